package client

import (
	"context"
	"strings"
	"time"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// EventType is what an event is about.
type EventType string

// The types of events. A younger shim may know others.
const (
	Created  EventType = "created"
	Started  EventType = "started"
	OOM      EventType = "oom"
	Stopping EventType = "stopping"
	Exited   EventType = "exited" // the last one of a container
)

// Event is something that happened to a container.
type Event struct {
	Seq  uint64 // from 1, without gaps
	At   time.Time
	Type EventType
	Init rundir.Process
	// Exit is set by Exited. When the container was started is not in it.
	Exit *rundir.Exit
}

// Events gives the events after a number, waiting up to wait for the first one.
// A shim waits for a minute at most.
func (c *Client) Events(ctx context.Context, after uint64, wait time.Duration) ([]Event, error) {
	resp, err := call(ctx, c, wait+quick, proto.ShimService.Events, c.eventsRequest(after, wait))
	return events(resp), err
}

func (c *Client) eventsRequest(after uint64, wait time.Duration) *proto.EventsRequest {
	return &proto.EventsRequest{Id: c.dir.ID(), After: after, WaitMs: uint32(wait.Milliseconds())}
}

func events(resp *proto.EventsResponse) []Event {
	var list []Event
	for _, e := range resp.GetEvents() {
		list = append(list, Event{
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
			for _, e := range events(resp) {
				after = e.Seq
				f(e)
				if e.Type == Exited {
					return nil
				}
			}
		}
	})
}
