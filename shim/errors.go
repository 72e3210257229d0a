package shim

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/shim/logfile"
)

// What a call can fail with. toStatus gives each its code on the wire.
var (
	ErrInvalid  = errors.New("invalid request")                       // InvalidArgument
	ErrNotFound = errors.New("no such container in this shim")        // NotFound
	ErrExists   = errors.New("the container exists")                  // AlreadyExists
	ErrState    = errors.New("not possible in the container's phase") // FailedPrecondition
	ErrEnding   = errors.New("the shim ends because no Create came")  // Unavailable
	ErrNoLog    = errors.New("the container has no log")              // FailedPrecondition
	ErrNoPty    = errors.New("the container has no terminal")         // FailedPrecondition
	ErrDeleted  = errors.New("deleted while it was created")          // Aborted
)

var statusCodes = []struct {
	err  error
	code codes.Code
}{
	{ErrInvalid, codes.InvalidArgument},
	{ErrNotFound, codes.NotFound},
	{ErrExists, codes.AlreadyExists},
	{ErrState, codes.FailedPrecondition},
	{ErrNoLog, codes.FailedPrecondition},
	{ErrNoPty, codes.FailedPrecondition},
	{ErrEnding, codes.Unavailable},
	{ErrDeleted, codes.Aborted},
	{logfile.ErrPath, codes.InvalidArgument},
	{logfile.ErrNotRegular, codes.InvalidArgument},
	{unix.ELOOP, codes.InvalidArgument}, // a symbolic link in a path of the request
	{unix.ENAMETOOLONG, codes.InvalidArgument},
	{runc.ErrNotStartable, codes.FailedPrecondition},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// toStatus is the one place where an error becomes a code.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	for _, m := range statusCodes {
		if errors.Is(err, m.err) {
			return status.Error(m.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}
