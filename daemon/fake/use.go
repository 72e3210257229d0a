package fake

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// What tests do with a node and its daemon.

// PodConfig is that of a pod with a network of its own. It shares the host's ipc
// namespace: a /dev/shm of its own would have to be mounted.
func PodConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		Hostname: "host",
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Ipc: runtimeapi.NamespaceMode_NODE},
			},
		},
	}
}

// ContainerConfig is that of a container which runs a command, by default that of
// the image, which sleeps. It has a pid namespace of its own.
func ContainerConfig(name string, command ...string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: "image"},
		Command:  command,
		Linux: &runtimeapi.LinuxContainerConfig{
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

// Shared is the config of a container that lives in the pid namespace of its pod.
func Shared(name string) *runtimeapi.ContainerConfig {
	cfg := ContainerConfig(name)
	cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	return cfg
}

// Sleeps is a command that ends when it is told to, Stubborn one that does not: the
// shim has it ignore SIGTERM from the beginning.
var (
	Sleeps   = []string{"sleep", "infinity"}
	Stubborn = append([]string{stubborn}, Sleeps...)
)

const stubborn = "stubborn"

// RunPod makes a pod.
func (d *Daemon) RunPod(t *testing.T, name string) string {
	t.Helper()
	id, err := d.Pods.Run(t.Context(), PodConfig(name), "")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// Create makes a container in a pod.
func (d *Daemon) Create(t *testing.T, podID string, cfg *runtimeapi.ContainerConfig) string {
	t.Helper()
	p, err := d.Pods.Find(podID)
	if err != nil {
		t.Fatal(err)
	}
	id, err := d.Containers.Create(t.Context(), p, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// Run makes a container in a pod and starts it.
func (d *Daemon) Run(t *testing.T, podID string, cfg *runtimeapi.ContainerConfig) string {
	t.Helper()
	id := d.Create(t, podID, cfg)
	if err := d.Containers.Start(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	return id
}

// Status is that of a container.
func (d *Daemon) Status(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	resp, err := d.Containers.Status(id, false)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Status
}

// Ended waits for the end of a container and gives its status.
func (d *Daemon) Ended(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	must.Come(t, "the end of a container", func() bool {
		return d.Status(t, id).State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	return d.Status(t, id)
}

// PodStatus is that of a pod.
func (d *Daemon) PodStatus(t *testing.T, id string) *runtimeapi.PodSandboxStatus {
	t.Helper()
	resp, err := d.Pods.Status(id, false)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Status
}

// Signal sends a signal to the shim of a container.
func (n *Node) Signal(t *testing.T, id string, sig syscall.Signal) {
	t.Helper()
	p, err := n.Dir(id).FindShim()
	if err == nil {
		err = syscall.Kill(p.PID, sig)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// StopShim stops the shim of a container by a signal, and returns when all of it has
// stopped.
func (n *Node) StopShim(t *testing.T, id string) {
	t.Helper()
	n.Signal(t, id, syscall.SIGSTOP)
	p, err := n.Dir(id).FindShim()
	if err == nil {
		err = unix.Waitid(unix.P_PID, p.PID, nil, unix.WSTOPPED, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// KillShim kills the shim of a container, and returns when it is gone: the last of its
// threads has let go of the lock.
func (n *Node) KillShim(t *testing.T, id string) {
	t.Helper()
	n.Signal(t, id, syscall.SIGKILL)
	must.Come(t, "the end of a shim", func() bool {
		_, err := n.Dir(id).FindShim()
		held, _ := n.Dir(id).Held()
		return errors.Is(err, rundir.ErrNoProcess) && !held
	})
}

// Lives says whether processes of a container live, whatever its files say.
func (n *Node) Lives(t *testing.T, podID, id string) bool {
	t.Helper()
	path, err := n.Cgroups.ContainerPath("", podID, id)
	if err != nil {
		t.Fatal(err)
	}
	_, populated, err := n.Cgroups.Of(path).Populated()
	if err != nil {
		t.Fatal(err)
	}
	return populated
}

// Left is what there is on the node of any pod or container.
func (n *Node) Left(t *testing.T) []string {
	t.Helper()
	var left []string
	for _, tree := range []string{n.Root, n.State} {
		for _, k := range []state.Kind{state.Pods, state.Containers} {
			names, err := filepath.Glob(filepath.Join(tree, string(k), "*"))
			if err != nil {
				t.Fatal(err)
			}
			left = append(left, names...)
		}
	}
	all, err := rundir.Shims(n.State)
	if err != nil {
		t.Fatal(err)
	}
	for id := range all {
		left = append(left, "shim of "+id)
	}
	live, err := cgroup(n.Cgroups.dir).processes()
	if err != nil {
		t.Fatal(err)
	}
	for range live {
		left = append(left, "a process")
	}
	return left
}

// Dir is the run directory of a container.
func (n *Node) Dir(id string) rundir.Dir {
	return rundir.Dir(filepath.Join(n.State, string(state.Containers), id))
}

// Durable is where the record of a container or pod lies.
func (n *Node) Durable(k state.Kind, id string) string { return filepath.Join(n.Root, string(k), id) }

// Damages are what can happen to files in a directory, one at a time.
func Damages(names ...string) map[string]func(dir string) error {
	all := map[string]func(string) error{}
	for _, name := range names {
		in := func(dir string) string { return filepath.Join(dir, name) }
		all[name+" removed"] = func(dir string) error { return os.Remove(in(dir)) }
		all[name+" is a directory"] = func(dir string) error {
			return errors.Join(os.Remove(in(dir)), os.Mkdir(in(dir), 0o700))
		}
		if name == rundir.SocketName || name == rundir.LockName {
			continue
		}
		all[name+" emptied"] = func(dir string) error { return os.Truncate(in(dir), 0) }
		all[name+" damaged"] = func(dir string) error { return os.WriteFile(in(dir), []byte(`{"version":1}`), 0o600) }
	}
	return all
}

// RunDirDamages are what can happen to the run directory of a container.
func RunDirDamages() map[string]func(dir string) error {
	all := Damages(rundir.LockName, rundir.SocketName, rundir.IdentityName,
		rundir.LaunchName, rundir.SpecName, rundir.StatusName)
	all["nothing"] = func(string) error { return nil }
	all["no directory"] = os.RemoveAll
	for name, r := range map[string]any{
		rundir.StatusName: rundir.Status{
			Phase:     rundir.PhaseRunning,
			BootID:    rundir.BootID(),
			StartedAt: time.Unix(1000, 0),
		},
		rundir.ExitName: rundir.Exit{Source: rundir.SourceWaited, Reason: rundir.ReasonCompleted},
	} {
		all[name+" is another container's"] = func(dir string) error {
			return record.WriteOf(filepath.Join(dir, name), "another", r, false)
		}
	}
	all["shim.json is another container's, no lock, no socket"] = func(dir string) error {
		ended := rundir.Identity{Shim: rundir.Process{PID: 1 << 22, StartTime: 1}, BootID: rundir.BootID()}
		return errors.Join(
			record.WriteOf(filepath.Join(dir, rundir.IdentityName), "another", ended, false),
			os.RemoveAll(filepath.Join(dir, rundir.LockName)),
			os.RemoveAll(filepath.Join(dir, rundir.SocketName)),
		)
	}
	return all
}
