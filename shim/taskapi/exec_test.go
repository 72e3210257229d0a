package taskapi

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// ended is an exec that has ended.
type ended struct{ closed chan struct{} }

func (ended) Pid() int                    { return 1 }
func (ended) Kill(uint32, bool) error     { return nil }
func (ended) Resize(uint16, uint16) error { return nil }
func (ended) CloseStdin()                 {}
func (ended) Exit() (int, time.Time)      { return 0, time.Time{} }
func (e ended) Close()                    { close(e.closed) }

func (ended) Exited() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

func TestExecsAreBounded(t *testing.T) {
	var e execs
	add := func(id string, spec int) error {
		return e.add(&exec{
			id:      id,
			deleted: make(chan struct{}),
			options: ExecOptions{Process: &anypb.Any{Value: make([]byte, spec)}},
		})
	}
	if err := add("large", maxSpecs+1); !errors.Is(err, kind.Exhausted) {
		t.Errorf("a large spec: %v", err)
	}
	for i := range maxExecs {
		must.Succeed(t, add(fmt.Sprint(i), maxSpecs/maxExecs))
	}
	if err := add("one more", 0); !errors.Is(err, kind.Exhausted) {
		t.Errorf("one too many: %v", err)
	}
	old := ended{make(chan struct{})}
	e.all[3].running = old
	if err := add("3", 0); !errors.Is(err, kind.Exists) {
		t.Errorf("the same id: %v", err)
	}
	if err := add("one more", 0); err != nil || len(e.all) != maxExecs || e.indexLocked("3") >= 0 {
		t.Errorf("instead of one that has ended: %v, %d execs", err, len(e.all))
	}
	<-old.closed
	for len(e.all) > 0 {
		e.removeLocked(0)
	}
	if e.specs != 0 {
		t.Errorf("%d bytes of no specs", e.specs)
	}
	// Whatever else it is that a client has chosen.
	large := strings.Repeat("x", maxSpecs/2)
	check := func(name string, process *anypb.Any, fifo string) {
		e := execs{}
		for i := range 3 {
			x := exec{id: fmt.Sprint(i), options: ExecOptions{Process: process, FIFOs: [3]string{fifo, "", fifo}}}
			if err := e.add(&x); (err == nil) != (i == 0) {
				t.Errorf("%s: exec %d of 3: %v", name, i, err)
			}
		}
	}
	check("types", &anypb.Any{TypeUrl: large + "x"}, "")
	check("FIFOs", &anypb.Any{}, large)
}
