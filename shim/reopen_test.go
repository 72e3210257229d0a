package shim_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/shim"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// reopeningMain is this test binary as a shim that can execute itself.
func reopeningMain(dir string) int {
	launcher := os.NewFile(3, "launcher")
	first := os.Getenv(shim.FilesVariable) == ""
	if first {
		unix.CloseOnExec(3)
		launcher.Read(make([]byte, 1))
	}
	err := shim.Reopening(shim.Config{
		Dir:           rundir.Dir(dir),
		CreateTimeout: limit,
		Log:           slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Ready: func() {
			if first {
				launcher.Write([]byte{0})
				launcher.Close()
			}
		},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// reopen makes the shim execute itself, and connects to what comes of it.
func (b *box) reopen() {
	b.t.Helper()
	before, err := b.dir.ReadIdentity()
	must.Succeed(b.t, err)
	unix.Kill(before.Shim.PID, unix.SIGUSR2)
	b.conn.Close()
	b.until("another shim in the same process", func() bool {
		now, err := b.dir.ReadIdentity()
		return err == nil && now.Nonce != before.Nonce && now.Shim == before.Shim
	})
	b.connect()
}

// stream is what the log has of one output, without the framing.
func (b *box) stream(name string) string {
	b.t.Helper()
	log, err := os.ReadFile(filepath.Join(b.logs, "0.log"))
	must.Succeed(b.t, err)
	var s strings.Builder
	for line := range strings.Lines(string(log)) {
		m := record.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			b.t.Fatalf("no log record: %q", line)
		}
		if m[1] == name {
			s.WriteString(m[3])
			if m[2] == "F" {
				s.WriteByte('\n')
			}
		}
	}
	return s.String()
}

// counting writes numbers to both outputs, on lines of two and of one, until it is
// told to stop.
const counting = `
	trap 'stop=1' TERM
	exec 3<&0
	(cat <&3; echo input has ended) &
	i=0
	while [ -z "$stop" ]; do
		printf '%s ' $((2*i))
		echo $((2*i+1))
		echo $i >&2
		i=$((i+1))
		[ $((i%100)) -gt 0 ] || sleep 0.01
	done
	echo end
	exit 42`

// A container is opened again and again from its files and its descriptors, while it
// is created, writes, is given execs, and ends. Nothing of it is lost or doubled.
func TestReopen(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		t.Run(fmt.Sprintf("terminal %v", terminal), func(t *testing.T) {
			b := newBox(t)
			b.reopening = true
			b.launch()
			spec := b.spec(counting)
			spec.Process.Terminal = terminal
			req := b.request(spec)
			req.Stdin, req.StdinOnce = true, true
			created, err := b.client.Create(b.ctx(), req)
			must.Succeed(t, err)
			b.reopen()
			if again, err := b.client.Create(b.ctx(), req); err != nil || again.Init.Pid != created.Init.Pid {
				t.Errorf("create once more: %v, %v", again, err)
			}
			b.start()
			before := b.state()
			for i := range 6 {
				size := b.state().Log.Bytes
				b.until("more output", func() bool { return b.state().Log.Bytes > size+1000 })
				b.reopen()
				b.checkReopened(before, uint64(2))
				stdout, path := memfd(t)
				want := strconv.Itoa(i)
				r, err := b.exec(sh("echo "+want), &pb.ExecSyncRequest{StdoutPath: path})
				if got := contents(t, stdout); err != nil || r.ExitCode != 0 || got != want+"\n" {
					t.Errorf("exec: %q, %v, %v", got, r, err)
				}
			}
			_, err = b.client.ResizePty(b.ctx(), &pb.ResizePtyRequest{Id: b.id, Width: 80, Height: 24})
			if (err == nil) != terminal {
				t.Errorf("resize: %v", err)
			}
			b.checkEnd(terminal)
		})
	}
}

// checkReopened compares what a shim says with what the one before said.
func (b *box) checkReopened(before *pb.StateResponse, events uint64) {
	b.t.Helper()
	now := b.state()
	same := now.Phase == before.Phase && now.Init.Pid == before.Init.Pid && now.Terminal == before.Terminal &&
		now.StartedAt.AsTime().Equal(before.StartedAt.AsTime()) && now.LastEvent == events
	if !same || now.Log.Bytes < before.Log.Bytes || now.Log.DroppedBytes != 0 || now.Log.Error != "" {
		b.t.Errorf("state %v, before %v", now, before)
	}
	r, err := b.client.Events(b.ctx(), &pb.EventsRequest{Id: b.id})
	if err != nil || uint64(len(r.Events)) != events || r.Events[1].Type != pb.EventType_EVENT_TYPE_STARTED ||
		!r.Events[1].At.AsTime().Equal(before.StartedAt.AsTime()) {
		b.t.Errorf("events %v, %v", r, err)
	}
}

// checkEnd stops a container that counts while its shim is reopened, and checks its
// end and all of its output.
func (b *box) checkEnd(terminal bool) {
	t := b.t
	t.Helper()
	started, asked := b.state().StartedAt.AsTime(), time.Now()
	request := &pb.StopRequest{Id: b.id, Signal: uint32(unix.SIGTERM), GraceMs: uint64(limit.Milliseconds())}
	if _, err := b.client.Stop(b.ctx(), request); err != nil {
		t.Fatal(err)
	}
	if id, err := b.dir.ReadIdentity(); err == nil {
		unix.Kill(id.Shim.PID, unix.SIGUSR2) // whatever it is at now
	}
	b.until("its end is on record", func() bool { _, err := rundir.ReadExitIn(b.durable); return err == nil })
	b.gone()
	e, err := b.dir.ReadExit()
	if err != nil || e.Code != 42 || e.Source != rundir.SourceWaited ||
		!e.StartedAt.Equal(started) || e.ExitedAt.Before(asked) {
		t.Errorf("exit %+v, %v", e, err)
	}
	st, err := b.dir.ReadStatus()
	if err != nil || st.Seq != 4 || len(st.Events) != 4 || st.Events[3].Type != rundir.EventExited {
		t.Errorf("status %+v, %v", st, err)
	}
	if terminal { // both outputs are one
		out := strings.ReplaceAll(b.stream("stdout"), "\r", "")
		if !strings.HasSuffix(out, "\nend\n") || strings.Contains(out, "ended") {
			t.Errorf("output ends with %q", out[max(0, len(out)-100):])
		}
		want := 0
		for line := range strings.Lines(out) {
			pair, one := fmt.Sprintf("%d %d\n", 2*want, 2*want+1), fmt.Sprintf("%d\n", want)
			if line != pair && line != one && line != "end\n" {
				t.Fatalf("line %d: %q", want, line)
			}
			if !strings.Contains(line, " ") {
				want++
			}
		}
		return
	}
	out, found := strings.CutSuffix(b.stream("stdout"), "end\n")
	if !found || strings.Contains(out, "ended") {
		t.Errorf("output ends with %q", out[max(0, len(out)-100):])
	}
	for name, output := range map[string]string{"stdout": out, "stderr": b.stream("stderr")} {
		for i, number := range strings.Fields(output) {
			if number != strconv.Itoa(i) {
				t.Fatalf("%s: number %d is %q", name, i, number)
			}
		}
	}
}

// The deadline of a stop is kept by the shims that follow.
func TestReopenWhileStopping(t *testing.T) {
	b := newBox(t)
	b.reopening = true
	b.run("trap '' TERM; echo ready; while :; do sleep 0.01; done")
	b.says("ready")
	began := time.Now()
	b.reopen()
	grace := 3*time.Second + 10*time.Since(began) // two more have to fit, also on a slow machine
	request := &pb.StopRequest{Id: b.id, Signal: 15, GraceMs: uint64(grace.Milliseconds())}
	if _, err := b.client.Stop(b.ctx(), request); err != nil {
		t.Fatal(err)
	}
	before, err := b.dir.ReadStatus()
	must.Succeed(t, err)
	for range 2 {
		b.reopen()
	}
	b.gone()
	e, err := b.dir.ReadExit()
	if err != nil || e.Signal != 9 || e.Reason != rundir.ReasonError || e.Source != rundir.SourceWaited {
		t.Errorf("exit %+v, %v", e, err)
	}
	st, err := b.dir.ReadStatus()
	if err != nil || st.Stop == nil || *st.Stop != *before.Stop || !st.Killed {
		t.Errorf("stop %+v, before %+v, %v", st.Stop, before.Stop, err)
	}
	// RequestedAt may be later than the time from which the grace counts.
	if early := rundir.WallTime(before.Stop.KillAt).Sub(e.ExitedAt); early > 100*time.Millisecond {
		t.Errorf("killed %v before the deadline", early)
	}
}
