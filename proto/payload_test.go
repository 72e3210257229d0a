package proto

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// A request of any size arrives as it was, and a small one needs no file.
func TestPayload(t *testing.T) {
	small := &CreateRequest{Id: "x", Spec: &anypb.Any{Value: []byte("{}")}}
	if f, err := Pack(small); f != nil || err != nil {
		t.Errorf("small: %v, %v", f, err)
	}
	want := &CreateRequest{Id: "x", Spec: &anypb.Any{Value: make([]byte, 5<<20)}}
	f, err := Pack(want)
	must.Succeed(t, err)
	defer f.Close()
	got := &CreateRequest{Id: "x", PayloadPath: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())}
	if err := Unpack(got); err != nil || !proto.Equal(got, want) {
		t.Errorf("%v, and they are equal: %v", err, proto.Equal(got, want))
	}
	if f, err := Pack(&CreateRequest{Spec: &anypb.Any{Value: make([]byte, maxPayload+1)}}); err == nil {
		t.Errorf("too large: %v", f)
	}
	for _, path := range []string{"/no/such/file", "/dev/zero", "/proc/self", t.TempDir()} {
		if err := Unpack(&CreateRequest{PayloadPath: path}); err == nil {
			t.Errorf("read %s", path)
		}
	}
	for _, whole := range []any{&CreateRequest{Id: "x"}, &StateRequest{}, nil} {
		if err := Unpack(whole); err != nil {
			t.Error(err)
		}
	}
}

// Text is not made longer on its way.
func TestMarshalAnyIsPlain(t *testing.T) {
	text := strings.Repeat("<&>", 1000)
	a, err := MarshalAny(&specs.Process{Args: []string{text}})
	if err != nil || len(a.Value) > len(text)+200 {
		t.Errorf("%d bytes, %v", len(a.GetValue()), err)
	}
	p, err := UnmarshalAny[specs.Process](a)
	if err != nil || p.Args[0] != text {
		t.Errorf("%v", err)
	}
}
