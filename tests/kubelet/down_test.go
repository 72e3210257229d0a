package kubelet

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	core "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// downSpecs are pods of which some end while the runtime is down: when the file
// /marks/go is there, or killed by the test.
var downSpecs = map[string]string{
	"stays": `
  containers: [{name: main, image: IMAGE, command: [sleep, "1000"]}]
`,
	"killed": `
  restartPolicy: Never
  containers: [{name: main, image: IMAGE, command: [sleep, "1000"]}]
`,
	"seven": `
  restartPolicy: Never
  volumes: [{name: marks, hostPath: {path: MARKS}}]
  containers:
  - name: main
    image: IMAGE
    command:
    - sh
    - -c
    - while [ ! -e /marks/go ]; do sleep 0.1; done; echo last words; touch /marks/seven; exit 7
    volumeMounts: [{name: marks, mountPath: /marks}]
`,
	"again": `
  volumes: [{name: marks, hostPath: {path: MARKS}}]
  containers:
  - name: main
    image: IMAGE
    command:
    - sh
    - -c
    - |
      [ -e /marks/go ] && exec sleep 1000
      while [ ! -e /marks/go ]; do sleep 0.1; done
      touch /marks/again
      exit 8
    volumeMounts: [{name: marks, mountPath: /marks}]
`,
}

// What ends while the runtime is down is shown with its own exit code, its own time and
// its last words; what runs is left alone.
func TestRuntimeIsDown(t *testing.T) {
	k := startKubelet(t, harness.New(t))
	for name, spec := range downSpecs {
		k.apply(name, spec)
	}
	ids := map[string]string{}
	for name := range downSpecs {
		ids[name] = containerID(k.ready(name))
	}
	sandboxes := k.sandboxIDs()

	victim := (&harness.Container{
		N:      k.n,
		ID:     ids["killed"],
		Config: &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: "killed"}},
	}).Info().PID
	k.n.Kill()
	down := time.Now().Truncate(time.Second) // a pod's status has whole seconds
	k.endSome(victim)
	up := time.Now()
	k.n.Start()

	check := func(end *core.ContainerStateTerminated, code int32) {
		t.Helper()
		wantEnd(t, end, code, "Error")
		if end != nil && (end.FinishedAt.Time.Before(down) || end.FinishedAt.Time.After(up)) {
			t.Errorf("it ended at %v, want a time from %v to %v", end.FinishedAt, down, up)
		}
	}
	check(k.exited("seven", "main"), 7)
	check(k.exited("killed", "main"), 137)
	p := k.until("again", "the container runs again", func(p *core.Pod) bool {
		return container(p, "main").RestartCount == 1 && container(p, "main").State.Running != nil
	})
	check(container(p, "main").LastTerminationState.Terminated, 8)
	k.logged("seven", "main", "last words\n")
	k.checkUntouched("stays", ids)

	// Now the kubelet is away for a while, too.
	ids["again"] = containerID(k.ready("again"))
	k.n.Kill()
	k.stop()
	k.n.Start()
	k.start()
	for _, name := range []string{"stays", "again"} {
		k.checkUntouched(name, ids)
	}
	if now := k.sandboxIDs(); !maps.Equal(now, sandboxes) {
		t.Errorf("the sandboxes were %v and are %v", sandboxes, now)
	}
	k.finish()
}

// endSome ends containers while the runtime is down. It returns when that is done and
// the kubelet has seen that the runtime is gone.
func (k *kubelet) endSome(victim int) {
	k.t.Helper()
	before := len(k.complaints())
	if err := unix.Kill(victim, unix.SIGKILL); err != nil {
		k.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(k.n.Path("marks"), "go"), nil, 0o644); err != nil {
		k.t.Fatal(err)
	}
	harness.Eventually(k.t, patience, "the containers have ended, and the kubelet misses the runtime", func() bool {
		for _, name := range []string{"seven", "again"} {
			if _, err := os.Stat(filepath.Join(k.n.Path("marks"), name)); err != nil {
				return false
			}
		}
		return len(k.complaints()) > before
	})
}

// checkUntouched fails unless a pod is ready with the container that it had.
func (k *kubelet) checkUntouched(name string, ids map[string]string) {
	k.t.Helper()
	p := k.ready(name)
	if now := containerID(p); now != ids[name] {
		k.t.Errorf("the container of %s was %s and is %s: %+v", name, ids[name], now, p.Status)
	}
}

// containerID is the id of a pod's container main in the runtime.
func containerID(p *core.Pod) string { return filepath.Base(container(p, "main").ContainerID) }

func (k *kubelet) sandboxIDs() map[string]string {
	k.t.Helper()
	m := map[string]string{}
	for _, s := range k.sandboxes() {
		m[s.Id] = s.Metadata.Name
	}
	return m
}
