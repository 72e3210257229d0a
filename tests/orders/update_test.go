package orders

import (
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// A container ends while an update of it is at a step: what the answer says is what its status shows. The
// daemon closes its connection at the end, and makes the call again.
func TestUpdateAtTheEnd(t *testing.T) {
	t.Parallel()
	n := harness.New(t, harness.Options{Failpoints: true})
	const before, after = 100, 200
	for _, at := range []step.Step{step.ShimUpdated, step.ShimUpdateKept} {
		t.Run(string(at), func(t *testing.T) {
			n := n.With(t)
			pod := n.RunPod(string(at))
			c := pod.Run("c", []string{"sleep", "1000"})
			update := func(shares int64) error {
				ctx, cancel := harness.Deadline()
				defer cancel()
				_, err := n.Runtime.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{
					ContainerId: c.ID, Linux: &cri.LinuxContainerResources{CpuShares: shares}})
				return err
			}
			must.Succeed(t, update(before))
			pid := c.Info().PID
			n.Arm(string(at) + " 2s")
			answer := make(chan error)
			go func() { answer <- update(after) }()
			harness.Eventually(t, callTimeout, "the update is at the step", func() bool {
				return n.Reached()[string(at)] > 0
			})
			must.Succeed(t, unix.Kill(pid, unix.SIGKILL))
			err := <-answer
			n.Arm()
			want := int64(before)
			switch code := status.Code(err); code {
			case codes.OK:
				want = after
			case codes.FailedPrecondition:
			default:
				t.Errorf("an update meets the end of its container: %v", err)
			}
			if got := c.WaitExited(callTimeout).GetResources().GetLinux().GetCpuShares(); got != want {
				t.Errorf("the answer is %v, and the status shows shares of %d", err, got)
			}
			pod.Remove()
		})
	}
	n.CheckOwners()
}
