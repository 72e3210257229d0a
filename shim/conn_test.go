package shim

import (
	"encoding/binary"
	"fmt"
	"testing"
)

// MaxConns is for the tests with a shim.
const MaxConns = maxConns

// The headers are found however the bytes come.
func TestFrames(t *testing.T) {
	var bytes []byte
	for i, n := range []int{0, 1, 5000, 10} {
		bytes = binary.BigEndian.AppendUint32(bytes, uint32(n))
		bytes = binary.BigEndian.AppendUint32(bytes, uint32(i))
		bytes = append(bytes, byte(i+1), byte(i+2))
		bytes = append(bytes, make([]byte, n)...)
	}
	for size := 1; size <= len(bytes); size += 1 + size/7 {
		var s frames
		var found []frame
		for rest := bytes; len(rest) > 0; rest = rest[min(size, len(rest)):] {
			s.feed(rest[:min(size, len(rest))], func(f frame) { found = append(found, f) })
		}
		want := []frame{{0, 0, 1, 2}, {1, 1, 2, 3}, {5000, 2, 3, 4}, {10, 3, 4, 5}}
		if fmt.Sprint(found) != fmt.Sprint(want) {
			t.Fatalf("in pieces of %d: %v, want %v", size, found, want)
		}
	}
}
