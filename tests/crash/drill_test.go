package crash

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// disaster is one step, and the life of a pod that reaches it.
type disaster struct {
	at   step.Step
	nth  int // which time it is reached; 0: the first
	life life
	// then is a step of the recovery, or of the undoing, at which it happens again.
	then step.Step
	// ofShim says that it is a shim that reaches it, lost what becomes of the
	// container if that shim is killed there.
	ofShim bool
	lost   loss
	// ofStream says that it is holdfast-stream that reaches it.
	ofStream bool
}

// loss is what nobody can know any more of a container whose shim was killed.
type loss int

const (
	nothing loss = iota
	output       // that the shim had not read
	ending       // how the container ended, and its output
)

// limit bounds what a kubelet tries, and what goes away by itself.
const limit = 30 * time.Second

// life is what is special about a pod.
type life int

const (
	plain     life = iota
	withInit       // its containers share a pid namespace
	deadShim       // the shim of the container that stays is killed
	stopped        // the container that stays is stopped with a grace
	reopened       // its log is opened anew
	visited        // a command is executed in it
	updated        // it, and the pod, get other resources
	inSession      // it has sessions
	watched        // somebody has events told
	saved          // a checkpoint is made of it
	podSaved       // a checkpoint is made of its pod, and another pod of that
)

func (l life) String() string {
	return [...]string{
		"plain", "with init", "dead shim", "stopped", "reopened", "visited", "updated", "in session", "watched",
		"saved", "pod saved",
	}[l]
}

func (d disaster) String() string {
	name := fmt.Sprintf("%s %d", d.at, max(d.nth, 1))
	if d.life != plain {
		name += " " + d.life.String()
	}
	if d.then != "" {
		name += " then " + string(d.then)
	}
	return name
}

// Every step of the daemon and of a shim. The first container of a pod with an init is its init;
// the first one that is removed is so by RemoveContainer, and the second one, or
// the init, with its pod.
var disasters = []disaster{
	{at: step.PodRecord},
	{at: step.PodNamespaces},
	{at: step.PodIntent},
	{at: step.PodNetwork},
	{at: step.PodNetwork, then: step.PodDetached},
	{at: step.PodNetwork, then: step.PodErased},
	{at: step.PodAttached},
	{at: step.PodInit, life: withInit},
	{at: step.PodPinned, life: withInit},
	{at: step.PodPlugins},
	{at: step.PodReady},
	{at: step.PodUpdated, life: updated},
	{at: step.PodStopping},
	{at: step.PodKilled},
	{at: step.PodKilled, life: withInit},
	{at: step.PodDetached},
	{at: step.PodDetached, life: withInit},
	{at: step.PodStopped},
	{at: step.PodErased},
	{at: step.PodFrozen, life: podSaved},
	{at: step.PodThawed, life: podSaved},
	{at: step.PodArchive, life: podSaved},
	{at: step.PodArchived, life: podSaved},
	{at: step.PodRestoring, life: podSaved},
	{at: step.PodRestored, life: podSaved},

	{at: step.ContainerImage},
	{at: step.ContainerRecord},
	{at: step.ContainerRecord, life: withInit},
	{at: step.ContainerPlugins},
	{at: step.ContainerRoot},
	{at: step.ContainerRoot, life: withInit},
	{at: step.ContainerShim},
	{at: step.ContainerShim, life: withInit},
	{at: step.ContainerRuntime},
	{at: step.ContainerRuntime, life: withInit},
	{at: step.ContainerRuntime, then: step.ContainerBuried},
	{at: step.ContainerRuntime, then: step.ContainerEnded},
	{at: step.ContainerRuntime, then: step.ContainerErased},
	{at: step.ContainerCreated},
	{at: step.ContainerCreated, life: withInit},
	{at: step.ContainerStarted},
	{at: step.ContainerStarted, life: withInit},
	{at: step.ContainerUpdating, life: updated},
	{at: step.ContainerUpdated, life: updated},
	{at: step.ContainerReopened, life: reopened},
	{at: step.ContainerStopping, life: stopped},
	{at: step.ContainerStopping}, // by StopPodSandbox
	{at: step.ContainerFreezing, life: saved},
	{at: step.ContainerFrozen, life: saved},
	{at: step.ContainerSaved, life: saved},
	{at: step.ContainerThawed, life: saved},
	{at: step.ContainerArchived, life: saved},
	{at: step.ContainerRemoving},
	{at: step.ContainerRemoving, nth: 2},
	{at: step.ContainerRemoving, life: withInit},
	{at: step.ContainerBuried},
	{at: step.ContainerBuried, life: deadShim},
	{at: step.ContainerEnded},
	{at: step.ContainerEnded, nth: 2},
	{at: step.ContainerEnded, life: withInit},
	{at: step.ContainerErased},
	{at: step.ContainerErased, nth: 2},
	{at: step.ContainerErased, life: withInit},

	{at: step.SessionToken, life: inSession, nth: 2},
	{at: step.SessionServed, life: inSession},
	{at: step.SessionServed, life: inSession, nth: 2},
	{at: step.EventSending, life: watched},
	{at: step.EventSending, life: watched, nth: 3},
	{ofStream: true, at: step.StreamLocked, life: inSession},
	{ofStream: true, at: step.StreamAnnounced, life: inSession},
	{ofStream: true, at: step.StreamTaken, life: inSession},
	{ofStream: true, at: step.StreamOpened, life: inSession},

	{ofShim: true, at: step.ShimCreating},
	{ofShim: true, at: step.ShimCreating, life: withInit},
	{ofShim: true, at: step.ShimRuntime},
	{ofShim: true, at: step.ShimRuntime, life: withInit},
	{ofShim: true, at: step.ShimCreated},
	{ofShim: true, at: step.ShimReleased, lost: ending},
	{ofShim: true, at: step.ShimStarted, lost: ending},
	{ofShim: true, at: step.ShimStopping, life: stopped, lost: ending},
	{ofShim: true, at: step.ShimSignalled, life: stopped, lost: ending},
	{ofShim: true, at: step.ShimReopened, life: reopened, lost: ending},
	{ofShim: true, at: step.ShimExecRecord, life: visited, lost: ending},
	{ofShim: true, at: step.ShimExecStarted, life: visited, lost: ending},
	{ofShim: true, at: step.ShimExecEnded, life: visited, lost: ending},
	{ofShim: true, at: step.ShimSession, life: inSession, lost: ending},
	{ofShim: true, at: step.ShimExecEnded, life: inSession, lost: ending},
	{ofShim: true, at: step.ShimUpdated, life: updated, lost: ending},
	{ofShim: true, at: step.ShimUpdateKept, life: updated, lost: ending},
	{ofShim: true, at: step.ShimFrozen, life: saved, lost: ending},
	{ofShim: true, at: step.ShimSaved, life: saved, lost: ending},
	{ofShim: true, at: step.ShimExitSeen, lost: ending},
	{ofShim: true, at: step.ShimExitRecorded, lost: output},
	{ofShim: true, at: step.ShimReaped, lost: output},
	{ofShim: true, at: step.ShimExitAnnounced},
	{ofShim: true, at: step.ShimCleaned},
}

// The daemon is killed at each step in the life of a pod and of its containers. It
// is started again, and the kubelet repeats its request until that succeeds.
// Whatever the step: there is one of each thing while the pod lives, every exit
// code is the scripted one, no line of a log is lost or doubled, and in the end
// nothing is left on the machine. A shim that is killed is not started again: its
// container is undone, or ends with it, and no success is invented.
func TestKilledAtEachStep(t *testing.T) { eachStep(t, "kill") }

// Each step fails once, as on a full disk and as on a broken one. The daemon lives on and
// has to undo by itself.
func TestFailsAtEachStep(t *testing.T) {
	reasons := []string{"ENOSPC", "EIO"}
	if !drill {
		i := chance(t).IntN(len(reasons))
		reasons = reasons[i : i+1]
	}
	for _, why := range reasons {
		t.Run(why, func(t *testing.T) { eachStep(t, "fail "+why) })
	}
}

// seed is another one each time. HOLDFAST_SEED repeats one.
func seed(t *testing.T) uint64 {
	t.Helper()
	seed, err := strconv.ParseUint(os.Getenv("HOLDFAST_SEED"), 10, 64)
	if err != nil {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	return seed
}

// chance is what a quick form chooses by.
func chance(t *testing.T) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(seed(t), 0))
}

// Each step takes its time, or the daemon is stopped there and goes on later.
func TestHeldAtEachStep(t *testing.T) {
	if !drill {
		t.Skip("only HOLDFAST_DRILL=1 takes the time for it")
	}
	for _, action := range []string{"stop", "1500ms"} {
		t.Run(action, func(t *testing.T) { eachStep(t, action) })
	}
}

// A process that is stopped at a step stays so for longer than those wait who call it. The
// kubelet gives up and repeats its request; the daemon says that a shim does not answer, or
// kills it for somebody who wants the container gone. What goes on later does no harm.
func TestStoppedForLongAtEachStep(t *testing.T) {
	t.Parallel()
	eachStep(t, stopForLong)
}

const stopForLong = "stop for long"

// holdFor is how long a disaster has a process stopped for, if that is to be long.
func (d disaster) holdFor() time.Duration {
	const (
		kubelet = 3 * time.Second // longer than givesUp
		quick   = 12 * time.Second
		end     = 50 * time.Second // for a stopped shim that is ended: two quick calls, and 30 s
		slow    = 5 * time.Minute  // for a create or a start
	)
	switch creates := []step.Step{step.ShimCreating, step.ShimRuntime, step.ShimCreated, step.ShimReleased,
		step.ShimStarted}; {
	case !d.ofShim:
		return kubelet
	case !drill:
		return quick
	case slices.Contains(creates, d.at):
		return slow
	}
	return end
}

// givesUp is what a call of a kubelet may take that meets a process that is stopped for long.
const givesUp = 2 * time.Second

// eachStep has an action happen at each step. Several nodes share the work: most
// of it is waiting for other processes.
func eachStep(t *testing.T, action string) {
	const nodes = 4
	tally := harness.Drill(t, strings.TrimPrefix(t.Name(), "Test"))
	lists := make([][]disaster, nodes)
	list := chosen(action)
	if action == stopForLong && !drill {
		lots := chance(t)
		lots.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		list = list[:2*nodes]
	}
	for i, d := range list {
		lists[i%nodes] = append(lists[i%nodes], d)
	}
	for i, list := range lists {
		t.Run(fmt.Sprintf("node %d", i), func(t *testing.T) {
			t.Parallel()
			n := harness.New(t, harness.Options{Failpoints: true})
			for i, d := range list {
				t.Run(d.String(), func(t *testing.T) {
					if (d.life == saved || d.life == podSaved) && noCRIU() != "" {
						t.Skip(noCRIU())
					}
					k := &kubelet{disaster: d, n: n.With(t), t: t, tally: tally, action: action}
					if strings.HasPrefix(action, "fail") {
						k.excuse = "failpoint"
					}
					switch action {
					case "kill":
						k.dead = k.checkWindow
					case stopForLong:
						k.action, k.hold = "stop", d.holdFor()
					}
					k.live(fmt.Sprintf("pod%d", i))
				})
			}
			n.Arm()
			tally.CheckClean(n)
		})
	}
}

// noCRIU says why CRIU cannot work on this machine; "" if it can.
var noCRIU = sync.OnceValue(func() string {
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		return fmt.Sprintf("criu check: %v: %s", err, out)
	}
	return ""
})

// chosen are the disasters of an action. What the kubelet sees of a step that fails
// is much the same in each life, so that one of them does but for a drill.
func chosen(action string) (list []disaster) {
	seen := map[step.Step]bool{}
	for _, d := range disasters {
		// A container whose undoing fails is undone in the background. A pod stays,
		// for the kubelet to remove.
		again := action == "kill" || strings.HasPrefix(action, "fail") && d.at == step.ContainerRuntime
		if d.then != "" && !again || action != "kill" && !drill && d.then == "" && seen[d.at] {
			continue
		}
		seen[d.at] = true
		list = append(list, d)
	}
	return list
}

// kubelet does what one does for a pod: it repeats what has no answer.
type kubelet struct {
	disaster
	n      *harness.Node
	t      *testing.T
	tally  *harness.Tally
	action string // as proto/step has it
	// excuse is in the text of each error that the action may cause; empty: the daemon
	// has to be dead.
	excuse string
	dead   func() // called when the daemon is found dead; may be nil
	// hold is how long a process is stopped for, if that is to be long.
	hold time.Duration
	// lossOf says what may be lost of a container, where a disaster does not; may be nil.
	lossOf func(id string) loss
	// neverRan says whether a container whose shim was killed has not run for sure; may be nil.
	neverRan func(id string) bool
	killed   int // times that the daemon was found dead
	failed   int // calls that failed otherwise
}

// lose counts something as lost.
func (k *kubelet) lose(what harness.Loss, format string, args ...any) {
	k.t.Helper()
	k.t.Errorf(format, args...)
	k.tally.Lost(what, "%s: "+format, append([]any{k.t.Name()}, args...)...)
}

// live takes a pod with two containers from nothing to nothing while a disaster
// happens.
func (k *kubelet) live(name string) {
	defer k.leave()
	defer k.goOn()()
	if k.life == inSession {
		k.endStream()
	}
	k.arm()
	wantEnd := func(string) {}
	if k.life == watched {
		wantEnd = k.subscribe()
	}
	pod := k.runPod(name)
	ends, stays := k.runContainers(pod)
	k.awaitExit(ends)
	k.checkLiving(pod, ends, stays)
	wantEnd(ends.ID)
	k.disturb(stays, k.life)
	k.stopPod(pod.ID)
	k.checkEnds(ends, stays)
	// The other container is removed with the pod.
	k.removeContainer(ends.ID)
	k.removePod(pod.ID)
	k.checkHappened()
	if k.life == inSession {
		k.dropTokens()
	}
	k.clean()
}

// clean waits until nothing is left of a life. The daemon may be killed while it
// removes in the background.
func (k *kubelet) clean() {
	k.t.Helper()
	if left := k.n.AwaitClean(k.revive); left != "" {
		k.lose(harness.Leaks, "%s", left)
	}
}

// disturb does what is special about a life to the container that stays.
func (k *kubelet) disturb(c *harness.Container, what life) {
	k.t.Helper()
	switch what {
	case deadShim:
		k.killShim(c)
	case stopped:
		k.do("StopContainer", func(ctx context.Context) error {
			_, err := k.n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: 30})
			return err
		})
	case reopened:
		k.do("ReopenContainerLog", func(ctx context.Context) error {
			_, err := k.n.Runtime.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: c.ID})
			return k.unlessLost(ctx, c, err)
		})
	case visited:
		k.do("ExecSync", func(ctx context.Context) error {
			r, err := c.Exec(30, "echo", "hello")
			if err == nil && (r.ExitCode != 0 || string(r.Stdout) != "hello\n") {
				k.t.Errorf("a command exited with %d and said %q, %q", r.ExitCode, r.Stdout, r.Stderr)
			}
			return k.unlessLost(ctx, c, err)
		})
	case updated:
		k.do("UpdatePodSandboxResources", func(ctx context.Context) error {
			_, err := k.n.Runtime.UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{
				PodSandboxId: c.Pod.ID,
				Resources:    &cri.LinuxContainerResources{CpuShares: 1024},
			})
			return err
		})
		k.update(c)
	case inSession:
		k.converse(c)
	case saved:
		k.save(c)
	case podSaved:
		k.restorePod(c, k.savePod(c))
	}
}

// savePod makes a checkpoint of the pod of a container, and gives its directory. Whenever
// that fails, the container goes on, and nothing is left in the directory.
func (k *kubelet) savePod(c *harness.Container) (dir string) {
	k.t.Helper()
	dir = k.t.TempDir()
	k.do("CheckpointPod", func(ctx context.Context) error {
		_, err := k.n.Runtime.CheckpointPod(ctx, &cri.CheckpointPodRequest{
			PodSandboxId: c.Pod.ID,
			OutputPath:   dir,
			ContainerIds: []string{c.ID},
		})
		files := 3
		if err != nil {
			files = 0
		}
		k.eventually("there is the whole checkpoint or nothing", func() bool {
			k.revive() // its end may be seen later than that of the call
			left, rerr := os.ReadDir(dir)
			return rerr == nil && len(left) == files
		})
		lines := len(c.Log())
		k.eventually("the container goes on", func() bool {
			k.revive()
			return len(c.Log()) > lines+2
		})
		return err
	})
	return dir
}

// restorePod makes a pod of a checkpoint, which is whole in the end, runs, and goes.
func (k *kubelet) restorePod(c *harness.Container, dir string) {
	k.t.Helper()
	p := &harness.Pod{N: k.n, Config: k.n.PodConfig(c.Pod.Config.Metadata.Name + "-restored")}
	r := &harness.Container{N: k.n, Pod: p, Config: c.Config}
	k.do("RestorePod", func(ctx context.Context) error {
		resp, err := k.n.Runtime.RestorePod(ctx, &cri.RestorePodRequest{
			CheckpointPath:   dir,
			Config:           p.Config,
			ContainerConfigs: []*cri.ContainerConfig{c.Config},
		})
		if err == nil {
			p.ID, r.ID = resp.PodSandboxId, resp.RestoredContainers[0].ContainerId
		}
		return err
	})
	k.do("StartContainer", func(ctx context.Context) error {
		_, err := k.n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: r.ID})
		return err
	})
	k.eventually("the restored container goes on", func() bool { return len(r.Log()) > 2 })
	k.removePod(p.ID)
}

// save makes a checkpoint of a container. Whenever that fails, the container goes on, and
// nothing is left of the archive.
func (k *kubelet) save(c *harness.Container) {
	k.t.Helper()
	dir := k.t.TempDir()
	k.do("CheckpointContainer", func(ctx context.Context) error {
		_, err := k.n.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{
			ContainerId: c.ID,
			Location:    filepath.Join(dir, "archive.tar"),
		})
		files := 1
		if err != nil {
			files = 0
		}
		k.eventually("there is the whole archive or nothing", func() bool {
			k.revive() // its end may be seen later than that of the call
			left, rerr := os.ReadDir(dir)
			return rerr == nil && len(left) == files
		})
		if err := k.unlessLost(ctx, c, err); err != nil || k.lost == ending && k.action == "kill" {
			return err
		}
		lines := len(c.Log())
		k.eventually("the container goes on", func() bool {
			k.revive()
			return len(c.Log()) > lines+2
		})
		return err
	})
}

// update gives a container other resources. Whenever that fails, it has the old ones or
// the new ones, and the status says which.
func (k *kubelet) update(c *harness.Container) {
	k.t.Helper()
	const shares, memory = 512, 512 << 20
	pid := c.Info().PID
	agree := func() bool {
		var s *cri.ContainerStatus
		k.do("ContainerStatus", func(ctx context.Context) (err error) {
			s, err = k.status(ctx, c)
			return err
		})
		if s.State == cri.ContainerState_CONTAINER_EXITED {
			return true
		}
		limit, err := harness.CgroupFile(pid, "memory", "memory.limit_in_bytes", "memory.max")
		weight, werr := harness.CgroupFile(pid, "cpu", "cpu.shares", "cpu.weight")
		r := s.GetResources().GetLinux()
		now := limit == fmt.Sprint(memory) && (weight == fmt.Sprint(shares) || weight == "59")
		shown := r.GetMemoryLimitInBytes() == memory && r.GetCpuShares() == shares
		return err == nil && werr == nil && now == shown &&
			(now || limit != fmt.Sprint(memory) && r.GetCpuShares() == 0)
	}
	k.do("UpdateContainerResources", func(ctx context.Context) error {
		_, err := k.n.Runtime.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{
			ContainerId: c.ID,
			Linux:       &cri.LinuxContainerResources{CpuShares: shares, MemoryLimitInBytes: memory},
		})
		if err != nil {
			k.revive()
		}
		k.eventually("status and kernel agree about resources", agree)
		return k.unlessLost(ctx, c, err)
	})
}

// unlessLost forgives the error of a call to a container that ended with its shim.
func (k *kubelet) unlessLost(ctx context.Context, c *harness.Container, err error) error {
	if err == nil || k.action != "kill" || k.lost != ending {
		return err
	}
	if s, serr := k.status(ctx, c); serr == nil && s.State == cri.ContainerState_CONTAINER_EXITED {
		return nil
	}
	return err
}

// arm sets the failpoints of a disaster.
func (k *kubelet) arm() {
	lines := []string{fmt.Sprintf("%s %s %d", k.at, k.action, max(k.nth, 1))}
	if k.then != "" {
		lines = append(lines, fmt.Sprintf("%s %s 1", k.then, k.action))
	}
	k.n.Arm(lines...)
}

// leave leaves the node to the next disaster as it should be.
func (k *kubelet) leave() {
	if k.at != "" {
		k.n.Arm()
	}
	if !k.t.Failed() {
		return
	}
	k.revive()
	k.n.RemoveAllPods()
	k.n.Mark()
}

// revive starts the daemon again if it is dead, as often as that takes.
func (k *kubelet) revive() {
	for k.n.Ended() {
		k.killed++
		k.tally.Kill()
		if k.dead != nil {
			k.dead()
		}
		if err := k.n.Bounce(); err == nil || k.killed > 5 {
			return
		}
	}
}

func (k *kubelet) removeContainer(id string) {
	k.t.Helper()
	k.do("RemoveContainer", func(ctx context.Context) error {
		_, err := k.n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
		return err
	})
}

func (k *kubelet) stopPod(id string) {
	k.t.Helper()
	k.do("StopPodSandbox", func(ctx context.Context) error {
		_, err := k.n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
		return err
	})
}

func (k *kubelet) removePod(id string) {
	k.t.Helper()
	k.do("RemovePodSandbox", func(ctx context.Context) error {
		_, err := k.n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
		return err
	})
}

// do repeats a call until it succeeds.
func (k *kubelet) do(what string, call func(context.Context) error) {
	k.t.Helper()
	for deadline := time.Now().Add((limit + 2*k.hold) * slow); ; time.Sleep(harness.Tick) {
		ctx, cancel := harness.Deadline()
		if k.hold > 0 && !k.ofShim {
			cancel()
			ctx, cancel = context.WithTimeout(context.Background(), givesUp)
		}
		err := call(ctx)
		cancel()
		if err == nil {
			return
		}
		k.revive()
		switch {
		case time.Now().After(deadline):
			k.t.Fatalf("%s still fails: %v", what, err)
		case k.excuse != "" && strings.Contains(err.Error(), k.excuse):
			k.failed++
		case k.hold > 0 && status.Code(err) == codes.DeadlineExceeded:
			k.failed++
		case status.Code(err) != codes.Unavailable || k.excuse != "":
			k.t.Fatalf("%s: %v", what, err)
		}
	}
}

// goOn has processes that are stopped go on after a while, until stop is called.
func (k *kubelet) goOn() (stop func()) {
	if k.action != "stop" {
		return func() {}
	}
	done, over := make(chan struct{}), make(chan struct{})
	since := map[rundir.Process]time.Time{}
	go func() {
		defer close(over)
		for {
			select {
			case <-done:
				return
			case <-time.After(300 * time.Millisecond):
			}
			for _, pid := range append(slices.Collect(maps.Values(k.n.ShimPIDs())), k.n.PID(), k.n.StreamPID()) {
				p, err := rundir.FindProcess(pid)
				if err != nil || !p.Stopped() {
					continue
				}
				if since[p].IsZero() {
					since[p] = time.Now()
				}
				if time.Since(since[p]) >= k.hold {
					unix.Kill(pid, unix.SIGCONT)
				}
			}
		}
	}()
	return func() { close(done); <-over }
}

func (k *kubelet) runPod(name string) *harness.Pod {
	k.t.Helper()
	pod := &harness.Pod{N: k.n, Config: k.n.PodConfig(name)}
	if k.life == withInit {
		pod.Config.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_POD},
		}
	}
	k.do("RunPodSandbox", func(ctx context.Context) error {
		r, err := k.n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod.Config})
		pod.ID = r.GetPodSandboxId()
		return err
	})
	return pod
}

// runContainers runs a container that ends by itself and one that does not.
func (k *kubelet) runContainers(pod *harness.Pod) (ends, stays *harness.Container) {
	k.t.Helper()
	withMode := func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = pod.Config.Linux.GetSecurityContext().GetNamespaceOptions()
	}
	leave := []string{"sh", "-c", "echo leaving; exit 17"}
	ends = &harness.Container{Config: harness.ContainerConfig("ends", leave, withMode)}
	stays = &harness.Container{Config: harness.ContainerConfig("stays", []string{"testbox", "print"}, withMode)}
	for _, c := range []*harness.Container{ends, stays} {
		c.N, c.Pod = k.n, pod
		k.do("CreateContainer", func(ctx context.Context) error {
			r, err := k.n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
				PodSandboxId:  pod.ID,
				Config:        c.Config,
				SandboxConfig: pod.Config,
			})
			c.ID = r.GetContainerId()
			return err
		})
		k.do("StartContainer", func(ctx context.Context) error {
			_, err := k.n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ID})
			// The answer to an earlier try may have been lost.
			if s, serr := k.status(ctx, c); err != nil && serr == nil && s.StartedAt != 0 {
				return nil
			}
			return k.unlessLost(ctx, c, err)
		})
	}
	k.eventually("a container prints", func() bool { return len(stays.Log()) > 2 || k.loses(stays) == ending })
	return ends, stays
}

// loses says what may be lost of a container whose shim was killed at a system call.
func (k *kubelet) loses(c *harness.Container) loss {
	if k.lossOf == nil {
		return nothing
	}
	return k.lossOf(c.ID)
}

func (k *kubelet) status(ctx context.Context, c *harness.Container) (*cri.ContainerStatus, error) {
	r, err := k.n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.ID})
	return r.GetStatus(), err
}

// awaitExit waits for the end of a container. What is done meanwhile may kill the
// daemon.
func (k *kubelet) awaitExit(c *harness.Container) (s *cri.ContainerStatus) {
	k.t.Helper()
	k.eventually(c.Config.Metadata.Name+" has ended", func() bool {
		k.do("ContainerStatus", func(ctx context.Context) (err error) {
			s, err = k.status(ctx, c)
			return err
		})
		return s.State == cri.ContainerState_CONTAINER_EXITED
	})
	return s
}

func (k *kubelet) eventually(what string, f func() bool) {
	k.t.Helper()
	harness.Eventually(k.t, (3*limit+2*k.hold)*slow, what, f)
}

// killShim kills the shim of a container, which the daemon has to bury.
func (k *kubelet) killShim(c *harness.Container) {
	k.t.Helper()
	check(k.t, unix.Kill(c.ShimPID(), unix.SIGKILL))
	k.awaitExit(c)
}

// checkLiving compares what CRI tells, and the machine, with what there has to be:
// one pod, its containers, their shims, and one of each thing of the pod.
func (k *kubelet) checkLiving(pod *harness.Pod, ends, stays *harness.Container) {
	k.t.Helper()
	k.do("lists", func(ctx context.Context) error {
		pods, err := k.n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		containers, err := k.n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
		if err != nil {
			return err
		}
		if len(pods.Items) != 1 || pods.Items[0].Id != pod.ID ||
			pods.Items[0].State != cri.PodSandboxState_SANDBOX_READY {
			k.t.Errorf("the pods are %v, want %s, ready", pods.Items, pod.ID)
		}
		var ids []string
		for _, c := range containers.Containers {
			ids = append(ids, c.Id)
		}
		if want := sorted(ends.ID, stays.ID); !slices.Equal(sorted(ids...), want) {
			k.t.Errorf("the containers are %v, want %v", ids, want)
		}
		return nil
	})
	shims := []string{stays.ID}
	if k.loses(stays) == ending {
		shims = nil
	}
	if k.life == withInit {
		shims = append(shims, pod.ID)
	}
	var living []string
	k.eventually("each container that runs has a shim", func() bool {
		living = nil
		for id := range k.n.ShimPIDs() {
			living = append(living, id)
		}
		return slices.Equal(sorted(living...), sorted(shims...))
	})
	// An undone attempt may take a moment to go.
	var count map[string]int
	k.eventually("the pod has one network", func() bool {
		count = map[string]int{}
		for _, thing := range k.n.Leftovers() {
			count[strings.Fields(thing)[0]]++
		}
		return count["netns"] == 1 && count["lease"] == 1 && count["veth"] == 1
	})
}

func sorted(s ...string) []string { return slices.Sorted(slices.Values(s)) }

// checkEnds checks exit codes and logs of a pod that was stopped.
func (k *kubelet) checkEnds(ends, stays *harness.Container) {
	k.t.Helper()
	lostEnds, lostStays := k.loses(ends), k.loses(stays)
	switch {
	case k.lossOf != nil:
	case k.hold > 0 && k.ofShim:
		lostEnds, lostStays = output, output // if it was killed
	case k.life == deadShim:
		lostStays = ending
	case k.action == "kill" && k.life == plain:
		lostEnds = k.lost
	case k.action == "kill":
		lostStays = k.lost
	}
	code := int32(137)
	if k.life == stopped {
		code = 0 // it ends so on SIGTERM
	}
	k.checkExit(ends, 17, lostEnds)
	k.checkExit(stays, code, lostStays)
	if k.lossOf != nil && (lostEnds != nothing || lostStays != nothing) {
		k.checkKept(ends, stays)
	}
	log := ends.Log()
	if len(log) > 1 || len(log) == 1 && log[0].Text != "leaving" || len(log) == 0 && lostEnds == nothing {
		k.lose(harness.Lines, "the log of a container is %v, want one line", log)
	}
	if count, err := harness.Numbered("line", stays.Log()); err != nil {
		k.lose(harness.Lines, "the log of a container after %d good lines: %v", count, err)
	}
}

// checkKept: the next daemon says the same of containers whose shims were killed.
func (k *kubelet) checkKept(list ...*harness.Container) {
	k.t.Helper()
	before := map[string]*cri.ContainerStatus{}
	for _, c := range list {
		before[c.ID] = c.Status()
	}
	k.n.Restart()
	for _, c := range list {
		if now := c.Status(); !proto.Equal(now, before[c.ID]) {
			k.lose(harness.Statuses, "%s has another status after a restart:\n%v\n%v", c.Config.Metadata.Name,
				before[c.ID], now)
		}
	}
}

// checkExit checks how a container ended. Where that is not known, it says so.
func (k *kubelet) checkExit(c *harness.Container, code int32, l loss) {
	k.t.Helper()
	const killed, unknown = 137, 255
	s := k.awaitExit(c)
	reason := "Error"
	if code == 0 {
		reason = "Completed"
	}
	good := s.ExitCode == code && s.Reason == reason
	died := (s.ExitCode == killed || s.ExitCode == unknown) && s.Reason == "ShimDied"
	if k.hold > 0 && k.ofShim { // the daemon may have killed a shim that did not answer
		good = good || died
	}
	if l == ending {
		good = died
		if k.neverRan != nil && k.neverRan(c.ID) {
			good = s.ExitCode == unknown && s.Reason == "ContainerCannotRun" && len(c.Log()) == 0
		}
	}
	if !good {
		k.lose(harness.Statuses, "%s exited with %d, %s, %q", c.Config.Metadata.Name, s.ExitCode, s.Reason, s.Message)
	}
}

// checkHappened: the steps were reached, and what was to happen there did.
func (k *kubelet) checkHappened() {
	k.t.Helper()
	reached := k.n.Reached()
	want := 0
	for s, times := range map[step.Step]int{k.at: max(k.nth, 1), k.then: 1} {
		switch {
		case s == "":
			continue
		case reached[string(s)] < times:
			k.t.Errorf("%s was reached %d times: %v", s, reached[string(s)], reached)
		}
		if k.action == "kill" && !k.ofShim && !k.ofStream {
			want++
		} else {
			k.tally.Kill()
		}
	}
	if k.killed != want {
		k.t.Errorf("the daemon was killed %d times, want %d", k.killed, want)
	}
}
