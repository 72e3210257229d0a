package daemon

import (
	"errors"
	"fmt"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// The kinds of error, for errors.Is. Package cri maps each to a gRPC code.
var (
	ErrInvalid      = kind.Invalid
	ErrNotFound     = errors.New("not found")
	ErrExists       = errors.New("exists already")
	ErrState        = errors.New("wrong state")
	ErrUnavailable  = errors.New("unavailable")
	ErrUnsupported  = kind.Unsupported
	ErrUnauthorized = errors.New("not authorized")
	ErrRejected     = errors.New("rejected") // an image, by a verifier
	ErrClosing      = errors.New("shutting down")
)

// kindError gives an error a kind without changing its text.
type kindError struct {
	error
	kind error
}

func (e *kindError) Unwrap() []error { return []error{e.error, e.kind} }

// as gives err a kind. A nil err stays nil.
func as(kind, err error) error {
	if err == nil {
		return nil
	}
	return &kindError{err, kind}
}

// shimError gives the answers of a shim, and its silence, their kind.
func shimError(err error) error {
	if errors.Is(err, client.ErrUnreachable) {
		return as(ErrUnavailable, err)
	}
	switch {
	case errors.Is(err, kind.Invalid):
		return as(ErrInvalid, err)
	case errors.Is(err, kind.NotFound):
		return as(ErrNotFound, err)
	case errors.Is(err, kind.Exists):
		return as(ErrExists, err)
	case errors.Is(err, kind.State):
		return as(ErrState, err)
	}
	return err
}

func errorf(kind error, format string, args ...any) error {
	return &kindError{fmt.Errorf(format, args...), kind}
}
