package pods

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
)

// Pods whose names join to the same text are two.
func TestNameOf(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range []*runtimeapi.PodSandboxMetadata{
		{Namespace: "a", Name: "b/c"},
		{Namespace: "a/b", Name: "c"},
		{Namespace: "a", Name: `b"/"c`},
		{Namespace: `a"/"b`, Name: "c"},
		{Namespace: "a", Name: `b" uid "c`, Uid: "d"},
		{Namespace: "a", Name: "b", Uid: `c" uid "d`},
		{Namespace: "a", Name: "b", Attempt: 11},
		{Namespace: "a", Name: "b", Uid: " attempt 1", Attempt: 1},
	} {
		rec := &records.Pod{Config: records.Message[*runtimeapi.PodSandboxConfig]{
			M: &runtimeapi.PodSandboxConfig{Metadata: m},
		}}
		name := NameOf(rec).Name
		if seen[name] {
			t.Errorf("%s stands for two pods", name)
		}
		seen[name] = true
	}
}
