package pods

import (
	"context"

	"github.com/holdfast-cri/holdfast/proto/stream"
)

// PortForward gives the address at which a client connects to ports of a pod, on the
// loopback of its network namespace; ports is empty where it says later which.
func (m *Manager) PortForward(ctx context.Context, id string, ports []int32) (string, error) {
	p, err := m.Find(id)
	if err != nil {
		return "", err
	}
	if err := p.Ready(); err != nil {
		return "", err
	}
	return m.Sessions.URL(ctx, stream.Request{
		Kind:  stream.PortForward,
		ID:    p.ID(),
		Netns: p.Record().Namespaces.Net,
		Ports: ports,
	})
}
