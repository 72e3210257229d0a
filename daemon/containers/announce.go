package containers

import (
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// The events of a container, in the order of their numbers in the CRI. One that ends
// without having run has no started event, and one that is removed without that none of
// its end.
const (
	created = runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT
	started = runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT
	stopped = runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
	deleted = runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT
)

// happened is the event after the last one that has happened, but for the removal. Nobody
// knows of a container that is still being created.
func (c *Container) happened() (next runtimeapi.ContainerEventType) {
	s := c.Seen()
	switch {
	case c.Record().Phase == records.ContainerCreating:
		return created
	case s.Exit != nil:
		return stopped + 1
	case s.Phase == rundir.PhaseRunning && !s.Guessed:
		return started + 1
	}
	return created + 1
}

// announce tells subscribers of all that has happened before next and that they have not
// been told of.
func (c *Container) announce(next runtimeapi.ContainerEventType) {
	c.seeing.Lock()
	defer c.seeing.Unlock()
	c.announceLocked(next)
}

// announceLocked is announce for the holder of seeing.
func (c *Container) announceLocked(next runtimeapi.ContainerEventType) {
	rec, ran := c.Record(), c.ran()
	if c.announced == created && rec.Phase == records.ContainerRemoving {
		return // whoever asked for it never got it
	}
	for ; c.announced < next; c.announced++ {
		c.noteEvent(c.announced)
		switch t := c.announced; {
		case c.m.Announce == nil,
			rec.Init && t != stopped,
			t == started && !ran,
			t == stopped && !ran && rec.Phase == records.ContainerRemoving:
		default:
			c.m.Announce(c, t)
		}
	}
}

// ran says whether the container has been started.
func (c *Container) ran() bool {
	s := c.Seen()
	return !s.StartedAt.IsZero() || s.Exit != nil && !s.Exit.StartedAt.IsZero() ||
		s.Phase == rundir.PhaseRunning && !s.Guessed
}

// journal keeps what has happened.
func (c *Container) journal(what records.What, at time.Time, format string, args ...any) {
	if c.m.Journal == nil {
		return
	}
	rec := c.Record()
	c.m.Journal(records.Entry{
		At:   at,
		ID:   rec.ID,
		Pod:  rec.PodID,
		Name: c.name(),
		What: what,
		Text: fmt.Sprintf(format, args...),
	})
}

// noteEvent notes an event. That of a pod's init which matters is its end.
func (c *Container) noteEvent(t runtimeapi.ContainerEventType) {
	rec, s := c.Record(), c.Seen()
	switch {
	case rec.Init && t != stopped:
	case t == created:
		c.journal(records.Created, time.Now(), "image %s", rec.Config.M.GetImage().GetImage())
	case t == started && c.ran():
		c.journalStart()
	case t == stopped && s.Exit != nil:
		c.journalExit()
	case t == deleted:
		c.journal(records.Removed, time.Now(), "")
	}
}

// JournalMissing keeps what a daemon before has not come to keep, and what has happened
// while none ran. has says what is there.
func (c *Container) JournalMissing(has func(records.What) bool) {
	rec := c.Record()
	if !has(records.Asked) && !rec.Init {
		c.journal(records.Asked, rec.CreatedAt, "CreateContainer")
	}
	if !has(records.Started) && !rec.Init && c.ran() {
		c.journalStart()
	}
	if !has(records.Exited) && c.Seen().Exit != nil {
		c.journalExit()
	}
}

func (c *Container) journalStart() {
	s := c.Seen()
	at := s.StartedAt
	if at.IsZero() && s.Exit != nil {
		at = s.Exit.StartedAt
	}
	c.journal(records.Started, at, "")
}

func (c *Container) journalExit() {
	exit := c.Seen().Exit
	var status *rundir.Status
	if s, err := c.dir.ReadStatus(); err == nil {
		status = &s
	}
	c.journal(records.Exited, exit.ExitedAt, "%s", records.Ending(exit, status))
}
