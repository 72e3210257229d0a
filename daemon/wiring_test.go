package daemon

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/daemon/network"
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
