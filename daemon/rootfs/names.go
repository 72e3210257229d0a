package rootfs

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// maxImplied bounds the names in the record of a layer, in bytes. In JSON a byte
// may take six, and a reader takes no more than 64 MiB.
const maxImplied = 8 << 20

// maxImpliedOfAll bounds them in all layers of a root together: all are in memory while it
// is being mounted.
const maxImpliedOfAll = 64 << 20

// maxKept is what stays in memory of those of each layer, in bytes.
const maxKept = 64 << 10

// name of a file. JSON cannot hold one that is not UTF-8, so such a name is
// written in hexadecimal after a NUL, which no name has.
type name string

// MarshalText implements encoding.TextMarshaler.
func (n name) MarshalText() ([]byte, error) {
	if utf8.ValidString(string(n)) {
		return []byte(n), nil
	}
	return []byte("\x00" + hex.EncodeToString([]byte(n))), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *name) UnmarshalText(text []byte) error {
	*n = name(text)
	if code, ok := strings.CutPrefix(string(text), "\x00"); ok {
		raw, err := hex.DecodeString(code)
		if err != nil {
			return fmt.Errorf("the name %q: %w", code, err)
		}
		*n = name(raw)
	}
	return nil
}

// impliedNames are the names of the directories without an entry, sorted.
func (x *extractor) impliedNames() (list []name, err error) {
	for _, n := range slices.Sorted(maps.Values(x.implied)) {
		list = append(list, name(n))
	}
	if sizeOf(list) > maxImplied {
		return nil, fmt.Errorf("%w: too many directories without entries, or with names too long", ErrBadLayer)
	}
	return list, nil
}

func sizeOf(list []name) (n int) {
	for _, s := range list {
		n += len(s) + 16 // quotes, a comma, and the string's header
	}
	return n
}
