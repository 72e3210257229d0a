// Package state owns the durable paths: where the records of pods and
// containers lie, how they are written, and what happens to one that does not
// read.
//
//	ROOT/pods/ID/record.json         a pod          STATE/pods/ID/record.json    its copy
//	ROOT/containers/ID/record.json   a container    STATE/containers/ID/         its run directory (package rundir)
//	ROOT/quarantine/                 what was damaged, under the time it was found
//
// One daemon uses a tree: it holds a flock(2) of ROOT and of STATE. Both are closed
// to other users of the host, with all that is below them.
//
// A record is renamed into place, so a killed daemon loses nothing. It is synced
// only where the caller says so: a power cut also ends what the record speaks of.
package state

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/proto/record"
)

// Kind is a kind of object with a directory of its own under root and state.
type Kind string

// The kinds of object.
const (
	Pods       Kind = "pods"
	Containers Kind = "containers"
)

const (
	recordName = "record.json"
	delPrefix  = ".del-"
)

// ErrLocked says that another daemon uses the same root or state.
var ErrLocked = errors.New("another holdfastd uses it")

// Store is the two trees. Its methods may be called at the same time for
// different objects; calls for one object are the caller's to put in order.
type Store struct {
	root, state string
	log         *slog.Logger
	locks       []*os.File // root and state; locked for the life of the daemon
	quarantined atomic.Int64
}

// Open makes the trees where they are missing and takes them for this process.
func Open(root, state string, log *slog.Logger) (*Store, error) {
	s := &Store{root: root, state: state, log: log}
	for _, tree := range []string{root, state} {
		if err := os.MkdirAll(filepath.Dir(tree), 0o755); err != nil {
			return nil, fmt.Errorf("cannot use %s: %w", tree, err)
		}
		for _, name := range []string{"", string(Pods), string(Containers)} {
			if err := s.makeClosed(filepath.Join(tree, name)); err != nil {
				return nil, fmt.Errorf("cannot use %s: %w", tree, err)
			}
		}
	}
	locks, err := Lock(root, state)
	if err != nil {
		return nil, err
	}
	s.locks = locks
	return s, nil
}

// makeClosed makes a directory that only its owner, who runs the daemon, may enter. One
// that is there is closed: an earlier version, or an administrator, left it open,
// and a setuid program of a container must not be reached by a user of the host.
func (s *Store) makeClosed(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return &fs.PathError{Op: "open", Path: dir, Err: syscall.ENOTDIR}
	}
	if owner := int(st.Sys().(*syscall.Stat_t).Uid); owner != os.Geteuid() {
		s.log.Warn("taking a directory from another user", "path", dir, "uid", owner)
		if err := os.Chown(dir, os.Geteuid(), os.Getegid()); err != nil {
			return err
		}
	}
	if st.Mode().Perm() == 0o700 {
		return nil
	}
	s.log.Warn("closing a directory to other users", "path", dir, "mode", st.Mode())
	return os.Chmod(dir, 0o700)
}

// Lock takes the locks of trees, as a daemon holds them for its life: of root and state, in
// this order. The caller closes the files.
func Lock(trees ...string) (locks []*os.File, err error) {
	for _, tree := range trees {
		f, err := lock(tree)
		if err != nil {
			for _, f := range locks {
				f.Close()
			}
			return nil, fmt.Errorf("cannot use %s: %w", tree, err)
		}
		locks = append(locks, f)
	}
	return locks, nil
}

// lockPatience is how long a lock may stay after its daemon was killed: a child
// that it was just starting has a copy of the descriptor until its execve(2).
const lockPatience = 3 * time.Second

// lock locks the directory itself: there is no file that could be in the way.
func lock(tree string) (*os.File, error) {
	f, err := os.Open(tree)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockPatience); ; {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			break
		}
		// Nothing tells when it is free, but for a call that would wait for ever.
		time.Sleep(10 * time.Millisecond)
	}
	f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = fmt.Errorf("%w%s", ErrLocked, holder(tree))
	}
	return nil, err
}

// holder says which process has the lock of a directory, as far as the kernel tells.
func holder(tree string) string {
	var st unix.Stat_t
	b, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Stat(tree, &st) != nil {
		return ""
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(b)) {
		// NUMBER: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE START END
		if f := strings.Fields(line); len(f) > 5 && f[1] == "FLOCK" && f[5] == file {
			return ": process " + f[4]
		}
	}
	return ""
}

// Close gives the trees to the next daemon.
func (s *Store) Close() error {
	var errs []error
	for _, f := range s.locks {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Dir is the durable directory of an object.
func (s *Store) Dir(k Kind, id string) string { return filepath.Join(s.root, string(k), id) }

// RunDir is the directory of an object that lasts until the next boot.
func (s *Store) RunDir(k Kind, id string) string { return filepath.Join(s.state, string(k), id) }

// HasRunDir says whether that directory is there.
func (s *Store) HasRunDir(k Kind, id string) bool {
	_, err := os.Lstat(s.RunDir(k, id))
	return err == nil
}

// Create makes the durable directory of an object.
func (s *Store) Create(k Kind, id string) error {
	if err := os.MkdirAll(s.Dir(k, id), 0o700); err != nil {
		return fmt.Errorf("cannot make a directory for %s: %w", id, err)
	}
	return nil
}

// Put replaces the record of an object whose directory exists.
func (s *Store) Put(k Kind, id string, v any, sync bool) error {
	return record.Write(filepath.Join(s.Dir(k, id), recordName), v, sync)
}

// PutCopy writes the record a second time, into the run directory, where it
// stands in for a damaged first.
func (s *Store) PutCopy(k Kind, id string, v any) error {
	return record.Write(filepath.Join(s.RunDir(k, id), recordName), v, false)
}

// Get reads the record of an object. Errors are those of record.Read.
func (s *Store) Get(k Kind, id string, v any) error {
	return record.Read(filepath.Join(s.Dir(k, id), recordName), v)
}

// GetCopy reads what PutCopy wrote.
func (s *Store) GetCopy(k Kind, id string, v any) error {
	return record.Read(filepath.Join(s.RunDir(k, id), recordName), v)
}

// Read reads the record of an object below one of the trees, without a store. Errors are
// those of record.Read.
func Read(tree string, k Kind, id string, v any) error {
	return record.Read(filepath.Join(tree, string(k), id, recordName), v)
}

// IDs lists the objects that have a directory in either tree.
func (s *Store) IDs(k Kind) ([]string, error) {
	seen := map[string]bool{}
	var ids []string
	for _, tree := range []string{s.root, s.state} {
		entries, err := os.ReadDir(filepath.Join(tree, string(k)))
		if err != nil {
			return nil, fmt.Errorf("cannot list the %s: %w", k, err)
		}
		for _, e := range entries {
			if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && !seen[e.Name()] {
				seen[e.Name()] = true
				ids = append(ids, e.Name())
			}
		}
	}
	return ids, nil
}

// Sweep removes what Remove had renamed when its daemon ended. Errors are
// logged: the next start tries again.
func (s *Store) Sweep() {
	for _, k := range []Kind{Pods, Containers} {
		for _, tree := range []string{s.root, s.state} {
			left, _ := os.ReadDir(filepath.Join(tree, string(k)))
			for _, e := range left {
				if !strings.HasPrefix(e.Name(), delPrefix) {
					continue
				}
				path := filepath.Join(tree, string(k), e.Name())
				if err := RemoveTree(path); err != nil {
					s.log.Warn("cannot finish a removal", "path", path, "error", err)
				}
			}
		}
	}
}

// RemoveRunDir removes the run directory of an object. Nothing may be mounted
// below it any more: a mount makes this fail, never follow.
func (s *Store) RemoveRunDir(k Kind, id string) error {
	path := s.RunDir(k, id)
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return remove(path) // of which the first attempt got no further than another name
	}
	var table []mounts.Mount
	if err == nil {
		table, err = mounts.Read(mounts.Self)
	}
	for _, m := range table {
		if m.Below(real) {
			err = fmt.Errorf("%s is still mounted", m.Point)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot remove %s: %w", path, err)
	}
	return remove(path)
}

// Remove removes the durable directory of an object, the record with it: the
// last step of its life.
func (s *Store) Remove(k Kind, id string) error { return remove(s.Dir(k, id)) }

// remove renames first, so that no half-removed object is ever loaded.
func remove(path string) error {
	gone := filepath.Join(filepath.Dir(path), delPrefix+filepath.Base(path))
	err := os.Rename(path, gone)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case errors.Is(err, syscall.ENOTEMPTY), errors.Is(err, fs.ErrExist):
		// A removal of the same name was cut short.
		err = RemoveTree(path)
	}
	if err == nil {
		err = RemoveTree(gone)
	}
	if err != nil {
		return fmt.Errorf("cannot remove %s: %w", path, err)
	}
	return nil
}

// Quarantine moves a damaged record, or the whole directory of an object that
// has none, out of the way and says so. What was moved is kept for a person to
// look at; nothing reads it again.
func (s *Store) Quarantine(path string, why error) {
	to := filepath.Join(s.root, "quarantine")
	err := os.MkdirAll(to, 0o700)
	if err == nil {
		name := fmt.Sprintf("%s-%d-%s-%s", time.Now().UTC().Format("20060102T150405"), s.quarantined.Add(1),
			filepath.Base(filepath.Dir(path)), filepath.Base(path))
		to = filepath.Join(to, name)
		if err = os.Rename(path, to); errors.Is(err, syscall.EXDEV) {
			err = RemoveTree(path) // of the run directory: means nothing after a boot anyway
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Error("cannot quarantine", "path", path, "damage", why, "error", err)
		return
	}
	s.log.Error("quarantined", "path", path, "to", to, "damage", why)
}

// QuarantineRecord is Quarantine for the record of an object.
func (s *Store) QuarantineRecord(k Kind, id string, why error) {
	s.Quarantine(filepath.Join(s.Dir(k, id), recordName), why)
}
