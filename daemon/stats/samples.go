package stats

import (
	"math/bits"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A rate is taken over the time since an earlier call: at least minWindow, as a shorter
// time says little, and at most maxWindow, as what was long ago is not what is.
const (
	minWindow = time.Second
	maxWindow = 2 * time.Minute
)

// samples are earlier readings of how much processor time was used. The zero value has
// none. No call waits for a second reading: the first one of a cgroup has no rate, unless
// its use began not long ago, with nothing.
type samples struct {
	mu     sync.Mutex
	last   map[string]sample // by cgroup
	pruned time.Time
}

type sample struct {
	at   time.Time
	used uint64 // nanoseconds
	rate *runtimeapi.UInt64Value
}

// rate takes a reading, and gives the use in nanoseconds per second; nil: not known. start
// is when nothing had been used; zero: not known.
func (s *samples) rate(path string, now time.Time, used uint64, start time.Time) *runtimeapi.UInt64Value {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pruneLocked(now)
	last, ok := s.last[path]
	if !ok || now.Sub(last.at) > maxWindow || used < last.used {
		last = sample{at: now, used: used}
		if age := now.Sub(start); age >= 0 && age <= maxWindow {
			last = sample{at: start}
		}
	}
	if window := now.Sub(last.at); window >= minWindow {
		// It fits: no machine has a use of 2^64 nanoseconds per second.
		high, low := bits.Mul64(used-last.used, uint64(time.Second))
		per, _ := bits.Div64(high, low, uint64(window))
		last = sample{at: now, used: used, rate: number(per)}
	}
	s.last[path] = last
	return last.rate
}

// pruneLocked drops what is of no use any more. s.mu is held.
func (s *samples) pruneLocked(now time.Time) {
	if s.last != nil && now.Sub(s.pruned) < maxWindow {
		return
	}
	if s.last == nil {
		s.last = map[string]sample{}
	}
	s.pruned = now
	for path, last := range s.last {
		if now.Sub(last.at) > maxWindow {
			delete(s.last, path)
		}
	}
}
