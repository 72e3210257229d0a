package daemon

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/daemon/nri"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// What mechanisms refuse is the caller's fault or the node's.
func TestKindsOfMechanisms(t *testing.T) {
	for _, c := range []struct {
		err, want error
		text      string
	}{
		{treeError(fmt.Errorf("x: %w", rootfs.ErrBadLayer)), kind.Invalid, "x: "},
		{treeError(fmt.Errorf("x: %w", rootfs.ErrNoDiff)), kind.State, "x: "},
		{treeError(errors.New("x")), kind.Unavailable, "x"},
		{sysctlError(fmt.Errorf("x: %w", network.ErrSysctl)), kind.Invalid, "config.linux.sysctls: x: "},
		{sysctlError(errors.New("x")), kind.Unavailable, "x"},
	} {
		if !errors.Is(c.err, c.want) || !strings.HasPrefix(c.err.Error(), c.text) {
			t.Errorf("%v: want %v, %q", c.err, c.want, c.text)
		}
	}
	if treeError(nil) != nil || sysctlError(nil) != nil {
		t.Error("no error became one")
	}
}

// The socket of plugins is the runtime's own: what a pod mounts never takes its place. Without
// one, nothing else is.
func TestOwnPaths(t *testing.T) {
	for _, c := range []struct {
		nri nri.Config
		own bool
	}{
		{nri.Config{Socket: "/run/nri/nri.sock"}, true},
		{nri.Config{Socket: "/run/nri/nri.sock", Disable: true}, false},
		{nri.Config{}, false},
	} {
		own := Config{Root: "/r", State: "/s", Address: "/a", NRI: c.nri}.ownPaths("/w")
		if slices.Contains(own, "/run/nri/nri.sock") != c.own || slices.Contains(own, "") {
			t.Errorf("%+v: %q", c.nri, own)
		}
	}
}
