package spec

import (
	"errors"
	"fmt"
)

// ErrInvalid is the kind of all errors that the caller's config causes.
var ErrInvalid = errors.New("invalid config")

// ErrUnsupported is the kind of all errors about well-formed requests that this
// runtime or this machine cannot fulfil.
var ErrUnsupported = errors.New("not supported")

// FieldError is a fault of one field. Its kind is ErrInvalid or ErrUnsupported.
type FieldError struct {
	Field   string // as in the CRI, with its path: config.linux.resources.cpu_shares
	Problem string
	Kind    error
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Problem }

// Unwrap gives the kind, for errors.Is.
func (e *FieldError) Unwrap() error { return e.Kind }

func invalid(field, format string, args ...any) error {
	return &FieldError{field, fmt.Sprintf(format, args...), ErrInvalid}
}

func unsupported(field, format string, args ...any) error {
	return &FieldError{field, fmt.Sprintf(format, args...), ErrUnsupported}
}
