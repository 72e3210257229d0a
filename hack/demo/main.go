// Command demo shows in a minute what Holdfast is for: a pod that survives its
// runtime. It needs root and what `make build` makes, and leaves nothing behind.
package main

import (
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// report is what package harness tells its caller; in a test it is *testing.T.
type report struct {
	failed   bool
	cleanups []func()
}

type stopped struct{}

func (r *report) Helper()                   {}
func (r *report) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }
func (r *report) Failed() bool              { return r.failed }
func (r *report) Logf(f string, a ...any)   { fmt.Fprintf(os.Stderr, f+"\n", a...) }
func (r *report) Errorf(f string, a ...any) { r.failed = true; r.Logf(f, a...) }
func (r *report) Fatalf(f string, a ...any) { r.Errorf(f, a...); panic(stopped{}) }

func main() {
	log.SetFlags(0)
	r := &report{}
	interrupt := make(chan os.Signal, 1)
	signal.Notify(interrupt, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil && p != (stopped{}) {
				panic(p)
			}
		}()
		demo(r)
	}()
	select {
	case <-done:
	case <-interrupt:
		r.failed = true
	}
	for _, f := range slices.Backward(r.cleanups) {
		f()
	}
	if r.failed {
		log.Fatal("The demo failed.")
	}
	fmt.Print(next)
}

const next = `
Nothing of this is left on the machine. What to try next:
  make test                       every promise, as a test
  bin/holdfastd --help            a node of your own; then point crictl or a kubelet at its socket
  bin/holdfastctl --help          look at the shims, also while no daemon runs
  README.md, docs/architecture.md how it works
`

const patience = 30 * time.Second

func demo(r *report) {
	say("1. An image registry on loopback, a daemon in a scratch folder, one pod with two containers")
	n := harness.New(r)
	note("scratch folder %s, socket %s", n.Dir, n.Socket)
	pod := n.RunPod("demo")
	note("pod %s has the address %s", pod.ID[:12], pod.Status().GetNetwork().GetIp())

	gate := gate(n)
	printer := pod.Run("printer", []string{"testbox", "print"})
	leaver := pod.Run("leaver", []string{"testbox", "wait", "/gate/go", "/gate/leaving"}, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{HostPath: gate, ContainerPath: "/gate"}}
	})
	harness.Eventually(r, patience, "the printer has printed", func() bool { return len(printer.Log()) >= 3 })
	for _, l := range printer.Log()[:3] {
		note("log: %s %s %s", l.Time.Format(time.RFC3339Nano), l.Stream, l.Text)
	}
	pid := printer.Info().PID
	note("printer runs as pid %d; leaver waits to exit with 42", pid)

	say("2. SIGKILL for the daemon, pid %d", n.PID())
	n.Kill()
	atKill := len(printer.Log())
	note("printer had written %d lines by then", atKill)
	from := time.Now()
	if err := os.WriteFile(filepath.Join(gate, "go"), []byte("42\n"), 0); err != nil {
		r.Fatalf("cannot tell leaver to go: %v", err)
	}
	harness.Eventually(r, patience, "leaver has said its last words", func() bool { return len(leaver.Log()) == 1 })
	harness.Eventually(r, patience, "leaver's shim has ended", func() bool { return n.ShimPIDs()[leaver.ID] == 0 })
	to := time.Now()
	harness.Eventually(r, patience, "the printer goes on", func() bool { return len(printer.Log()) >= atKill+200 })
	note("no daemon: leaver was told to exit at %s and was gone at %s", clock(from), clock(to))
	note("no daemon: printer has written %d lines more", len(printer.Log())-atKill)

	say("3. The daemon is started again")
	n.Start()
	started := time.Now()
	back := printer.Info()
	check(r, back.PID == pid && printer.Status().State == cri.ContainerState_CONTAINER_RUNNING,
		"same pid: printer runs as pid %d, and did before", back.PID)
	lines := printer.Log()
	count, err := harness.Numbered("line", lines)
	check(r, err == nil && count > atKill, "no log line lost: 1 to %d, each exactly once", count)
	end := leaver.Status()
	check(r, end.State == cri.ContainerState_CONTAINER_EXITED && end.ExitCode == 42, "exit code %d, reason %s",
		end.ExitCode, end.Reason)
	finished := time.Unix(0, end.FinishedAt)
	check(r, finished.After(from) && finished.Before(to),
		"the true time of exit: %s; the daemon came back at %s", clock(finished), clock(started))

	say("4. The pod is removed")
	pod.Remove()
	n.CheckClean()
	check(r, !r.failed, "no process, mount, namespace, address, cgroup or file is left")
}

// gate is a directory with the fifo that leaver waits at.
func gate(n *harness.Node) string {
	dir := n.Path("gate")
	err := os.Mkdir(dir, 0o755)
	if err == nil {
		err = syscall.Mkfifo(filepath.Join(dir, "go"), 0o600)
	}
	if err != nil {
		n.T.Fatalf("cannot make a fifo in %s: %v", dir, err)
	}
	return dir
}

func say(f string, a ...any)  { fmt.Printf("\n"+f+"\n", a...) }
func note(f string, a ...any) { fmt.Printf("   "+f+"\n", a...) }

func check(r *report, ok bool, f string, a ...any) {
	verdict := "ok "
	if !ok {
		verdict, r.failed = "BAD", true
	}
	fmt.Printf("   %s "+f+"\n", append([]any{verdict}, a...)...)
}

func clock(t time.Time) string { return t.Format("15:04:05.000") }
