package network

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

const (
	// hostLocalDir is where host-local keeps its addresses unless it is told otherwise.
	hostLocalDir = "/var/lib/cni/networks"

	// leaseLockLimit bounds the wait for plugins that are at work in the same directory.
	leaseLockLimit = time.Second
)

// freeNameless gives back addresses of a network that no DEL gives back: files of
// host-local without a word in them. It makes a file and then writes the pod into it, both
// under its lock (plugins 1.9.1, backend/disk). If it is killed in between, or the power
// is cut, nobody has the address, and no DEL finds it by its pod. What cannot be freed now
// waits for the next DEL.
func (n *Network) freeNameless(ctx context.Context, list *libcni.NetworkConfigList) {
	for _, p := range list.Plugins {
		var c struct {
			IPAM struct {
				Type    string `json:"type"`
				DataDir string `json:"dataDir"`
			} `json:"ipam"`
		}
		if json.Unmarshal(p.Bytes, &c) != nil || c.IPAM.Type != "host-local" {
			continue
		}
		dir := filepath.Join(cmp.Or(c.IPAM.DataDir, hostLocalDir), list.Name)
		freed, err := freeNamelessIn(ctx, dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			n.log.Warn("addresses that nobody has were not given back", "directory", dir, "error", err)
		}
		if len(freed) > 0 {
			n.log.Warn("addresses given back that nobody had: their plugin was killed",
				"directory", dir,
				"addresses", freed)
		}
	}
}

func freeNamelessIn(ctx context.Context, path string) (freed []string, err error) {
	dir, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	entries, err := fs.ReadDir(dir.FS(), ".")
	if err != nil {
		return nil, err
	}
	nameless := func(name string) bool {
		st, err := dir.Lstat(name)
		return err == nil && st.Mode().IsRegular() && st.Size() == 0
	}
	var names []string
	for _, e := range entries {
		if _, err := netip.ParseAddr(e.Name()); err == nil && nameless(e.Name()) {
			names = append(names, e.Name())
		}
	}
	if len(names) == 0 {
		return nil, nil
	}
	lock, err := dir.OpenFile("lock", os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	r := &run{path: filepath.Join(path, "lock"), lock: lock}
	if err := r.poll(ctx, leaseLockLimit); err != nil {
		if !slices.ContainsFunc(names, nameless) {
			return nil, nil // they were being written
		}
		return nil, err
	}
	defer unix.Flock(int(lock.Fd()), unix.LOCK_UN) // also on behalf of a child that has yet to exec
	for _, name := range names {
		if !nameless(name) { // nobody is writing it now
			continue
		}
		if rerr := dir.Remove(name); rerr != nil {
			err = errors.Join(err, rerr)
			continue
		}
		freed = append(freed, name)
	}
	return freed, err
}
