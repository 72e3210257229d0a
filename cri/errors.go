package cri

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

const pullImage = runtimeapi.ImageService_PullImage_FullMethodName

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
	return kind.ToStatus(err)
}
