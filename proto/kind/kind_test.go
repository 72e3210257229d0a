package kind

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What one process answers with must be of the same kind in another.
func TestThereAndBack(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
		back error
	}{
		{Errorf(Invalid, "cmd: is empty"), codes.InvalidArgument, Invalid},
		{As(NotFound, errors.New("no container")), codes.NotFound, NotFound},
		{fmt.Errorf("cannot start: %w", State), codes.FailedPrecondition, State},
		{As(Unavailable, fmt.Errorf("no answer: %w", context.DeadlineExceeded)), codes.DeadlineExceeded, context.DeadlineExceeded},
		{Errorf(Closing, "the daemon ends"), codes.Unavailable, Unavailable},
		{Errorf(Exists, "another config"), codes.AlreadyExists, Exists},
		{Errorf(Aborted, "deleted"), codes.Aborted, Aborted},
		{As(Invalid, fmt.Errorf("cannot write: %w", syscall.ENOSPC)), codes.ResourceExhausted, nil},
		{errors.New("no kind"), codes.Unknown, nil},
	} {
		wire := ToStatus(c.err)
		back := FromStatus(wire)
		if status.Code(wire) != c.code || back.Error() != c.err.Error() {
			t.Errorf("%v is %v, want %s; back: %v", c.err, wire, c.code, back)
		}
		for _, k := range []error{Invalid, NotFound, State, Unavailable, Exists, Aborted, Closing, context.DeadlineExceeded, syscall.ENOSPC} {
			if errors.Is(back, k) != (k == c.back) {
				t.Errorf("%v came back as %v", c.err, k)
			}
		}
	}
	if ToStatus(nil) != nil || FromStatus(nil) != nil || As(Invalid, nil) != nil {
		t.Error("no error became one")
	}
	if s := status.Error(codes.DataLoss, "x"); ToStatus(s) != s {
		t.Error("a status was changed")
	}
}
