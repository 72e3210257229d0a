package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// history is all that the API server has said of pods, events and the node. Its methods
// may be called by several goroutines.
type history struct {
	mu     sync.Mutex
	pods   map[types.UID][]core.Pod // each state that a pod had
	events map[types.UID]core.Event // as they were last
	nodes  []core.Node              // each state of the one node
	err    error                    // why a watch has ended before the test
}

// watch has everything noted that happens from now on, until the programs are stopped: an
// API server waits a minute for watches to end.
func (c *cluster) watch() {
	c.seen = &history{pods: map[types.UID][]core.Pod{}, events: map[types.UID]core.Event{}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, kind := range []string{"pods", "events", "nodes"} {
		wg.Go(func() {
			err := c.follow(ctx, kind)
			c.seen.mu.Lock()
			defer c.seen.mu.Unlock()
			if ctx.Err() == nil {
				c.seen.err = fmt.Errorf("the watch of %s has ended: %w", kind, err)
			}
		})
	}
	c.stopWatching = func() { cancel(); wg.Wait() }
}

// follow notes the states of all objects of a kind.
func (c *cluster) follow(ctx context.Context, kind string) error {
	resp, err := c.request(ctx, "/api/v1/"+kind+"?watch=1&timeoutSeconds=7200")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	d := json.NewDecoder(resp.Body)
	for {
		var change struct {
			Type   string
			Object json.RawMessage
		}
		if err := d.Decode(&change); err != nil {
			return err
		}
		if change.Type == "DELETED" {
			continue // its last state has been there before
		}
		if err := c.seen.note(kind, change.Object); err != nil {
			return err
		}
	}
}

func (h *history) note(kind string, object []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch kind {
	case "pods":
		var p core.Pod
		if err := json.Unmarshal(object, &p); err != nil {
			return err
		}
		h.pods[p.UID] = append(h.pods[p.UID], p)
	case "events":
		var e core.Event
		if err := json.Unmarshal(object, &e); err != nil {
			return err
		}
		h.events[e.UID] = e
	case "nodes":
		var n core.Node
		if err := json.Unmarshal(object, &n); err != nil {
			return err
		}
		h.nodes = append(h.nodes, n)
	}
	return nil
}

// Annotations of a pod that say what is no fault.
const (
	endsMark     = "ends"     // the exit codes that its containers may have, as "0 42"; "index": that of the job
	restartsMark = "restarts" // how often its containers are started again
)

// faults are what must not have happened to pods and the node, whatever was done to the
// runtime.
func (h *history) faults() (faults []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err != nil {
		faults = append(faults, h.err.Error())
	}
	for _, states := range h.pods {
		for i := range states {
			p := &states[i]
			for _, f := range h.podFaultsLocked(p, i > 0 && podReady(&states[i-1])) {
				faults = append(faults, fmt.Sprintf("pod %s/%s: %s", p.Namespace, p.Name, f))
			}
		}
	}
	ready := false
	for i := range h.nodes {
		now := isReady(h.nodes[i].Status.Conditions)
		if ready && !now {
			faults = append(faults, fmt.Sprintf("the node was not ready: %+v", h.nodes[i].Status.Conditions))
		}
		ready = now
	}
	slices.Sort(faults)
	return slices.Compact(faults)
}

func podReady(p *core.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c core.PodCondition) bool {
		return c.Type == core.PodReady && c.Status == core.ConditionTrue
	})
}

// podFaultsLocked compares a state of a pod with what its annotations allow. A reason to
// be started again is that the runtime died during StartContainer: no runtime can tell
// the kubelet then that it has not started the container. The kubelet has it killed
// before it was started, and makes another one.
func (h *history) podFaultsLocked(p *core.Pod, wasReady bool) (faults []string) {
	calm := p.Annotations[restartsMark] == "" && p.Annotations[endsMark] == "" && p.DeletionTimestamp == nil
	if p.Status.Phase == core.PodUnknown || wasReady && calm && !podReady(p) {
		faults = append(faults, fmt.Sprintf("was ready and is %s, %+v", p.Status.Phase, p.Status.ContainerStatuses))
	}
	allowed, _ := strconv.Atoi(p.Annotations[restartsMark])
	failed := h.failedStartsLocked(p.UID)
	for _, c := range statuses(p) {
		// What looks at another container in its PID namespace is killed with that one.
		isLook := slices.ContainsFunc(p.Status.EphemeralContainerStatuses, func(e core.ContainerStatus) bool {
			return e.Name == c.Name
		})
		if int(c.RestartCount) > allowed+failed {
			faults = append(faults, fmt.Sprintf("%s was started again %d times, want at most %d and %d",
				c.Name, c.RestartCount, allowed, failed))
		}
		for _, end := range []*core.ContainerStateTerminated{c.State.Terminated, c.LastTerminationState.Terminated} {
			switch {
			case end == nil || mayEnd(p, end):
			case isLook && p.DeletionTimestamp != nil:
			case failed > 0 && end.Reason == "ContainerCannotRun" && end.StartedAt.Unix() == 0:
			default:
				faults = append(faults, fmt.Sprintf("%s has ended so: %+v", c.Name, *end))
			}
		}
	}
	return faults
}

// mayEnd says whether a container of a pod may have ended so. One that was asked to end
// ends with 0.
func mayEnd(p *core.Pod, end *core.ContainerStateTerminated) bool {
	reason := "Error"
	if end.ExitCode == 0 {
		reason = "Completed"
	}
	if end.Reason != reason || end.StartedAt.IsZero() || end.FinishedAt.Before(&end.StartedAt) {
		return false
	}
	code := strconv.Itoa(int(end.ExitCode))
	ends := p.Annotations[endsMark]
	if ends == "index" {
		ends = p.Annotations["batch.kubernetes.io/job-completion-index"]
	}
	return slices.Contains(strings.Fields(ends), code) || end.ExitCode == 0 && p.DeletionTimestamp != nil
}

// statuses are those of the containers of all kinds.
func statuses(p *core.Pod) []core.ContainerStatus {
	return slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses,
		p.Status.EphemeralContainerStatuses)
}

// failedStartsLocked is how many starts of a pod's containers failed with the runtime.
func (h *history) failedStartsLocked(pod types.UID) (n int) {
	for _, e := range h.events {
		if e.InvolvedObject.UID == pod && e.Reason == "Failed" && isDown(e.Message) {
			n += max(1, int(e.Count))
		}
	}
	return n
}

// gone are the words of a call that the runtime's death has ended, or kept from beginning.
var gone = []string{
	"cri.sock: connect: connection refused",
	"cri.sock: connect: no such file or directory",
	"error reading from server: EOF",
	"connection reset by peer",
	"transport is closing",
	"write: broken pipe",
}

// isDown says whether a text tells that the runtime is gone at the moment.
func isDown(text string) bool {
	return slices.ContainsFunc(gone, func(words string) bool { return strings.Contains(text, words) })
}

// accepted are warnings that have another cause than the runtime.
var accepted = []struct{ reason, text, why string }{
	{"CgroupV1", "", "the machine's"},
	{"InvalidDiskCapacity", "invalid capacity 0 on image filesystem", "the kubelet asks before it has figures"},
	{"FailedScheduling", "", "the one node takes no pods while it is drained"},
	{"FailedMount", `configmap "kube-root-ca.crt" not found`, "the namespace has been made a moment ago"},
	{"FailedMount", `object "`, "the kubelet has not read it yet"},
	{"ClusterIPNotAllocated", "", "the API server looks for what its own start is about to record"},
}

// follows are the texts of events that only repeat another one, which says more.
var follows = []string{"Error: ImageInspectError", "Error: ErrImagePull"}

// complaints are the events that tell of something wrong: warnings, but for accepted ones
// and those of a runtime that is gone while it is killed, and what the kubelet or the
// controllers do when they take a pod or the node for broken.
func (h *history) complaints(killing bool) (lines, transient []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	alarms := []string{"SandboxChanged", "NodeNotReady", "TaintManagerEviction", "Preempted", "Rebooted"}
	for _, e := range h.events {
		line := fmt.Sprintf("%s %s %s/%s %dx: %s", e.Reason, e.InvolvedObject.Kind, e.InvolvedObject.Namespace,
			e.InvolvedObject.Name, e.Count, e.Message)
		switch {
		case e.Type == core.EventTypeNormal && !slices.Contains(alarms, e.Reason):
		case isAccepted(e) || isWanted(e):
		case e.Reason == "Unhealthy" && !h.servesLocked(e):
		case killing && (isDown(e.Message) || slices.Contains(follows, e.Message)):
			transient = append(transient, line)
		default:
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	slices.Sort(transient)
	return lines, transient
}

// servesLocked says whether the pod of an event was ready by then, and not yet deleted. A
// probe fails before the program listens, and when it has been told to end.
func (h *history) servesLocked(e core.Event) bool {
	var since, until time.Time
	for _, p := range h.pods[e.InvolvedObject.UID] {
		if since.IsZero() && podReady(&p) {
			since = readySince(&p)
		}
		if until.IsZero() && p.DeletionTimestamp != nil {
			until = p.DeletionTimestamp.Add(-time.Duration(*p.DeletionGracePeriodSeconds) * time.Second)
		}
	}
	at := e.LastTimestamp.Time // in whole seconds, as the others
	return !since.IsZero() && at.After(since) && (until.IsZero() || at.Before(until))
}

func readySince(p *core.Pod) time.Time {
	for _, c := range p.Status.Conditions {
		if c.Type == core.PodReady {
			return c.LastTransitionTime.Time
		}
	}
	return time.Time{}
}

func isAccepted(e core.Event) bool {
	for _, a := range accepted {
		if e.Reason == a.reason && strings.Contains(e.Message, a.text) {
			return true
		}
	}
	return false
}

// isWanted says whether a row makes a thing fail on purpose.
func isWanted(e core.Event) bool {
	for _, r := range rows {
		if e.InvolvedObject.Namespace == r.name {
			return slices.Contains(r.warnings, e.Reason)
		}
	}
	return false
}
