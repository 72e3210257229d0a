package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Visit calls f with each cgroup of each hierarchy that is mounted: its directory, and its
// path as /proc/PID/cgroup has it. It is called for a cgroup before those below it, and
// these are left out where it is false. Cgroups that go meanwhile are no error.
func Visit(f func(dir, path string) bool) error {
	var errs []error
	for _, h := range hierarchies() {
		err := filepath.WalkDir(h.dir, func(dir string, e fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return ignoreGone(err)
			case !e.IsDir() || dir == h.dir:
				return nil
			}
			path := strings.TrimSuffix(h.root, "/") + strings.TrimPrefix(dir, h.dir)
			if !f(dir, path) {
				return fs.SkipDir
			}
			return nil
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// RemoveDirs removes the directories of cgroups without processes. The error is ErrBusy
// where one is left.
func RemoveDirs(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		if !safe(dir) {
			continue
		}
		if _, err := os.Lstat(filepath.Join(dir, "cgroup.procs")); err == nil {
			errs = append(errs, removeTree(dir))
		}
	}
	return errors.Join(errs...)
}
