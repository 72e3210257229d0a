package harness

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Tick is how often a test looks for what it waits for.
const Tick = 10 * time.Millisecond

// Eventually waits until f is true, and gives up with a message after timeout.
func Eventually(t T, timeout time.Duration, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(timeout); !f(); time.Sleep(Tick) {
		if time.Now().After(deadline) {
			t.Fatalf("after %s still not so: %s", timeout, what)
		}
	}
}

// Pod is a sandbox.
type Pod struct {
	N      *Node
	ID     string
	Config *cri.PodSandboxConfig
}

// PodConfig is the configuration of a pod with a network and a log directory.
func (n *Node) PodConfig(name string, edit ...func(*cri.PodSandboxConfig)) *cri.PodSandboxConfig {
	c := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		Hostname:     name,
		LogDirectory: filepath.Join(n.LogDir, name),
		Labels:       map[string]string{"app": name},
		Linux:        &cri.LinuxPodSandboxConfig{CgroupParent: n.cgroupParent},
	}
	for _, f := range edit {
		f(c)
	}
	return c
}

// RunPod runs a sandbox. It is removed with the node, or by Remove.
func (n *Node) RunPod(name string, edit ...func(*cri.PodSandboxConfig)) *Pod {
	n.T.Helper()
	p := &Pod{N: n, Config: n.PodConfig(name, edit...)}
	ctx, cancel := Deadline()
	defer cancel()
	r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.Config})
	if err != nil {
		n.T.Fatalf("RunPodSandbox %s: %v", name, err)
	}
	p.ID = r.PodSandboxId
	return p
}

// With is the same pod, reporting to another test: a subtest.
func (p *Pod) With(t T) *Pod { return &Pod{N: p.N.With(t), ID: p.ID, Config: p.Config} }

// Status is what PodSandboxStatus says.
func (p *Pod) Status() *cri.PodSandboxStatus {
	p.N.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	r, err := p.N.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		p.N.T.Fatalf("PodSandboxStatus %s: %v", p.Config.Metadata.Name, err)
	}
	return r.Status
}

// Remove stops and removes the pod.
func (p *Pod) Remove() {
	p.N.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	if err := p.N.removePod(ctx, p.ID); err != nil {
		p.N.T.Fatalf("%v", err)
	}
}

// Container is a container of a pod.
type Container struct {
	N      *Node
	Pod    *Pod
	ID     string
	Config *cri.ContainerConfig
}

// With is the same container, reporting to another test: a subtest.
func (c *Container) With(t T) *Container {
	p := c.Pod.With(t)
	return &Container{N: p.N, Pod: p, ID: c.ID, Config: c.Config}
}

// ContainerConfig is the configuration of a container of Image.
func ContainerConfig(name string, command []string, edit ...func(*cri.ContainerConfig)) *cri.ContainerConfig {
	c := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: Image},
		Command:  command,
		LogPath:  name + ".log",
		Linux:    &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}},
	}
	for _, f := range edit {
		f(c)
	}
	return c
}

// Create creates a container.
func (p *Pod) Create(name string, command []string, edit ...func(*cri.ContainerConfig)) *Container {
	p.N.T.Helper()
	c := &Container{N: p.N, Pod: p, Config: ContainerConfig(name, command, edit...)}
	ctx, cancel := Deadline()
	defer cancel()
	r, err := p.N.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: p.ID, Config: c.Config, SandboxConfig: p.Config})
	if err != nil {
		p.N.T.Fatalf("CreateContainer %s: %v", name, err)
	}
	c.ID = r.ContainerId
	return c
}

// Run creates and starts a container.
func (p *Pod) Run(name string, command []string, edit ...func(*cri.ContainerConfig)) *Container {
	p.N.T.Helper()
	c := p.Create(name, command, edit...)
	c.Start()
	return c
}

// Start starts the container.
func (c *Container) Start() {
	c.N.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	if _, err := c.N.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ID}); err != nil {
		c.N.T.Fatalf("StartContainer %s: %v", c.Config.Metadata.Name, err)
	}
}

// Status is what ContainerStatus says.
func (c *Container) Status() *cri.ContainerStatus {
	c.N.T.Helper()
	s, _ := c.verbose()
	return s
}

// Info is the JSON object that the verbose ContainerStatus holds.
type Info struct {
	PID         int    `json:"pid"`
	SandboxID   string `json:"sandboxId"`
	RuntimeSpec struct {
		Linux struct{ Resources Resources }
	} `json:"runtimeSpec"`
}

// Resources are some of those of an OCI spec.
type Resources struct {
	Memory struct{ Limit int64 }
	CPU    struct{ Shares int64 }

	Devices []struct{ Access string }
}

// Info is what the verbose ContainerStatus adds.
func (c *Container) Info() Info {
	c.N.T.Helper()
	_, info := c.verbose()
	return info
}

func (c *Container) verbose() (*cri.ContainerStatus, Info) {
	c.N.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	r, err := c.N.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	if err != nil {
		c.N.T.Fatalf("ContainerStatus %s: %v", c.Config.Metadata.Name, err)
	}
	var i Info
	if err := json.Unmarshal([]byte(r.Info["info"]), &i); err != nil {
		c.N.T.Fatalf("ContainerStatus %s: its info is no JSON object: %v: %q", c.Config.Metadata.Name, err,
			r.Info["info"])
	}
	return r.Status, i
}

// WaitExited waits for the container's end and gives its last status.
func (c *Container) WaitExited(timeout time.Duration) *cri.ContainerStatus {
	c.N.T.Helper()
	var s *cri.ContainerStatus
	Eventually(c.N.T, timeout, c.Config.Metadata.Name+" has ended", func() bool {
		s = c.Status()
		return s.State == cri.ContainerState_CONTAINER_EXITED
	})
	return s
}

// Stop is StopContainer with a grace in whole seconds.
func (c *Container) Stop(grace int64) {
	c.N.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	_, err := c.N.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: grace})
	if err != nil {
		c.N.T.Fatalf("StopContainer %s: %v", c.Config.Metadata.Name, err)
	}
}

// Remove removes the container, running or not.
func (c *Container) Remove() {
	c.N.T.Helper()
	ctx, cancel := Deadline()
	defer cancel()
	if _, err := c.N.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
		c.N.T.Fatalf("RemoveContainer %s: %v", c.Config.Metadata.Name, err)
	}
}

// Exec runs a command in the container. A command that fails is no error here.
func (c *Container) Exec(timeout int64, command ...string) (*cri.ExecSyncResponse, error) {
	ctx, cancel := Deadline()
	defer cancel()
	return c.N.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: command, Timeout: timeout})
}

// Output is what a command that must succeed writes to stdout.
func (c *Container) Output(command ...string) string {
	c.N.T.Helper()
	r, err := c.Exec(60, command...)
	if err != nil {
		c.N.T.Fatalf("ExecSync %v in %s: %v", command, c.Config.Metadata.Name, err)
	}
	if r.ExitCode != 0 {
		c.N.T.Fatalf("%v in %s exits with %d: %s", command, c.Config.Metadata.Name, r.ExitCode, r.Stderr)
	}
	return string(r.Stdout)
}

// LogPath is where the container's log lies on the host.
func (c *Container) LogPath() string {
	return filepath.Join(c.Pod.Config.LogDirectory, c.Config.LogPath)
}

// Log is the container's log so far.
func (c *Container) Log() []Line {
	c.N.T.Helper()
	lines, err := ReadLog(c.LogPath())
	if err != nil {
		c.N.T.Fatalf("%v", err)
	}
	return lines
}

// WaitLog waits until a line of the log has the text in it.
func (c *Container) WaitLog(timeout time.Duration, text string) {
	c.N.T.Helper()
	Eventually(c.N.T, timeout, fmt.Sprintf("%s has logged %q", c.Config.Metadata.Name, text), func() bool {
		b, _ := os.ReadFile(c.LogPath())
		return strings.Contains(string(b), text)
	})
}

// Line is one line of a CRI log, put together from its parts.
type Line struct {
	Time   time.Time // of its last part
	Stream string
	Text   string
	Parts  int
}

// ReadLog reads a log in the CRI format, "TIME STREAM TAG TEXT". Anything else
// in it is an error; a last record without its newline is being written and is
// left out.
func ReadLog(path string) ([]Line, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var lines []Line
	open := map[string]*Line{}
	records := strings.Split(string(b), "\n")
	for i, r := range records[:len(records)-1] {
		f := strings.SplitN(r, " ", 4)
		if len(f) != 4 || (f[2] != "P" && f[2] != "F") || (f[1] != "stdout" && f[1] != "stderr") {
			return nil, fmt.Errorf("cannot read %s: record %d is no CRI log record: %.200q", path, i+1, r)
		}
		at, err := time.Parse(time.RFC3339Nano, f[0])
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: record %d: %w", path, i+1, err)
		}
		l := open[f[1]]
		if l == nil {
			l = &Line{Stream: f[1]}
			open[f[1]] = l
		}
		l.Time, l.Text, l.Parts = at, l.Text+f[3], l.Parts+1
		if f[2] == "F" {
			lines = append(lines, *l)
			delete(open, f[1])
		}
	}
	return lines, nil
}

// Numbered checks that lines are numbered from 1 on without a gap, each as
// "PREFIX 00000001 ...", and gives the last number.
func Numbered(prefix string, lines []Line) (int, error) {
	for i, l := range lines {
		want := fmt.Sprintf("%s %08d", prefix, i+1)
		if !strings.HasPrefix(l.Text, want) {
			return i, fmt.Errorf("line %d is %.40q, want %q", i+1, l.Text, want)
		}
	}
	return len(lines), nil
}
