package pods

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/records"
)

// The events of a pod are named like those of containers, and have its id as that of the
// container. A pod is created and started at once.
const (
	created = runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT
	stopped = runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
	deleted = runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT
)

// AnnounceContainer tells subscribers what has happened to a container. The end of its
// init is the end of a pod.
func (m *Manager) AnnounceContainer(c *containers.Container, t runtimeapi.ContainerEventType) {
	rec := c.Record()
	m.mu.Lock()
	p := m.all[rec.PodID]
	m.mu.Unlock()
	switch {
	case !rec.Init:
		m.publish(func() *runtimeapi.ContainerEventResponse { return p.Event(rec.ID, t) })
	case p != nil && p.Record().Phase != records.PodCreating:
		p.announce(stopped)
	}
}

// announce tells subscribers of all that has happened to the pod, up to last, and that
// they have not been told of.
func (p *Pod) announce(last runtimeapi.ContainerEventType) {
	p.announcing.Lock()
	defer p.announcing.Unlock()
	if p.announced == created && p.Record().Phase != records.PodReady {
		return // whoever asked for it never got it
	}
	for ; p.announced <= last; p.announced++ {
		t := p.announced
		if what, ok := journaled[t]; ok {
			p.journal(what, time.Now(), "")
		}
		p.m.publish(func() *runtimeapi.ContainerEventResponse { return p.Event(p.ID(), t) })
	}
}

func (m *Manager) publish(describe func() *runtimeapi.ContainerEventResponse) {
	if m.Publish != nil {
		m.Publish(describe)
	}
}

// Event describes an event with all that is so now. Of a pod that is not known, nil, there
// is nothing to say.
func (p *Pod) Event(id string, t runtimeapi.ContainerEventType) *runtimeapi.ContainerEventResponse {
	e := &runtimeapi.ContainerEventResponse{
		ContainerId:        id,
		ContainerEventType: t,
		// Before the states are read: they are at least as new as it says.
		CreatedAt: time.Now().UnixNano(),
	}
	if p == nil {
		return e
	}
	if list, ok := p.statuses(); ok {
		e.PodSandboxStatus, e.ContainersStatuses = p.status(), list
	}
	return e
}

// maxStatuses bounds the statuses in one message, in bytes. A client takes in 16 MiB.
const maxStatuses = 8 << 20

// statuses are those of the pod's containers. They are not given where they are more than
// a message should have.
func (p *Pod) statuses() ([]*runtimeapi.ContainerStatus, bool) {
	list := p.m.Containers.Statuses(p.ID())
	size := 0
	for _, s := range list {
		if size += proto.Size(s); size > maxStatuses {
			return nil, false
		}
	}
	return list, true
}

// journaled are the events of pods that the journal keeps.
var journaled = map[runtimeapi.ContainerEventType]records.What{
	created: records.Created,
	stopped: records.Stopped,
	deleted: records.Removed,
}

// journal keeps what has happened.
func (p *Pod) journal(what records.What, at time.Time, format string, args ...any) {
	if p.m.Journal == nil {
		return
	}
	m := p.Record().Config.M.GetMetadata()
	p.m.Journal(records.Entry{
		At:   at,
		ID:   p.ID(),
		Name: m.GetNamespace() + "/" + m.GetName(),
		What: what,
		Text: fmt.Sprintf(format, args...),
	})
}
