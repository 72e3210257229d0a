package shim_test

import (
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// TestThawDuringFreeze has a caller give up while its freeze waits for an exec: the container
// runs when both are over.
func TestThawDuringFreeze(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	r, w, err := os.Pipe()
	must.Succeed(t, err)
	defer r.Close()
	out, path := memfd(t)
	exec, thaw, freezes := make(chan error, 1), make(chan error, 1), make(chan error, 2)
	go func() {
		_, err := b.exec(sh("echo started; cat"), &pb.ExecSyncRequest{StdinPath: procPath(r), StdoutPath: path})
		exec <- err
	}()
	b.until("the exec runs", func() bool { return strings.Contains(contents(t, out), "started") })
	for range 2 {
		go func() {
			_, err := b.client.Freeze(b.ctx(), &pb.FreezeRequest{Id: b.id, LimitMs: 600_000})
			freezes <- err
		}()
	}
	// The other one waits for the exec.
	if err := <-freezes; err == nil || !strings.Contains(err.Error(), "under way") {
		t.Errorf("the freeze that comes second: %v", err)
	}
	go func() {
		_, err := b.client.Thaw(b.ctx(), &pb.ThawRequest{Id: b.id})
		thaw <- err
	}()
	w.Close()
	for name, end := range map[string]chan error{"freeze": freezes, "thaw": thaw, "exec": exec} {
		if err := <-end; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := b.exec(sh("true"), &pb.ExecSyncRequest{}); err != nil {
		t.Errorf("an exec after the thaw: %v", err)
	}
	if state, err := os.ReadFile("/sys/fs/cgroup/freezer" + b.cgroup + "/freezer.state"); err == nil &&
		string(state) != "THAWED\n" {
		t.Errorf("the container is %s", state)
	}
}

// TestFreezeStopped has a process in the container that a signal has stopped. The container
// goes on, whether that can be saved or not.
func TestFreezeStopped(t *testing.T) {
	b := newBox(t)
	// kill(1) does not wait until the process has stopped.
	b.run(`sleep 1000 & kill -STOP $!; until busybox grep -q '^State:.T' /proc/$!/status; do :; done; echo ready; wait`)
	b.says("ready")
	want := codes.OK
	if updateV1 {
		want = codes.FailedPrecondition
	}
	if _, err := b.client.Freeze(b.ctx(), &pb.FreezeRequest{Id: b.id, LimitMs: 600_000}); code(err) != want {
		t.Errorf("got %v, not %s", err, want)
	}
	if _, err := b.client.Thaw(b.ctx(), &pb.ThawRequest{Id: b.id}); err != nil {
		t.Error(err)
	}
	if _, err := b.exec(sh("true"), &pb.ExecSyncRequest{}); err != nil {
		t.Errorf("an exec after the thaw: %v", err)
	}
}
