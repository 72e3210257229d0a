package stream

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Address is where a holdfast-stream listens, and which process it is.
type Address struct {
	Base    string         `json:"base"` // of URLs, such as http://127.0.0.1:34567
	Process rundir.Process `json:"process"`
	BootID  string         `json:"bootId"`
}

// URL is where a client has to go with a token.
func (a Address) URL(k Kind, token string) string { return a.Base + "/" + string(k) + "/" + token }

// What Running says of a holdfast-stream that cannot be told of.
var (
	ErrNotRunning = errors.New("no holdfast-stream runs")
	ErrStarting   = errors.New("the holdfast-stream that runs does not listen yet")
)

// Running gives the address of the holdfast-stream that runs. The error is
// ErrNotRunning or ErrStarting, or tells why nobody knows.
func (d Dir) Running() (Address, error) {
	held, err := rundir.Held(d.Path(lockName))
	if err != nil {
		return Address{}, err
	}
	if !held {
		return Address{}, ErrNotRunning
	}
	// An earlier one may have left its address behind.
	a, err := d.address()
	if err != nil || a.BootID != rundir.BootID() || !a.Process.Alive() {
		return Address{}, ErrStarting
	}
	return a, nil
}

func (d Dir) address() (a Address, err error) {
	err = record.Read(d.Path(addressName), &a)
	return a, err
}

// sweepAddresses removes what a holdfast-stream has left that was killed while it wrote its
// address. Only who has the lock writes it: what was there before a look at the lock, which
// nobody had, is nobody's.
func (d Dir) sweepAddresses() error {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return fmt.Errorf("cannot look for what is left of addresses: %w", err)
	}
	if held, err := rundir.Held(d.Path(lockName)); held || err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "."+addressName+".") {
			err = errors.Join(err, os.RemoveAll(d.Path(e.Name())))
		}
	}
	return err
}

// Server is the lock by which a holdfast-stream lives: at most one has it.
type Server struct {
	dir  Dir
	lock *os.File
	base string // that was announced; empty: none yet
}

// Lock takes the lock. rundir.ErrLocked: another holdfast-stream runs. What is no lock
// and stands in its place is removed.
func (d Dir) Lock() (*Server, error) {
	if err := d.Make(); err != nil {
		return nil, err
	}
	// What cannot be removed is for the next start.
	_ = d.sweepAddresses()
	lock, err := rundir.Lock(d.Path(lockName))
	if err != nil && !errors.Is(err, rundir.ErrLocked) {
		if err = os.RemoveAll(d.Path(lockName)); err == nil {
			lock, err = rundir.Lock(d.Path(lockName))
		}
	}
	if err != nil {
		return nil, err
	}
	// An earlier process may still serve its connections. The address is nobody's
	// until Announce, and only its port counts.
	if a, aerr := d.address(); aerr == nil {
		a.Process = rundir.Process{}
		err = record.Write(d.Path(addressName), a, false)
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &Server{dir: d, lock: lock}, nil
}

// LastPort is the port at which an earlier holdfast-stream listened. Whoever takes it
// again keeps the addresses valid that were given out. "": none is known.
func (s *Server) LastPort() string {
	a, err := s.dir.address()
	if err != nil || a.BootID != rundir.BootID() {
		return ""
	}
	base, err := url.Parse(a.Base)
	if err != nil {
		return ""
	}
	return base.Port()
}

// Announce writes down where this process listens. It takes requests by then.
func (s *Server) Announce(base string) error {
	self, err := rundir.FindProcess(os.Getpid())
	if err != nil {
		return err
	}
	s.base = base
	return record.Write(s.dir.Path(addressName), Address{base, self, rundir.BootID()}, false)
}

// Sweep removes the tokens that have expired, and writes the address down again if somebody
// has removed or damaged it: nobody could have a session for as long as one of others goes on.
func (s *Server) Sweep(ctx context.Context) error {
	err := s.dir.Sweep(ctx)
	if _, aerr := s.dir.address(); aerr != nil && s.base != "" {
		err = errors.Join(err, os.RemoveAll(s.dir.Path(addressName)), s.Announce(s.base))
	}
	return err
}

// Retire gives the lock back if nothing is to be done any more: no token waits to be
// used, and idle, which is asked after that, says that no connection is left. Then it is
// true: no request is lost if the process ends now, and the next one starts another.
func (s *Server) Retire(ctx context.Context, idle func() bool) (bool, error) {
	if err := s.dir.Make(); err != nil {
		return false, err
	}
	gate, err := s.dir.gate(ctx)
	if err != nil {
		return false, err
	}
	defer gate.Close()
	unused, _, err := s.dir.sweepLocked()
	if err != nil || unused > 0 || !idle() {
		return false, err
	}
	// Before the gate: a token that is put from now on finds nobody.
	return true, s.Close()
}

// Close gives the lock back. A holdfast-stream that is to end, by SIGTERM, does so at
// once, when it has stopped to listen: another one takes its place while it serves the
// connections that it has to their ends.
func (s *Server) Close() error { return s.lock.Close() }
