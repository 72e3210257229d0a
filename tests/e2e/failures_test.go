package e2e

import (
	"crypto/rand"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A plugin at the end of the chain fails when the others have done their work.
func TestPluginFails(t *testing.T) {
	t.Parallel()
	n := harness.New(t, harness.Options{Plugins: map[string]string{"failing": `#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}' ;;
ADD) echo '{"cniVersion": "1.0.0", "code": 101, "msg": "failing on purpose"}'; exit 1 ;;
esac
`}})
	ctx, cancel := harness.Deadline()
	defer cancel()
	for range 2 {
		_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.PodConfig("unlucky")})
		if err == nil || !strings.Contains(err.Error(), "failing on purpose") {
			t.Errorf("the error is %v, want the plugin's words in it", err)
		}
	}
	n.CheckClean()

	// The host's network needs no plugin.
	n.RunPod("host", func(c *cri.PodSandboxConfig) { hostNetwork(c) }).Remove()
	n.CheckClean()
}

// A plugin that hangs holds up neither other pods nor the next daemon.
func TestPluginHangs(t *testing.T) {
	t.Parallel()
	seconds := number()
	n := harness.New(t, harness.Options{Plugins: map[string]string{"hanging": `#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}' ;;
ADD) echo $$ >"${0%/*}/hangs"; exec sleep ` + seconds + ` ;;
esac
`}})
	go func() {
		ctx, cancel := harness.Deadline()
		defer cancel()
		n.Runtime.RunPodSandbox(ctx,
			&cri.RunPodSandboxRequest{Config: n.PodConfig("hangs")}) // fails: its daemon is killed
	}()
	harness.Eventually(t, patience, "the plugin hangs", func() bool {
		_, err := os.Stat(n.Path("plugins/hangs"))
		return err == nil
	})
	other := n.RunPod("other", func(c *cri.PodSandboxConfig) { hostNetwork(c) })
	n.Restart()
	if s := other.Status(); s.State != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("the other pod is %s", s.State)
	}
	n.RemoveAllPods()
	for _, pid := range find("sleep\x00" + seconds) { // the plugin itself outlives the daemon that called it
		unix.Kill(pid, unix.SIGKILL)
	}
	n.CheckClean()
}

func hostNetwork(c *cri.PodSandboxConfig) {
	c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}}
}

// The OCI runtime refuses, or went missing.
func TestRuntimeFails(t *testing.T) {
	t.Parallel()
	broken := filepath.Join(t.TempDir(), "runtime")
	check(t, os.WriteFile(broken, []byte("#!/bin/sh\necho broken on purpose >&2\nexit 1\n"), 0o755))
	n := harness.New(t, harness.Options{Config: fmt.Sprintf("[runtimes.broken]\npath = %q\n", broken)})
	create := func(t *testing.T) {
		n := n.With(t)
		ctx, cancel := harness.Deadline()
		defer cancel()
		config := n.PodConfig("broken")
		r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: "broken"})
		if err != nil {
			t.Fatalf("a pod needs no OCI runtime: %v", err)
		}
		_, err = n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: r.PodSandboxId,
			Config: harness.ContainerConfig("broken", []string{"true"}), SandboxConfig: config})
		if err == nil {
			t.Error("a container was created by a broken runtime")
		}
		t.Logf("%v", err)
		n.RemoveAllPods()
		n.CheckClean()
	}
	t.Run("broken runtime", create)
	check(t, os.Remove(broken))
	t.Run("missing runtime", create)
	t.Run("missing program", func(t *testing.T) {
		n := n.With(t)
		pod := n.RunPod("refused")
		n.Mark()
		ctx, cancel := harness.Deadline()
		defer cancel()
		r, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID,
			Config: harness.ContainerConfig("refused", []string{"/no/such/program"}), SandboxConfig: pod.Config})
		if err == nil {
			_, err = n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: r.ContainerId})
			(&harness.Container{N: n, Pod: pod, ID: r.ContainerId, Config: harness.ContainerConfig("refused",
				nil)}).Remove()
		}
		if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
			t.Errorf("the error is %v, want it to name the program", err)
		}
		n.CheckClean()
		// The name is free again.
		pod.Create("refused", []string{"true"}).Remove()
		n.CheckClean()
	})
}

func TestPullFails(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	layer, err := harness.MakeLayer(map[string]string{"file": strings.Repeat("content", 1000)})
	check(t, err)
	const ref = "registry.test/tests/fragile:1"
	if _, err := n.Registry.Push(ref, ocispec.ImageConfig{}, layer); err != nil {
		t.Fatal(err)
	}
	pull := func() error {
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
		return err
	}
	n.Registry.Break(func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
	})
	if err := pull(); err == nil {
		t.Error("an image was pulled from a broken registry")
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil || r.GetImage() != nil {
		t.Errorf("half an image is listed: %v, %v", r, err)
	}
	// Blobs that came whole are kept for the next attempt, and go with the image.
	n.Registry.Break(nil)
	if err := pull(); err != nil {
		t.Errorf("the registry is mended, and still: %v", err)
	}
	if _, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Errorf("RemoveImage: %v", err)
	}
	n.CheckClean()
}

// The disk is full at any step. The answer says so, nothing is left, and all
// works again when there is room.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	n := harness.New(t, harness.Options{RootMiB: 64})
	pod := n.RunPod("full")
	runs := pod.Run("runs", []string{"testbox", "print", "-every", "20ms"})

	var st unix.Statfs_t
	check(t, unix.Statfs(n.Root, &st))
	filler := filepath.Join(n.Root, "filler")
	f, err := os.Create(filler)
	check(t, err)
	defer f.Close()
	n.Mark()
	check(t, unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize))

	ctx, cancel := harness.Deadline()
	defer cancel()
	if r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.PodConfig("more")}); err == nil {
		t.Errorf("a pod was made on a full disk: %s", r.PodSandboxId)
	}
	if r, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID,
		Config: harness.ContainerConfig("more", []string{"sleep", "1000"}), SandboxConfig: pod.Config}); err == nil {
		t.Errorf("a container was made on a full disk: %s", r.ContainerId)
	}
	noise := make([]byte, 1<<20)
	rand.Read(noise)
	layer, err := harness.MakeLayer(map[string]string{"noise": string(noise)})
	check(t, err)
	const ref = "registry.test/tests/large:1"
	if _, err := n.Registry.Push(ref, ocispec.ImageConfig{}, layer); err != nil {
		t.Fatal(err)
	}
	_, err = n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err == nil {
		t.Error("an image was pulled onto a full disk")
	} else {
		t.Logf("%v", err)
	}
	n.CheckClean()

	// What runs goes on, and so does the next daemon.
	n.Restart()
	if s := runs.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the running container is %s", s.State)
	}
	runs.Stop(60)
	if s := runs.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 0 {
		t.Errorf("the container is %s with code %d, want exited with 0", s.State, s.ExitCode)
	}
	check(t, os.Truncate(filler, 0))
	n.Pull(ref)
	pod.Run("more", []string{"true"}).WaitExited(patience)
	n.RemoveAllPods()
}
