package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// Ioctls of linux/fs.h, see fsfreeze(8).
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// frozenDisk mounts an ext4 of its own. The functions let it stand still, and go on.
func frozenDisk(t *testing.T) (dir string, freeze, thaw func()) {
	t.Helper()
	dir = harness.Disk(t, 256)
	disk, err := os.Open(dir)
	check(t, err)
	set := func(request uint) error { return unix.IoctlSetInt(int(disk.Fd()), request, 0) }
	thaw = func() { set(fiThaw) } // a second time is an error, and no more
	t.Cleanup(func() {
		thaw()
		disk.Close()
	})
	return dir, func() {
		if err := set(fiFreeze); err != nil {
			t.Fatalf("cannot freeze %s: %v", dir, err)
		}
	}, thaw
}

// While the disks of root and state stand still, and calls that change something
// with them, all that the kubelet reads is answered.
func TestReadersDoNotWaitForTheDisk(t *testing.T) {
	dir, freeze, thaw := frozenDisk(t)
	address := fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t))
	n := harness.New(t, harness.Options{
		Root:   filepath.Join(dir, "root"),
		State:  filepath.Join(dir, "state"),
		Config: fmt.Sprintf("[metrics]\naddress = %q\n", address),
	})
	pod := n.RunPod("frozen")
	running := pod.Run("running", []string{"sleep", "1000"})
	removed := pod.Run("removed", []string{"sleep", "1000"})

	freeze()
	writers := map[string]func(context.Context) error{
		"RunPodSandbox": func(ctx context.Context) error {
			_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.PodConfig("second")})
			return err
		},
		"RemoveContainer": func(ctx context.Context) error {
			_, err := n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: removed.ID})
			return err
		},
		"RemoveImage": func(ctx context.Context) error {
			_, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: harness.Image}})
			return err
		},
	}
	ended := make(chan string, len(writers))
	ctx, cancel := harness.Deadline()
	defer cancel()
	for name, f := range writers {
		go func() { ended <- fmt.Sprintf("%s: %v", name, f(ctx)) }()
	}
	select {
	case s := <-ended:
		t.Errorf("a call that writes did not wait for the disk: %s", s)
	case <-time.After(300 * time.Millisecond): // they are at it by now, most likely
	}
	callAll(t, reads(n, pod.ID, running.ID))
	callAll(t, readsOfStats(n, running.ID))
	if s := scrape(t, address); s.value("holdfast_pods", "state", "ready") != 1 {
		t.Errorf("the metrics have %v ready pods", s.value("holdfast_pods", "state", "ready"))
	}

	thaw()
	for range writers {
		if s := <-ended; len(s) < 5 || s[len(s)-5:] != "<nil>" {
			t.Error(s)
		}
	}
}

func callAll(t *testing.T, calls map[string]func(context.Context) error) {
	t.Helper()
	for name, f := range calls {
		ctx, cancel := harness.Deadline()
		if err := f(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
}

func readsOfStats(n *harness.Node, id string) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"ContainerStats": func(ctx context.Context) error {
			_, err := n.Runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: id})
			return err
		},
		"ListContainerStats": func(ctx context.Context) error {
			r, err := n.Runtime.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
			if err == nil && (len(r.Stats) != 2 || r.Stats[0].WritableLayer == nil) {
				err = fmt.Errorf("got %v", r.Stats)
			}
			return err
		},
		"ListPodSandboxStats": func(ctx context.Context) error {
			r, err := n.Runtime.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{})
			if err == nil && (len(r.Stats) != 1 || r.Stats[0].GetLinux().GetNetwork() == nil) {
				err = fmt.Errorf("got %v", r.Stats)
			}
			return err
		},
		"ListPodSandboxMetrics": func(ctx context.Context) error {
			_, err := n.Runtime.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
			return err
		},
	}
}

func reads(n *harness.Node, podID, id string) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"Status": func(ctx context.Context) error {
			_, err := n.Runtime.Status(ctx, &cri.StatusRequest{})
			return err
		},
		"ListPodSandbox": func(ctx context.Context) error {
			r, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
			if err == nil && len(r.Items) != 1 {
				err = fmt.Errorf("got %v", r.Items)
			}
			return err
		},
		"ListContainers": func(ctx context.Context) error {
			r, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
			if err == nil && len(r.Containers) != 2 {
				err = fmt.Errorf("got %v", r.Containers)
			}
			return err
		},
		"ContainerStatus": func(ctx context.Context) error {
			_, err := n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
			return err
		},
		"PodSandboxStatus": func(ctx context.Context) error {
			_, err := n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: podID})
			return err
		},
		"ListImages": func(ctx context.Context) error {
			_, err := n.Images.ListImages(ctx, &cri.ListImagesRequest{})
			return err
		},
		"ImageStatus": func(ctx context.Context) error {
			_, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: harness.Image}})
			return err
		},
		"ImageFsInfo": func(ctx context.Context) error {
			_, err := n.Images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
			return err
		},
	}
}
