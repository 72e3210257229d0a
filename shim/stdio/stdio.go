// Package stdio takes what a container writes to the container's log.
//
// A copier per output reads and at once writes what it has read. What a crash
// of this process can lose is one read, and the begin of a line that has no end
// yet: such a line stays in memory until its newline, logfile.MaxLine bytes or
// the end of the output.
//
// The log is the only thing a copier ever waits for. Whoever else is to get a
// copy of the output needs a queue with a bound, in front of which no copier
// waits.
package stdio

import (
	"os"
	"sync"

	"github.com/holdfast-cri/holdfast/shim/logfile"
)

// Stdio is the outputs of one container. Its methods may be called from several
// goroutines.
type Stdio struct {
	log *logfile.File // not owned; nil drops the output

	mu      sync.Mutex
	copiers map[*copier]struct{} // that run
	idle    chan struct{}        // closed while there are none
	closed  bool
}

// New makes a Stdio that writes to log, which stays the caller's and has to stay
// open until the outputs are drained. With a nil log the output is read and
// dropped.
func New(log *logfile.File) *Stdio {
	idle := make(chan struct{})
	close(idle)
	return &Stdio{log: log, copiers: make(map[*copier]struct{}), idle: idle}
}

// Add starts to copy r until its end, which for the master of a pseudo-terminal
// is EIO. It owns r from now on and closes it.
//
// If r is blocking, a non-blocking duplicate takes its place, and whatever else
// shares its open file becomes non-blocking, too. Who wants to go on using r, for
// instance to write to a terminal, makes the descriptor non-blocking before
// os.NewFile: then r stays in use, and open until its end.
func (s *Stdio) Add(stream logfile.Stream, r *os.File) {
	c := &copier{log: s.log, stream: stream, r: pollable(r)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.r.Close()
		return
	}
	if len(s.copiers) == 0 {
		s.idle = make(chan struct{})
	}
	s.copiers[c] = struct{}{}
	go func() {
		c.run()
		s.remove(c)
	}()
}

func (s *Stdio) remove(c *copier) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.copiers, c)
	if len(s.copiers) == 0 {
		close(s.idle)
	}
}

// Drained is closed once all outputs have ended and are in the log. It is to be
// called after the last Add: without an output it is closed.
func (s *Stdio) Drained() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.idle
}

// Close gives up on outputs that don't end, because a process that outlived the
// container holds them open. What has been written to them until now still goes
// to the log. Close returns when that is done, which takes as long as the writes
// to the log: if their disk hangs, so does Close.
func (s *Stdio) Close() {
	s.mu.Lock()
	if !s.closed {
		for c := range s.copiers {
			c.stop()
		}
	}
	s.closed = true
	idle := s.idle
	s.mu.Unlock()
	<-idle
}
