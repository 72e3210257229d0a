package e2e

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// layersOf gives the directories of an image's unpacked layers.
func layersOf(t *testing.T, n *harness.Node, ref string) (dirs []string) {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}, Verbose: true})
	if err != nil || r.Image == nil {
		t.Fatalf("ImageStatus of %s: %v, %v", ref, r, err)
	}
	var info struct {
		ImageSpec ocispec.Image `json:"imageSpec"`
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || len(info.ImageSpec.RootFS.DiffIDs) == 0 {
		t.Fatalf("the layers of %s: %v in %v", ref, err, r.Info)
	}
	for _, l := range info.ImageSpec.RootFS.DiffIDs {
		dirs = append(dirs, filepath.Join(n.Root, "layers", l.Algorithm().String(), l.Encoded()))
	}
	return dirs
}

// beginPull pulls an image in the background. The channel gives the end of that.
func beginPull(n *harness.Node, ref string) <-chan error {
	pulled := make(chan error, 1)
	go func() {
		ctx, cancel := harness.Deadline()
		defer cancel()
		_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
		pulled <- err
	}()
	return pulled
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

func removeImage(t *testing.T, n *harness.Node, ref string) {
	t.Helper()
	ctx, cancel := harness.Deadline()
	defer cancel()
	if _, err := n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
}

// The layers of an image that was removed stay while a container uses them,
// over restarts, and go with it.
func TestRemovedImageInUse(t *testing.T) {
	n := harness.New(t)
	layers := layersOf(t, n, harness.Image)
	pod := n.RunPod("used")
	c := pod.Run("box", []string{"sleep", "1000"})
	removeImage(t, n, harness.Image)
	n.Restart()
	for _, l := range layers {
		if !exists(filepath.Join(l, "diff")) {
			t.Errorf("%s went while a container uses it", l)
		}
	}
	if out := c.Output("cat", "/etc/group"); !strings.Contains(out, "extra") {
		t.Errorf("the container reads %q", out)
	}
	pod.Remove()
	for _, l := range layers {
		harness.Eventually(t, patience, "the layers are gone", func() bool { return !exists(l) })
	}
	n.CheckClean()
}

// A layer that was not on the disk when the power went is unpacked again from
// its blob when a container needs it; where blobs are not kept it is fetched.
// Where it cannot be fetched, the image counts as not being here, so that the
// kubelet pulls it.
func TestLostLayers(t *testing.T) {
	for name, config := range map[string]string{"blobs kept": "", "blobs dropped": "[images]\nkeep_blobs = false\n"} {
		t.Run(name, func(t *testing.T) {
			n := harness.New(t, harness.Options{Config: config})
			layers := layersOf(t, n, harness.Image)
			cutPower := func() {
				t.Helper()
				n.Stop()
				for _, l := range layers {
					// As after a power cut: of another boot, and without its mark.
					var r map[string]any
					path := filepath.Join(l, "layer.json")
					check(t, record.Read(path, &r))
					r["bootId"] = "another"
					check(t, record.Write(path, r, false))
					os.Remove(filepath.Join(l, "synced"))
				}
				n.Start()
				for _, l := range layers {
					if exists(l) {
						t.Errorf("%s is still there", l)
					}
				}
			}
			cutPower()
			pod := n.RunPod("lost")
			c := pod.Run("box", []string{"sleep", "1000"})
			if out := c.Output("cat", "/etc/group"); !strings.Contains(out, "extra") {
				t.Errorf("the container reads %q", out)
			}
			c.Stop(0)
			c.Remove()
			cutPower()
			n.Registry.Break(func(*http.Request) bool { return true })
			ctx, cancel := harness.Deadline()
			defer cancel()
			_, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID,
				SandboxConfig: pod.Config,
				Config: &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: "again"},
					Image: &cri.ImageSpec{Image: harness.Image}, Command: []string{"true"}}})
			r, serr := n.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: harness.Image}})
			if serr != nil {
				t.Fatal(serr)
			}
			if config == "" && (err != nil || r.Image == nil) {
				t.Errorf("with blobs, and without a registry: %v, image %v", err, r.Image)
			}
			if config != "" && (status.Code(err) != codes.NotFound || r.Image != nil) {
				t.Errorf("without blobs and registry: %v, image %v", err, r.Image)
			}
			n.Registry.Break(nil)
			n.Pull(harness.Image)
			pod.Run("pulled", []string{"true"}).WaitExited(patience)
			pod.Remove()
		})
	}
}

// An image that a verifier turns down is not pulled, in words that the kubelet
// knows.
func TestVerifier(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	verdict := func(text string) {
		t.Helper()
		// A program that a process has open for writing cannot be run: no child may have it.
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
		check(t, os.WriteFile(filepath.Join(dir, "verifier"), []byte("#!/bin/sh\n"+text+"\n"), 0o755))
	}
	verdict("exit 0")
	n := harness.New(t,
		harness.Options{Config: "[images]\nverifier_dir = \"" + dir + "\"\nverifier_timeout = \"2m\"\n"})
	const ref = "registry.test/tests/unsigned:1"
	push(t, n, ref, [2]string{"f", "x"})
	verdict(`case "$2" in */unsigned:*) echo nobody signed it; exit 1;; esac`)
	pull := func(ctx context.Context, ref string) error {
		_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
		return err
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	err := pull(ctx, ref)
	if status.Code(err) != codes.Unknown ||
		!strings.HasPrefix(status.Convert(err).Message(), "SignatureValidationFailed: ") ||
		!strings.Contains(err.Error(), "nobody signed it") {
		t.Errorf("got %v", err)
	}
	if err := pull(ctx, harness.Image); err != nil {
		t.Errorf("another image: %v", err)
	}
}
