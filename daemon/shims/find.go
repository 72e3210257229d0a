package shims

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Whether a shim lives is for the kernel to say: files can be missing, damaged or
// of another boot. The witness is the command line of a process, which names the
// run directory.

// Alive says whether the shim of a run directory lives. A lock that is held proves
// it; one that is free, and the process that shim.json names gone, proves the
// opposite. Where a file is missing the processes are looked through.
func Alive(dir rundir.Dir) (bool, error) {
	held, err := dir.Held()
	if err == nil && held {
		return true, nil
	}
	if id, ierr := dir.ReadIdentity(); err == nil && ierr == nil && !id.Shim.Alive() {
		return false, nil
	}
	_, err = Find(dir)
	if errors.Is(err, rundir.ErrNoProcess) {
		return false, nil
	}
	return err == nil, err
}

// Find gives the shim of a run directory: rundir.ErrNoProcess if there is none.
// It looks at the process that shim.json names first, then at all of them.
func Find(dir rundir.Dir) (rundir.Process, error) {
	if id, err := dir.ReadIdentity(); err == nil && id.Shim.Alive() && keeps(id.Shim.PID, dir) {
		return id.Shim, nil
	}
	all, err := Running(filepath.Dir(filepath.Dir(string(dir))))
	if err != nil {
		return rundir.Process{}, fmt.Errorf("cannot find the shim of %s: %w", dir.ID(), err)
	}
	p, ok := all[dir.ID()]
	if !ok {
		return p, fmt.Errorf("cannot find the shim of %s: no process keeps %s: %w", dir.ID(), dir, rundir.ErrNoProcess)
	}
	return p, nil
}

// Running gives all shims of a state directory by the ids of their containers.
func Running(stateDir string) (map[string]rundir.Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("cannot look for shims: %w", err)
	}
	containers := filepath.Join(stateDir, rundir.ContainersName)
	all := map[string]rundir.Process{}
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
		if p, err := rundir.FindProcess(pid); err == nil && keeps(pid, dir) && p.Alive() {
			all[dir.ID()] = p
		}
	}
	return all, nil
}

// keeps says whether a process is the shim of a run directory.
func keeps(pid int, dir rundir.Dir) bool {
	d, ok := kept(pid)
	return ok && d.ID() == dir.ID() && same(filepath.Dir(string(d)), filepath.Dir(string(dir)))
}

// kept gives the run directory of a process that is a shim.
//
// Anybody can choose his command line, also in a container. A shim is a program
// of that name that root runs in the daemon's mount namespace.
func kept(pid int) (rundir.Dir, bool) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	cmdline, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil {
		return "", false
	}
	args := strings.Split(string(cmdline), "\x00")
	i := slices.Index(args, "--dir")
	if i < 0 || i+1 >= len(args) || !filepath.IsAbs(args[i+1]) {
		return "", false
	}
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
	return rundir.Dir(args[i+1]), true
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
