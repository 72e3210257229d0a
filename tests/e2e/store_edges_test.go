package e2e

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// push makes an image of layers with one file each, by name and content.
func push(t *testing.T, n *harness.Node, ref string, layers ...[2]string) string {
	t.Helper()
	var all []harness.Layer
	for _, l := range layers {
		made, err := harness.MakeLayer(map[string]string{l[0]: l[1]})
		check(t, err)
		all = append(all, made)
	}
	d, err := n.Registry.Push(ref, ocispec.ImageConfig{}, all...)
	check(t, err)
	return d.String()
}

func imageOf(t *testing.T, n *harness.Node, ref string) *cri.Image {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	check(t, err)
	return r.Image
}

// A tag that moved leaves the old image with its digest only, to be listed and
// removed. An image goes with all its names, by whichever of them.
func TestNamesOfImages(t *testing.T) {
	n := harness.New(t)
	const tag, other = "registry.test/tests/moves:1", "registry.test/tests/elsewhere:2"
	content := rand.Text()
	first := push(t, n, tag, [2]string{"file", content})
	push(t, n, other, [2]string{"file", content})
	old := n.Pull(tag)
	push(t, n, tag, [2]string{"file", rand.Text()})
	fresh := n.Pull(tag)
	i := imageOf(t, n, old)
	if old == fresh || i == nil || len(i.RepoTags) != 0 ||
		!slices.Equal(i.RepoDigests, []string{"registry.test/tests/moves@" + first}) {
		t.Errorf("the old image is %v", i)
	}
	if id := n.Pull(other); id != old {
		t.Errorf("the same image has the ids %s and %s", id, old)
	}
	if i = imageOf(t, n, old); len(i.RepoTags) != 1 || len(i.RepoDigests) != 2 {
		t.Errorf("under two names it is %v", i)
	}
	layers := layersOf(t, n, old)
	for _, by := range []string{old, other, "registry.test/tests/moves@" + first,
		strings.TrimPrefix(old, "sha256:")[:12]} {
		n.Pull("registry.test/tests/moves@" + first)
		n.Pull(other)
		removeImage(t, n, by)
		for _, name := range []string{old, other, "registry.test/tests/moves@" + first} {
			if imageOf(t, n, name) != nil {
				t.Errorf("removed by %s, %s is still there", by, name)
			}
		}
		harness.Eventually(t, patience, "its layers are gone", func() bool { return !exists(layers[0]) })
	}
	if i := imageOf(t, n, tag); i == nil || i.Id != fresh {
		t.Errorf("the tag is of %v, want %s", i, fresh)
	}
	removeImage(t, n, tag)
	removeImage(t, n, tag) // once more is no error
	n.CheckClean()
}

// A removal while a pull is under way takes nothing from it.
func TestRemovalDuringPull(t *testing.T) {
	n := harness.New(t)
	const one, two = "registry.test/tests/during:1", "registry.test/tests/during:2"
	shared := [2]string{"shared", rand.Text()}
	push(t, n, one, shared)
	push(t, n, two, shared, [2]string{"more", rand.Text()})
	n.Pull(one)
	layers := layersOf(t, n, one)
	blocked, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	n.Registry.Break(func(r *http.Request) bool {
		if strings.Contains(r.URL.Path, "during/blobs/") {
			once.Do(func() { close(blocked) })
			<-goOn
		}
		return false
	})
	pulled := beginPull(n, two)
	<-blocked
	removeImage(t, n, two) // not there yet
	removeImage(t, n, one)
	close(goOn)
	check(t, <-pulled)
	n.Registry.Break(nil)
	if imageOf(t, n, one) != nil || imageOf(t, n, two) == nil {
		t.Errorf("there are %v and %v", imageOf(t, n, one), imageOf(t, n, two))
	}
	n.Restart()
	if i := imageOf(t, n, two); i == nil {
		t.Error("it is gone after a restart")
	}
	for _, l := range append(layers, layersOf(t, n, two)...) {
		if !exists(filepath.Join(l, "diff")) {
			t.Errorf("%s is gone", l)
		}
	}
	removeImage(t, n, two)
	n.CheckClean()
}

// A removal at the time of a creation: either it came too late, or the container
// has all of its image.
func TestRemovalDuringCreation(t *testing.T) {
	n := harness.New(t)
	pod := n.RunPod("creation")
	created := 0
	for i := range 12 {
		n.Pull(harness.Image)
		removed := make(chan error, 1)
		go func() {
			ctx, cancel := harness.Deadline()
			defer cancel()
			_, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: harness.Image}})
			removed <- err
		}()
		ctx, cancel := harness.Deadline()
		c := &harness.Container{N: n, Pod: pod, Config: harness.ContainerConfig(fmt.Sprintf("c%d", i), []string{"sleep",
			"100000"})}
		r, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID, Config: c.Config,
			SandboxConfig: pod.Config})
		cancel()
		check(t, <-removed)
		if status.Code(err) == codes.NotFound {
			continue
		}
		check(t, err)
		created++
		c.ID = r.ContainerId
		c.Start()
		if out := c.Output("cat", "/etc/group"); !strings.Contains(out, "extra") {
			t.Errorf("it reads %q", out)
		}
		c.Remove()
	}
	t.Logf("%d of 12 creations came first", created)
	pod.Remove()
	n.CheckClean()
}

// An image that was removed while a container uses it, and is pulled again, has
// the layers that the container kept.
func TestPulledAgainWhileInUse(t *testing.T) {
	n := harness.New(t)
	inode := func(path string) uint64 {
		t.Helper()
		var st syscall.Stat_t
		check(t, syscall.Lstat(path, &st))
		return st.Ino
	}
	layers := layersOf(t, n, harness.Image)
	before := inode(layers[0])
	pod := n.RunPod("again")
	c := pod.Run("box", []string{"sleep", "100000"})
	for range 2 {
		removeImage(t, n, harness.Image)
		n.Pull(harness.Image)
		if after := inode(layers[0]); after != before {
			t.Error("the layer was unpacked again")
		}
		n.Restart()
	}
	if out := c.Output("cat", "/etc/group"); !strings.Contains(out, "extra") {
		t.Errorf("it reads %q", out)
	}
	pod.Remove()
	n.CheckClean()
}

// A second daemon on the same root, or state, does not start, and the first one
// does not notice.
func TestSecondDaemon(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	for _, same := range []string{"root", "state"} {
		args := map[string]string{"root": n.Path("other-root"), "state": n.Path("other-state")}
		args[same] = n.Path(same)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		cmd := exec.CommandContext(ctx, filepath.Join(n.Bin, "holdfastd"), "--config", n.Path("config.toml"),
			"--root", args["root"], "--state", args["state"], "--address", n.Path("other.sock"))
		out, err := cmd.CombinedOutput()
		cancel()
		if err == nil || !strings.Contains(string(out), fmt.Sprint("another holdfastd uses it: process ", n.PID())) {
			t.Errorf("a second daemon on the same %s: %v: %s", same, err, out)
		}
	}
	n.Pull(harness.Image)
	n.CheckClean()
}

// The root can only be read, as after an error of its disk. The daemon starts and
// tells of all that runs; what cannot be done is refused, and works afterwards.
func TestReadOnlyRoot(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("readonly")
	c := pod.Run("box", []string{"sleep", "100000"})
	n.Kill()
	check(t, syscall.Mount(n.Root, n.Root, "", syscall.MS_BIND, ""))
	mounted := true
	writable := func() {
		if mounted {
			if err := syscall.Unmount(n.Root, syscall.MNT_DETACH); err != nil {
				t.Errorf("cannot unmount %s: %v", n.Root, err)
			}
			mounted = false
		}
	}
	t.Cleanup(writable)
	check(t, syscall.Mount("", n.Root, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	n.Start()
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING || c.Output("echo", "fine") != "fine\n" {
		t.Errorf("the container is %s", s.State)
	}
	if imageOf(t, n, harness.Image) == nil {
		t.Error("the image is not listed")
	}
	push(t, n, "registry.test/tests/readonly:1", [2]string{"file", rand.Text()})
	ctx, cancel := harness.Deadline()
	defer cancel()
	image := &cri.ImageSpec{Image: "registry.test/tests/readonly:1"}
	if _, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: image}); err == nil {
		t.Error("an image was pulled")
	}
	_, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: harness.Image}})
	if err == nil {
		t.Error("an image was removed")
	}
	if i := imageOf(t, n, harness.Image); i == nil || len(i.RepoTags) != 1 {
		t.Errorf("after a removal that failed it is %v", i)
	}
	n.Kill()
	writable()
	n.Start()
	n.Pull("registry.test/tests/readonly:1")
	removeImage(t, n, "registry.test/tests/readonly:1")
	pod.Remove()
	n.CheckClean()
}

// A pull that does not fit fails as such. Nothing of it is left, what was there
// before works, and so does the next pull that fits.
func TestImageTooLarge(t *testing.T) {
	t.Parallel()
	n := harness.New(t, harness.Options{RootMiB: 48})
	large := make([]byte, 60<<20)
	rand.Read(large)
	push(t, n, "registry.test/tests/large:1", [2]string{"small", rand.Text()}, [2]string{"large", string(large)})
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := n.Images.PullImage(ctx,
		&cri.PullImageRequest{Image: &cri.ImageSpec{Image: "registry.test/tests/large:1"}})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("the pull ends with %v", err)
	}
	for _, dir := range []string{"images/ingest", "images/pending", "layers/tmp"} {
		harness.Eventually(t, patience, dir+" is empty", func() bool {
			l, err := os.ReadDir(filepath.Join(n.Root, dir))
			return err == nil && len(l) == 0
		})
	}
	n.CheckClean()
	n.Restart()
	pod := n.RunPod("full")
	pod.Run("box", []string{"sleep", "100000"})
	push(t, n, "registry.test/tests/fits:1", [2]string{"fits", string(large[:8<<20])})
	n.Pull("registry.test/tests/fits:1")
	removeImage(t, n, "registry.test/tests/fits:1")
	pod.Remove()
	n.CheckClean()
}

// All records of a running container are lost, and then its image is removed. It
// goes on, and can read its files.
func TestUnknownContainerKeepsItsLayers(t *testing.T) {
	n := harness.New(t)
	pod := n.RunPod("unknown")
	c := pod.Run("box", []string{"sleep", "100000"})
	pid := c.Info().PID
	layers := layersOf(t, n, harness.Image)
	n.Kill()
	kept := map[string][]byte{}
	for _, path := range []string{filepath.Join(n.Root, "containers", c.ID, "record.json"),
		filepath.Join(n.State, "containers", c.ID, "create.json")} {
		b, err := os.ReadFile(path)
		check(t, err)
		kept[path] = b
		check(t, os.Remove(path))
	}
	n.Start()
	removeImage(t, n, harness.Image)
	for _, l := range layers {
		if !exists(filepath.Join(l, "diff", "etc", "group")) {
			t.Errorf("%s went while a container uses it", l)
		}
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/etc/group", pid)); err != nil ||
		!strings.Contains(string(b), "extra") {
		t.Errorf("the container's /etc/group: %q, %v", b, err)
	}
	n.Kill()
	for path, b := range kept {
		check(t, os.WriteFile(path, b, 0o600))
	}
	n.Start()
	pod.Remove()
	for _, l := range layers {
		harness.Eventually(t, patience, "the layers are gone", func() bool { return !exists(l) })
	}
	n.CheckClean()
}
