package faults

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

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

// The OCI runtime hangs, is killed before it has done anything, or after it has done all,
// at each of its verbs. The call fails or succeeds; the container goes on, and when the
// runtime is well again so is everything else.
func TestRuntimeAtEachVerb(t *testing.T) {
	t.Parallel()
	d := harness.Drill(t, "runtime at each verb")
	bin, err := harness.Binaries()
	check(t, err)
	dir := t.TempDir()
	runtime := filepath.Join(dir, "runtime")
	check(t, os.WriteFile(runtime, fmt.Appendf(nil, insaneRuntime, filepath.Join(bin, "runc")), 0o755))
	set := func(verb, how string) {
		check(t, os.WriteFile(filepath.Join(dir, "mode"), []byte(verb+" "+how+"\n"), 0o600))
	}
	set("none", "none")
	n := harness.New(t, harness.Options{Config: fmt.Sprintf("[runtimes.insane]\npath = %q\n", runtime)})
	for verb, call := range map[string]func(context.Context, *harness.Container) error{
		"create": func(context.Context, *harness.Container) error { return nil },
		"start":  func(context.Context, *harness.Container) error { return nil },
		"exec": func(ctx context.Context, c *harness.Container) error {
			_, err := n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"true"}, Timeout: 1})
			return err
		},
		"update": func(ctx context.Context, c *harness.Container) error {
			_, err := n.Runtime.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: c.ID,
				Linux: &cri.LinuxContainerResources{CpuShares: 300}})
			return err
		},
		"delete": func(ctx context.Context, c *harness.Container) error { return nil },
	} {
		for _, how := range []string{"hang", "killed", "half"} {
			t.Run(verb+" "+how, func(t *testing.T) {
				d.Kill()
				set("none", "none")
				n := n.With(t)
				config := n.PodConfig(verb+"-"+how, hostNetwork)
				ctx, cancel := harness.Deadline()
				defer cancel()
				r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: "insane"})
				check(t, err)
				pod := &harness.Pod{N: n, ID: r.PodSandboxId, Config: config}
				c := pod.Run("c", []string{"sleep", "1000"})
				pid := c.Info().PID

				set(verb, how)
				limited, end := context.WithTimeout(context.Background(), 3*time.Second)
				err = call(limited, c)
				end()
				if verb == "create" || verb == "delete" {
					limited, end := context.WithTimeout(context.Background(), 3*time.Second)
					_, err = n.Runtime.CreateContainer(limited, &cri.CreateContainerRequest{PodSandboxId: pod.ID,
						Config: harness.ContainerConfig("more", []string{"true"}), SandboxConfig: config})
					end()
				}
				t.Logf("%v", err)
				if err == nil && (verb == "create" || verb == "exec") && how != "half" {
					t.Error("the call has succeeded")
				}
				wantRunning(t, d, c, pid)
				n.Restart()
				wantRunning(t, d, c, pid)
				set("none", "none")
				if out := c.Output("echo", "fine"); out != "fine\n" {
					t.Errorf("a command says %q", out)
				}
				c.Stop(0)
				wantExit(t, d, c, 137)
				pod.Remove()
				wantClean(t, d, n)
			})
		}
	}
}
