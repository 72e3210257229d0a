// Package audit compares a machine with the records: it finds every shim, process, mount, namespace, cgroup and file
// that Holdfast has, or may have left, and says whose it is and why it is there, or that it has no owner. It needs no
// daemon, and asks none: what the records and the kernel say is compared, so that what a daemon has forgotten is found.
//
// The machine goes on meanwhile. What is there is looked at first and the records after that, because everything is on
// record before it is taken; and what has no owner has to have none in a second look as well, as the same process,
// mount or file.
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

// The kinds.
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

// order is that in which things are listed and taken away: a process uses mounts, and a mount keeps a directory.
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
	// Doubt says that it cannot be told whose it is, or whether it has an owner. It is not taken away.
	Doubt bool `json:"doubt,omitempty"`

	key string // differs between all things that there are, and were
	fix *fix   // nil: not for this package to take away
}

// Ownerless says whether it is known to have no owner.
func (t *Thing) Ownerless() bool { return t.Owner == "" && !t.Doubt }

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
func (r *Report) Ownerless() []Thing { return r.those((*Thing).Ownerless) }

// Doubtful are the things of which nobody can tell the owner.
func (r *Report) Doubtful() []Thing { return r.those(func(t *Thing) bool { return t.Doubt }) }

func (r *Report) those(are func(*Thing) bool) (list []Thing) {
	for _, t := range r.Things {
		if are(&t) {
			list = append(list, t)
		}
	}
	return list
}

// maxLooks bounds the looks at a machine on which things come and go all the time.
const maxLooks = 5

// Look looks at the machine, and looks again as long as there is something without an owner, or with a doubtful one,
// that was not so before: things come and go.
func Look(ctx context.Context, o Options) (Report, error) {
	o, err := o.resolved()
	if err != nil {
		return Report{}, err
	}
	before := map[string]bool{}
	for n := 1; ; n++ {
		r := takeLook(o).report()
		now, fresh := map[string]bool{}, 0
		for i := range r.Things {
			t := &r.Things[i]
			if t.Owner != "" {
				continue
			}
			now[t.key] = t.Doubt
			if doubt, seen := before[t.key]; !seen || doubt != t.Doubt {
				fresh++
				if n == maxLooks {
					t.Doubt, t.Why = true, "it came while it was looked for: look again. "+t.Why
				}
			}
		}
		if fresh == 0 || n == maxLooks {
			return r, nil
		}
		before = now
		select {
		case <-time.After(cmp.Or(o.Pause, time.Second)):
		case <-ctx.Done():
			return r, ctx.Err()
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
	// blind says that a part of the machine could not be looked at. What has an owner there may seem to have none.
	blind bool
}

func takeLook(o Options) *look {
	l := &look{Options: o, held: map[string]bool{}}
	// The order matters: see the comment of the package.
	l.machine = l.lookAtMachine()
	l.networks = l.lookAtNetworks()
	l.readOwners()
	l.stores = l.readStores()
	l.parents = l.cgroupParents()
	l.judgeProcesses()
	l.judgeMounts()
	l.judgePins()
	l.judgeNetworks()
	l.judgeCgroups()
	l.judgeTrees()
	return l
}

// report sorts what was found.
func (l *look) report() Report {
	slices.SortStableFunc(l.things, func(a, b Thing) int {
		return cmp.Or(slices.Index(order, a.Kind)-slices.Index(order, b.Kind), cmp.Compare(a.Name, b.Name))
	})
	slices.Sort(l.unknown)
	return Report{DaemonRuns: l.daemonRuns, Things: l.things, Unknown: slices.Compact(l.unknown)}
}

// verdict is what is known of the owner of something.
type verdict struct {
	owner, why string
	doubt      bool
}

func (v verdict) none() bool { return v.owner == "" && !v.doubt }

// of, none and doubt are the verdicts on what has an owner, has none, and may have one.
func of(owner, why string) verdict            { return verdict{owner: owner, why: why} }
func none(format string, args ...any) verdict { return verdict{why: fmt.Sprintf(format, args...)} }
func doubtful(format string, args ...any) verdict {
	return verdict{why: fmt.Sprintf(format, args...), doubt: true}
}

// add notes a thing. same differs between two things of one name, one after the other. The fix counts only if it has no
// owner.
func (l *look) add(k Kind, name, same string, v verdict, f *fix) {
	key := fmt.Sprint(k, "\x00", name, "\x00", same)
	t := Thing{Kind: k, Name: name, Owner: v.owner, Why: v.why, Doubt: v.doubt, key: key}
	if v.none() {
		t.fix = f
		t.Remedy = f.remedy(l.daemonRuns)
	}
	l.things = append(l.things, t)
}

// addProcess notes a process, which may change its name at will.
func (l *look) addProcess(k Kind, p *process, v verdict) {
	l.add(k, p.text(), "", v, killProcess(p))
	l.things[len(l.things)-1].key = fmt.Sprint(k, p.Process)
}

// fail notes what does not read.
func (l *look) fail(format string, args ...any) {
	l.unknown = append(l.unknown, fmt.Errorf(format, args...).Error())
}

// miss notes a part of the machine that could not be looked at: nothing is taken away then.
func (l *look) miss(format string, args ...any) {
	l.blind = true
	l.fail(format, args...)
}
