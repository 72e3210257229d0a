package records

import (
	"errors"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// An object is found by its id or by what only its id begins with; errors name the field.
func TestFind(t *testing.T) {
	all := map[string]int{"ab": 1, "abc": 2, "b": 3}
	for id, want := range map[string]int{"ab": 1, "abc": 2, "b": 3} {
		if got, err := Find(all, id, "container_id", "container"); err != nil || got != want {
			t.Errorf("%q: %d, %v", id, got, err)
		}
	}
	for id, want := range map[string]error{"a": kind.Invalid, "": kind.NotFound, "abcd": kind.NotFound} {
		_, err := Find(all, id, "container_id", "container")
		if !errors.Is(err, want) || !strings.HasPrefix(err.Error(), "container_id: ") {
			t.Errorf("%q: %v, want %v", id, err, want)
		}
	}
}
