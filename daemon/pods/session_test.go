package pods_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/stream"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestPortForward(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	id := b.RunPod(t, "pod")
	cfg := fake.PodConfig("host")
	cfg.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
		NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE},
	}}
	host, err := b.Pods.Run(ctx, cfg, "")
	must.Succeed(t, err)
	p, err := b.Pods.Find(id)
	must.Succeed(t, err)
	netns := p.Record().Namespaces.Net
	if netns == "" {
		t.Fatal("the pod has no network of its own")
	}
	for _, c := range []struct {
		id    string
		ports []int32
		want  stream.Request
	}{
		{id[:12], []int32{80, 443}, stream.Request{
			Kind:  stream.PortForward,
			ID:    id,
			Netns: netns,
			Ports: []int32{80, 443},
		}},
		{id, nil, stream.Request{Kind: stream.PortForward, ID: id, Netns: netns}},
		{host, nil, stream.Request{Kind: stream.PortForward, ID: host}},
	} {
		url, err := b.Pods.PortForward(ctx, c.id, c.ports)
		asked := b.Sessions.Asked()
		if err != nil || url == "" || !reflect.DeepEqual(asked, []stream.Request{c.want}) {
			t.Errorf("%s: %q, %v\n%+v, want\n%+v", c.id, url, err, asked, c.want)
		}
	}
	must.Succeed(t, b.Pods.Stop(ctx, id))
	for id, want := range map[string]error{id: kind.State, "nobody": kind.NotFound} {
		_, err := b.Pods.PortForward(ctx, id, nil)
		if !errors.Is(err, want) || !strings.HasPrefix(err.Error(), "pod_sandbox_id: ") || b.Sessions.Asked() != nil {
			t.Errorf("%s: %v, want %v", id, err, want)
		}
	}
}
