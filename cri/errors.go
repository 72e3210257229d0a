package cri

import (
	"context"
	"errors"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/holdfast-cri/holdfast/daemon"
)

// toStatus is the one place where errors become gRPC codes.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	code := codes.Unknown
	for _, k := range []struct {
		kind error
		code codes.Code
	}{
		{daemon.ErrClosing, codes.Unavailable},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{daemon.ErrTimeout, codes.DeadlineExceeded},
		{syscall.ENOSPC, codes.ResourceExhausted},
		{syscall.EDQUOT, codes.ResourceExhausted},
		{daemon.ErrInvalid, codes.InvalidArgument},
		{daemon.ErrNotFound, codes.NotFound},
		{daemon.ErrExists, codes.AlreadyExists},
		{daemon.ErrState, codes.FailedPrecondition},
		{daemon.ErrUnauthorized, codes.PermissionDenied},
		{daemon.ErrRejected, codes.PermissionDenied},
		{daemon.ErrUnsupported, codes.Unimplemented},
		{daemon.ErrUnavailable, codes.Unavailable},
	} {
		if errors.Is(err, k.kind) {
			code = k.code
			break
		}
	}
	return status.Error(code, err.Error())
}

// pullStatus also tells the kubelet that a registry is down or an image not to
// be trusted. The kubelet looks for the names at the begin of the text, which
// it sees there only if the code is Unknown.
func pullStatus(err error) error {
	if errors.Is(err, daemon.ErrRejected) {
		return status.Errorf(codes.Unknown, "%v: %v", crierrors.ErrSignatureValidationFailed, err)
	}
	if errors.Is(err, daemon.ErrUnavailable) && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return status.Errorf(codes.Unknown, "%v: %v", crierrors.ErrRegistryUnavailable, err)
	}
	return toStatus(err)
}

// invalid is an InvalidArgument that names the field.
func invalid(field, problem string) error {
	return status.Errorf(codes.InvalidArgument, "%s: %s", field, problem)
}
