package crash

import (
	"fmt"
	"maps"
	"os"
	"path"
	"strings"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// disk follows what a power cut could take of what lies below ROOT, by the system calls that
// are made: the content of a file until its fsync(2), a name until that of its directory.
type disk struct {
	trees   *strings.Replacer
	places  *strings.Replacer // the other way round
	content map[string]bool   // files whose content is not on the disk
	names   map[string]bool   // what has a name that is not
	faults  []string
}

func newDisk(n *harness.Node) *disk {
	return &disk{
		trees:   strings.NewReplacer(n.State+"/", "STATE/", n.Root+"/", "ROOT/"),
		places:  strings.NewReplacer("STATE/", n.State+"/", "ROOT/", n.Root+"/"),
		content: map[string]bool{},
		names:   map[string]bool{},
	}
}

// onDisk are the calls that need something to be on the disk before them, as docs/files.md and
// docs/images.md have it.
var onDisk = []struct {
	call, path string // its last one
	needs      string // with ID for the object of the path; empty: the content of what is renamed
	why        string
}{
	{"rename", "ROOT/images/blobs/*/ID", "", "the name of a blob says that it is whole"},
	{"rename", "ROOT/images/refs/ID.json", "", "a reference is the truth"},
	{"rename", "ROOT/images/refs/ID.json", "ROOT/images/blobs/*/*", "a reference never names half a blob"},
	{"unlink", "ROOT/images/pending/ID.json", "ROOT/images/refs/*", "a pull that was answered is there"},
	{"create", "ROOT/layers/*/ID/synced", "ROOT/layers/*/ID", "the mark says that the layer is on the disk"},
	{"create", "ROOT/cni/results/*ID*", "ROOT/pods/ID/record.json", "it alone tells of an address that is taken"},
	{"rename", "ROOT/containers/ID/exit.json", "", "the kubelet asks for the exit code after the reboot"},
	{"unlink", "STATE/containers/ID/shim.sock", "ROOT/containers/ID/exit.json", "a shim makes it so before it ends"},
}

// note takes a call that is about to be made.
func (d *disk) note(call string, paths []string) {
	for i := range paths {
		paths[i] = d.trees.Replace(paths[i])
	}
	last := paths[len(paths)-1]
	d.check(call, paths[0], last)
	switch call {
	case "create", "write", "truncate":
		d.content[last] = true
	case "rename":
		d.names[last] = true
		delete(d.content, last)
		if d.content[paths[0]] {
			d.content[last] = true
		}
		delete(d.content, paths[0])
		delete(d.names, paths[0])
	case "unlink":
		delete(d.content, last)
		delete(d.names, last)
	case "fsync":
		delete(d.content, last)
		maps.DeleteFunc(d.names, func(name string, _ bool) bool { return path.Dir(name) == last })
	case "syncfs":
		clear(d.content)
		clear(d.names)
	}
}

// check compares a call with the rules.
func (d *disk) check(call, from, to string) {
	id := idPattern.FindString(to)
	if id == "" {
		return
	}
	like := func(pattern, name string) bool {
		ok, err := path.Match(strings.ReplaceAll(pattern, "ID", id), name)
		return ok && err == nil
	}
	for _, rule := range onDisk {
		if rule.call != call || !like(rule.path, to) {
			continue
		}
		needed := func(name string) bool {
			if rule.needs == "" && name != from || rule.needs != "" && !like(rule.needs, name) {
				return false
			}
			// The call that made it may have been let through to a process that was killed first.
			_, err := os.Lstat(d.places.Replace(name))
			return err == nil
		}
		for what, missing := range map[string]map[string]bool{"content": d.content, "name": d.names} {
			for name := range missing {
				if needed(name) {
					d.faults = append(d.faults,
						fmt.Sprintf("before %s %s: the %s of %s is not on the disk; %s", call, to, what, name,
							rule.why))
				}
			}
		}
	}
}
