package faults

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

const linksImage = "registry.test/tests/links:1"

// tree is all that a directory of the host has in it, with the content of files, and what
// is mounted there.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	check(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		content, _ := os.ReadFile(path) // of a directory: none
		fmt.Fprintf(&b, "%s %s %s\n", path, e.Type(), content)
		return nil
	}))
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], dir) {
			fmt.Fprintf(&b, "mounted: %s\n", f[4])
		}
	}
	return b.String()
}

// An image is made of links to a directory of the host, wherever the node looks for a
// path in it. Nothing of that directory is seen, made, changed or mounted over.
func TestLinksOutOfAnImage(t *testing.T) {
	t.Parallel()
	d := harness.Drill(t, "links out of an image")
	n := harness.New(t)
	secret := t.TempDir()
	check(t, os.Chmod(secret, 0o777))
	for name, content := range map[string]string{
		"passwd":      "root:x:0:0::/:/bin/sh\nevil:x:4242:4242::/:/bin/sh\n",
		"group":       "evil:x:4242:evil\n",
		"hosts":       "secret\n",
		"hostname":    "secret\n",
		"resolv.conf": "secret\n",
		"file":        "secret\n",
	} {
		check(t, os.WriteFile(filepath.Join(secret, name), []byte(content), 0o666))
	}
	links := map[string]string{"out": secret, "up": "../../../../../../../.." + secret, "vol": secret}
	for _, name := range []string{"passwd", "group", "hosts", "hostname", "resolv.conf"} {
		links["etc/"+name] = secret + "/" + name
	}
	box, err := harness.BoxLayer()
	check(t, err)
	layer, err := harness.LinkLayer(links)
	check(t, err)
	volumes := map[string]struct{}{"/vol": {}, "/up/vol": {}}
	_, err = n.Registry.Push(linksImage, ocispec.ImageConfig{Volumes: volumes}, box, layer)
	check(t, err)
	n.Pull(linksImage)
	before := tree(t, secret)
	pod := n.RunPod("links")

	use := func(c *cri.ContainerConfig) { c.Image = &cri.ImageSpec{Image: linksImage} }
	for name, edit := range map[string]func(*cri.ContainerConfig){
		"plain":     func(*cri.ContainerConfig) {},
		"user":      func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "evil" },
		"directory": func(c *cri.ContainerConfig) { c.WorkingDir = "/out/made" },
		"up":        func(c *cri.ContainerConfig) { c.WorkingDir = "/up/made" },
		"readonly":  func(c *cri.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true },
		"mount": func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{
				{HostPath: n.LogDir, ContainerPath: "/out/made"},
				{HostPath: n.LogDir, ContainerPath: "/up/up"},
			}
		},
		"image": func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/image", Readonly: true, ImageSubPath: "out",
				Image: &cri.ImageSpec{Image: linksImage}}}
		},
	} {
		d.Kill()
		ctx, cancel := harness.Deadline()
		config := harness.ContainerConfig(name, []string{"sleep", "1000"}, use, edit)
		r, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.ID, Config: config,
			SandboxConfig: pod.Config})
		if err == nil {
			_, err = n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: r.ContainerId})
		}
		cancel()
		t.Logf("%s: %.200v", name, err)
		if name == "user" && err == nil {
			t.Error("a user of the host's file was found")
		}
		if err != nil {
			continue
		}
		c := &harness.Container{N: n, Pod: pod, ID: r.ContainerId, Config: config}
		// What its own root looks up is inside, too, and so is what is written through it.
		out, err := c.Exec(60, "sh", "-c",
			"cat /out/file /image/file /up/file; id evil; echo x >/vol/x; echo x >/out/x; pwd")
		if err != nil || strings.Contains(string(out.Stdout), "secret") ||
			strings.Contains(string(out.Stdout), "4242") {
			t.Errorf("%s: a command says %q, %v", name, out.GetStdout(), err)
		}
	}
	if after := tree(t, secret); after != before {
		d.Lost(harness.Leaks, "the directory was\n%s\nand is\n%s", before, after)
	}
	n.RemoveAllPods()
	if after := tree(t, secret); after != before {
		d.Lost(harness.Leaks, "the directory was\n%s\nand is in the end\n%s", before, after)
	}
}
