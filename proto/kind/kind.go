// Package kind is the kinds of error that cross a process boundary: the shim
// answers with them, the daemon passes them on, the CRI reports them. Here is
// the one place where a kind becomes a gRPC code, and a code a kind.
package kind

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The kinds, for errors.Is.
var (
	Invalid      = errors.New("invalid request")
	NotFound     = errors.New("not found")
	Exists       = errors.New("exists already")
	State        = errors.New("wrong state")
	Aborted      = errors.New("aborted")
	Unavailable  = errors.New("unavailable")
	Unsupported  = errors.New("not supported")
	Unauthorized = errors.New("not authorized")
	Rejected     = errors.New("rejected") // an image, by a verifier
	Exhausted    = errors.New("no room")
	Timeout      = errors.New("timed out")
	Closing      = errors.New("shutting down")
)

// table is searched from the top: an error may be of several kinds.
var table = []struct {
	kind error
	code codes.Code
}{
	{Closing, codes.Unavailable},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{Timeout, codes.DeadlineExceeded},
	{syscall.ENOSPC, codes.ResourceExhausted},
	{syscall.EDQUOT, codes.ResourceExhausted},
	{Exhausted, codes.ResourceExhausted},
	{Invalid, codes.InvalidArgument},
	{NotFound, codes.NotFound},
	{Exists, codes.AlreadyExists},
	{State, codes.FailedPrecondition},
	{Aborted, codes.Aborted},
	{Unauthorized, codes.PermissionDenied},
	{Rejected, codes.PermissionDenied},
	{Unsupported, codes.Unimplemented},
	{Unavailable, codes.Unavailable},
}

// ToStatus gives err its gRPC code: Unknown if it is of no kind. Its text is bounded.
// An error that is a status already stays as it is.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	for _, k := range table {
		if errors.Is(err, k.kind) {
			return status.Error(k.code, Shorten(err.Error()))
		}
	}
	return status.Error(codes.Unknown, Shorten(err.Error()))
}

// FromStatus gives an error that came over the wire its kind. The text stays
// the sender's. An error of a code without a kind is returned without one.
func FromStatus(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	text := errors.New(s.Message())
	for _, k := range table {
		// What a full disk or a shutdown is called is for the process that met it.
		_, errno := k.kind.(syscall.Errno)
		if k.code == s.Code() && !errno && k.kind != Closing {
			return As(k.kind, text)
		}
	}
	return text
}

// kindError gives an error a kind without changing its text.
type kindError struct {
	error
	kind error
}

func (e *kindError) Unwrap() []error { return []error{e.error, e.kind} }

// Made is told of each error that gets a kind, by the function that gives it. It is for
// tests, which set it before anything runs (tests/refusals).
var Made func(error)

func made(err error) error {
	if Made != nil {
		Made(err)
	}
	return err
}

// As gives err a kind. A nil err stays nil.
func As(kind, err error) error {
	if err == nil {
		return nil
	}
	return made(&kindError{err, kind})
}

// Errorf makes an error of a kind. The kind does not show in the text.
func Errorf(kind error, format string, args ...any) error {
	return made(&kindError{fmt.Errorf(format, args...), kind})
}

// maxText bounds what a text may have, in bytes: errors repeat what they were given,
// and a name in an image may have a megabyte.
const maxText = 4 << 10

// Shorten leaves out the middle of a text that is longer than anybody reads.
func Shorten(text string) string {
	if len(text) <= maxText {
		return text
	}
	const half = maxText / 2
	return strings.ToValidUTF8(fmt.Sprintf("%s [%d bytes left out] %s",
		text[:half], len(text)-2*half, text[len(text)-half:]), "")
}

// ShortenAttr is slog.HandlerOptions.ReplaceAttr for a log whose lines are bounded.
func ShortenAttr(_ []string, a slog.Attr) slog.Attr {
	if k := a.Value.Kind(); k != slog.KindString && k != slog.KindAny {
		return a
	}
	if text := a.Value.String(); len(text) > maxText {
		a.Value = slog.StringValue(Shorten(text))
	}
	return a
}
