package journal

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/records"
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
		if err != nil {
			t.Fatal(err)
		}
	}
	if all, err := Read(dir); err != nil || len(all) != 3 {
		t.Errorf("%v, %v", all, err)
	}
	if all, err := Read(t.TempDir()); err != nil || len(all) != 0 {
		t.Errorf("without a journal: %v, %v", all, err)
	}
}
