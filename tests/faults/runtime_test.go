package faults

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// insaneRuntime hangs at one verb, or is killed at it, and is runc at all others.
const insaneRuntime = `#!/bin/sh
read verb how <"${0%%/*}/mode"
case " $* " in *" $verb "*)
	case $how in
	hang) echo $$ >>"${0%%/*}/hangs"; exec sleep 100000 ;;
	killed) kill -9 $$ ;;
	half) %[1]s "$@"; kill -9 $$ ;;
	esac
esac
exec %[1]s "$@"
`

// runtimeNode is a node whose handler "insane" is that runtime.
type runtimeNode struct {
	*harness.Node
	*harness.Tally
	mode string // a file
}

func newInsaneRuntime(t *testing.T, name string) *runtimeNode {
	bin, err := harness.Binaries()
	check(t, err)
	dir := t.TempDir()
	runtime := filepath.Join(dir, "runtime")
	check(t, os.WriteFile(runtime, fmt.Appendf(nil, insaneRuntime, filepath.Join(bin, "runc")), 0o755))
	n := &runtimeNode{mode: filepath.Join(dir, "mode"), Tally: harness.Drill(t, name)}
	n.set(t, "none", "none")
	n.Node = harness.New(t, harness.Options{Config: fmt.Sprintf("[runtimes.insane]\npath = %q\n", runtime)})
	return n
}

func (n *runtimeNode) set(t *testing.T, verb, how string) {
	t.Helper()
	check(t, os.WriteFile(n.mode, []byte(verb+" "+how+"\n"), 0o600))
}

// run gives a container that runs by that runtime, which is well.
func (n *runtimeNode) run(t *testing.T, name string) *harness.Container {
	t.Helper()
	n.set(t, "none", "none")
	pod := &harness.Pod{N: n.With(t), Config: n.PodConfig(name, hostNetwork)}
	ctx, cancel := harness.Deadline()
	defer cancel()
	r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod.Config, RuntimeHandler: "insane"})
	check(t, err)
	pod.ID = r.PodSandboxId
	return pod.Run("c", []string{"sleep", "1000"})
}

// calls have the shim run a verb.
var calls = map[string]func(context.Context, *harness.Container) error{
	"create": func(ctx context.Context, c *harness.Container) error {
		_, err := c.N.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: c.Pod.ID,
			Config: harness.ContainerConfig("more", []string{"true"}), SandboxConfig: c.Pod.Config})
		return err
	},
	"exec": func(ctx context.Context, c *harness.Container) error {
		deadline, _ := ctx.Deadline()
		limit := max(1, int64(time.Until(deadline)/time.Second)-1)
		_, err := c.N.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"true"}, Timeout: limit})
		return err
	},
	"update": func(ctx context.Context, c *harness.Container) error {
		_, err := c.N.Runtime.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: c.ID,
			Linux: &cri.LinuxContainerResources{CpuShares: 300}})
		return err
	},
}

var waysOfRuntime = []string{"hang", "killed", "half"}

// The OCI runtime hangs, is killed before it has done anything, or after it has done all,
// at each of its verbs. The call fails; the container goes on, and when the runtime is well
// again so is everything else.
func TestRuntimeAtEachVerb(t *testing.T) {
	t.Parallel()
	n := newInsaneRuntime(t, "runtime at each verb")
	for verb, call := range calls {
		for _, how := range waysOfRuntime {
			t.Run(verb+" "+how, func(t *testing.T) {
				c := n.run(t, verb+"-"+how)
				pid := c.Info().PID
				n.set(t, verb, how)
				n.Kills(1)
				limit := time.Minute
				if how == "hang" {
					limit = 3 * time.Second
				}
				ctx, cancel := context.WithTimeout(context.Background(), limit)
				err := call(ctx, c)
				cancel()
				want := codes.Unavailable // the kubelet may ask again
				if how == "hang" {
					want = codes.DeadlineExceeded
				}
				if status.Code(err) != want {
					t.Errorf("the call ends with %s, want %s: %v", status.Code(err), want, err)
				}
				wantRunning(t, n.Tally, c, pid)
				n.Restart()
				wantRunning(t, n.Tally, c, pid)
				n.set(t, "none", "none")
				if out := c.Output("echo", "fine"); out != "fine\n" {
					t.Errorf("a command says %q", out)
				}
				c.Stop(0)
				wantExit(t, n.Tally, c, killed)
				c.Pod.Remove()
				wantClean(t, n.Tally, n.With(t))
			})
		}
	}
}

// The same when the daemon has it forget a container whose shim was killed.
func TestRuntimeAtDelete(t *testing.T) {
	t.Parallel()
	n := newInsaneRuntime(t, "runtime at delete")
	for _, how := range waysOfRuntime {
		if how == "hang" && !harness.Full {
			continue // it is waited for, for as long as a disk may take
		}
		t.Run(how, func(t *testing.T) {
			c := n.run(t, how)
			pid := c.Info().PID
			n.set(t, "delete", how)
			n.Kills(1)
			check(t, unix.Kill(c.ShimPID(), unix.SIGKILL))
			harness.Eventually(t, patience, "its process is killed", func() bool { return !harness.IsProcess(pid) })
			n.Restart()
			n.set(t, "none", "none")
			if s := c.WaitExited(patience); s.Reason != "ShimDied" {
				n.Lost(harness.Statuses, "the container has ended with %d, %s: %s", s.ExitCode, s.Reason, s.Message)
			}
			c.Pod.Remove()
			wantClean(t, n.Tally, n.With(t))
		})
	}
}
