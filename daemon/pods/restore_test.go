package pods

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// What is no checkpoint, or not that of the request, is refused, with its field where it is
// one of the request's.
func TestSavedPodRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := openCheckpoint(dir); !errors.Is(err, kind.Invalid) || !strings.Contains(err.Error(), "pod.json") {
		t.Errorf("an empty directory: %v", err)
	}
	const pod = `{"version": 1, "handler": "h", "containers": [
		{"name": "a", "archive": "absent", "config": {}}, {"name": "b", "archive": "../b", "config": {}}]}`
	must.Succeed(t, os.WriteFile(filepath.Join(dir, manifestName), []byte(pod), 0o600))
	s, err := openCheckpoint(dir)
	must.Succeed(t, err)
	defer s.dir.Close()
	for _, c := range s.Containers {
		if _, err := s.archive(c.Archive); !errors.Is(err, kind.Invalid) || !strings.Contains(err.Error(), c.Archive) {
			t.Errorf("the archive %s: %v", c.Archive, err)
		}
	}
	named := func(names ...string) (list []*runtimeapi.ContainerConfig) {
		for _, n := range names {
			list = append(list, &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: n}})
		}
		return list
	}
	other := named("a", "b")
	other[1].Command = []string{"x"}
	for _, c := range []struct {
		field, handler string
		containers     []*runtimeapi.ContainerConfig
	}{
		{"", "h", named("b", "a")},
		{"runtime_handler", "", named("a", "b")},
		{"container_configs", "h", named("a")},
		{"container_configs[1].metadata.name", "h", named("a", "")},
		{"container_configs[1].metadata.name", "h", named("a", "a")},
		{"container_configs[0].metadata.name", "h", named("x", "b")},
		{"container_configs[1].command", "h", other},
	} {
		err := s.matches(&runtimeapi.RestorePodRequest{RuntimeHandler: c.handler, ContainerConfigs: c.containers})
		if c.field == "" && err == nil {
			continue
		}
		if c.field == "" || !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), c.field+": ") {
			t.Errorf("got %v, want one about %q", err, c.field)
		}
	}
}
