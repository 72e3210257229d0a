package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Words gives the words of each line of a file in the cgroup of a controller, "" for
// v2: most counters are one word, or a name and a number. nil: there is no such file,
// or the cgroup has gone.
func (c Set) Words(controller, file string) ([][]string, error) {
	dir, ok := c.dir(controller)
	if !ok {
		return nil, nil
	}
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err := ignoreGone(err); err != nil {
		return nil, fmt.Errorf("cannot read what the kernel counts: %w", err)
	}
	var words [][]string
	for line := range strings.Lines(string(b)) {
		if w := strings.Fields(line); len(w) > 0 {
			words = append(words, w)
		}
	}
	return words, nil
}
