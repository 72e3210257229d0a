// Package vm boots a machine with systemd and cgroup v2, which the machine that
// develops may not have, and runs tests inside: those of package guest, and those
// of other packages that depend on who manages the cgroups.
//
// HOLDFAST_VM is the program that boots it. It is called as
//
//	PROGRAM run -s FOLDER -t SECONDS -- COMMAND...
//
// copies FOLDER to /host in the machine, runs COMMAND there as root, and gives
// back its output and its exit status. With
//
//	-d FILE -k REGEX -n N -l LOSE
//
// FILE is a disk that outlives the machine, /dev/vdb, made if it is not there. It
// fails from the Nth write on, and the power goes when a line of the output
// matches, with exit status 137. LOSE is what of the disk goes with it: none, all
// that was not flushed, or a number that seeds a choice.
package vm

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// suite is one test binary in the machine.
type suite struct {
	name string // its folder
	run  string // -test.run
	env  string // for env(1), if not empty
}

var suites = []suite{
	{name: "daemon/placement", run: "."},
	{name: "runc", run: "."},
	{name: "runc/cgroup", run: "."},
	{name: "shim", run: "."},
	{name: "tests/vm/guest", run: "."},
	// What is not here has nothing to do with cgroups or systemd, or needs a
	// faster machine than an emulated one.
	{name: "tests/e2e", run: "^(TestStop|TestStopOutlivesTheDaemon|TestKilledShim|TestSharedPIDNamespace|TestNamespaces|" +
		"TestTerminal|TestPodNetwork|TestLostRecords|TestWedgedShim|TestUserNamespace|TestUserNamespaceAnd|" + ofCgroups},
	// The driver is that of systemd, but here.
	{name: "tests/e2e", run: "^(TestUserNamespace|" + ofCgroups, env: "HOLDFAST_CGROUP_DRIVER=cgroupfs"},
	{name: "tests/crash", run: "^TestRandomKills$"},
}

// ofCgroups ends a pattern of tests with those that depend on the driver and version of
// cgroups.
const ofCgroups = "TestUpdate.*|TestGetContainerEvents|TestRefusedFields|TestStatsOfNetwork|" +
	"TestMetricsFitTheirDescriptors)$"

// limit is that of the whole run: emulated, all takes ten to thirty times as long.
const limit = 40 * time.Minute

func TestVM(t *testing.T) {
	runner := program(t)
	// HOLDFAST_VM_SUITES picks some, as NAME or NAME=REGEXP, which get HOLDFAST_VM_ENV.
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
			chosen = append(chosen, suite{name: name, run: run, env: os.Getenv("HOLDFAST_VM_ENV")})
		}
	}
	share := makeShare(t)
	var script strings.Builder
	script.WriteString("status=0\n")
	for _, s := range chosen {
		addTest(t, share, s.name)
		fmt.Fprintf(&script, "(cd %s && env %s ./test -test.v -test.timeout=%s -test.run '%s') || status=1\n", s.name,
			s.env, limit, s.run)
	}
	script.WriteString("exit $status\n")
	all, code := boot(t, runner, share, script.String())
	if code != 0 {
		t.Errorf("the tests in the machine ended with exit status %d", code)
	}
	// A machine that ran nothing has proved nothing.
	passed := len(regexp.MustCompile(`(?m)^--- PASS: `).FindAllString(all, -1))
	if passed < len(chosen) || strings.Contains(all, "--- SKIP") {
		t.Errorf("%d tests passed in the machine, want %d or more, and none skipped", passed, len(chosen))
	}
}

// The power is cut at random writes while images are pulled and removed; see
// TestPowerCut of tests/crash. HOLDFAST_DRILL=1 cuts it more often.
func TestPowerCut(t *testing.T) {
	runner := program(t)
	if os.Getenv("HOLDFAST_VM_SUITES") != "" {
		t.Skip("HOLDFAST_VM_SUITES picks other tests")
	}
	cuts := 4
	if os.Getenv("HOLDFAST_DRILL") != "" {
		cuts = 25
	}
	share := makeShare(t)
	addTest(t, share, "tests/crash")
	before, disk := filepath.Join(share, "before"), filepath.Join(t.TempDir(), "disk")
	live := func(load time.Duration, options ...string) int {
		t.Helper()
		out, code := boot(t, runner, share,
			fmt.Sprintf("export HOLDFAST_DISK=/dev/vdb HOLDFAST_BEFORE=/host/before HOLDFAST_LOAD=%s\n"+
				"cd tests/crash && exec ./test -test.v -test.run '^TestPowerCut$'\n", load), append([]string{"-d",
				disk}, options...)...)
		f, err := os.OpenFile(before, os.O_APPEND|os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(out)
			err = errors.Join(err, f.Close())
		}
		must.Succeed(t, err)
		if strings.Contains(out, "power: broken: ") || code != 0 && code != cutStatus {
			t.Fatalf("a life of the machine ended with exit status %d", code)
		}
		return code
	}
	must.Succeed(t, os.WriteFile(before, nil, 0o644))
	for i := range cuts {
		load := 5*time.Second + rand.N(40*time.Second)
		at := 100 + rand.IntN(800)
		lose := []string{"all", strconv.Itoa(rand.IntN(1000)), strconv.Itoa(rand.IntN(1000)), "none"}[i%4]
		t.Logf("cut %d after %s of load or at write %d, losing %s", i, load, at, lose)
		if code := live(load, "-k", "^power: dark", "-n", strconv.Itoa(at), "-l", lose); code != cutStatus {
			t.Errorf("the power was not cut: exit status %d", code)
		}
	}
	if code := live(0); code != 0 {
		t.Errorf("the last life ended with exit status %d", code)
	}
}

// cutStatus is the exit status of a machine whose power was cut.
const cutStatus = 137

// program is HOLDFAST_VM.
func program(t *testing.T) string {
	t.Helper()
	runner := os.Getenv("HOLDFAST_VM")
	if runner == "" {
		t.Skip("HOLDFAST_VM is not set to a program that boots a machine: make vm-test VM=PROGRAM")
	}
	if _, err := os.Stat(runner); err != nil {
		t.Fatalf("HOLDFAST_VM: %v", err)
	}
	return runner
}

// build runs a command in the source tree.
func build(t *testing.T, args ...string) {
	t.Helper()
	root, err := harness.Root()
	must.Succeed(t, err)
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // runc has its own say in the Makefile
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// makeShare makes the folder that becomes /host, with all that is installed.
func makeShare(t *testing.T) string {
	t.Helper()
	share := t.TempDir()
	build(t, "make", "--no-print-directory", "install", "DESTDIR="+filepath.Join(share, "tree"), "PREFIX=/usr/local")
	build(t, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(share, "tree", libexec, "testbox"),
		"./tests/harness/testbox")
	return share
}

// addTest adds the tests of a package as NAME/test.
func addTest(t *testing.T, share, name string) {
	t.Helper()
	build(t, "go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(share, name, "test"), "./"+name)
}

// boot runs a script in a machine where the share is installed. It prints the
// output line by line, because a run takes minutes.
func boot(t *testing.T, runner, share, script string, options ...string) (output string, status int) {
	t.Helper()
	script = fmt.Sprintf(`cp -a tree/. /
ln -s %[1]s bin
systemctl daemon-reload
export HOLDFAST_GUEST=1 HOLDFAST_SLOW=15 HOLDFAST_BIN=%[1]s HOLDFAST_TEST_SHIM=%[1]s/holdfast-shim
`, libexec) + script
	must.Succeed(t, os.WriteFile(filepath.Join(share, "run"), []byte(script), 0o755))
	args := append([]string{"run", "-s", share, "-t", fmt.Sprint(int(limit.Seconds()))}, options...)
	cmd := exec.CommandContext(t.Context(), runner, append(args, "--", "sh", "./run")...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it ends its machine
	cmd.WaitDelay = time.Minute
	var all strings.Builder
	pr, pw, err := os.Pipe()
	must.Succeed(t, err)
	defer pr.Close()
	cmd.Stdout, cmd.Stderr = pw, pw
	err = cmd.Start()
	pw.Close()
	if err != nil {
		t.Fatalf("cannot boot a machine: %v", err)
	}
	for lines := bufio.NewScanner(pr); lines.Scan(); {
		fmt.Println("vm: " + lines.Text())
		fmt.Fprintln(&all, lines.Text())
	}
	cmd.Wait() // its state tells
	return all.String(), cmd.ProcessState.ExitCode()
}

// libexec is where make install puts the programs.
const libexec = "/usr/local/libexec/holdfast"
