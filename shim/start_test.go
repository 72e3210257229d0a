package shim_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// silenceLogs has the disk of the logs not answer. wake brings it back: calls that wait for
// it fail, later ones do not.
func (b *box) silenceLogs() (wake func()) {
	b.t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		b.t.Skip("needs FUSE: ", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount("nobody", b.logs, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		unix.Close(fd)
		b.t.Skip("cannot mount FUSE: ", err)
	}
	awake := false
	wake = func() {
		if awake {
			return
		}
		awake = true
		if err := unix.Unmount(b.logs, unix.MNT_DETACH); err != nil {
			b.t.Error(err)
		}
		unix.Close(fd) // ends what waits
	}
	b.t.Cleanup(wake)
	return wake
}

// waitsIn says whether a thread of a process is in a system call.
func waitsIn(pid, call int) bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
	for _, path := range tasks {
		b, _ := os.ReadFile(path)
		if strings.HasPrefix(string(b), fmt.Sprintf("%d ", call)) {
			return true
		}
	}
	return false
}

// While the start of a container waits for the disk of its log, the shim answers, and the
// container can be ended. A second start waits for the first one.
func TestStartWhileLogIsSilent(t *testing.T) {
	for name, kill := range map[string]bool{"it is killed": true, "the disk comes back": false} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			b.create(b.spec("echo here; exec sleep 1000"))
			wake := b.silenceLogs()
			started := make(chan error, 2)
			ctx := b.ctx()
			for range cap(started) {
				go func() {
					_, err := b.client.Start(ctx, &pb.StartRequest{Id: b.id})
					started <- err
				}()
			}
			b.until("a start waits for the disk", func() bool { return waitsIn(b.cmd.Process.Pid, unix.SYS_OPENAT2) })
			if _, err := b.exec(sh("true"), &pb.ExecSyncRequest{}); code(err) != codes.FailedPrecondition {
				t.Errorf("exec: %v", err)
			}
			if !kill {
				wake()
				b.checkStarts(started)
				return
			}
			if _, err := b.client.Stop(b.ctx(), &pb.StopRequest{Id: b.id}); err != nil {
				t.Fatal(err)
			}
			if e := b.wait(); e.GetCode() != 137 || e.GetReason() != rundir.ReasonNeverRan {
				t.Errorf("exit %v", e)
			}
			if e, err := b.dir.ReadExit(); err != nil || e.Code != 137 {
				t.Errorf("exit record %+v, %v", e, err)
			}
			if _, err := b.client.Delete(b.ctx(), &pb.DeleteRequest{Id: b.id, Force: true}); err != nil {
				t.Errorf("delete: %v", err)
			}
			wake()
			for range cap(started) {
				if err := <-started; code(err) != codes.FailedPrecondition {
					t.Errorf("start: %v", err)
				}
			}
			b.gone()
			if names, err := os.ReadDir(b.logs); err != nil || len(names) > 0 {
				t.Errorf("logs of a container that was never started: %v, %v", names, err)
			}
		})
	}
}

// checkStarts makes sure that the start that has waited for the disk has failed, and that
// the one behind it has started the container with its log.
func (b *box) checkStarts(started <-chan error) {
	b.t.Helper()
	first, second := <-started, <-started
	if (first == nil) == (second == nil) {
		b.t.Errorf("starts: %v, %v", first, second)
	}
	b.says("here")
	before := b.state().StartedAt.AsTime()
	r, err := b.client.Start(b.ctx(), &pb.StartRequest{Id: b.id})
	must.Succeed(b.t, err)
	if at := r.StartedAt.AsTime(); !at.Equal(before) {
		b.t.Errorf("started at %v, and before at %v", at, before)
	}
}
