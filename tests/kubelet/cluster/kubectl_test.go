package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	core "k8s.io/api/core/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

// newImage is the same image by another name, which the node has not pulled.
const newImage = "registry.test/tests/box:2"

// command is kubectl, in the namespace of a row. It is killed when it takes too long.
func (c *cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, machine.Program(), append([]string{"kubectl", "-n", c.space}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.n.Path("kubeconfig"), "HOME="+c.n.Path("home"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	return cmd
}

// result is how kubectl ended.
type result struct {
	out, errs string
	code      int // -1: it did not end by itself
}

// run runs kubectl. Where it says that the runtime is gone, it is run again.
func (c *cluster) run(input string, args ...string) result {
	c.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * harness.Tick) {
		r := c.once(input, args...)
		if r.code == 0 || !c.killing || !isDown(r.errs) || time.Now().After(deadline) {
			return r
		}
		c.t.Logf("again, as the runtime was gone: kubectl %s", strings.Join(args, " "))
	}
}

func (c *cluster) once(input string, args ...string) result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := c.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatalf("cannot run kubectl %s: %v", strings.Join(args, " "), err)
	}
	return result{out: out.String(), errs: errs.String(), code: cmd.ProcessState.ExitCode()}
}

// kubectl is what kubectl writes. It has to succeed.
func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	r := c.run("", args...)
	if r.code != 0 {
		c.t.Fatalf("kubectl %s: exit code %d: %s%s", strings.Join(args, " "), r.code, r.out, r.errs)
	}
	return r.out
}

// apply makes objects of manifests: IMAGE is the image of the tests, DIR the scratch
// directory of the node.
func (c *cluster) apply(manifests string) {
	c.t.Helper()
	manifests = strings.NewReplacer("IMAGE", harness.Image, "DIR", c.n.Dir).Replace(manifests)
	if r := c.run(manifests, "apply", "-f", "-"); r.code != 0 {
		c.t.Fatalf("kubectl apply: %s", r.errs)
	}
}

// makeSpace makes the namespace of a row, and waits until pods can be made in it.
func (c *cluster) makeSpace() {
	c.t.Helper()
	c.kubectl("create", "namespace", c.space)
	c.until("there is a service account", func() bool {
		return c.get("/api/v1/namespaces/"+c.space+"/serviceaccounts/default", &core.ServiceAccount{}) == nil
	})
}

// until waits until something is so.
func (c *cluster) until(what string, f func() bool) {
	c.t.Helper()
	c.untilDone(what, func() error {
		if !f() {
			return errors.New("it is not")
		}
		return nil
	})
}

// untilDone waits until something succeeds.
func (c *cluster) untilDone(what string, f func() error) {
	c.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * harness.Tick) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("after %s still not so: %s: %v", patience, what, err)
		}
	}
}

// pods are those of the namespace with a label.
func (c *cluster) pods(selector string) []core.Pod {
	c.t.Helper()
	var list core.PodList
	if err := c.get("/api/v1/namespaces/"+c.space+"/pods?labelSelector="+selector, &list); err != nil {
		c.t.Fatalf("cannot list the pods: %v", err)
	}
	return list.Items
}

// pod is a pod of the namespace, empty if there is none.
func (c *cluster) pod(name string) *core.Pod {
	var p core.Pod
	if err := c.get("/api/v1/namespaces/"+c.space+"/pods/"+name, &p); err != nil {
		return &core.Pod{}
	}
	return &p
}

// ready waits until a pod is ready.
func (c *cluster) ready(name string) *core.Pod {
	c.t.Helper()
	var p *core.Pod
	c.until(name+" is ready", func() bool { p = c.pod(name); return podReady(p) })
	return p
}

// exec is what a command in a pod writes. It has to succeed.
func (c *cluster) exec(pod string, command ...string) string {
	c.t.Helper()
	return c.kubectl(append([]string{"exec", pod, "--"}, command...)...)
}

// rollout waits until an object has all its pods, as they are wanted now.
func (c *cluster) rollout(object string) {
	c.t.Helper()
	c.kubectl("rollout", "status", object, fmt.Sprintf("--timeout=%v", patience-10*time.Second))
}
