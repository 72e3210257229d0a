package kubelet

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

// Pods of all kinds, with a runtime that nobody disturbs: and then the kubelet has
// nothing to complain about.
func TestPods(t *testing.T) {
	k := startKubelet(t, harness.New(t))
	k.runRows()
	k.finish()
	k.checkComplaints()
}

// The same with a runtime that is killed and started again all the while.
func TestPodsWhileTheRuntimeIsKilled(t *testing.T) {
	k := startKubelet(t, harness.New(t))
	k.killRuntime(2 * time.Second)
	k.runRows()
	k.finish()
}

// The same with the features of the kubelet that need newer calls of the runtime, as
// far as it has them.
func TestPodsWithGates(t *testing.T) {
	n := harness.New(t)
	var on []string
	for _, g := range gates {
		missing := slices.DeleteFunc(slices.Clone(g.calls), func(c call) bool { return hasCall(n, c) })
		if len(missing) == 0 {
			on = append(on, g.names...)
		} else {
			t.Logf("%v stay off: the runtime has %d of %d calls", g.names, len(g.calls)-len(missing), len(g.calls))
		}
	}
	if len(on) == 0 {
		t.Skip("the runtime has none of the calls")
	}
	k := startKubelet(t, n, on...)
	k.runRows()
	if slices.Contains(on, statsGate) {
		k.checkFigures()
	}
	k.finish()
	k.checkComplaints()
}

// enoughKills is how often the runtime is killed at least.
const enoughKills = 10

// killRuntime has the runtime killed once in a while, until stopKilling is called.
func (k *kubelet) killRuntime(every time.Duration) {
	k.killing = true
	killer := machine.KillRuntime(k.t, k.n, every)
	stop := sync.OnceFunc(killer.Stop)
	k.t.Cleanup(stop)
	k.stopKilling = func() {
		harness.Eventually(k.t, patience, "the runtime was killed often enough", func() bool {
			return killer.Kills() >= enoughKills
		})
		stop()
		k.t.Logf("the runtime was killed %d times", killer.Kills())
	}
}

// runRows runs all pods at a time, and looks at what became of them when all has been
// checked: nothing was started again that had no reason.
func (k *kubelet) runRows() {
	k.t.Helper()
	for _, r := range rows {
		k.apply(r.name, r.spec)
	}
	k.t.Run("pods", func(t *testing.T) {
		for _, r := range rows {
			t.Run(r.name, func(t *testing.T) {
				t.Parallel()
				r.check(k.with(t))
			})
		}
	})
	if k.killing {
		k.stopKilling()
	}
	for _, r := range rows {
		if !r.gone {
			k.checkRestarts(r)
		}
	}
	k.checkObjects()
}

// checkRestarts fails if containers were started again without a reason. One is that
// the runtime died during StartContainer: no runtime can tell the kubelet then that it
// has not started the container.
func (k *kubelet) checkRestarts(r row) {
	k.t.Helper()
	p := k.pod(r.name)
	if p == nil {
		k.t.Errorf("there is no pod %s", r.name)
		return
	}
	var restarts int32
	for _, c := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		restarts += c.RestartCount
	}
	want := r.restarts
	if k.killing {
		want += k.failedStarts(p.Name)
	}
	if restarts < r.restarts || restarts > want {
		k.t.Errorf("containers of %s were started again %d times, want %d to %d", r.name, restarts, r.restarts, want)
	}
}

// failedStarts is how many starts in a pod have failed because the runtime was gone.
func (k *kubelet) failedStarts(pod string) (n int32) {
	k.t.Helper()
	for _, line := range k.complaints() {
		if strings.Contains(line, `"Unhandled Error"`) && strings.Contains(line, "start failed in pod "+pod+"_") &&
			strings.Contains(line, ": RunContainerError: ") && !strings.Contains(line, "cannot run:") {
			n++
		}
	}
	return n
}

// checkObjects looks at the runtime's side: no pod had to have a second sandbox, and
// none has lost its first. The kubelet stops that of a pod that has come to its end.
func (k *kubelet) checkObjects() {
	k.t.Helper()
	for _, s := range k.sandboxes() {
		p := k.pod(strings.TrimSuffix(s.Metadata.Name, "-"+nodeName))
		ended := p == nil || p.Status.Phase == core.PodFailed || p.Status.Phase == core.PodSucceeded
		if s.Metadata.Attempt != 0 || s.State != cri.PodSandboxState_SANDBOX_READY && !ended {
			k.t.Errorf("the sandbox of %s is %s, at attempt %d", s.Metadata.Name, s.State, s.Metadata.Attempt)
		}
	}
	k.checkImages()
}

// checkImages: the name is what the user wrote, though the kubelet creates by id. The
// id is one of the list of images, or the kubelet takes the image for unused.
func (k *kubelet) checkImages() {
	k.t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	images, err := k.n.Images.ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		k.t.Fatalf("ListImages: %v", err)
	}
	refs := map[string][]string{} // by id
	for _, i := range images.Images {
		refs[i.Id] = i.RepoDigests
	}
	list, err := k.n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		k.t.Fatalf("ListContainers: %v", err)
	}
	for _, c := range list.Containers {
		r, err := k.n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.Id})
		if err != nil {
			k.t.Fatalf("ContainerStatus: %v", err)
		}
		s := r.Status
		if c.Image.GetImage() != harness.Image || s.Image.GetImage() != harness.Image || c.ImageId != s.ImageId ||
			c.ImageRef != s.ImageRef || !slices.Contains(refs[c.ImageId], c.ImageRef) {
			k.t.Errorf("%s has the image %v, id %q, ref %q; in the list %v, %q, %q", c.Metadata.Name, s.Image,
				s.ImageId, s.ImageRef, c.Image, c.ImageId, c.ImageRef)
		}
	}
}

// harmless are complaints that have another cause than the runtime.
var harmless = []string{
	// The kubelet's own doing, and its lack of an API server.
	"Flexvolume plugin directory",
	"kubernetes.io/csi: kubeclient not set",
	"Skipping CSINode initialization",
	`"failed to check if node is newer; using informer node"`,
	`"Failed to read data from checkpoint" err="checkpoint is not found"`,
	"container runtime status check may not have completed yet", // when it starts
	"PLEG is not healthy: pleg has yet to be successful",
	`"Image garbage collection failed once. Stats initialization may not have completed yet"`,
	`"Could not get metadata" err="stat `, // it lists the manifests while some are removed
	`"Unable to process watch event" err="the pod with key `,
	`"Error on socket receive"`, // of its WebSocket library, when a client has gone
	// The machine: no CAP_SYS_RESOURCE, and tests that run in different cgroups of v1.
	`"Failed to set rlimit on max file handles"`,
	`"Failed to find cgroups of kubelet"`,
	// Its cAdvisor knows the sockets of two runtimes and asks no other.
	`err="no imagefs label for configured runtime"`,
	`"Partial failure issuing cadvisor.ContainerInfoV2"`,       // it has not looked at all cgroups yet
	`"Error proxying data from backend to client"`,             // the client has gone
	`err="rpc error: code = Canceled desc = context canceled"`, // it ends
	// So it asks whether the runtime has a call.
	`"PodSandbox from runtime service failed" err="rpc error: code = InvalidArgument desc = pod_sandbox_id: is empty"`,
	// The row typo.
	"/no/such/command",
	// It asks for a container that it has had removed a moment ago.
	`"ContainerStatus from runtime service failed" err="rpc error: code = NotFound`,
}

// checkComplaints fails if the kubelet has warned of something that is not known.
func (k *kubelet) checkComplaints() {
	k.t.Helper()
	known := harmless
	if !hasCall(k.n, containerStats) {
		known = append(slices.Clone(known), "method ListContainerStats not implemented")
	}
	lines := slices.DeleteFunc(k.complaints(), func(line string) bool {
		return slices.ContainsFunc(known, func(text string) bool { return strings.Contains(line, text) })
	})
	if len(lines) > 0 {
		k.t.Errorf("the kubelet complains %d times:\n%s", len(lines), strings.Join(lines[:min(20, len(lines))], "\n"))
	}
}
