package pods_test

import (
	"errors"
	"os"
	"path/filepath"
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
	// One whose /dev/shm is a directory, which is found when the pod is there already.
	saved := t.TempDir()
	const manifest = `{"version": 1, "containers": [{"name": "c", "config": {}}]}`
	if err := errors.Join(os.WriteFile(filepath.Join(saved, "pod.json"), []byte(manifest), 0o600),
		os.Mkdir(filepath.Join(saved, "shm.tar"), 0o700)); err != nil {
		t.Fatal(err)
	}
	restored := fake.PodConfig("restored")
	restored.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_POD
	named := &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c"}}
	for _, c := range []struct {
		field   string
		path    string
		configs []*runtimeapi.ContainerConfig
		options map[string]string
	}{
		{"options", saved, []*runtimeapi.ContainerConfig{named}, options},
		{"container_configs", saved, nil, nil},
		{"checkpoint_path", t.TempDir(), []*runtimeapi.ContainerConfig{named}, nil},
		{"checkpoint_path", saved, []*runtimeapi.ContainerConfig{named}, nil},
	} {
		_, err := b.Pods.Restore(t.Context(), &runtimeapi.RestorePodRequest{
			CheckpointPath:   c.path,
			Config:           restored,
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
