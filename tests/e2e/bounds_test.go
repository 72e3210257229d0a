package e2e

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// envOf is an environment of about so many bytes, of a text that JSON makes longer.
func envOf(bytes int, text string) func(*cri.ContainerConfig) {
	value := strings.Repeat(text, 100_000/len(text))
	return func(c *cri.ContainerConfig) {
		for i := range bytes / len(value) {
			c.Envs = append(c.Envs, &cri.KeyValue{Key: fmt.Sprintf("LONG%d", i), Value: []byte(value)})
		}
	}
}

// An environment that the kernel takes is one that a container gets, whatever is in
// it; another is refused when the container is made.
func TestLargeEnvironment(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("env")
	for name, c := range map[string]struct {
		bytes int
		text  string
	}{"plain": {1_900_000, "x"}, "escaped": {1_900_000, "<"}, "control": {1_900_000, "\x01"}} {
		box := pod.Run(name, []string{"sleep", "1000"}, envOf(c.bytes, c.text))
		wantOutput(t, box, fmt.Sprintln(c.bytes), "sh", "-c",
			`tr '\0' '\n' </proc/1/environ | grep ^LONG | cut -d= -f2 | tr -d '\n' | wc -c`)
		n.Restart()
		box.Info() // the whole spec fits the answer
		r, err := box.Exec(10, "sh", "-c", "echo $#", strings.Repeat("<", 100_000), strings.Repeat("\x01", 100_000),
			strings.Repeat("&", 100_000), strings.Repeat("\x01", 100_000), strings.Repeat("\x01", 100_000),
			strings.Repeat("\x01", 100_000), strings.Repeat("\x01", 100_000), strings.Repeat("\x01", 100_000))
		if err == nil && r.ExitCode == 0 { // the environment and these are too much for the kernel
			t.Errorf("%s: the kernel takes more than it says: %v, %v", name, r, err)
		}
		box.Remove()
	}
	box := pod.Run("small", []string{"sleep", "1000"})
	args := []string{"sh", "-c", "echo $#", "sh"}
	for range 8 {
		args = append(args, strings.Repeat("\x01", 100_000))
	}
	if out := box.Output(args...); out != "8\n" {
		t.Errorf("the command has %q arguments", out)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId:  pod.ID,
		Config:        harness.ContainerConfig("toomuch", []string{"true"}, envOf(2_200_000, "x")),
		SandboxConfig: pod.Config,
	})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "config.envs") {
		t.Errorf("more than the kernel takes: %v", err)
	}
	n.RemoveAllPods()
	n.CheckClean()
}

// A list has no bound but the client's, and comes in parts to those who ask for that.
func TestLongLists(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	want := map[string]bool{}
	var pods []*harness.Pod
	for i := range 18 {
		pod := n.RunPod(fmt.Sprint("long", i), hostNetwork, func(c *cri.PodSandboxConfig) {
			c.Annotations = map[string]string{"long": strings.Repeat("x", 1_000_000)}
		})
		want[pod.ID] = true
		pods = append(pods, pod)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	list, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}, grpc.MaxCallRecvMsgSize(64<<20))
	if err != nil || len(list.Items) != len(want) {
		t.Errorf("%d pods are listed, %v", len(list.GetItems()), err)
	}
	s, err := n.Runtime.StreamPodSandboxes(ctx, &cri.StreamPodSandboxesRequest{}, grpc.MaxCallRecvMsgSize(4<<20))
	check(t, err)
	for {
		r, err := s.Recv()
		if err == io.EOF {
			break
		}
		check(t, err)
		for _, p := range r.PodSandboxes {
			if !want[p.Id] {
				t.Errorf("%s comes twice, or should not", p.Id)
			}
			delete(want, p.Id)
		}
	}
	if len(want) != 0 {
		t.Errorf("%d pods did not come", len(want))
	}
	images, err := n.Images.StreamImages(ctx, &cri.StreamImagesRequest{})
	check(t, err)
	if r, err := images.Recv(); err != nil || len(r.Images) != 1 {
		t.Errorf("images: %v, %v", r, err)
	}
	containers, err := n.Runtime.StreamContainers(ctx, &cri.StreamContainersRequest{})
	check(t, err)
	if r, err := containers.Recv(); err != io.EOF {
		t.Errorf("no container: %v, %v", r, err)
	}
	for _, p := range pods {
		p.Remove()
	}
	n.CheckClean()
}
