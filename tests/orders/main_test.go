// Package orders makes the calls of the CRI in every order, kills processes meanwhile, and compares what
// is answered, and the machine, with a model (model_test.go). HOLDFAST_DRILL=1 runs the long form;
// HOLDFAST_SEED repeats the choices of a run.
package orders

import (
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

func TestMain(m *testing.M) {
	code := m.Run()
	harness.RemoveBinaries()
	os.Exit(code)
}
