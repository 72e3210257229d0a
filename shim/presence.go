package shim

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// presence is what shows that the shim lives and how to call it: the lock, the
// socket and shim.json. It belongs to the goroutine of Run.
type presence struct {
	dir      rundir.Dir
	identity rundir.Identity
	log      *slog.Logger
	serve    func(net.Listener) // in the background, until the listener is closed

	lock     *os.File
	listener *net.UnixListener
	names    map[string]fs.FileInfo // of lock and socket, as they were made
}

// identify says who this process is.
func identify(version string) (rundir.Identity, error) {
	self, err := rundir.FindProcess(os.Getpid())
	return rundir.Identity{Shim: self, BootID: rundir.BootID(), Nonce: rand.Text(), Version: version}, err
}

// takeLock takes the lock, unless it is there and ours.
func (p *presence) takeLock() error {
	if p.lock != nil && p.names[rundir.LockName] == nil { // another program has taken it
		info, err := p.lock.Stat()
		if err != nil {
			return fmt.Errorf("cannot use the lock: %w", err)
		}
		p.names[rundir.LockName] = info
	}
	if p.has(rundir.LockName) {
		return nil
	}
	take := p.dir.Lock
	if p.lock != nil {
		take = p.dir.Relock
	}
	lock, err := take()
	if err != nil {
		return err
	}
	if p.lock != nil {
		p.lock.Close()
	}
	p.lock = lock
	return p.remember(rundir.LockName)
}

// listen makes the socket, unless it is there and ours.
func (p *presence) listen() error {
	if p.has(rundir.SocketName) {
		return nil
	}
	l, err := p.dir.Listen()
	if err != nil {
		return err
	}
	if p.listener != nil {
		p.listener.Close() // nobody can reach it any more
	}
	p.listener = l
	p.serve(l)
	return p.remember(rundir.SocketName)
}

// appear makes whatever of it is not there. The lock comes first: only its
// holder may touch the rest.
func (p *presence) appear() error {
	if err := p.takeLock(); err != nil {
		return err
	}
	if err := p.listen(); err != nil {
		return err
	}
	return p.dir.WriteIdentity(p.identity)
}

// reappear is for a run directory that somebody has damaged or emptied.
func (p *presence) reappear() {
	err := os.MkdirAll(string(p.dir), 0o700)
	if err == nil {
		err = p.appear()
	}
	if err != nil {
		p.log.Error("cannot be called again", "error", err)
		return
	}
	p.log.Info("lock and socket are in place")
}

// disappear takes the socket away. The lock stays until close.
func (p *presence) disappear() error {
	if err := os.Remove(p.dir.Path(rundir.SocketName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the socket: %w", err)
	}
	return nil
}

func (p *presence) close() {
	if p.listener != nil {
		p.listener.Close()
	}
	p.lock.Close()
}

func (p *presence) remember(name string) error {
	info, err := os.Lstat(p.dir.Path(name))
	p.names[name] = info
	return err
}

// has says whether a name still stands for what this shim has made.
func (p *presence) has(name string) bool {
	info, err := os.Lstat(p.dir.Path(name))
	return err == nil && p.names[name] != nil && os.SameFile(info, p.names[name])
}
