package containers

import (
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// A request is refused where it lets the processes of a checkpoint do less than they can, and
// never where it is the one that they were made by.
func TestExceeds(t *testing.T) {
	caps := func(names ...string) *specs.LinuxCapabilities {
		return &specs.LinuxCapabilities{Bounding: names, Permitted: names, Effective: names}
	}
	inherits := caps("A", "B")
	inherits.Inheritable = []string{"A", "B"}
	ambient := caps("A")
	ambient.Ambient = []string{"A"}
	ordinary := specs.Process{User: specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{9}}, Capabilities: caps("A")}
	root := specs.Process{Capabilities: caps("A", "B")}
	for name, c := range map[string]struct {
		was, now specs.Process
		field    string // empty: it is restored
	}{
		"the same":           {ordinary, ordinary, ""},
		"the same, root":     {root, root, ""},
		"an image's user":    {ordinary, root, ""},
		"of another runtime": {specs.Process{Capabilities: inherits}, root, ""},
		"of root":            {root, ordinary, "run_as_user"},
		"a group":            {ordinary, specs.Process{User: specs.User{UID: 7}}, "run_as_group"},
		"more groups": {ordinary, specs.Process{User: specs.User{UID: 7, GID: 8}, Capabilities: caps("A")},
			"supplemental_groups"},
		"more capabilities": {root, specs.Process{Capabilities: caps("A")}, "capabilities"},
		"inheritable":       {specs.Process{Capabilities: inherits}, specs.Process{Capabilities: caps("A")}, "capabilities"},
		"ambient":           {specs.Process{Capabilities: ambient}, root, "capabilities"},
		"no_new_privs":      {root, specs.Process{Capabilities: caps("A", "B"), NoNewPrivileges: true}, "no_new_privs"},
	} {
		info := &checkpoint.Info{Spec: specs.Spec{Process: &c.was, Linux: &specs.Linux{}}}
		err := (&origin{info: info}).exceeds(&specs.Spec{Process: &c.now, Linux: &specs.Linux{}})
		if c.field == "" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		named := err != nil && strings.Contains(err.Error(), "security_context."+c.field+":")
		if c.field != "" && (!errors.Is(err, kind.Invalid) || !named) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
