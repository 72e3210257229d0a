package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// The socket belongs to one process, and to nobody else what it is made of.
func TestListen(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	address := filepath.Join(t.TempDir(), "new", "cri.sock")
	first, err := listen(address)
	check(t, err)
	for _, name := range []string{address, address + ".lock"} {
		if st, err := os.Stat(name); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	if _, err := listen(address); err == nil || !strings.Contains(err.Error(), "another process serves it") {
		t.Errorf("a second one: %v", err)
	}
	if c, err := net.Dial("unix", address); err != nil {
		t.Errorf("the first is not served any more: %v", err)
	} else {
		c.Close()
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	again, err := listen(address)
	check(t, err)
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func TestListenInPlaceOf(t *testing.T) {
	abandoned := func(address string) error {
		l, err := net.Listen("unix", address)
		if err == nil {
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			err = l.Close()
		}
		return err
	}
	live := func(address string) error {
		l, err := net.Listen("unix", address)
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}
	directory := func(suffix string) func(string) error {
		return func(address string) error { return os.MkdirAll(address+suffix, 0o755) }
	}
	file := func(address string) error { return os.WriteFile(address, nil, 0o600) }
	link := func(address string) error { return os.Symlink("/nowhere/x", address) }
	for name, c := range map[string]struct {
		make func(address string) error
		want string
	}{
		"the socket of a killed daemon": {abandoned, ""},
		"a program that knows no lock":  {live, "another process serves it"},
		"an empty directory":            {directory(""), ""},
		"a full directory":              {directory("/x"), "a directory is in its place"},
		"a file":                        {file, "something else is in its place"},
		"a link":                        {link, "something else is in its place"},
		"a directory for the lock":      {directory(".lock"), "cri.sock.lock"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := filepath.Join(t.TempDir(), "cri.sock")
			check(t, c.make(address))
			l, err := listen(address)
			if err == nil {
				l.Close()
			}
			said := fmt.Sprint(err)
			switch {
			case c.want == "" && err == nil:
			case c.want == "" || !strings.Contains(said, "cannot listen on "+address) || !strings.Contains(said,
				c.want):
				t.Error(said)
			}
		})
	}
}

var check = must.Succeed
