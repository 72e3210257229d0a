package spec

import (
	"fmt"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// FieldError is a fault of one field. It is of the kind kind.Invalid if the
// caller's config causes it, and of kind.Unsupported if a well-formed request is
// one that this runtime or this machine cannot fulfil.
type FieldError struct {
	Field   string // as in the CRI, with its path: config.linux.resources.cpu_shares
	Problem string
	Kind    error
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Problem }

// Unwrap gives the kind, for errors.Is.
func (e *FieldError) Unwrap() error { return e.Kind }

func invalid(field, format string, args ...any) error {
	return fieldError(kind.Invalid, field, format, args...)
}

func unsupported(field, format string, args ...any) error {
	return fieldError(kind.Unsupported, field, format, args...)
}

// Errors repeat what they were given, which may be a megabyte, and are logged.
const (
	longestField   = 256
	longestProblem = 1024
)

func fieldError(k error, field, format string, args ...any) error {
	problem := fmt.Sprintf(format, args...)
	return &FieldError{Field: shorten(field, longestField), Problem: shorten(problem, longestProblem), Kind: k}
}

// shorten leaves out the middle of a text that is longer than max bytes.
func shorten(s string, max int) string {
	if len(s) <= max {
		return s
	}
	return fmt.Sprintf("%s ... (%d bytes) ... %s", s[:max/2], len(s), s[len(s)-max/2:])
}
