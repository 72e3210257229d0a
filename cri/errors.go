package cri

import (
	"context"
	"errors"
	"regexp"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

const (
	pullImage       = runtimeapi.ImageService_PullImage_FullMethodName
	createContainer = runtimeapi.RuntimeService_CreateContainer_FullMethodName
)

// createErrors are names that the kubelet and people look for at the beginning of the text
// of an error of CreateContainer, by the field that it is about.
var createErrors = []struct {
	field *regexp.Regexp
	code  codes.Code // OK: any
	name  error
}{
	{regexp.MustCompile(`^config\.mounts\[\d+\]\.image`), codes.OK, crierrors.ErrImageVolumeMountFailed},
	{
		regexp.MustCompile(`^config\.mounts\[\d+\]\.recursive_read_only`),
		codes.Unimplemented,
		crierrors.ErrRROUnsupported,
	},
}

// toStatus gives the error of a call its code. The kubelet is told that a registry
// is down or an image not to be trusted by a name at the beginning of the text,
// which it sees there only if the code is Unknown.
func toStatus(method string, err error) error {
	given := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	switch {
	case method == pullImage && errors.Is(err, kind.Rejected):
		return status.Errorf(codes.Unknown, "%v: %v", crierrors.ErrSignatureValidationFailed, kind.Shorten(err.Error()))
	case method == pullImage && errors.Is(err, kind.Unavailable) && !given:
		return status.Errorf(codes.Unknown, "%v: %v", crierrors.ErrRegistryUnavailable, kind.Shorten(err.Error()))
	}
	err = kind.ToStatus(err)
	if method != createContainer || err == nil {
		return err
	}
	s := status.Convert(err)
	for _, c := range createErrors {
		if c.field.MatchString(s.Message()) && (c.code == codes.OK || c.code == s.Code()) {
			return status.Errorf(s.Code(), "%v: %s", c.name, s.Message())
		}
	}
	return err
}
