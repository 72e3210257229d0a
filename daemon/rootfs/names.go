package rootfs

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"
)

// names of files. JSON cannot hold one that is not UTF-8, so such a name is
// written in hexadecimal after a NUL, which no name has.
type names []string

func (l names) MarshalJSON() ([]byte, error) {
	safe := make([]string, len(l))
	for i, n := range l {
		if safe[i] = n; !utf8.ValidString(n) {
			safe[i] = "\x00" + hex.EncodeToString([]byte(n))
		}
	}
	return json.Marshal(safe)
}

func (l *names) UnmarshalJSON(b []byte) error {
	var safe []string
	if err := json.Unmarshal(b, &safe); err != nil {
		return err
	}
	for i, n := range safe {
		if code, ok := strings.CutPrefix(n, "\x00"); ok {
			raw, err := hex.DecodeString(code)
			if err != nil {
				return fmt.Errorf("the name %q: %w", n, err)
			}
			safe[i] = string(raw)
		}
	}
	*l = safe
	return nil
}
