package crash

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// The daemon is killed at random moments while pods come and go. Every exit code
// is the scripted one, and nothing is left on the machine. HOLDFAST_SEED repeats
// the moments of a run as far as the machine allows.
func TestRandomKills(t *testing.T) {
	lifecycles, workers := 16, 4
	switch {
	case drill:
		lifecycles = 200
	case slow > 1:
		lifecycles, workers = 8, 2
	}
	tally := harness.Drill(t, "RandomKills")
	seed := seed(t)

	n := harness.New(t)
	alive, giveUp := context.WithCancel(t.Context()) // without a daemon there is nothing to wait for
	stop := make(chan struct{})
	kills := make(chan int, 1)
	var last atomic.Int64 // when something got done
	last.Store(time.Now().UnixNano())
	go func() {
		count, err := killAtRandom(n, rand.New(rand.NewPCG(seed, 0)), &last, stop)
		if err != nil {
			t.Errorf("cannot restart the daemon: %v", err)
			giveUp()
		}
		kills <- count
	}()

	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		chance := rand.New(rand.NewPCG(seed, uint64(w+1)))
		wg.Go(func() {
			for {
				i := int(next.Add(1))
				if i > lifecycles || alive.Err() != nil {
					return
				}
				ctx, cancel := context.WithTimeout(alive, 10*time.Minute*min(slow, 3))
				if err := lifecycle(ctx, n, i, chance); err != nil {
					tally.Lost(harness.Statuses, "pod %d: %v", i, err)
				}
				cancel()
				last.Store(time.Now().UnixNano())
			}
		})
	}
	wg.Wait()
	close(stop)
	count := <-kills
	tally.Kills(count)
	t.Logf("%d kills during %d lifecycles", count, lifecycles)

	giveUp()
	check(t, n.AwaitReady())
	n.RemoveAllPods()
	tally.CheckClean(n)
}

// slow is how many times slower than others this machine is, HOLDFAST_SLOW: an
// emulated one needs that a daemon lives longer to get anything done.
var slow = func() time.Duration {
	n, _ := strconv.Atoi(os.Getenv("HOLDFAST_SLOW")) // 0 without
	return time.Duration(max(n, 1))
}()

// killAtRandom kills and restarts the daemon until stop is closed, and leaves it
// running. The longer it is since something got done, the longer the daemons
// live: on a slow machine they would never get a pod up. It gives the number of
// kills.
func killAtRandom(n *harness.Node, chance *rand.Rand, last *atomic.Int64, stop chan struct{}) (int, error) {
	for kills := 0; ; kills++ {
		// Half of the lives are shorter than a pod takes to come up.
		life := time.Duration(chance.Int64N(int64(300 * time.Millisecond)))
		if chance.IntN(2) == 0 {
			life += time.Duration(chance.Int64N(int64(700 * time.Millisecond)))
		}
		patience := time.Duration(1 + time.Since(time.Unix(0, last.Load()))/(30*time.Second))
		select {
		case <-stop:
			return kills, nil
		case <-time.After(life * slow * patience):
		}
		if err := n.Bounce(); err != nil {
			return kills, err
		}
	}
}

// lifecycle takes a pod with two containers from nothing to nothing, and does
// what a kubelet does when an answer stays out: it looks, and tries again.
func lifecycle(ctx context.Context, n *harness.Node, i int, chance *rand.Rand) error {
	config := n.PodConfig(fmt.Sprintf("pod%d", i), variety(i))
	id, err := runSandbox(ctx, n, config)
	if err != nil {
		return err
	}
	// One ends by itself, the other has to be stopped.
	code := int32(1 + chance.IntN(100))
	ends := harness.ContainerConfig("ends", []string{"sh", "-c", fmt.Sprintf("echo leaving; exit %d", code)})
	stays := harness.ContainerConfig("stays", []string{"testbox", "print"})
	for _, c := range []*cri.ContainerConfig{stays, ends} {
		cid, err := runContainer(ctx, n, id, config, c)
		if err != nil {
			return err
		}
		if c == stays && chance.IntN(2) == 0 {
			_, err := again(ctx, func(ctx context.Context) (*cri.StopContainerResponse, error) {
				return n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: cid, Timeout: 5})
			})
			if err != nil {
				return fmt.Errorf("StopContainer: %w", err)
			}
		}
		if c == ends {
			if err := awaitExit(ctx, n, cid, code); err != nil {
				return err
			}
		}
	}
	_, err = again(ctx, func(ctx context.Context) (*cri.StopPodSandboxResponse, error) {
		return n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
	})
	if err != nil {
		return fmt.Errorf("StopPodSandbox: %w", err)
	}
	if chance.IntN(4) == 0 {
		return nil // the end of the test removes it
	}
	_, err = again(ctx, func(ctx context.Context) (*cri.RemovePodSandboxResponse, error) {
		return n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
	})
	if err != nil {
		return fmt.Errorf("RemovePodSandbox: %w", err)
	}
	return nil
}

// variety gives one pod in three a user namespace, and one in six an init too.
func variety(i int) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) {
		if _, older := harness.KernelBefore(6, 3); i%3 != 0 || older {
			return
		}
		o := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
		if i%6 == 0 {
			o.Pid = cri.NamespaceMode_POD
		}
		ids := []*cri.IDMapping{{HostId: uint32(1+i) << 16, Length: 1 << 16}}
		o.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: ids, Gids: ids}
		c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: o}
	}
}

// again repeats a call for as long as the daemon is not there to answer it.
func again[R any](ctx context.Context, call func(context.Context) (R, error)) (R, error) {
	for {
		r, err := call(ctx)
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return r, err
		}
		time.Sleep(harness.Tick)
	}
}

// runSandbox does as the kubelet: a sandbox of the pod that is ready is used,
// one that is not is stopped, and another attempt is made.
func runSandbox(ctx context.Context, n *harness.Node, config *cri.PodSandboxConfig) (string, error) {
	for {
		r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
		if err == nil {
			return r.PodSandboxId, nil
		}
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return "", fmt.Errorf("RunPodSandbox: %w", err)
		}
		list, err := again(ctx, func(ctx context.Context) (*cri.ListPodSandboxResponse, error) {
			return n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{
				Filter: &cri.PodSandboxFilter{LabelSelector: config.Labels}})
		})
		if err != nil {
			return "", fmt.Errorf("ListPodSandbox: %w", err)
		}
		for _, p := range list.Items {
			if p.State == cri.PodSandboxState_SANDBOX_READY {
				return p.Id, nil
			}
			_, err := again(ctx, func(ctx context.Context) (*cri.StopPodSandboxResponse, error) {
				return n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Id})
			})
			if err != nil {
				return "", fmt.Errorf("StopPodSandbox of a failed attempt: %w", err)
			}
			config.Metadata.Attempt = max(config.Metadata.Attempt, p.Metadata.Attempt+1)
		}
	}
}

// runContainer creates and starts a container. Create is repeated as it is: an
// identical request gets the container that an earlier one made.
func runContainer(ctx context.Context, n *harness.Node, pod string, sandbox *cri.PodSandboxConfig,
	config *cri.ContainerConfig) (string, error) {
	r, err := again(ctx, func(ctx context.Context) (*cri.CreateContainerResponse, error) {
		return n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
			PodSandboxId: pod, Config: config, SandboxConfig: sandbox})
	})
	if err != nil {
		return "", fmt.Errorf("CreateContainer %s: %w", config.Metadata.Name, err)
	}
	_, err = again(ctx, func(ctx context.Context) (*cri.StartContainerResponse, error) {
		return n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: r.ContainerId})
	})
	if err == nil {
		return r.ContainerId, nil
	}
	// The answer to the first try may have been lost; then it is not created any more.
	s, serr := containerStatus(ctx, n, r.ContainerId)
	if serr != nil || s.State == cri.ContainerState_CONTAINER_CREATED || s.StartedAt == 0 {
		return "", fmt.Errorf("StartContainer %s: %w (%v)", config.Metadata.Name, err, s)
	}
	return r.ContainerId, nil
}

func containerStatus(ctx context.Context, n *harness.Node, id string) (*cri.ContainerStatus, error) {
	r, err := again(ctx, func(ctx context.Context) (*cri.ContainerStatusResponse, error) {
		return n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
	})
	if err != nil {
		return nil, fmt.Errorf("ContainerStatus: %w", err)
	}
	return r.Status, nil
}

func awaitExit(ctx context.Context, n *harness.Node, id string, code int32) error {
	for {
		s, err := containerStatus(ctx, n, id)
		switch {
		case err != nil:
			return err
		case s.State == cri.ContainerState_CONTAINER_EXITED && s.ExitCode == code:
			return nil
		case s.State == cri.ContainerState_CONTAINER_EXITED:
			return fmt.Errorf("the container exited with %d, reason %s, %q; want %d", s.ExitCode, s.Reason, s.Message,
				code)
		case s.State != cri.ContainerState_CONTAINER_RUNNING:
			return fmt.Errorf("a started container is %s", s.State)
		case ctx.Err() != nil:
			return fmt.Errorf("the container did not end: %w", ctx.Err())
		}
		time.Sleep(harness.Tick)
	}
}
