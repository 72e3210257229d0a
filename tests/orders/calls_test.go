package orders

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// target is a pod of one name, and what its callers know of it. Its methods may be called by several
// goroutines.
type target struct {
	*history
	n      *harness.Node
	config *cri.PodSandboxConfig

	mu         sync.Mutex
	pod        string // ids that were answered last; empty: none yet
	containers [2]string
	podOf      map[string]string // by id of all containers that anybody was told of
	rotated    [2]int            // times that logs were renamed
	variant    [2]int            // of the script that most ask for now
}

var slotNames = [...]string{"a", "b"}

// callTimeout bounds a call. A daemon that lives answers long before.
const callTimeout = time.Minute

// noSuchID is an id that nothing has.
var noSuchID = strings.Repeat("0", 64)

func newTarget(n *harness.Node, name string, died *sync.Map) *target {
	return &target{history: newHistory(died), n: n, config: n.PodConfig(name), podOf: map[string]string{}}
}

// known gives the ids of the pod and of a container, as far as they were answered.
func (g *target) known(slot int) (pod, id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if slot == thePod {
		return g.pod, g.pod
	}
	id = g.containers[slot]
	return cmp.Or(g.podOf[id], g.pod), id
}

// learn keeps the id of a container that was answered, or listed.
func (g *target) learn(slot int, id, pod string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.containers[slot], g.podOf[id] = id, pod
}

// logPath is the log of one config of a container.
func (s script) logPath(slot int) string { return fmt.Sprintf("%s-%d.log", slotNames[slot], s.variant) }

// containerConfig is the config of a container that does what a script says.
func (g *target) containerConfig(slot int, s script) *cri.ContainerConfig {
	command := []string{"testbox", "print", "-every", "5ms", "-count", fmt.Sprint(s.lines), "-exit", fmt.Sprint(s.exit)}
	return harness.ContainerConfig(slotNames[slot], command, func(c *cri.ContainerConfig) {
		c.LogPath = s.logPath(slot)
	})
}

// do makes a call and records it. It is nil if there was no daemon to send it to.
func (g *target) do(c call) *call {
	made := g.address(c)
	g.begin(made)
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	got, err := g.send(ctx, made)
	if status.Code(err) == codes.Unavailable && strings.HasPrefix(status.Convert(err).Message(), "connection error:") {
		g.forget(made)
		return nil
	}
	made.finish(err)
	switch {
	case err != nil:
	case made.verb == runPod:
		made.got = got
		g.mu.Lock()
		g.pod = got
		g.mu.Unlock()
	case made.verb == create:
		made.got = got
		g.learn(made.slot, got, made.pod)
	}
	g.end(made)
	return made
}

// address gives a call the ids that are known.
func (g *target) address(c call) *call {
	pod, id := g.known(c.slot)
	switch c.verb {
	case runPod:
	case create:
		g.mu.Lock()
		c.pod = cmp.Or(g.pod, noSuchID)
		g.mu.Unlock()
	default:
		c.pod, c.id = cmp.Or(pod, noSuchID), cmp.Or(id, noSuchID)
	}
	return &c
}

// send is the call itself. It gives the id of what was created.
func (g *target) send(ctx context.Context, c *call) (id string, err error) {
	r := g.n.Runtime
	switch c.verb {
	case runPod:
		a, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: g.config})
		return a.GetPodSandboxId(), err
	case stopPod:
		_, err = r.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: c.id})
	case removePod:
		_, err = r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: c.id})
	case create:
		a, err := r.CreateContainer(ctx, &cri.CreateContainerRequest{
			PodSandboxId: c.pod, Config: g.containerConfig(c.slot, c.script), SandboxConfig: g.config})
		return a.GetContainerId(), err
	case start:
		_, err = r.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.id})
	case stop:
		_, err = r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.id, Timeout: c.grace})
	case remove:
		_, err = r.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.id})
	case exec:
		err = g.exec(ctx, c.id)
	case update:
		_, err = r.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{
			ContainerId: c.id, Linux: &cri.LinuxContainerResources{CpuShares: c.shares}})
	case reopen:
		g.rotate(c.slot)
		_, err = r.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: c.id})
	default:
		err = fmt.Errorf("nobody calls %s", c.verb)
	}
	return "", err
}

// exec runs a command whose output and exit code have to be exact.
func (g *target) exec(ctx context.Context, id string) error {
	a, err := g.n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{
		ContainerId: id, Cmd: []string{"sh", "-c", "echo out; echo err >&2; exit 7"}, Timeout: 50})
	if err == nil && (a.ExitCode != 7 || string(a.Stdout) != "out\n" || string(a.Stderr) != "err\n") {
		if a.ExitCode == codeKilled { // its container has ended meanwhile
			return status.Error(codes.Unavailable, "the command was killed")
		}
		return status.Errorf(codes.DataLoss, "a command exited with %d and said %q, %q", a.ExitCode, a.Stdout, a.Stderr)
	}
	return err
}

// rotate renames the logs of a container, as a kubelet does before it has them opened anew.
func (g *target) rotate(slot int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rotated[slot]++
	logs, _ := filepath.Glob(filepath.Join(g.config.LogDirectory, slotNames[slot]+"-*.log"))
	for _, path := range logs {
		os.Rename(path, fmt.Sprintf("%s.%06d", path, g.rotated[slot]))
	}
}

// look asks for all that is to be seen of the pod and records it.
func (g *target) look(client int) (answered bool) {
	answered = g.listPods(client)
	if pod, _ := g.known(thePod); pod != "" {
		answered = g.lookAtPod(client, pod) && g.list(client, pod) && answered
	}
	for slot := range slotNames {
		if _, id := g.known(slot); id != "" {
			answered = g.lookAt(client, slot, id) && answered
		}
	}
	return answered
}

// observe makes a call that only looks, and gives what it says, which has the same times as the call.
func (g *target) observe(c call, ask func(context.Context) error) *call {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	c.verb, c.began = see, time.Now().UnixNano()
	err := ask(ctx)
	c.finish(err)
	return &c
}

func (g *target) lookAtPod(client int, id string) bool {
	var a *cri.PodSandboxStatusResponse
	c := g.observe(call{client: client, slot: thePod, pod: id, id: id}, func(ctx context.Context) (err error) {
		a, err = g.n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: id})
		return err
	})
	switch {
	case c.failed:
		return false
	case c.code == codes.OK:
		c.seen = podView(a.Status.Id, a.Status.State, a.Status.CreatedAt)
		g.showAll(c, a.ContainersStatuses)
	case c.code != codes.NotFound:
		g.wrong(c)
	}
	g.end(c)
	return true
}

// listPods records whether a pod of the name is listed.
func (g *target) listPods(client int) bool {
	var a *cri.ListPodSandboxResponse
	c := g.observe(call{client: client, slot: thePod}, func(ctx context.Context) (err error) {
		a, err = g.n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{
			Filter: &cri.PodSandboxFilter{LabelSelector: g.config.Labels}})
		return err
	})
	if c.failed {
		return false
	}
	for _, p := range a.GetItems() {
		if c.seen != nil {
			g.wrong(c) // two of one name
			break
		}
		g.mu.Lock()
		g.pod = p.Id
		g.mu.Unlock()
		c.id, c.seen = p.Id, podView(p.Id, p.State, p.CreatedAt)
	}
	g.end(c)
	return true
}

// wrong makes an answer that nothing allows one that the checker will not take.
func (g *target) wrong(c *call) { c.seen = &view{id: "refused: " + c.text} }

// showAll records the statuses that came with that of a pod.
func (g *target) showAll(from *call, statuses []*cri.ContainerStatus) {
	for slot, name := range slotNames {
		c := &call{verb: see, client: from.client, slot: slot, pod: from.pod, began: from.began, ended: from.ended}
		for _, s := range statuses {
			if s.Metadata.Name != name {
				continue
			}
			if c.seen != nil {
				g.wrong(c) // two of one name
				continue
			}
			c.id, c.seen = s.Id, containerView(s)
		}
		g.end(c)
	}
}

func (g *target) lookAt(client, slot int, id string) bool {
	var a *cri.ContainerStatusResponse
	pod, _ := g.known(slot)
	c := g.observe(call{client: client, slot: slot, pod: pod, id: id}, func(ctx context.Context) (err error) {
		a, err = g.n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
		return err
	})
	switch {
	case c.failed:
		return false
	case c.code == codes.OK:
		c.seen = containerView(a.Status)
	case c.code != codes.NotFound:
		g.wrong(c)
	}
	g.end(c)
	return true
}

// list records which containers a pod is listed with.
func (g *target) list(client int, pod string) bool {
	var a *cri.ListContainersResponse
	from := g.observe(call{client: client, pod: pod}, func(ctx context.Context) (err error) {
		a, err = g.n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{
			Filter: &cri.ContainerFilter{PodSandboxId: pod}})
		return err
	})
	if from.failed {
		return false
	}
	for slot, name := range slotNames {
		c := *from
		c.slot = slot
		for _, l := range a.GetContainers() {
			if l.Metadata.Name != name {
				continue
			}
			if c.seen != nil {
				g.wrong(&c) // two of one name
				continue
			}
			g.learn(slot, l.Id, pod)
			c.id, c.seen = l.Id, &view{id: l.Id, phase: phaseOf(l.State), created: l.CreatedAt}
		}
		g.end(&c)
	}
	return true
}

func podView(id string, s cri.PodSandboxState, createdAt int64) *view {
	v := &view{id: id, phase: exited, created: createdAt}
	if s == cri.PodSandboxState_SANDBOX_READY {
		v.phase = running
	}
	return v
}

func phaseOf(s cri.ContainerState) phase {
	switch s {
	case cri.ContainerState_CONTAINER_CREATED:
		return created
	case cri.ContainerState_CONTAINER_RUNNING:
		return running
	case cri.ContainerState_CONTAINER_EXITED:
		return exited
	}
	return absent // the checker does not take it
}

func containerView(s *cri.ContainerStatus) *view {
	return &view{
		id:       s.Id,
		phase:    phaseOf(s.State),
		whole:    true,
		created:  s.CreatedAt,
		started:  s.StartedAt,
		finished: s.FinishedAt,
		exit:     s.ExitCode,
		reason:   s.Reason,
		shares:   s.GetResources().GetLinux().GetCpuShares(),
	}
}
