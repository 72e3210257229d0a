package cgroup

import (
	"strconv"
	"strings"
)

// Stall is how long tasks have waited for a resource.
type Stall struct {
	Avg10, Avg60, Avg300 float64 // percent of the last 10, 60 and 300 seconds
	Total                uint64  // nanoseconds
}

// Pressure is how long some of the tasks have waited, and all of them.
type Pressure struct{ Some, Full Stall }

// Pressure reads that of cpu, memory or io. Only cgroup v2 has it, which a v1 machine
// may have beside v1. nil: the kernel does not tell.
func (c Set) Pressure(resource string) *Pressure {
	lines, _ := c.Words("", resource+".pressure")
	if len(lines) == 0 {
		return nil
	}
	p := &Pressure{}
	for _, words := range lines {
		to := &p.Some
		if words[0] == "full" {
			to = &p.Full
		}
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			if key == "total" {
				n, _ := Number(value)
				to.Total = n * 1000
				continue
			}
			percent, _ := strconv.ParseFloat(value, 64)
			switch key {
			case "avg10":
				to.Avg10 = percent
			case "avg60":
				to.Avg60 = percent
			case "avg300":
				to.Avg300 = percent
			}
		}
	}
	return p
}
