package records

import (
	"strings"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Find gives an object by its id, or by a prefix that is that of no other one. field
// is that of the request, what the kind of object, for errors.
func Find[T any](all map[string]T, id, field, what string) (found T, err error) {
	if o, ok := all[id]; ok {
		return o, nil
	}
	n := 0
	for full, o := range all {
		if id != "" && strings.HasPrefix(full, id) {
			found = o
			n++
		}
	}
	var none T
	switch n {
	case 0:
		return none, kind.Errorf(kind.NotFound, "%s: there is no %s %q", field, what, id)
	case 1:
		return found, nil
	}
	return none, kind.Errorf(kind.Invalid, "%s: more than one %s has an id that begins with %q", field, what, id)
}
