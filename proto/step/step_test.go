//go:build !failpoint

package step_test

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestReachDoesNothing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "failpoints")
	must.Succeed(t, os.WriteFile(file, []byte(string(step.PodRecord)+" fail\n"), 0o600))
	t.Setenv("HOLDFAST_FAILPOINTS", file)
	if err := step.Reach(step.PodRecord); err != nil {
		t.Error(err)
	}
	if env := step.Environ(); env != nil {
		t.Errorf("a child gets %v", env)
	}
	if _, err := os.Stat(file + ".reached"); err == nil {
		t.Error("it was noted")
	}
	if n := testing.AllocsPerRun(100, func() { step.Reach(step.PodRecord) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// The programs that are shipped have no code for it: what is inlined everywhere,
// and does nothing, has no symbol.
func TestCostsNothing(t *testing.T) {
	for _, program := range []string{"holdfastd", "holdfast-shim"} {
		path := filepath.Join(t.TempDir(), program)
		build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", path, "../../cmd/"+program)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		f, err := elf.Open(path)
		must.Succeed(t, err)
		defer f.Close()
		symbols, err := f.Symbols()
		if err != nil || len(symbols) == 0 {
			t.Fatalf("%s: %d symbols, %v", program, len(symbols), err)
		}
		for _, s := range symbols {
			if strings.Contains(s.Name, "/proto/step.") {
				t.Errorf("%s has %s", program, s.Name)
			}
		}
		text, err := os.ReadFile(path)
		must.Succeed(t, err)
		if strings.Contains(string(text), "HOLDFAST_FAILPOINTS") {
			t.Errorf("%s reads a file of failpoints", program)
		}
	}
}
