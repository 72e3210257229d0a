package tail

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// A log has its last lines, whole, and never more than the bound; so it is too for one
// that an earlier process has left.
func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	number := 0
	for range 3 { // processes, one after the other
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		must.Succeed(t, err)
		w := New(f)
		for range 30_000 {
			number++
			if _, err := fmt.Fprintf(w, "line %08d %s\n", number, bytes.Repeat([]byte("x"), number%100)); err != nil {
				t.Fatal(err)
			}
			if st, err := f.Stat(); err != nil || st.Size() > Max {
				t.Fatalf("the log has %d bytes, %v", st.Size(), err)
			}
		}
		f.Close()
	}
	b, err := os.ReadFile(path)
	must.Succeed(t, err)
	lines := bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
	if len(b) < Max/4 {
		t.Errorf("only %d bytes are kept", len(b))
	}
	for i, l := range lines {
		if want := fmt.Sprintf("line %08d ", number-len(lines)+1+i); !bytes.HasPrefix(l, []byte(want)) {
			t.Fatalf("line %d of %d is %q, want %q", i, len(lines), l, want)
		}
	}
}

// A pipe is only written to.
func TestPipe(t *testing.T) {
	r, w, err := os.Pipe()
	must.Succeed(t, err)
	defer r.Close()
	defer w.Close()
	go New(w).Write(make([]byte, 2*Max))
	b := make([]byte, 64<<10)
	for got := 0; got < 2*Max; {
		n, err := r.Read(b)
		must.Succeed(t, err)
		got += n
	}
}
