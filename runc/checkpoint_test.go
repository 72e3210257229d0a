package runc

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// What CRIU has logged is part of the error, and the first error of it is the cause.
func TestCheckpointSaysWhy(t *testing.T) {
	r := script(t, `echo '{"level":"error","msg":"criu failed: type NOTIFY errno 0"}' >>"$4"; exit 1`)
	dir := t.TempDir()
	for log, want := range map[string]string{
		"": "criu failed: type NOTIFY errno 0",
		"(00.1) Error (criu/x.c:1): no way\n(00.2) Error (criu/y.c:2): and so on\n": "CRIU says: (criu/x.c:1): no way",
	} {
		must.Succeed(t, os.WriteFile(filepath.Join(dir, "dump.log"), []byte(log), 0o600))
		err := r.Checkpoint(t.Context(), "box", CheckpointOptions{Images: "/i", Work: dir})
		e, ok := errors.AsType[*Error](err)
		if !ok || e.Verb != "checkpoint" || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("with the log %q: %v", log, err)
		}
	}
}
