// Package stdio is the hub of a container's standard files. Its outputs go to the
// log and to any number of clients, which come and go; the input of the clients
// goes to the container.
//
// A copier per output reads and at once passes on what it has read. It waits for
// the log, and for nothing else: a client has a queue with a bound, and is cut off
// when that is full. What a crash of this process can lose is one read, and the
// beginning of a line that has no end yet, unless that lies in a Memory: such a line
// is held back until its newline, logfile.MaxLine bytes or the end of the output.
package stdio

import (
	"errors"
	"os"
	"sync"

	"github.com/holdfast-cri/holdfast/proto/descriptor"
	"github.com/holdfast-cri/holdfast/shim/logfile"
)

// Hub is the standard files of one container. Its methods may be called from
// several goroutines.
type Hub struct {
	log     *logfile.File // not owned; nil: the output goes to clients only
	memory  *Memory       // not owned; nil: a line that is held back ends with this process
	clients clients
	input   input

	mu      sync.Mutex
	copiers map[*copier]struct{} // that run
	idle    chan struct{}        // closed while there are none
	closed  bool
}

// New makes a Hub that writes to log and keeps what is not there yet in memory.
// Both stay the caller's and have to stay open until Close or Leave has returned.
// Either may be nil.
func New(log *logfile.File, memory *Memory) *Hub {
	idle := make(chan struct{})
	close(idle)
	h := &Hub{log: log, memory: memory, copiers: make(map[*copier]struct{}), idle: idle}
	h.input.turn = make(chan struct{}, 1)
	return h
}

// Add starts to copy r until its end. The master of a pseudo-terminal comes to its
// end only after Finish. Add owns r from now on and closes it. A stream is added once.
//
// If r is blocking, a non-blocking duplicate takes its place, and whatever else
// shares its open file becomes non-blocking, too. A caller that goes on using r, for
// instance to write to a terminal, makes the descriptor non-blocking before
// os.NewFile: then r stays in use, and open until its end.
func (h *Hub) Add(stream logfile.Stream, r *os.File) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		r.Close()
		return
	}
	c := &copier{log: h.log, clients: &h.clients, stream: stream, r: pollable(r)}
	if h.memory != nil {
		c.part = h.memory.part(stream)
	} else {
		c.part = privatePart()
	}
	if len(h.copiers) == 0 {
		h.idle = make(chan struct{})
	}
	h.copiers[c] = struct{}{}
	go func() {
		c.run()
		h.remove(c)
	}()
}

func (h *Hub) remove(c *copier) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.copiers, c)
	if len(h.copiers) == 0 {
		close(h.idle)
		h.clients.end()
	}
}

// Drained is closed once all outputs have ended and are in the log. It is to be
// called after the last Add: without an output it is closed.
func (h *Hub) Drained() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.idle
}

// Finish says, after the last Add, that no process is left that could open a terminal
// of the container again: it is at its end once nobody has it open. Until then a program
// may close its terminal and go on with it later, for instance by /dev/console.
func (h *Hub) Finish() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	for c := range h.copiers {
		c.end(finish)
	}
}

// Close gives up on outputs that don't end, because a process that outlived the
// container holds them open. What has been written to them until now still goes
// to the log and to the clients. Close returns when that is done, which takes as
// long as the writes to the log: if their disk hangs, so does Close. Clients are
// given lastTimeout for the rest of their queues.
func (h *Hub) Close() {
	h.shut(stop)
	h.input.close()
	h.clients.close(lastTimeout)
}

// Files are the standard files on the supervisor's side.
type Files struct {
	// Outputs are what is read, by logfile.Stream: of a terminal its master, as the
	// first. nil: the output has ended.
	Outputs [streams]*os.File
	Input   *os.File // where input goes; nil: there is none, or it was closed
}

// Leave ends the Hub without touching the standard files, and gives copies of them,
// with which and the Memory another Hub goes on. What no copier has read yet stays
// unread. Clients are let go as by Close.
func (h *Hub) Leave() (Files, error) {
	var f Files
	var err error
	h.mu.Lock()
	for c := range h.copiers {
		var derr error
		f.Outputs[c.stream], derr = descriptor.Dup(c.r)
		if !errors.Is(derr, os.ErrClosed) { // it has just ended
			err = errors.Join(err, derr)
		}
	}
	h.mu.Unlock()
	input, ierr := h.input.dup()
	f.Input = input
	h.shut(leave)
	h.input.close()
	h.clients.close(lastTimeout)
	return f, errors.Join(err, ierr)
}

func (h *Hub) shut(how ending) {
	h.mu.Lock()
	if !h.closed {
		for c := range h.copiers {
			c.end(how)
		}
	}
	h.closed = true
	idle := h.idle
	h.mu.Unlock()
	<-idle
	h.clients.end() // also if there never was an output
}
