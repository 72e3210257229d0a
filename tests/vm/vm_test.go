// Package vm boots a machine with systemd and cgroup v2, which the machine that
// develops may not have, and runs tests inside: those of package guest, and those
// of other packages that depend on who manages the cgroups.
//
// HOLDFAST_VM is the program that boots it. It is called as
//
//	PROGRAM run -s FOLDER -t SECONDS -- COMMAND...
//
// copies FOLDER to /host in the machine, runs COMMAND there as root, and gives
// back its output and its exit status.
package vm

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// suite is one test binary in the machine.
type suite struct {
	name string // its folder
	run  string // -test.run
}

var suites = []suite{
	{"daemon/cgroup", "."},
	{"runc", "."},
	{"shim", "."},
	{"tests/vm/guest", "."},
	// What is not here has nothing to do with cgroups or systemd, or needs a
	// faster machine than an emulated one.
	{"tests/e2e", "^(TestStop|TestStopOutlivesTheDaemon|TestKilledShim|TestSharedPIDNamespace|TestNamespaces|TestTerminal|TestPodNetwork|TestLostRecords|TestWedgedShim|TestUserNamespace|TestUserNamespaceAnd)$"},
	{"tests/crash", "^TestRandomKills$"},
}

// limit is that of the whole run: emulated, all takes ten to thirty times as long.
const limit = 40 * time.Minute

func TestVM(t *testing.T) {
	runner := os.Getenv("HOLDFAST_VM")
	if runner == "" {
		t.Skip("HOLDFAST_VM is not set to a program that boots a machine: make vm-test VM=PROGRAM")
	}
	if _, err := os.Stat(runner); err != nil {
		t.Fatalf("HOLDFAST_VM: %v", err)
	}
	// HOLDFAST_VM_SUITES picks some, as NAME or NAME=REGEXP.
	chosen := suites
	if s := os.Getenv("HOLDFAST_VM_SUITES"); s != "" {
		chosen = nil
		for _, f := range strings.Fields(s) {
			name, run, ok := strings.Cut(f, "=")
			for _, known := range suites {
				if known.name == name && !ok {
					run = known.run
				}
			}
			chosen = append(chosen, suite{name, run})
		}
	}
	share := t.TempDir()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	build := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // runc has its own say in the Makefile
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	build("make", "--no-print-directory", "install", "DESTDIR="+filepath.Join(share, "tree"), "PREFIX=/usr/local")
	build("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(share, "tree", libexec, "testbox"), "./tests/harness/testbox")
	var script strings.Builder
	fmt.Fprintf(&script, `cp -a tree/. /
ln -s %[1]s bin
systemctl daemon-reload
export HOLDFAST_GUEST=1 HOLDFAST_SLOW=15 HOLDFAST_BIN=%[1]s HOLDFAST_TEST_SHIM=%[1]s/holdfast-shim
status=0
`, libexec)
	for _, s := range chosen {
		build("go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(share, s.name, "test"), "./"+s.name)
		fmt.Fprintf(&script, "(cd %s && ./test -test.v -test.timeout=%s -test.run '%s') || status=1\n", s.name, limit, s.run)
	}
	script.WriteString("exit $status\n")
	if err := os.WriteFile(filepath.Join(share, "run"), []byte(script.String()), 0o755); err != nil {
		t.Fatal(err)
	}

	cmd := exec.CommandContext(t.Context(), runner, "run", "-s", share, "-t", fmt.Sprint(int(limit.Seconds())), "--", "sh", "./run")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it ends its machine
	cmd.WaitDelay = time.Minute
	var all bytes.Buffer
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	cmd.Stdout, cmd.Stderr = pw, pw
	err = cmd.Start()
	pw.Close()
	if err != nil {
		t.Fatalf("cannot boot a machine: %v", err)
	}
	// Line by line, because a run takes minutes.
	for lines := bufio.NewScanner(pr); lines.Scan(); {
		fmt.Println("vm: " + lines.Text())
		fmt.Fprintln(&all, lines.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the tests in the machine: %v", err)
	}
	// A machine that ran nothing has proved nothing.
	passed := len(regexp.MustCompile(`(?m)^--- PASS: `).FindAll(all.Bytes(), -1))
	if passed < len(chosen) || bytes.Contains(all.Bytes(), []byte("--- SKIP")) {
		t.Errorf("%d tests passed in the machine, want %d or more, and none skipped", passed, len(chosen))
	}
}

// libexec is where make install puts the programs.
const libexec = "/usr/local/libexec/holdfast"
