package placement

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestDetect(t *testing.T) {
	for _, c := range []struct {
		setting         string
		booted, unified bool
		want            Driver
		err             string
	}{
		{"auto", true, true, Systemd, ""},
		{"auto", true, false, Cgroupfs, ""},
		{"auto", false, true, Cgroupfs, ""},
		{"cgroupfs", true, true, Cgroupfs, ""},
		{"systemd", true, true, Systemd, ""},
		{"systemd", true, false, Systemd, ""},
		{"systemd", false, true, "", "not the init process"},
		{"Systemd", true, true, "", "want auto, cgroupfs or systemd"},
		{"", true, true, "", "want auto, cgroupfs or systemd"},
	} {
		got, err := detect(c.setting, c.booted, c.unified)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("detect(%q, %v, %v) = %q, %v; want %q, %q", c.setting, c.booted, c.unified, got, err, c.want,
				c.err)
		}
	}
}

func TestContainerPath(t *testing.T) {
	for _, c := range []struct {
		driver      Driver
		parent, id  string
		want, error string
	}{
		{Cgroupfs, "", "c1", "/holdfast/pods/pod1/c1", ""},
		{Cgroupfs, "/kubepods/burstable/podX", "c1", "/kubepods/burstable/podX/c1", ""},
		{Cgroupfs, "kubepods//besteffort/./podX/", "c1", "/kubepods/besteffort/podX/c1", ""},
		{Cgroupfs, "/kubepods/../../etc", "c1", "", `cgroup_parent "/kubepods/../../etc"`},
		{Cgroupfs, "/a\n0::/b", "c1", "", "cgroup_parent"},
		{Cgroupfs, "/kubepods.slice", "c1", "", "cgroup driver here is cgroupfs"},
		{Cgroupfs, "/kubepods", "../c1", "", `id "../c1"`},
		{Cgroupfs, "/kubepods", "", "", "id"},
		{Systemd, "", "c1", "system.slice:holdfast:c1", ""},
		{Systemd, "-.slice", "c1", "-.slice:holdfast:c1", ""},
		{Systemd, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX_1.slice", "c1",
			"kubepods-burstable-podX_1.slice:holdfast:c1", ""},
		{Systemd, "kubepods.slice/", "c1", "kubepods.slice:holdfast:c1", ""},
		{Systemd, "/kubepods/burstable/podX", "c1", "", "cgroup driver here is systemd"},
		{Systemd, "/x/../kubepods.slice", "c1", "", "cgroup_parent"},
		{Systemd, "a:b.slice", "c1", "", "not the name of a slice"},
		{Systemd, "a--b.slice", "c1", "", "not the name of a slice"},
		{Systemd, "-a.slice", "c1", "", "not the name of a slice"},
		{Systemd, ".slice", "c1", "", "not the name of a slice"},
		{Systemd, "kubepods.slice", "a:b", "", `id "a:b"`},
	} {
		m := &Manager{driver: c.driver}
		got, err := m.ContainerPath(c.parent, "pod1", c.id)
		if got != c.want || (err == nil) != (c.error == "") || err != nil && !strings.Contains(err.Error(), c.error) {
			t.Errorf("%s: ContainerPath(%q, %q) = %q, %v; want %q, error %q", c.driver, c.parent, c.id, got, err,
				c.want, c.error)
		}
		if wrong := strings.Contains(c.error, "id"); err != nil && errors.Is(err, ErrParent) == wrong &&
			c.error != "cgroup_parent" {
			t.Errorf("%s: ContainerPath(%q, %q): %v: wraps ErrParent: %v", c.driver, c.parent, c.id, err, !wrong)
		}
	}
}

// startSleep starts a process to be moved about. It ends with the test, or by
// the function returned.
func startSleep(t *testing.T) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	check(t, cmd.Start())
	end = sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	t.Cleanup(end)
	return cmd.Process.Pid, end
}

// newManager gives a cgroupfs manager. The cgroups above those of shims and pods
// stay, as they do in production: other tests may be using them right now.
func newManager(t *testing.T) *Manager {
	t.Helper()
	must.BeRoot(t)
	m, err := New(Cgroupfs)
	check(t, err)
	return m
}

// shimID makes an id, whose cgroup goes with the test. Call it before
// startSleep, so that the process goes first.
func shimID(t *testing.T, m *Manager, name string) string {
	id := fmt.Sprintf("%s-%d", name, os.Getpid())
	t.Cleanup(func() {
		if err := m.RemoveShim(context.Background(), id); err != nil {
			t.Error(err)
		}
	})
	return id
}

func cgroupsOf(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	check(t, err)
	return string(b)
}

// hierarchies are the mount points of all.
func hierarchies(t *testing.T) []string {
	t.Helper()
	table, err := mounts.Read(mounts.Self)
	check(t, err)
	var dirs []string
	for _, m := range table {
		if m.Kind == "cgroup" || m.Kind == "cgroup2" {
			dirs = append(dirs, m.Point)
		}
	}
	return dirs
}

func TestPodCgroup(t *testing.T) {
	for _, c := range []struct {
		driver       Driver
		parent, want string
	}{
		{Cgroupfs, "", "/holdfast/pods/p1"},
		{Cgroupfs, "/kubepods/burstable/podX/", "/kubepods/burstable/podX"},
		{Cgroupfs, "kubepods/podX", "/kubepods/podX"},
		{Systemd, "", ""},
		{Systemd, "/kubepods.slice/kubepods-podX.slice", "/kubepods.slice/kubepods-podX.slice"},
		{Systemd, "kubepods-podX.slice", "/kubepods.slice/kubepods-podX.slice"},
		{Systemd, "/kubepods/podX", ""},
	} {
		m := &Manager{driver: c.driver}
		if got := m.PodCgroup(c.parent, "p1"); got != c.want {
			t.Errorf("%s, parent %q: the pod is in %q, want %q", c.driver, c.parent, got, c.want)
		}
		if c.want == "" {
			continue
		}
		inside, err := m.ContainerPath(c.parent, "p1", "c1")
		if got := path.Dir(m.ContainerCgroup(inside)); err != nil || got != c.want {
			t.Errorf("%s, parent %q: its container is in %q, %v, want it in %q", c.driver, c.parent, got, err, c.want)
		}
	}
}

func TestShim(t *testing.T) {
	m := newManager(t)
	id := shimID(t, m, "test")
	pid, end := startSleep(t)
	for range 2 {
		check(t, m.PlaceShim(t.Context(), id, pid))
	}
	of := cgroupsOf(t, pid)
	if n, all := strings.Count(of, ":/holdfast/shims/"+id+"\n"), len(hierarchies(t)); n != all {
		t.Errorf("placed in %d of %d hierarchies:\n%s", n, all, of)
	}
	if dir, alive, err := cgroup.At(path.Join(ShimsPath, id)).Populated(); err != nil || !alive {
		t.Errorf("the shim is not seen in its cgroup: %q, %v, %v", dir, alive, err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := m.RemoveShim(ctx, id); !errors.Is(err, ErrBusy) {
		t.Errorf("RemoveShim of a live one: %v, want ErrBusy", err)
	}
	if !strings.Contains(cgroupsOf(t, pid), id) {
		t.Error("the process has left its cgroup")
	}
	end()
	for range 2 {
		check(t, m.RemoveShim(t.Context(), id))
	}
	if left := cgroup.At(path.Join(ShimsPath, id)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestStream(t *testing.T) {
	m := newManager(t)
	for range 2 { // the next one finds what the first one has left
		pid, end := startSleep(t)
		check(t, m.PlaceStream(t.Context(), pid))
		of := cgroupsOf(t, pid)
		if n, all := strings.Count(of, ":/holdfast/stream\n"), len(hierarchies(t)); n != all {
			t.Errorf("placed in %d of %d hierarchies:\n%s", n, all, of)
		}
		end()
	}
}

// A process that is dying while its cgroup is removed is waited for.
func TestRemoveWaits(t *testing.T) {
	m := newManager(t)
	id := shimID(t, m, "waits")
	pid, end := startSleep(t)
	check(t, m.PlaceShim(t.Context(), id, pid))
	removed := make(chan error)
	go func() { removed <- m.RemoveShim(t.Context(), id) }()
	end()
	if err := <-removed; err != nil {
		t.Error(err)
	}
}

func TestPlaceDeadProcess(t *testing.T) {
	m := newManager(t)
	id := shimID(t, m, "dead")
	pid, end := startSleep(t)
	end()
	if err := m.PlaceShim(t.Context(), id, pid); err == nil || !strings.Contains(err.Error(), id) {
		t.Errorf("PlaceShim of a dead process: %v, want an error that names it", err)
	}
	if err := m.RemoveShim(t.Context(), id); err != nil {
		t.Error(err)
	}
	if left := cgroup.At(path.Join(ShimsPath, id)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestRemovePod(t *testing.T) {
	m := newManager(t)
	pod := fmt.Sprintf("pod-%d", os.Getpid())
	path, err := m.ContainerPath("", pod, "c1")
	check(t, err)
	hs := hierarchies(t)
	nested := filepath.Join(path, "made by the container")
	for _, h := range hs {
		check(t, os.MkdirAll(filepath.Join(h, nested), 0o755))
	}
	check(t, m.RemovePod(t.Context(), "/kubepods/podX", pod))
	for _, h := range hs {
		if _, err := os.Stat(filepath.Join(h, nested)); err != nil {
			t.Errorf("removed though the pod has a parent of its own: %v", err)
		}
	}
	for range 2 {
		check(t, m.RemovePod(t.Context(), "", pod))
	}
	for _, h := range hs {
		if _, err := os.Stat(filepath.Join(h, PodsPath, pod)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", filepath.Join(h, PodsPath, pod), err)
		}
	}
}

var check = must.Succeed
