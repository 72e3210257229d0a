package spec

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
)

// tmpfs mounts a file system that ends with the test.
func tmpfs(t *testing.T, dir string) {
	t.Helper()
	check(t, os.MkdirAll(dir, 0o755))
	check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// A mount that is read-only to the bottom covers what is mounted below its source, any other
// one does not. What is mounted later is seen as the propagation says.
func TestRuncMounts(t *testing.T) {
	b := newBundle(t)
	source := filepath.Join(b.dir, "source")
	tmpfs(t, source)
	check(t, unix.Mount("", source, "", unix.MS_SHARED, ""))
	tmpfs(t, filepath.Join(source, "below"))
	for _, d := range []string{"late", "own"} {
		check(t, os.Mkdir(filepath.Join(source, d), 0o755))
	}
	in := b.input(`alias b=/bin/busybox
for m in ro rro; do echo x 2>/dev/null >/$m/f || echo $m is read-only; done
for m in ro rro; do echo x 2>/dev/null >/$m/below/f && echo $m/below is writable; done
echo started; read go
for m in private slave shared; do [ -e /$m/late/f ] && echo $m sees it; done
b mount -t tmpfs none /slave/own && b touch /slave/own/f
b mount -t tmpfs none /shared/own && b touch /shared/own/g
echo mounted; read go`)
	in.RecursiveReadOnly = kernelHasRRO()
	for path, m := range map[string]*runtimeapi.Mount{
		"/ro":      {Readonly: true},
		"/rro":     {Readonly: true, RecursiveReadOnly: in.RecursiveReadOnly},
		"/private": {},
		"/slave":   {Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
		"/shared":  {Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
	} {
		m.HostPath, m.ContainerPath = source, path
		in.Container.Mounts = append(in.Container.Mounts, m)
	}
	in.Container.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{
		Capabilities: &runtimeapi.Capability{AddCapabilities: []string{"SYS_ADMIN"}},
	}
	r, err := validateAndBuild(in)
	check(t, err)
	defer b.delete()
	cmd := b.cmd(r.Spec, "run", "--bundle", b.dir, b.id)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	check(t, err)
	stdout, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	lines := bufio.NewScanner(stdout)
	until := func(last string) string {
		t.Helper()
		var out []string
		for lines.Scan() {
			if lines.Text() == last {
				return strings.Join(out, "\n")
			}
			out = append(out, lines.Text())
		}
		t.Fatalf("the container ended after %q: %v: %s", out, cmd.Wait(), &stderr)
		return ""
	}
	want := "ro is read-only\nrro is read-only\nro/below is writable"
	if !in.RecursiveReadOnly {
		want += "\nrro/below is writable"
	}
	if got := until("started"); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	tmpfs(t, filepath.Join(source, "late"))
	check(t, os.WriteFile(filepath.Join(source, "late/f"), nil, 0o644))
	stdin.Write([]byte("\n"))
	if got := until("mounted"); got != "slave sees it\nshared sees it" {
		t.Errorf("what is mounted later: %q", got)
	}
	if _, err := os.Stat(filepath.Join(source, "own/g")); err != nil {
		t.Errorf("the host does not see what is mounted in a mount that is shared: %v", err)
	}
	if _, err := os.Stat(filepath.Join(source, "own/f")); err == nil {
		t.Error("the host sees what is mounted in a slave")
	}
	stdin.Close()
	cmd.Wait()
	check(t, unix.Unmount(filepath.Join(source, "own"), unix.MNT_DETACH)) // its mount outlives it
	table, err := mounts.Read(mounts.Self)
	check(t, err)
	for _, m := range table {
		if strings.HasPrefix(m.Point, source+"/own") {
			t.Errorf("%s is left", m.Point)
		}
	}
}

// kernelHasRRO says whether the kernel has mount_setattr(2).
func kernelHasRRO() bool {
	return unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{}) != unix.ENOSYS
}
