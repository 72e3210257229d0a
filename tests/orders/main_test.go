// Package orders makes the calls of the CRI in every order, kills processes meanwhile, and compares what
// is answered, and the machine, with a model (model_test.go). HOLDFAST_DRILL=1 runs the long form;
// HOLDFAST_SEED repeats the choices of a run.
package orders

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// seed is what all choices come from.
var seed = func() uint64 {
	n, err := strconv.ParseUint(os.Getenv("HOLDFAST_SEED"), 10, 64)
	if err != nil {
		n = uint64(time.Now().UnixNano())
	}
	return n
}()

// lasts says until when a test makes calls: the long form as long as it is to, or as long as the time that
// go test has for it.
func lasts(t *testing.T, quick, full time.Duration) time.Time {
	if !harness.Full {
		return time.Now().Add(quick)
	}
	end := time.Now().Add(full)
	const rest = 2 * time.Minute // to look at what is left
	if limit, ok := t.Deadline(); ok && limit.Add(-rest).Before(end) {
		return limit.Add(-rest)
	}
	return end
}

// onNodes has some nodes share so many rounds, in an order of the seed, each a subtest with
// its number, until the time is up.
func onNodes(t *testing.T, count int, quick, full time.Duration, round func(t *testing.T, n *harness.Node, j int)) {
	const nodes = 6 // most of a round is waiting
	t.Logf("HOLDFAST_SEED=%d, %d rounds", seed, count)
	order := rand.New(rand.NewPCG(seed, 0)).Perm(count)
	t.Run("nodes", func(t *testing.T) {
		for i := range nodes {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				n := harness.New(t, harness.Options{Failpoints: true})
				defer n.CheckOwners()
				end := lasts(t, quick, full)
				for at := i; at < count; at += nodes {
					if time.Now().After(end) {
						t.Logf("%d rounds of this node are left out", (count-at)/nodes)
						return
					}
					t.Run(fmt.Sprint(order[at]), func(t *testing.T) { round(t, n.With(t), order[at]) })
				}
			})
		}
	})
}

func TestMain(m *testing.M) {
	code := m.Run()
	harness.RemoveBinaries()
	os.Exit(code)
}
