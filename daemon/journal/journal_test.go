package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func entry(n int) records.Entry {
	text := strings.Repeat("x", 200)
	return records.Entry{At: time.Unix(int64(n), 0), ID: fmt.Sprint(n), What: records.Asked, Text: text}
}

// What was written is read in order, the newest always, and all of it has a bound.
func TestBound(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	for _, n := range []int{10, 3000, 60000} {
		os.RemoveAll(dir)
		j := Open(dir, slog.New(slog.DiscardHandler))
		for i := range n {
			for len(j.waiting) == maxWaiting {
				time.Sleep(time.Millisecond)
			}
			j.Add(entry(i))
		}
		j.Close()
		all, err := Read(dir)
		if err != nil || len(all) == 0 || all[len(all)-1].ID != fmt.Sprint(n-1) {
			t.Fatalf("of %d: %d are read, %v", n, len(all), err)
		}
		for i, e := range all {
			if e.ID != fmt.Sprint(n-len(all)+i) {
				t.Fatalf("of %d: entry %d of %d is %s", n, i, len(all), e.ID)
			}
		}
		total := int64(0)
		for _, name := range []string{nowName, beforeName} {
			if st, err := os.Stat(filepath.Join(dir, name)); err == nil {
				total += st.Size()
			}
		}
		if total > 2*maxFile || n == 3000 && len(all) != n {
			t.Errorf("of %d: %d bytes, %d entries", n, total, len(all))
		}
	}
}

// A line that was cut short costs no other one.
func TestTorn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	for i := range 3 {
		j := Open(dir, slog.New(slog.DiscardHandler))
		j.Add(entry(i))
		j.Close()
		f, err := os.OpenFile(filepath.Join(dir, nowName), os.O_WRONLY|os.O_APPEND, 0)
		if err == nil {
			_, err = f.WriteString(`{"id":"torn`)
			f.Close()
		}
		must.Succeed(t, err)
	}
	if all, err := Read(dir); err != nil || len(all) != 3 {
		t.Errorf("%v, %v", all, err)
	}
	if all, err := Read(t.TempDir()); err != nil || len(all) != 0 {
		t.Errorf("without a journal: %v, %v", all, err)
	}
}

// A file that is larger than it may be, or none at all, costs neither memory nor time, and the other one is read. The
// journal goes on.
func TestStrangeFiles(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"FIFO":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"device":    func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) },
		"link":      func(path string) error { return os.Symlink("/dev/zero", path) },
		"sparse": func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 10<<30))
		},
	} {
		dir := t.TempDir()
		j := Open(dir, slog.New(slog.DiscardHandler))
		j.Add(entry(1))
		j.Close()
		if err := put(filepath.Join(dir, beforeName)); err != nil {
			t.Skipf("%s: %v", name, err)
		}
		if fd, err := unix.Open(filepath.Join(dir, beforeName), unix.O_RDWR|unix.O_NONBLOCK, 0); err == nil {
			defer unix.Close(fd) // whoever writes into the FIFO
		}
		all, err := Read(dir)
		if len(all) != 1 || err == nil && name != "sparse" {
			t.Errorf("%s: %v, %v", name, all, err)
		}
	}
}

// A journal that has become too large, by whatever, is read from its end, and replaced with the next entry.
func TestHugeFile(t *testing.T) {
	dir := t.TempDir()
	now := filepath.Join(dir, nowName)
	line, err := json.Marshal(entry(1))
	if err == nil {
		err = os.WriteFile(now, bytes.Repeat(append(line, '\n'), 10*maxFile/len(line)), 0o600)
	}
	must.Succeed(t, err)
	if all, err := Read(dir); err != nil || len(all) == 0 || len(all) > maxFile/len(line) {
		t.Errorf("%d entries, %v", len(all), err)
	}
	j := Open(dir, slog.New(slog.DiscardHandler))
	j.Add(records.Entry{ID: "2", Name: strings.Repeat("n", 10*maxFile)})
	j.Close()
	st, err := os.Stat(now)
	if err != nil || st.Size() > 2*maxText {
		t.Errorf("the file has %d bytes, %v", st.Size(), err)
	}
}
