package client

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// EventType is what an event is about.
type EventType = rundir.EventType

// The types of events. A younger shim may know others.
const (
	Created  = rundir.EventCreated
	Started  = rundir.EventStarted
	OOM      = rundir.EventOOM
	Stopping = rundir.EventStopping
	Exited   = rundir.EventExited // the last one of a container
)

// Event is something that happened to a container. Its JSON is for scripts.
type Event struct {
	ID   string         `json:"id"`            // of the container
	Seq  uint64         `json:"seq,omitempty"` // from 1, without gaps
	At   time.Time      `json:"at"`
	Type EventType      `json:"type"`
	Init rundir.Process `json:"init,omitzero"`
	// Exit is set by Exited. When the container was started is not in it.
	Exit *rundir.Exit `json:"exit,omitempty"`
}

// Events gives the events after a number, waiting up to wait for the first one.
// A shim waits for a minute at most.
func (c *Client) Events(ctx context.Context, after uint64, wait time.Duration) ([]Event, error) {
	resp, err := call(ctx, c, wait+quick, proto.ShimService.Events, c.eventsRequest(after, wait))
	return c.events(resp), err
}

func (c *Client) eventsRequest(after uint64, wait time.Duration) *proto.EventsRequest {
	return &proto.EventsRequest{Id: c.dir.ID(), After: after, WaitMs: uint32(wait.Milliseconds())}
}

func (c *Client) events(resp *proto.EventsResponse) []Event {
	var list []Event
	for _, e := range resp.GetEvents() {
		list = append(list, Event{
			ID:   c.dir.ID(),
			Seq:  e.GetSeq(),
			At:   proto.Time(e.GetAt()),
			Type: EventType(strings.ToLower(strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_"))),
			Init: e.GetInit().File(),
			Exit: e.GetExit().File(time.Time{}),
		})
	}
	return list
}

// Watch calls f with each event after a number, in order. It returns nil after
// the last event of a container, Exited, so as not to keep a shim that is about
// to end; otherwise the error says why it ended. It has a connection of its own,
// so that a long poll never delays a call.
func (c *Client) Watch(ctx context.Context, after uint64, f func(Event)) error {
	const poll = time.Minute
	return c.alone(ctx, func(shim proto.ShimService) error {
		for {
			ctx, cancel := context.WithTimeout(ctx, poll+quick)
			resp, err := shim.Events(ctx, c.eventsRequest(after, poll))
			cancel()
			if err != nil {
				return err
			}
			for _, e := range c.events(resp) {
				after = e.Seq
				f(e)
				if e.Type == Exited {
					return nil
				}
			}
		}
	})
}

// Past gives what has happened so far. A shim that has ended has taken its events
// along; the exit record stands for them, as an event without a number.
func (c *Client) Past(ctx context.Context) ([]Event, error) {
	alive, err := c.dir.Alive()
	if err != nil {
		return nil, err
	}
	if alive {
		ctx, cancel := c.Impatient(ctx)
		defer cancel()
		return c.Events(ctx, 0, 0)
	}
	exit, err := c.dir.ReadExit()
	if err != nil {
		return nil, ErrNoRecord
	}
	return []Event{c.exited(exit)}, nil
}

// Follow calls f with each event after a number until the container has ended. A
// shim that is starting or silent is asked again. A run directory that was
// removed is an end too; f gets no Exited then.
func (c *Client) Follow(ctx context.Context, after uint64, f func(Event)) {
	for ctx.Err() == nil {
		err := c.Watch(ctx, after, func(e Event) {
			after = e.Seq
			f(e)
		})
		if err == nil {
			return
		}
		if alive, herr := c.dir.Alive(); herr == nil && !alive {
			if exit, xerr := c.dir.ReadExit(); xerr == nil {
				f(c.exited(exit))
				return
			}
		}
		if _, err := os.Stat(string(c.dir)); errors.Is(err, fs.ErrNotExist) {
			return
		}
		pause(ctx, time.Second)
	}
}

// exited is the event that an exit record stands for.
func (c *Client) exited(e rundir.Exit) Event {
	return Event{ID: c.dir.ID(), At: e.ExitedAt, Type: Exited, Exit: &e}
}
