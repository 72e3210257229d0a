package record

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// body is what the records of these tests hold.
type body struct {
	Code     int
	ExitedAt time.Time
	Message  string
}

// A record is what json.Marshal makes of the envelope, whatever is in it.
func TestRecordIsItsEnvelope(t *testing.T) {
	for _, id := range []string{"", "a", `"<`} {
		for _, v := range []any{nil, "a <line>\n", 1.5, map[string]any{}, json.RawMessage(`{ "a" : "<" }`),
			body{Code: 1}} {
			got, err := EncodeOf(id, v)
			must.Succeed(t, err)
			b, err := json.Marshal(v)
			must.Succeed(t, err)
			want, err := json.Marshal(envelope{Version: Format, ID: id, Checksum: checksum(b), Body: b})
			must.Succeed(t, err)
			if string(got) != string(want)+"\n" {
				t.Errorf("%q of %q, not %q", got, id, want)
			}
		}
	}
}

func TestRecordSurvivesNoDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	want := body{Code: 3, ExitedAt: time.Now().UTC(), Message: "a \"quoted\" <line>\n"}
	must.Succeed(t, Write(path, want, true))
	var got body
	if err := Read(path, &got); err != nil || got != want {
		t.Fatalf("got %+v, %v", got, err)
	}
	whole, err := os.ReadFile(path)
	must.Succeed(t, err)
	check := func(what string, b []byte) {
		t.Helper()
		must.Succeed(t, os.WriteFile(path, b, 0o600))
		var e body
		err := Read(path, &e)
		if err == nil && e == want {
			return // white space, or a digit of the checksum in the other case
		}
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %+v, %v", what, e, err)
		}
	}
	for n := range len(whole) - 1 { // the last byte is a newline
		check("cut", whole[:n])
		flipped := append([]byte(nil), whole...)
		flipped[n] ^= 0x10
		check("flipped", flipped)
	}
	check("zeroes", make([]byte, len(whole)))
	check("two", append(append([]byte(nil), whole...), whole...))
	must.Succeed(t, os.Remove(path))
	if err := Read(path, &got); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrDamaged) {
		t.Errorf("missing: %v", err)
	}
	must.Succeed(t, os.Mkdir(path, 0o700))
	if err := Read(path, &got); !errors.Is(err, ErrDamaged) {
		t.Errorf("a directory: %v", err)
	}
}

func TestWriteRecordLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	if err := Write(filepath.Join(dir, "r.json"), func() {}, false); err == nil {
		t.Error("a function was encoded")
	}
	must.Succeed(t, os.Mkdir(filepath.Join(dir, "taken"), 0o700))
	if err := Write(filepath.Join(dir, "taken"), 1, false); err == nil {
		t.Error("a directory was replaced")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}
