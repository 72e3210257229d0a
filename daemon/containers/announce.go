package containers

import (
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
