package harness

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ids knows every pod and container that a node ever had, also those that a
// killed daemon told nobody of: a directory of that name comes before all else.
type ids struct {
	f *os.File // inotify(7)

	mu   sync.Mutex
	seen map[string]bool
}

// watchIDs follows the directories in which objects get a directory of their
// own. It makes them, so that none is missed. Close the file to end it.
func watchIDs(trees ...string) (*ids, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("cannot watch directories: %w", err)
	}
	w := &ids{f: os.NewFile(uintptr(fd), "inotify"), seen: map[string]bool{}}
	for _, tree := range trees {
		for _, kind := range []string{"pods", "containers"} {
			dir := filepath.Join(tree, kind)
			err := os.MkdirAll(dir, 0o711)
			if err == nil {
				_, err = unix.InotifyAddWatch(fd, dir, unix.IN_CREATE)
			}
			if err != nil {
				w.f.Close()
				return nil, fmt.Errorf("cannot watch %s: %w", dir, err)
			}
		}
	}
	go w.follow()
	return w, nil
}

func (w *ids) follow() {
	buf := make([]byte, 64<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			return // closed
		}
		w.mu.Lock()
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			length := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:])) // of the event and its name
			name := string(bytes.TrimRight(b[unix.SizeofInotifyEvent:length], "\x00"))
			if !strings.HasPrefix(name, ".") {
				w.seen[name] = true
			}
			b = b[length:]
		}
		w.mu.Unlock()
	}
}

// owns says whether a path has the id of one of the node's objects in it.
func (w *ids) owns(path string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for part := range strings.FieldsFuncSeq(path,
		func(r rune) bool { return r == '/' || r == '-' || r == '.' || r == ':' }) {
		if w.seen[part] {
			return true
		}
	}
	return false
}
