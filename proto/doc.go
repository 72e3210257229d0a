// Package proto is what daemon and shim agreed: the messages of shim.proto and
// their ttrpc stubs. Package rundir holds the same agreement as files.
package proto

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

// ProtocolMin and ProtocolMax are the versions of the contract that this build
// speaks. A change that an older peer would misread raises ProtocolMax; a shim
// outlives several daemons, so ProtocolMin trails it by two releases.
const (
	ProtocolMin = 1
	ProtocolMax = 1
)

// The type URLs are the ones that containerd's tools register, so that a
// generic ttrpc client can decode a spec on the wire.
func init() {
	const prefix = "types.containerd.io"
	typeurl.Register(&specs.Spec{}, prefix, "opencontainers/runtime-spec", "1", "Spec")
	typeurl.Register(&specs.Process{}, prefix, "opencontainers/runtime-spec", "1", "Process")
}

// MarshalAny wraps an OCI Spec or Process for the wire: JSON under a type URL.
func MarshalAny[T specs.Spec | specs.Process](v *T) (*anypb.Any, error) {
	url, err := typeurl.TypeURL(v)
	if err != nil {
		return nil, fmt.Errorf("cannot encode %T: %w", v, err)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // six bytes for one, which nobody needs here
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("cannot encode %T: %w", v, err)
	}
	return &anypb.Any{TypeUrl: url, Value: bytes.TrimSuffix(b.Bytes(), []byte("\n"))}, nil
}

// UnmarshalAny is the reverse of MarshalAny. An Any of another type is an error.
func UnmarshalAny[T specs.Spec | specs.Process](a *anypb.Any) (*T, error) {
	if a == nil {
		return nil, fmt.Errorf("cannot decode %T: it is missing", *new(T))
	}
	v := new(T)
	if err := typeurl.UnmarshalTo(a, v); err != nil {
		return nil, fmt.Errorf("cannot decode %T from %q: %w", *v, a.GetTypeUrl(), err)
	}
	return v, nil
}
