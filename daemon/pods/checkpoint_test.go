package pods_test

import (
	"errors"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Checkpoints are refused by the field that is wrong.
func TestCheckpointRefuses(t *testing.T) {
	b := newBed(t)
	pod := b.RunPod(t, "pod")
	c := b.Run(t, pod, fake.ContainerConfig("c"))
	other := b.RunPod(t, "other")
	stranger := b.Run(t, other, fake.ContainerConfig("c"))
	options := map[string]string{"x": "y"}
	for _, c := range []struct {
		field   string
		ids     []string
		options map[string]string
	}{
		{"options", []string{c}, options},
		{"container_ids", nil, nil},
		{"container_ids[1]", []string{c, c}, nil},
		{"container_ids[0]", []string{stranger}, nil},
	} {
		err := b.Pods.Checkpoint(t.Context(), &runtimeapi.CheckpointPodRequest{
			PodSandboxId: pod,
			OutputPath:   t.TempDir(),
			ContainerIds: c.ids,
			Options:      c.options,
		})
		if !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), c.field+": ") {
			t.Errorf("checkpoint: %v, want one about %s", err, c.field)
		}
	}
	for _, c := range []struct {
		field   string
		configs []*runtimeapi.ContainerConfig
		options map[string]string
	}{
		{"options", []*runtimeapi.ContainerConfig{{}}, options},
		{"container_configs", nil, nil},
		{"checkpoint_path", []*runtimeapi.ContainerConfig{{}}, nil},
	} {
		_, err := b.Pods.Restore(t.Context(), &runtimeapi.RestorePodRequest{
			CheckpointPath:   t.TempDir(),
			Config:           fake.PodConfig("restored"),
			ContainerConfigs: c.configs,
			Options:          c.options,
		})
		if !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), c.field+": ") {
			t.Errorf("restore: %v, want one about %s", err, c.field)
		}
	}
	b.remove(pod)
	b.remove(other)
	b.clean()
}
