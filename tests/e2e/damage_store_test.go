package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// dirWays are ways to damage a directory.
var dirWays = []struct {
	name   string
	damage func(path string) error
}{
	{"removed", os.RemoveAll},
	{"emptied", func(path string) error {
		l, err := os.ReadDir(path)
		for _, e := range l {
			if err := os.RemoveAll(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
		return err
	}},
	{"a file", func(path string) error {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		return os.WriteFile(path, []byte("not a directory"), 0o600)
	}},
	{"full of strangers", func(path string) error {
		for _, name := range []string{"stranger", ".stranger", "sha256", "sha512", strings.Repeat("0", 64), "x.json"} {
			if err := os.MkdirAll(filepath.Join(path, name, "in", "it"), 0o700); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(path, name+".file"), []byte("?"), 0o600); err != nil {
				return err
			}
		}
		return syscall.Mkfifo(filepath.Join(path, "fifo"), 0o600)
	}},
}

const dataImage = "registry.test/tests/mended:1"

// Each file and directory of the image and the layer store, down to the content
// of layers, is damaged, with the daemon down or up. Both images can then be
// pulled and used, and again after another restart.
func TestDamagedStore(t *testing.T) {
	n := harness.New(t)
	lower, err := harness.MakeLayer(map[string]string{"one": "1", "both": "lower"})
	check(t, err)
	upper, err := harness.MakeLayer(map[string]string{"two": "2", "both": "upper"})
	check(t, err)
	if _, err := n.Registry.Push(dataImage, ocispec.ImageConfig{}, lower, upper); err != nil {
		t.Fatal(err)
	}
	n.Pull(dataImage)
	pod := n.RunPod("mended")
	stays := pod.Run("stays", []string{"sleep", "100000"})
	removedLayers := false

	use := func(t *testing.T, name string) {
		t.Helper()
		n, pod := n.With(t), pod.With(t)
		for _, ref := range []string{harness.Image, dataImage} {
			n.Pull(ref)
		}
		c := pod.Run(name, []string{"sleep", "100000"}, func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/data", Readonly: true, Image: &cri.ImageSpec{Image: dataImage}}}
		})
		out := c.Output("cat", "/data/one", "/data/two", "/data/both", "/etc/group")
		if !strings.HasPrefix(out, "12upper") || !strings.Contains(out, "extra") {
			t.Errorf("it reads %q", out)
		}
		c.Remove()
		if !removedLayers {
			if out := stays.With(t).Output("cat", "/etc/group"); !strings.Contains(out, "extra") {
				t.Errorf("a container that was there before reads %q", out)
			}
		}
	}
	number := 0
	try := func(path, way string, up bool, damage func() error) {
		number++
		name := strings.TrimPrefix(path, n.Root+"/")
		t.Run(fmt.Sprintf("%d %s, %s, up %v", number, name, way, up), func(t *testing.T) {
			n := n.With(t)
			// What a container has for its root may be gone for it.
			if base := filepath.Base(path); strings.HasPrefix(name, "layers") && base != "layer.json" &&
				base != "synced" && base != "tmp" && base != "empty" && way != "full of strangers" {
				removedLayers = true
			}
			if !up {
				n.Kill()
			}
			check(t, damage())
			if !up {
				n.Start()
			}
			use(t, fmt.Sprintf("a%d", number))
			n.Restart()
			use(t, fmt.Sprintf("b%d", number))
		})
	}

	paths := storePaths(t, n)
	t.Logf("%d files and directories", len(paths))
	long := os.Getenv("HOLDFAST_DRILL") != ""
	// Those that take files away from containers come last.
	for _, inLayers := range []bool{false, true} {
		for i, path := range paths {
			st, err := os.Lstat(path)
			if err != nil || inLayers != strings.HasPrefix(path, filepath.Join(n.Root, "layers")) {
				continue // gone meanwhile
			}
			count := len(ways)
			if st.IsDir() {
				count = len(dirWays)
			}
			for j := range 2 * count {
				if !long && j != i%(2*count) {
					continue
				}
				up := j >= count
				if st.IsDir() {
					way := dirWays[j%count]
					try(path, way.name, up, func() error { return way.damage(path) })
					continue
				}
				way := ways[j%count]
				try(path, way.name, up, func() error {
					b, err := os.ReadFile(path)
					if err != nil {
						return nil // it was moved away, and the next pull has not written it
					}
					return way.damage(path, b)
				})
			}
		}
	}
}

// storePaths are all files and directories of the stores, without what is in
// layers: who changes that has changed the layer.
func storePaths(t *testing.T, n *harness.Node) (paths []string) {
	t.Helper()
	for _, tree := range []string{"images", "layers"} {
		err := filepath.WalkDir(filepath.Join(n.Root, tree), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			paths = append(paths, path)
			if d.Name() == "diff" {
				return fs.SkipDir
			}
			return nil
		})
		check(t, err)
	}
	return paths
}
