package audit

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

const sleepVariable = "HOLDFAST_TEST_SLEEP"

// TestMain makes the test binary a program that does nothing, whatever its arguments are, but have a child for each
// word of the variable after the first.
func TestMain(m *testing.M) {
	if _, more, _ := strings.Cut(os.Getenv(sleepVariable), " "); more != "" {
		child := exec.Command("/proc/self/exe")
		child.Env = []string{sleepVariable + "=" + more}
		child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread()
		if child.Start() == nil {
			os.Stdout.WriteString("started\n")
		}
	}
	if os.Getenv(sleepVariable) != "" {
		time.Sleep(time.Hour)
	}
	os.Exit(m.Run())
}

// sleeper starts a process that looks as it is told to, as a child of this one.
func sleeper(t *testing.T, children, program string, uid uint32, args ...string) int {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "audit")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	check(t, os.Chmod(dir, 0o755))
	b, err := os.ReadFile("/proc/self/exe")
	check(t, err)
	path := filepath.Join(dir, program)
	check(t, os.WriteFile(path, b, 0o755))
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.Env = "/", []string{sleepVariable + "=" + children}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if strings.Contains(children, " ") {
		_, err := out.Read(make([]byte, 1))
		check(t, err)
	}
	return cmd.Process.Pid
}

// thing is what is found of a process, or at a path.
func (r *Report) thing(name string) *Thing {
	i := slices.IndexFunc(r.Things, func(t Thing) bool {
		return t.Name == name || strings.HasPrefix(t.Name, name+" ")
	})
	if i < 0 {
		return nil
	}
	return &r.Things[i]
}

// A process of another user is none of ours, whatever its program and its arguments are called; nor is one that
// somebody has started by hand.
func TestFakedProcesses(t *testing.T) {
	must.BeRoot(t)
	o := trees(t, records.PodReady, records.AllDebts)
	fakes := map[string][]string{
		"holdfast-pause":  {filepath.Join(o.State, "x")},
		"holdfast-shim":   {"--dir", filepath.Join(o.State, "containers", idB)},
		"holdfast-stream": {"--dir", filepath.Join(o.State, "stream")},
		"holdfastd":       {"--state", o.State},
		"runc":            {"--root", filepath.Join(o.State, "runc"), "list"},
	}
	users, roots := map[string]int{}, map[string]int{}
	for program, args := range fakes {
		users[program] = sleeper(t, "1", program, 65534, args...)
		roots[program] = sleeper(t, "1", program, 0, args...)
	}
	r, err := Look(t.Context(), o)
	check(t, err)
	for program, pid := range users {
		if thing := r.thing(fmt.Sprint(pid)); thing != nil {
			t.Errorf("%s of another user is a thing: %+v", program, thing)
		}
	}
	for program, pid := range roots {
		thing := r.thing(fmt.Sprint(pid))
		if ownerless := program == "holdfast-pause" || program == "holdfast-shim"; thing == nil ||
			thing.Ownerless() != ownerless {
			t.Errorf("%s of root is %+v, ownerless %v is wanted", program, thing, ownerless)
		}
	}
}

// A shim of which no record tells is not ended while it keeps something, nor is what it keeps.
func TestShimWithoutRecord(t *testing.T) {
	must.BeRoot(t)
	o := trees(t, records.PodReady, records.AllDebts)
	for _, keeps := range []bool{false, true} {
		children := map[bool]string{false: "1", true: "1 1"}[keeps]
		pid := sleeper(t, children, "holdfast-shim", 0, "--dir", filepath.Join(o.State, "containers", idB))
		r, err := Look(t.Context(), o)
		check(t, err)
		thing := r.thing(fmt.Sprint(pid))
		if thing == nil || thing.Ownerless() == keeps || thing.Doubt != keeps || (len(r.Unknown) > 0) != keeps {
			t.Fatalf("it keeps something %v: %+v, unknown: %v", keeps, thing, r.Unknown)
		}
		if err := fixOne(t, o, *thing); (err == nil) == keeps {
			t.Errorf("it keeps something %v: %v", keeps, err)
		}
	}
}

// What is no file is not opened as one, or not waited for: a record, a config, a lease.
func TestStrangeFiles(t *testing.T) {
	must.BeRoot(t)
	for name, put := range map[string]func(path string) error{
		"FIFO":   func(path string) error { return unix.Mkfifo(path, 0o600) },
		"device": func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) },
		"huge": func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 10<<30))
		},
	} {
		o := trees(t, records.PodReady, records.AllDebts)
		o.CNIConfDir = filepath.Join(o.Root, "cni")
		pod, lease := filepath.Join(o.Root, "pods", idB), filepath.Join(o.Root, "cni/networks/holdfast")
		check(t, errors.Join(os.MkdirAll(pod, 0o700), os.MkdirAll(lease, 0o700)))
		check(t, errors.Join(
			put(filepath.Join(pod, "record.json")),
			put(filepath.Join(o.CNIConfDir, "10-x.conf")),
			put(filepath.Join(lease, "10.0.0.1")),
			put(filepath.Join(o.Root, "pods", idA, "x")),
			os.Mkdir(filepath.Join(o.Root, "journal"), 0o700),
			put(filepath.Join(o.Root, "journal/now")),
			put(filepath.Join(o.State, "daemon.json")),
		))
		r, err := Look(t.Context(), o)
		check(t, err)
		if thing := r.thing(pod); thing == nil || !thing.Doubt || len(r.Unknown) == 0 {
			t.Errorf("%s: the pod is %+v, unknown: %v", name, thing, r.Unknown)
		}
		if thing := r.thing(filepath.Join(o.State, "daemon.json")); thing == nil ||
			thing.Ownerless() == (name == "huge") {
			t.Errorf("%s in the place of a record: %+v", name, thing)
		}
	}
}

// What Holdfast cannot have made is not taken away, although nobody owns it.
func TestNotOurs(t *testing.T) {
	o := trees(t, records.PodReady, records.AllDebts)
	for _, dir := range []string{"database", "pods/backup", "images/mine", "layers/sha256"} {
		check(t, os.MkdirAll(filepath.Join(o.Root, dir), 0o700))
	}
	r, err := Look(t.Context(), o)
	check(t, err)
	for _, dir := range []string{"database", "pods/backup", "images/mine"} {
		path := filepath.Join(o.Root, dir)
		thing := r.thing(path)
		if thing == nil || !thing.Ownerless() || r.CanFix(*thing) || fixOne(t, o, *thing) == nil || !exists(path) {
			t.Errorf("%s: %+v", dir, thing)
		}
	}
	layers := filepath.Join(o.Root, "layers")
	if err := unix.Mount("tmpfs", layers, "tmpfs", 0, "size=4k"); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	defer unix.Unmount(layers, unix.MNT_DETACH)
	stray := filepath.Join(netns.Dir, netns.PinPrefix+"mine")
	check(t, errors.Join(os.MkdirAll(netns.Dir, 0o755), os.WriteFile(stray, nil, 0o600)))
	defer os.Remove(stray)
	r, err = Look(t.Context(), o)
	check(t, err)
	for i := range r.Things {
		if thing := &r.Things[i]; thing.Name == stray || thing.Kind == Mount && thing.Owner != "you" {
			t.Errorf("%+v", thing)
		}
	}
}

// An address may be another container runtime's, in whose directory the plugin has put it beside ours.
func TestForeignLease(t *testing.T) {
	o := trees(t, records.PodReady, records.AllDebts)
	dir := t.TempDir()
	o.CNIConfDir = filepath.Join(dir, "net.d")
	config := fmt.Sprintf(`{"name":"n","plugins":[{"type":"x","ipam":{"type":"host-local","dataDir":%q}}]}`, dir)
	check(t, errors.Join(os.Mkdir(o.CNIConfDir, 0o700), os.Mkdir(filepath.Join(dir, "n"), 0o700)))
	check(t, os.WriteFile(filepath.Join(o.CNIConfDir, "n.conflist"), []byte(config), 0o600))
	lease := filepath.Join(dir, "n", "203.0.113.7")
	check(t, os.WriteFile(lease, []byte(idB+"\r\neth0"), 0o600))
	for _, ours := range []bool{false, true} {
		if ours {
			check(t, os.MkdirAll(filepath.Join(o.State, "pods", idB), 0o700))
		}
		r, err := Look(t.Context(), o)
		check(t, err)
		if thing := r.thing(lease); thing == nil || thing.Doubt == ours || r.CanFix(*thing) != ours {
			t.Errorf("of a pod that was ours %v: %+v", ours, thing)
		}
	}
}

// What comes and goes all the time is never said to have an owner.
func TestChurn(t *testing.T) {
	o := trees(t, records.PodReady, records.AllDebts)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		last := filepath.Join(o.State, "0")
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			next := filepath.Join(o.State, fmt.Sprint(n))
			os.WriteFile(next, nil, 0o600)
			os.Remove(last)
			last = next
		}
	}()
	defer func() {
		close(stop)
		<-done
	}()
	// A name that has come and gone between two looks is in neither.
	must.Come(t, "something without an owner", func() bool {
		r, err := Look(t.Context(), o)
		check(t, err)
		return len(r.Ownerless())+len(r.Doubtful()) > 0
	})
}

// A shim that lives by its lock and is not seen, as from another PID namespace, means that nothing is taken away.
func TestHiddenShim(t *testing.T) {
	o := trees(t, records.PodReady, records.AllDebts)
	run := filepath.Join(o.State, "containers", idB)
	check(t, errors.Join(os.MkdirAll(run, 0o700), os.MkdirAll(filepath.Join(o.Root, "containers", idB), 0o700)))
	config := records.Container{ID: idB, PodID: idA, BootID: rundir.BootID(), Phase: records.ContainerCreated}
	check(t, record.Write(filepath.Join(o.Root, string(state.Containers), idB, "record.json"), config, false))
	stray := filepath.Join(o.State, "stray")
	check(t, os.WriteFile(stray, nil, 0o600))
	lock, err := rundir.Dir(run).Lock()
	check(t, err)
	r, err := Look(t.Context(), o)
	check(t, err)
	thing := r.thing(stray)
	if thing == nil || len(r.Unknown) != 1 || !strings.Contains(r.Unknown[0], "look from where") {
		t.Fatalf("%+v, unknown: %v", thing, r.Unknown)
	}
	if err := fixOne(t, o, *thing); !errors.Is(err, ErrNotHere) || !exists(stray) {
		t.Errorf("it was taken away: %v", err)
	}
	check(t, lock.Close())
	check(t, fixOne(t, o, *thing))
}

// What an overlay of somebody else tells without names keeps no file that is no layer.
func TestUnnamedLayers(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"lower", "merged", "layers/sha256/" + idB, "containers/" + idB} {
		check(t, os.MkdirAll(filepath.Join(dir, name), 0o700))
	}
	lower, err := os.Open(filepath.Join(dir, "lower"))
	check(t, err)
	defer lower.Close()
	merged := filepath.Join(dir, "merged")
	options := fmt.Sprintf("lowerdir=/proc/self/fd/%d:%s", lower.Fd(), filepath.Join(dir, "layers/sha256", idB))
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	defer unix.Unmount(merged, unix.MNT_DETACH)
	if err := unused(filepath.Join(dir, "containers", idB)); err != nil {
		t.Errorf("a directory that is no layer: %v", err)
	}
	for _, id := range []string{idA, idB} {
		if err := unused(filepath.Join(dir, "layers/sha256", id)); err == nil {
			t.Errorf("the layer %s can be removed", id[:4])
		}
	}
}
