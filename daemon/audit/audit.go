// Package audit compares a machine with the records: it finds every shim, process, mount,
// namespace, cgroup and file that Holdfast has, or may have left, and says whose it is and
// why it is there, or that it has no owner. It needs no daemon, and asks none: what the
// records and the kernel say is compared, so that what a daemon has forgotten is found.
//
// The machine goes on meanwhile. What is there is looked at first and the records after
// that, because everything is on record before it is taken; and what has no owner has to
// have none in a second look as well, as the same process, mount or file.
package audit

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"
)

// Kind is what a thing is.
type Kind string

// The kinds, in the order in which they are listed and taken away: a process uses mounts,
// and a mount keeps a directory.
const (
	Daemon     Kind = "daemon"
	Shim       Kind = "shim"
	Process    Kind = "process"
	Mount      Kind = "mount"
	Namespace  Kind = "namespace"
	Veth       Kind = "veth"
	Lease      Kind = "lease" // of an IP address
	Cgroup     Kind = "cgroup"
	Token      Kind = "token" // of a session
	Socket     Kind = "socket"
	FIFO       Kind = "fifo"
	Directory  Kind = "directory"
	File       Kind = "file"
	Log        Kind = "log"
	Layer      Kind = "layer"
	Blob       Kind = "blob"
	Download   Kind = "download" // begun, or of a pull that was cut short
	Record     Kind = "record"
	Quarantine Kind = "quarantine"
)

var order = []Kind{
	Daemon, Shim, Process, Mount, Namespace, Veth, Lease, Cgroup, Token, Socket, FIFO, Directory, File, Log, Layer,
	Blob, Download, Record, Quarantine,
}

// Thing is something on the machine.
type Thing struct {
	Kind  Kind   `json:"kind"`
	Name  string `json:"name"`            // a path; of a process its pid and command line
	Owner string `json:"owner,omitempty"` // empty: none
	Why   string `json:"why"`             // it is there, or has no owner
	// Remedy is what is to be done about one without an owner.
	Remedy string `json:"remedy,omitempty"`
	// Doubt says that its owner cannot be told, because a record does not read.
	Doubt bool `json:"doubt,omitempty"`

	same string // differs between two things of one name, one after the other
	fix  *fix   // nil: not for this package to take away
}

// Ownerless says whether it is known to have no owner.
func (t *Thing) Ownerless() bool { return t.Owner == "" && !t.Doubt }

func (t *Thing) key() string { return string(t.Kind) + "\x00" + t.Name + "\x00" + t.same }

// Options say where to look. Paths are absolute.
type Options struct {
	Root, State string
	Address     string // of the CRI
	CNIConfDir  string // empty: only the networks of pods are known
	NRISocket   string // empty: none
	// Pause is between two looks; 0: a second.
	Pause time.Duration
}

// Report is what was found.
type Report struct {
	DaemonRuns bool    `json:"daemonRuns"`
	Things     []Thing `json:"things"`
	// Unknown is what could not be looked at, or does not read.
	Unknown []string `json:"unknown,omitempty"`
}

// Ownerless are the things without an owner.
func (r *Report) Ownerless() (list []Thing) {
	for _, t := range r.Things {
		if t.Ownerless() {
			list = append(list, t)
		}
	}
	return list
}

// maxLooks bounds the looks at a machine on which things come and go all the time.
const maxLooks = 5

// Look looks at the machine, and looks again if something has no owner.
func Look(ctx context.Context, o Options) (Report, error) {
	o, err := o.resolved()
	if err != nil {
		return Report{}, err
	}
	r, ownerless := takeLook(o).report()
	for n := 1; n < maxLooks && len(ownerless) > 0; n++ {
		select {
		case <-time.After(cmp.Or(o.Pause, time.Second)):
		case <-ctx.Done():
			return r, ctx.Err()
		}
		before := ownerless
		r, ownerless = takeLook(o).report()
		fresh := 0
		for i := range r.Things {
			if t := &r.Things[i]; t.Ownerless() && !before[t.key()] {
				fresh++
			}
		}
		if fresh == 0 {
			return r, nil
		}
		if n == maxLooks-1 {
			r.excuse(before)
		}
	}
	return r, nil
}

// excuse takes what was not seen without an owner before for something in motion.
func (r *Report) excuse(before map[string]bool) {
	for i := range r.Things {
		if t := &r.Things[i]; t.Ownerless() && !before[t.key()] {
			t.Owner, t.Why = "not known yet", "it came while it was looked for: look again"
		}
	}
}

// resolved has the links in the trees' paths resolved, as the daemon has.
func (o Options) resolved() (Options, error) {
	for _, path := range []*string{&o.Root, &o.State} {
		real, err := filepath.EvalSymlinks(*path)
		if err != nil {
			return o, fmt.Errorf("cannot look at %s: %w", *path, err)
		}
		*path = real
	}
	return o, nil
}

// look is one look at the machine.
type look struct {
	Options
	machine
	networks
	owners
	stores  stores
	parents map[string]bool // of the cgroups of containers
	held    map[string]bool // namespaces that were noted
	things  []Thing
	unknown []string
}

func takeLook(o Options) *look {
	l := &look{Options: o}
	// The order matters: see the comment of the package.
	l.machine = l.lookAtMachine()
	l.networks = l.lookAtNetworks()
	l.owners = l.readOwners()
	l.stores = l.readStores()
	for _, judge := range []func(){
		l.judgeProcesses, l.judgeMounts, l.judgePins, l.judgeNetworks, l.judgeCgroups, l.judgeTrees,
	} {
		judge()
	}
	return l
}

// report sorts what was found, and gives the keys of what has no owner.
func (l *look) report() (Report, map[string]bool) {
	slices.SortStableFunc(l.things, func(a, b Thing) int {
		return cmp.Or(cmp.Compare(slices.Index(order, a.Kind), slices.Index(order, b.Kind)), cmp.Compare(a.Name, b.Name))
	})
	ownerless := map[string]bool{}
	for _, t := range l.things {
		if t.Ownerless() {
			ownerless[t.key()] = true
		}
	}
	slices.Sort(l.unknown)
	return Report{DaemonRuns: l.daemonRuns, Things: l.things, Unknown: slices.Compact(l.unknown)}, ownerless
}

// verdict is what is known of the owner of something.
type verdict struct {
	owner, why string
	doubt      bool
}

// none is the verdict on what has no owner.
func none(format string, args ...any) verdict { return verdict{why: fmt.Sprintf(format, args...)} }

// add notes a thing. The fix counts only if it has no owner.
func (l *look) add(k Kind, name, same string, v verdict, f *fix) {
	t := Thing{Kind: k, Name: name, Owner: v.owner, Why: v.why, Doubt: v.doubt, same: same}
	if t.Ownerless() {
		t.fix = f
		t.Remedy = f.remedy(l.daemonRuns)
	}
	l.things = append(l.things, t)
}

// fail notes what could not be looked at.
func (l *look) fail(format string, args ...any) {
	l.unknown = append(l.unknown, fmt.Errorf(format, args...).Error())
}
