// Package layers is the layering of the source tree as a test: which folder may
// import which, and why not the others. Read it downward:
//
//	cri -> daemon -> proto <- shim -> runc, reaper, pty
package layers

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/holdfast-cri/holdfast/"

// A folder may import the standard library and what is allowed here, directly.
// An entry that ends with /... stands for all below it as well.
var allowed = map[string][]string{
	"proto": {
		"github.com/containerd/ttrpc", "github.com/containerd/typeurl/v2",
		"github.com/opencontainers/runtime-spec/specs-go",
		"google.golang.org/protobuf/...", "golang.org/x/sys/unix", module + "proto/rundir",
	},
	"proto/client": {
		module + "proto/descriptor", module + "proto", module + "proto/kind", module + "proto/rundir",
		module + "proto/session", module + "pty",
		"github.com/containerd/ttrpc", "github.com/opencontainers/runtime-spec/specs-go",
		"google.golang.org/grpc/codes", "google.golang.org/grpc/status", "golang.org/x/sys/unix",
	},
	"proto/session":   {module + "proto/descriptor", "golang.org/x/sys/unix"},
	"proto/handshake": {"golang.org/x/sys/unix"},
	"proto/kind":      {"google.golang.org/grpc/codes", "google.golang.org/grpc/status"},
	"proto/record":    {},
	"proto/step":      {"golang.org/x/sys/unix"},
	"proto/tail":      {},
	"proto/rundir":    {module + "proto/record", "golang.org/x/sys/unix"},
	"proto/stream": {module + "proto/kind", module + "proto/record", module + "proto/rundir",
		"golang.org/x/sys/unix"},
	"reaper":           {module + "reaper/pidfd", "golang.org/x/sys/unix"},
	"reaper/group":     {module + "reaper/pidfd", "golang.org/x/sys/unix"},
	"reaper/pidfd":     {module + "proto/descriptor", "golang.org/x/sys/unix"},
	"pty":              {module + "proto/descriptor", "golang.org/x/sys/unix"},
	"proto/descriptor": {"golang.org/x/sys/unix"},
	"runc":             {module + "reaper/pidfd", module + "reaper/group", "golang.org/x/sys/unix"},
	"runc/cgroup":      {module + "proto/descriptor", module + "reaper/pidfd", "golang.org/x/sys/unix"},
	"shim": {
		module + "proto/...", module + "runc/...", module + "reaper/...", module + "pty",
		module + "shim/...",
		"github.com/containerd/ttrpc", "github.com/containerd/typeurl/v2",
		"github.com/opencontainers/runtime-spec/specs-go/...",
		"golang.org/x/sys/unix", "google.golang.org/protobuf/types/known/anypb",
	},
	"shim/process": {
		module + "proto/record", module + "proto/rundir", module + "proto/step", module + "pty", module + "reaper",
		module + "runc", module + "runc/cgroup",
		"github.com/opencontainers/runtime-spec/specs-go", "golang.org/x/sys/unix",
	},
	"shim/stdio":   {module + "proto/descriptor", module + "shim/logfile", "golang.org/x/sys/unix"},
	"shim/logfile": {"golang.org/x/sys/unix"},
	"shim/taskapi": {
		module + "proto", module + "proto/kind", module + "runc/cgroup", "github.com/containerd/ttrpc",
		"google.golang.org/protobuf/encoding/protowire", "google.golang.org/protobuf/reflect/protoreflect",
		"google.golang.org/protobuf/types/known/anypb", "google.golang.org/protobuf/types/known/timestamppb",
	},

	"daemon/beneath": {"golang.org/x/sys/unix"},
	"daemon/mounts":  {"golang.org/x/sys/unix"},
	"daemon/cdi": {
		module + "daemon/beneath", module + "proto/kind", "github.com/opencontainers/runtime-spec/specs-go",
		"tags.cncf.io/container-device-interface/pkg/cdi", "tags.cncf.io/container-device-interface/pkg/parser",
		"tags.cncf.io/container-device-interface/specs-go",
	},
	"daemon/metrics": {
		module + "daemon/records",
		"github.com/prometheus/client_golang/prometheus", "github.com/prometheus/client_golang/prometheus/collectors",
	},

	"cmd/holdfast-pause": {},
	"cmd/holdfast-shim": {
		module + "proto/...", module + "shim/...", "golang.org/x/sys/unix",
	},
	"cri/streaming": {
		module + "proto/descriptor", module + "proto/client", module + "proto/kind", module + "proto/rundir",
		module + "proto/session", module + "proto/step", module + "proto/stream",
		"github.com/gorilla/websocket", "github.com/moby/spdystream/spdy",
		"github.com/opencontainers/runtime-spec/specs-go",
		"golang.org/x/sys/unix", "k8s.io/cri-streaming/pkg/streaming/...", "k8s.io/streaming/pkg/httpstream/...",
		"k8s.io/utils/exec",
	},
	"cmd/holdfast-stream": {
		module + "cri/streaming", module + "daemon/network/netns", module + "proto/handshake", module + "proto/kind",
		module + "proto/step", module + "proto/stream", module + "proto/tail",
		"golang.org/x/sys/unix", "k8s.io/klog/v2",
	},
	"cmd/holdfastctl": {
		module + "proto/...", module + "daemon/audit", module + "daemon/beneath", module + "daemon/records",
		module + "daemon/network/netns",
		"github.com/opencontainers/runtime-spec/specs-go", "github.com/pelletier/go-toml/v2", "golang.org/x/sys/unix",
		"google.golang.org/grpc", "google.golang.org/grpc/codes", "google.golang.org/grpc/credentials/insecure",
		"google.golang.org/grpc/status", "k8s.io/cri-api/pkg/apis/runtime/v1", "k8s.io/cri-api/pkg/errors",
	},
}

// A ban holds for what a folder imports directly, or for all that it links.
type ban struct {
	folders []string // FOLDER/... stands for all below it as well
	path    string
	linked  bool // also through other packages
	why     string
}

var bans = []ban{
	{[]string{"shim/...", "cmd/holdfast-shim", "runc/...", "reaper/...", "pty", "proto/..."}, module + "daemon/...",
		true,
		"the shim outlives the daemon; both know only proto"},
	{[]string{"shim/...", "cmd/holdfast-shim", "runc/...", "reaper/...", "pty", "proto/...", "daemon/..."},
		module + "cri/...", true,
		"CRI is the top: what is below serves other callers too"},
	{[]string{"daemon/...", "cri/...", "runc", "reaper", "pty", "proto/...", "cmd/holdfastd", "cmd/holdfast-stream",
		"cmd/holdfastctl"},
		module + "shim/...", true,
		"the shim is a process of its own; whoever needs it speaks proto to it"},

	{[]string{"shim/...", "cmd/holdfast-shim"}, "google.golang.org/grpc", true,
		"a gRPC server doubles the memory of each container's shim (its codes and status are small)"},
	{[]string{"shim/...", "cmd/holdfast-shim"}, "net/http", true,
		"HTTP costs each shim memory; streaming has a program of its own"},
	{[]string{"shim/...", "cmd/holdfast-shim"}, "crypto/tls", true,
		"the shim is reached by a socket in a directory of root"},
	{[]string{"shim/...", "cmd/holdfast-shim"}, "k8s.io/...", true,
		"the shim keeps CRI messages without looking inside"},
	{[]string{"shim/...", "cmd/holdfast-shim", "runc"}, "github.com/opencontainers/runc/...", true,
		"libcontainer needs cgo and 1 MB of each shim; the OCI runtime is a program"},

	{[]string{"daemon/...", "cri/...", "cmd/..."}, module + "daemon/fake", true, "only tests play a machine"},
	{[]string{"daemon/image"}, "net/http", false, "what speaks HTTP is below it, in daemon/image/registry"},

	{[]string{"cri/streaming", "cmd/holdfast-stream"}, module + "daemon", true, "sessions go on without the daemon"},
	{[]string{"cri/..."}, module + "runc", false, "only the daemon's parts touch the machine"},
	{[]string{"daemon/...", "proto/...", "runc", "reaper", "pty"}, "google.golang.org/grpc", false,
		"mechanism does not know its transport: cri maps errors (codes and status are allowed for ttrpc)"},
	{[]string{"tests/harness/..."}, module + "...", false,
		"the tests see a node as the kubelet does, through its programs"},
}

// What a folder of the daemon, and what is above it, may import of the module. A
// mechanism imports no other one: what it asks of another it declares as a small
// interface, and daemon joins the two. Read it downward:
//
//	daemon -> pods -> containers -> leaves and plain data
var ofTheModule = map[string][]string{
	"cri":    {"daemon", "daemon/metrics", "proto/kind"},
	"daemon": {"daemon/...", "proto/kind", "proto/record", "proto/rundir", "proto/stream", "runc/cgroup"},

	"daemon/pods": {
		"daemon/beneath", "daemon/checkpoint", "daemon/claims", "daemon/containers", "daemon/records", "daemon/runtimes",
		"daemon/spec", "daemon/state", "proto/kind", "proto/rundir", "proto/step", "proto/stream",
	},
	"daemon/containers": {
		"daemon/checkpoint", "daemon/claims", "daemon/records", "daemon/runtimes", "daemon/spec", "daemon/state",
		"daemon/beneath", "proto/client", "proto/kind", "proto/record", "proto/rundir", "proto/step", "proto/stream",
	},

	// The auditor joins the mechanisms as daemon does, and reads what they have written.
	"daemon/audit": {
		"daemon/beneath", "daemon/image", "daemon/journal", "daemon/mounts", "daemon/network/netns", "daemon/placement",
		"daemon/records", "daemon/rootfs", "daemon/state", "proto/rundir", "proto/stream", "reaper/pidfd", "runc/cgroup",
	},
	// What a checkpoint is on a disk; it does nothing to a container.
	"daemon/checkpoint": {"daemon/beneath", "daemon/records", "proto/descriptor", "proto/kind", "reaper/group"},

	"daemon/claims":    {"proto/kind", "proto/step"},
	"daemon/events":    {"proto/kind", "proto/step"},
	"daemon/journal":   {"daemon/records"},
	"daemon/records":   {"proto/kind", "proto/record", "proto/rundir"},
	"daemon/runtimes":  {"proto/kind", "runc"},
	"daemon/state":     {"daemon/mounts", "proto/record"},
	"daemon/spec":      {"daemon/beneath", "daemon/mounts", "proto/kind", "runc/cgroup"},
	"daemon/placement": {"runc/cgroup"},
	"daemon/shims":     {"daemon/spawn", "proto/client", "proto/rundir", "reaper/pidfd"},
	"daemon/spawn":     {"proto/step"},
	"daemon/stats":     {"daemon/network/netns", "runc/cgroup"},
	"daemon/streams": {"daemon/spawn", "proto/kind", "proto/rundir", "proto/step", "proto/stream",
		"reaper/pidfd"},
	"daemon/rootfs": {"daemon/beneath", "daemon/dirs", "daemon/mounts", "proto/kind", "proto/record", "proto/rundir"},
	"daemon/image": {"daemon/dirs", "daemon/records", "daemon/image/registry", "proto/kind", "proto/record",
		"proto/rundir", "reaper/group"},
	"daemon/image/registry": {"daemon/beneath", "proto/kind"},
	"daemon/network": {
		"daemon/network/...", "daemon/records", "daemon/beneath", "proto/kind", "proto/record",
		"reaper/group", "reaper/pidfd",
	},
	"daemon/network/netns": {},

	"daemon/fake": {
		"daemon/claims", "daemon/containers", "daemon/events", "daemon/pods", "daemon/records", "daemon/runtimes",
		"daemon/shims", "daemon/spec", "daemon/state", "proto", "proto/kind", "proto/record", "proto/rundir",
		"proto/stream", "reaper/pidfd", "runc", "tests/must",
	},

	"daemon/cdi":     {"daemon/beneath", "proto/kind"},
	"daemon/nri":     {"daemon/records", "proto/kind"},
	"daemon/metrics": {"daemon/records"},
	"daemon/beneath": {},
	"daemon/dirs":    {},
	"daemon/mounts":  {},

	"cmd/holdfastd": {"cri", "daemon", "daemon/...", "proto/..."},
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Standard   bool
}

func load(t *testing.T) map[string]pkg {
	t.Helper()
	// A path, as a pattern of names is looked for in every module there is.
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Imports,Deps,Standard",
		"../../...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	all := map[string]pkg{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[p.ImportPath] = p
	}
}

// matches says whether a path is meant by an entry, which may end with /... .
func matches(entry, p string) bool {
	base, tree := strings.CutSuffix(entry, "...")
	if !tree {
		return p == entry
	}
	return strings.HasPrefix(p, base) || p == strings.TrimSuffix(base, "/")
}

func folder(p string) (string, bool) { return strings.CutPrefix(p, module) }

// checkRows holds the imports that a table is about against its rows. what names an
// import as the table does; the table is not about those without a name.
func checkRows(t *testing.T, table map[string][]string, what func(pkg) (string, bool)) {
	t.Helper()
	all := load(t)
	for name, list := range table {
		p, ok := all[module+name]
		if !ok {
			t.Errorf("the table has a row for %s, and there is no such folder", name)
		}
		for _, path := range p.Imports {
			i, ours := what(all[path])
			if ours && !slices.ContainsFunc(list, func(a string) bool { return matches(a, i) }) {
				t.Errorf("%s imports %s: of such it may import %v", name, i, list)
			}
		}
	}
}

func TestAllowed(t *testing.T) {
	checkRows(t, allowed, func(p pkg) (string, bool) { return p.ImportPath, !p.Standard })
}

func TestOfTheModule(t *testing.T) {
	checkRows(t, ofTheModule, func(p pkg) (string, bool) { return folder(p.ImportPath) })
}

// No folder comes into being without a row.
func TestEveryFolderHasARow(t *testing.T) {
	for _, p := range load(t) {
		name, ours := folder(p.ImportPath)
		if !ours || strings.HasPrefix(name, "tests") || strings.HasPrefix(name, "hack") {
			continue
		}
		if allowed[name] == nil && ofTheModule[name] == nil {
			t.Errorf("%s has no row in these tables: say what it may import", name)
		}
	}
}

func TestBans(t *testing.T) {
	all := load(t)
	for _, b := range bans {
		used := false
		for _, p := range all {
			name, ours := folder(p.ImportPath)
			if !ours || !slices.ContainsFunc(b.folders, func(f string) bool { return matches(f, name) }) {
				continue
			}
			used = true
			paths := p.Imports
			if b.linked {
				paths = p.Deps
			}
			for _, i := range paths {
				if !matches(b.path, i) ||
					matches("tests/harness/...", name) && strings.HasPrefix(i, module+"tests/harness") {
					continue
				}
				t.Errorf("%s imports %s: %s%s", name, i, b.why, through(all, p.ImportPath, i))
			}
		}
		if !used {
			t.Errorf("no folder is meant by the ban of %s in %v", b.path, b.folders)
		}
	}
}

// through says by which way a package links another, if not directly.
func through(all map[string]pkg, from, to string) string {
	parent := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		for _, i := range all[queue[0]].Imports {
			if _, seen := parent[i]; seen {
				continue
			}
			parent[i] = queue[0]
			queue = append(queue, i)
		}
	}
	var way []string
	for p := parent[to]; p != "" && p != from; p = parent[p] {
		way = append(way, p)
	}
	if len(way) == 0 {
		return ""
	}
	slices.Reverse(way)
	return " (through " + strings.Join(way, ", ") + ")"
}
