package rundir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Whether a shim lives is for the kernel to say: files can be missing, damaged or
// of another boot. The witness is the command line of a process, which names the
// run directory.

// Alive says whether the shim lives. A lock that is held proves it; one that is
// free, and the process that shim.json names gone, proves the opposite. Where a file
// is missing or damaged the processes are looked through, and for somebody who does
// not see them the socket answers. When it is false, the shim has written what it
// had to.
func (d Dir) Alive() (bool, error) {
	held, err := d.Held()
	if err == nil && held {
		return true, nil
	}
	if id, ierr := d.ReadIdentity(); err == nil && ierr == nil && !id.Shim.Alive() {
		return false, nil
	}
	if _, err = d.FindShim(); !errors.Is(err, ErrNoProcess) {
		return err == nil, err
	}
	conn, err := d.Dial(context.Background()) // at once: nobody listens, or the kernel answers
	if err != nil {
		return false, nil
	}
	conn.Close()
	return true, nil
}

// FindShim gives the process that is the shim: ErrNoProcess if there is none. It
// looks at the one that shim.json names first, then at all of them.
func (d Dir) FindShim() (Process, error) {
	if id, err := d.ReadIdentity(); err == nil && id.Shim.Alive() && keeps(id.Shim.PID, d) {
		return id.Shim, nil
	}
	all, err := Shims(filepath.Dir(filepath.Dir(string(d))))
	if err != nil {
		return Process{}, fmt.Errorf("cannot find the shim of %s: %w", d.ID(), err)
	}
	p, ok := all[d.ID()]
	if !ok {
		return p, fmt.Errorf("cannot find the shim of %s: no process keeps %s: %w", d.ID(), d, ErrNoProcess)
	}
	return p, nil
}

// Shims gives all shims of a state directory by the ids of their containers.
func Shims(stateDir string) (map[string]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("cannot look for shims: %w", err)
	}
	containers := filepath.Join(stateDir, ContainersName)
	all := map[string]Process{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir, ok := kept(pid)
		if !ok || !same(filepath.Dir(string(dir)), containers) {
			continue
		}
		// It is asked once more behind its identity: the pid may be another's by now.
		if p, err := FindProcess(pid); err == nil && keeps(pid, dir) && p.Alive() {
			all[dir.ID()] = p
		}
	}
	return all, nil
}

// KeptBy gives the run directory of a process that is a shim; false: it is none, or has
// ended.
func KeptBy(pid int) (Dir, bool) { return kept(pid) }

// keeps says whether a process is the shim of a run directory.
func keeps(pid int, dir Dir) bool {
	d, ok := kept(pid)
	return ok && d.ID() == dir.ID() && same(filepath.Dir(string(d)), filepath.Dir(string(dir)))
}

// kept gives the run directory of a process that is a shim.
//
// Anybody can choose his command line, also in a container. A shim is a program
// of that name that root runs in the daemon's mount namespace.
func kept(pid int) (Dir, bool) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	exe, err := os.Readlink(filepath.Join(proc, "exe"))
	if err != nil || !strings.HasPrefix(filepath.Base(exe), "holdfast-shim") {
		return "", false
	}
	theirs, err := os.Readlink(filepath.Join(proc, "ns/mnt"))
	if err != nil {
		return "", false
	}
	if ours, err := os.Readlink("/proc/self/ns/mnt"); err != nil || ours != theirs {
		return "", false
	}
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil || !bytes.Contains(status, fmt.Appendf(nil, "\nUid:\t%d\t", os.Getuid())) {
		return "", false
	}
	// The command line comes last: it is memory of the process, so only that of a trusted one is read.
	args := CommandLine(pid)
	i := slices.Index(args, "--dir")
	if i < 0 || i+1 >= len(args) || !filepath.IsAbs(args[i+1]) {
		return "", false
	}
	return Dir(args[i+1]), true
}

// same says whether two paths are one directory.
func same(a, b string) bool {
	if a == b {
		return true
	}
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}
