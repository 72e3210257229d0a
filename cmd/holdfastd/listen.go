package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon"
)

// patience is how long an address may still be in use after its daemon was killed:
// a child that it was just starting has copies of the descriptors until its
// execve(2).
const patience = 3 * time.Second

// errInUse says that somebody else serves the address.
var errInUse = errors.New("another process serves it: give each daemon an address of its own")

// socket is the listener of the CRI, and the lock beside it.
type socket struct {
	net.Listener
	lock *os.File
}

// Close removes the socket, and then lets the next daemon have the address.
func (s *socket) Close() error { return errors.Join(s.Listener.Close(), s.lock.Close()) }

// listen takes the address over from an earlier daemon, and from nobody who lives:
// not from a daemon with other trees, which has the lock, and not from a program
// that knows no lock and answers.
func listen(address string) (net.Listener, error) {
	l, err := takeSocket(address)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", address, err)
	}
	return l, nil
}

func takeSocket(address string) (*socket, error) {
	if err := os.MkdirAll(filepath.Dir(address), 0o711); err != nil {
		return nil, err
	}
	const flags = os.O_RDWR | os.O_CREATE | unix.O_NOFOLLOW | unix.O_NONBLOCK
	lock, err := os.OpenFile(address+daemon.LockSuffix, flags, 0o600)
	if err != nil {
		return nil, err
	}
	err = await(func() error {
		if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			return errInUse
		}
		return nil
	})
	if err == nil {
		err = await(func() error { return unserved(address) })
	}
	if err == nil {
		err = clearAddress(address)
	}
	var l net.Listener
	if err == nil {
		l, err = net.Listen("unix", address)
	}
	if err == nil {
		if err = os.Chmod(address, 0o600); err != nil {
			l.Close()
		}
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &socket{l, lock}, nil
}

// await calls f until it is not errInUse, or patience is over.
func await(f func() error) error {
	for deadline := time.Now().Add(patience); ; {
		err := f()
		if !errors.Is(err, errInUse) || time.Now().After(deadline) {
			return err
		}
		// Nothing tells when it is free.
		time.Sleep(10 * time.Millisecond)
	}
}

// unserved says whether nobody answers at an address.
func unserved(address string) error {
	c, err := net.DialTimeout("unix", address, time.Second)
	switch {
	case err == nil:
		c.Close()
		return errInUse
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded):
		return errInUse // it is busy
	}
	return err
}

// clearAddress removes the socket of an earlier daemon. A directory in its place is
// what somebody made who wanted to mount a socket that was not there; one with
// something in it is left to a person.
func clearAddress(address string) error {
	st, err := os.Lstat(address)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.IsDir():
		err := unix.Rmdir(address)
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
			return errors.New("a directory is in its place, and something is in it: move it away")
		}
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("something else is in its place (%s): move it away", st.Mode())
	}
	return os.Remove(address)
}
