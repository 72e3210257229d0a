package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// gate holds up whoever calls hold, a line of shell, until it is opened.
type gate struct{ reached, open string }

func newGate(t *testing.T, name string) gate {
	dir := t.TempDir()
	return gate{filepath.Join(dir, name+"-reached"), filepath.Join(dir, name+"-open")}
}

func (g gate) hold() string {
	return fmt.Sprintf("touch %s; while [ ! -e %s ]; do sleep 0.02; done", g.reached, g.open)
}

func (g gate) touch(t *testing.T) {
	t.Helper()
	check(t, os.WriteFile(g.open, nil, 0o600))
}

// giveUp makes a call whose caller goes away while it waits at the gate, and lets
// it through when the caller is gone.
func (g gate) giveUp(t *testing.T, call func(context.Context) error) {
	t.Helper()
	os.Remove(g.reached)
	os.Remove(g.open)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() { failed <- call(ctx) }()
	harness.Eventually(t, patience, "the call has come to the gate", func() bool {
		_, err := os.Stat(g.reached)
		return err == nil
	})
	cancel()
	if err := <-failed; err == nil {
		t.Fatal("a call that was given up has succeeded")
	}
	g.touch(t)
}

// newGates makes a node whose network plugin and OCI runtime, the handler "slow", can be held up.
func newGates(t *testing.T) (n *harness.Node, adding, creating gate) {
	t.Helper()
	adding, creating = newGate(t, "add"), newGate(t, "create")
	adding.touch(t)
	creating.touch(t)
	bin, err := harness.Binaries()
	check(t, err)
	runtime := filepath.Join(t.TempDir(), "runtime")
	script := "#!/bin/sh\ncase \" $* \" in *' create '*) " + creating.hold() + " ;; esac\nexec " + bin +
		"/runc \"$@\"\n"
	check(t, os.WriteFile(runtime, []byte(script), 0o755))
	return harness.New(t, harness.Options{
		Config: fmt.Sprintf("[runtimes.slow]\npath = %q\n", runtime),
		Plugins: map[string]string{
			"slow": "#!/bin/sh\n[ \"$CNI_COMMAND\" != ADD ] || { " + adding.hold() + "; }\nexec " + bin + "/cni/portmap\n",
		},
	}), adding, creating
}

// What was made for a caller that has gone away is not listed, is given to the next
// one that asks for it, and does not outlive the daemon.
func TestCallerGivesUp(t *testing.T) {
	t.Parallel()
	n, adding, creating := newGates(t)
	config := n.PodConfig("pod")
	run := func(ctx context.Context) (string, error) {
		r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: "slow"})
		return r.GetPodSandboxId(), err
	}
	logged := func(text string, times int) {
		t.Helper()
		harness.Eventually(t, patience, fmt.Sprintf("the daemon has logged %q", text), func() bool {
			b, _ := os.ReadFile(n.DaemonLog())
			return strings.Count(string(b), text) == times
		})
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	wantPods := func(when string, want int) {
		t.Helper()
		list, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
		if err != nil || len(list.Items) != want {
			t.Fatalf("%s: pods %v (%v), want %d", when, list.GetItems(), err, want)
		}
	}
	giveUpPod := func() {
		t.Helper()
		adding.giveUp(t, func(ctx context.Context) error { _, err := run(ctx); return err })
	}
	giveUpPod()
	logged("pod ready", 1)
	wantPods("the caller is gone", 0)
	n.Restart()
	wantPods("after a restart", 0)
	logged("undid a creation that was cut short", 1)
	n.CheckClean()

	giveUpPod()
	logged("pod ready", 2)
	wantPods("the caller is gone", 0)
	id, err := run(ctx)
	check(t, err)
	logged("pod ready", 2) // no other one was made
	wantPods("it was asked for again", 1)

	request := &cri.CreateContainerRequest{
		PodSandboxId:  id,
		Config:        harness.ContainerConfig("c", []string{"sleep", "1000"}),
		SandboxConfig: config,
	}
	creating.giveUp(t, func(ctx context.Context) error {
		_, err := n.Runtime.CreateContainer(ctx,
			request)
		return err
	})
	logged("container created", 1)
	list, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil || len(list.Containers) != 0 {
		t.Fatalf("the caller is gone: containers %v (%v)", list.GetContainers(), err)
	}
	c, err := n.Runtime.CreateContainer(ctx, request)
	check(t, err)
	n.Restart()
	list, err = n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil || len(list.Containers) != 1 || list.Containers[0].Id != c.ContainerId {
		t.Fatalf("it was asked for again: containers %v (%v), want %s", list.GetContainers(), err, c.ContainerId)
	}
	if _, err := n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		t.Error(err)
	}
	n.RemoveAllPods()
	n.CheckClean()
}

// A kubelet that gave up may ask again with another config, as network plugins change the
// annotations of pods. It gets what it asks for now, and nothing is left of the other.
func TestCallerAsksForAnother(t *testing.T) {
	t.Parallel()
	n, adding, creating := newGates(t)
	ctx, cancel := harness.Deadline()
	defer cancel()
	pod := &cri.RunPodSandboxRequest{Config: n.PodConfig("pod"), RuntimeHandler: "slow"}
	adding.giveUp(t, func(ctx context.Context) error { _, err := n.Runtime.RunPodSandbox(ctx, pod); return err })
	pod.Config.Annotations = map[string]string{"address": "known"}
	// The daemon learns a moment later that the caller has gone.
	until := func(call func() error) {
		t.Helper()
		var err error
		harness.Eventually(t, patience, "an answer to another config", func() bool {
			err = call()
			return status.Code(err) != codes.AlreadyExists
		})
		check(t, err)
	}
	var p *cri.RunPodSandboxResponse
	until(func() (err error) { p, err = n.Runtime.RunPodSandbox(ctx, pod); return err })
	s, err := n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.PodSandboxId})
	if err != nil || s.Status.Annotations["address"] != "known" {
		t.Errorf("the pod is %v, %v", s, err)
	}
	c := &cri.CreateContainerRequest{
		PodSandboxId:  p.PodSandboxId,
		Config:        harness.ContainerConfig("c", []string{"sleep", "1000"}),
		SandboxConfig: pod.Config,
	}
	creating.giveUp(t, func(ctx context.Context) error { _, err := n.Runtime.CreateContainer(ctx, c); return err })
	c.Config.Labels = map[string]string{"is": "another"}
	until(func() error { _, err := n.Runtime.CreateContainer(ctx, c); return err })
	list, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil || len(list.Containers) != 1 || list.Containers[0].Labels["is"] != "another" {
		t.Errorf("the containers are %v, %v", list, err)
	}
	pods, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil || len(pods.Items) != 1 {
		t.Errorf("the pods are %v, %v", pods, err)
	}
	n.RemoveAllPods()
	n.CheckClean()
}
