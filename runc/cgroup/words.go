package cgroup

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Words gives the words of each line of a file in the cgroup of a controller, "" for
// v2: most counters are one word, or a name and a number. nil: there is no such file,
// or the cgroup has gone.
func (c Set) Words(controller, file string) ([][]string, error) {
	dir, ok := c.dir(controller)
	if !ok {
		return nil, nil
	}
	b, err := readFile(dir + "/" + file)
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

// readFile reads a file of the kernel. os.ReadFile would also have every such file
// watched for events, which takes longer than reading it.
func readFile(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 2048)
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, fmt.Errorf("read %s: %w", path, err)
		case n == 0:
			return b, nil
		default:
			b = b[:len(b)+n]
		}
	}
}
