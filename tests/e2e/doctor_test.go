package e2e

import (
	"net/http"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// In a life of pods of each mode holdfastctl doctor knows an owner of everything, with the
// daemon alive and killed.
func TestDoctorKnowsAllOwners(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	look := func(when string) {
		t.Helper()
		for _, state := range []string{"alive", "killed", "alive again"} {
			switch state {
			case "killed":
				n.Kill()
			case "alive again":
				n.Start()
			}
			if found := n.Doctor(); len(found) > 0 {
				t.Errorf("%s, with the daemon %s:\n  %s", when, state, strings.Join(found, "\n  "))
			}
		}
	}
	look("without a pod")

	plain := n.RunPod("plain")
	look("a pod without containers")
	created := plain.Create("created", []string{"sleep", "100000"})
	running := plain.Run("running", []string{"sleep", "100000"})
	plain.Run("ended", []string{"sh", "-c", "exit 3"}).WaitExited(patience)
	look("containers created, running, ended")

	host := n.RunPod("host", podWith(&cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE}))
	host.Run("c", []string{"sleep", "100000"}, containerWith(&cri.NamespaceOption{
		Network: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE,
	}))
	share := &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}
	shared := n.RunPod("shared", podWith(share))
	shared.Run("c", []string{"sleep", "100000"}, containerWith(share))
	if _, older := harness.KernelBefore(6, 3); !older {
		o := usernsOptions(1 << 20)
		n.RunPod("mapped", podWith(o))
	}
	n.RunPod("volume").Run("c", []string{"sleep", "100000"}, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{
			ContainerPath: "/image",
			Image:         &cri.ImageSpec{Image: harness.Image},
			Readonly:      true,
		}}
	})
	look("pods of each mode")

	done := make(chan struct{})
	go func() {
		defer close(done)
		running.Exec(0, "sleep", "100000") // ends with the daemon, or the container
	}()
	look("an exec under way")
	created.Start()
	running.Stop(0)
	<-done
	created.Remove()
	plain.Remove()
	look("a pod removed")
	n.RemoveAllPods()
	n.CheckClean()
}

// What a pull has brought so far belongs to it, also after it was cut short.
func TestDoctorKnowsPulls(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	layer, err := harness.MakeLayer(map[string]string{"file": strings.Repeat("x", 1<<16)})
	check(t, err)
	ref := n.Registry.Host + "/slow:1"
	_, err = n.Registry.Push(ref, ocispec.ImageConfig{}, layer)
	check(t, err)
	reached, release := make(chan struct{}, 100), make(chan struct{})
	served := 0 // guarded by the lock of the registry
	n.Registry.Break(func(r *http.Request) bool {
		if blobs := strings.Contains(r.URL.Path, "/blobs/"); r.Method == http.MethodGet && blobs {
			if served++; served > 1 { // a layer, or the config
				reached <- struct{}{}
				<-release
			}
		}
		return false
	})
	pulled := make(chan error, 1)
	go func() {
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
		pulled <- err
	}()
	<-reached
	for _, kill := range []bool{false, true} {
		if kill {
			n.Kill()
		}
		if found := n.Doctor(); len(found) > 0 {
			t.Errorf("during a pull, killed %v:\n  %s", kill, strings.Join(found, "\n  "))
		}
	}
	close(release)
	<-pulled
	n.Start()
	n.Pull(ref)
	n.CheckOwners()
}
