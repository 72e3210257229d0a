package shim_test

import (
	"context"
	"strings"
	"testing"
	"time"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
)

// taskClient is a client of containerd's task API.
func (b *box) taskClient() taskv3.TTRPCTaskService {
	b.t.Helper()
	_, conn, _ := b.dial()
	b.t.Cleanup(func() { conn.Close() })
	return taskv3.NewTTRPCTaskClient(conn)
}

// One container's whole life, as containerd's client sees it.
func TestTaskAPI(t *testing.T) {
	b := newBox(t)
	b.launch()
	c, ctx := b.taskClient(), b.ctx()
	if _, err := c.State(ctx, &taskv3.StateRequest{ID: b.id}); code(err) != codes.NotFound {
		t.Errorf("state without a container: %v", err)
	}
	created, err := b.client.Create(ctx, b.request(b.spec("trap 'exit 7' USR1; while :; do sleep 0.05; done")))
	if err != nil {
		t.Fatal(err)
	}
	pid := uint32(created.Init.Pid)
	b.taskStatus(c, pid, tasktypes.Status_CREATED)
	if r, err := c.Start(ctx, &taskv3.StartRequest{ID: b.id}); err != nil || r.Pid != pid {
		t.Errorf("start: %v, %v", r, err)
	}
	b.taskStatus(c, pid, tasktypes.Status_RUNNING)
	r, err := c.Connect(ctx, &taskv3.ConnectRequest{ID: b.id})
	if err != nil || r.ShimPid != uint32(b.cmd.Process.Pid) || r.TaskPid != pid || r.Version == "" {
		t.Errorf("connect: %v, %v", r, err)
	}
	pids, err := c.Pids(ctx, &taskv3.PidsRequest{ID: b.id})
	if err != nil || len(pids.Processes) == 0 || pids.Processes[0].Pid != pid {
		t.Errorf("pids: %v, %v", pids, err)
	}
	b.taskStats(c)
	if _, err := c.Shutdown(ctx, &taskv3.ShutdownRequest{Now: true}); code(err) != codes.FailedPrecondition {
		t.Errorf("shutdown: %v", err)
	}
	if _, err := c.Delete(ctx, &taskv3.DeleteRequest{ID: b.id}); code(err) != codes.FailedPrecondition {
		t.Errorf("delete: %v", err)
	}
	type end struct {
		r   *taskv3.WaitResponse
		err error
	}
	ended := make(chan end, 1)
	waiter := b.taskClient()
	go func() {
		r, err := waiter.Wait(ctx, &taskv3.WaitRequest{ID: b.id})
		ended <- end{r, err}
	}()
	b.until("it takes the signal", func() bool {
		_, err := c.Kill(ctx, &taskv3.KillRequest{ID: b.id, Signal: uint32(unix.SIGUSR1)})
		return err != nil || len(ended) > 0
	})
	e := <-ended
	if e.err != nil || e.r.ExitStatus != 7 || time.Since(e.r.ExitedAt.AsTime()).Abs() > limit {
		t.Errorf("wait: %v, %v", e.r, e.err)
	}
	b.gone()
}

// taskStatus asks both versions of the API.
func (b *box) taskStatus(c taskv3.TTRPCTaskService, pid uint32, want tasktypes.Status) {
	b.t.Helper()
	for _, id := range []string{b.id, ""} { // ctr sends no id unless it is told one
		r, err := c.State(b.ctx(), &taskv3.StateRequest{ID: id})
		if err != nil || r.ID != b.id || r.Pid != pid || r.Status != want || r.Bundle != string(b.dir) {
			b.t.Errorf("state, version 3: %v, %v", r, err)
		}
	}
	_, conn, _ := b.dial()
	defer conn.Close()
	r, err := taskv2.NewTTRPCTaskClient(conn).State(b.ctx(), &taskv2.StateRequest{ID: b.id})
	if err != nil || r.Pid != pid || r.Status != want {
		b.t.Errorf("state, version 2: %v, %v", r, err)
	}
}

// taskStats looks for the number of processes and the memory in the metrics.
func (b *box) taskStats(c taskv3.TTRPCTaskService) {
	b.t.Helper()
	r, err := c.Stats(b.ctx(), &taskv3.StatsRequest{ID: b.id})
	if err != nil {
		b.t.Errorf("stats: %v", err)
		return
	}
	var pids, memory []protowire.Number
	switch r.Stats.GetTypeUrl() {
	case "io.containerd.cgroups.v1.Metrics":
		pids, memory = []protowire.Number{2, 1}, []protowire.Number{4, 33, 2}
	case "io.containerd.cgroups.v2.Metrics":
		pids, memory = []protowire.Number{1, 1}, []protowire.Number{4, 32}
	default:
		b.t.Errorf("stats are %q", r.Stats.GetTypeUrl())
	}
	if n := field(b.t, r.Stats.GetValue(), pids); n < 1 || n > 10 {
		b.t.Errorf("%d processes", n)
	}
	if n := field(b.t, r.Stats.GetValue(), memory); n < 1<<12 || n > 1<<28 {
		b.t.Errorf("%d bytes of memory", n)
	}
}

// field gives the last of the numbers that are at a path of fields in a message.
func field(t *testing.T, m []byte, path []protowire.Number) (v uint64) {
	t.Helper()
	for len(m) > 0 {
		n, typ, tag := protowire.ConsumeTag(m)
		size := protowire.ConsumeFieldValue(n, typ, m[max(tag, 0):])
		if tag < 0 || size < 0 {
			t.Fatal("no message")
		}
		value := m[tag : tag+size]
		m = m[tag+size:]
		switch {
		case n != path[0]:
		case len(path) == 1:
			v, _ = protowire.ConsumeVarint(value)
		default:
			below, _ := protowire.ConsumeBytes(value)
			v = max(v, field(t, below, path[1:]))
		}
	}
	return v
}

func TestTaskAPIRefusals(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	_, conn, _ := b.dial()
	defer conn.Close()
	other := &taskv3.KillRequest{ID: "other", Signal: 9}
	for _, c := range []struct {
		method  string
		request any
		want    codes.Code
	}{
		{"Create", &taskv3.CreateTaskRequest{ID: b.id}, codes.Unimplemented},
		{"Pause", &taskv3.PauseRequest{ID: b.id}, codes.Unimplemented},
		{"Resume", &taskv3.ResumeRequest{ID: b.id}, codes.Unimplemented},
		{"Update", &taskv3.UpdateTaskRequest{ID: b.id}, codes.Unimplemented},
		{"Checkpoint", &taskv3.CheckpointTaskRequest{ID: b.id}, codes.Unimplemented},
		{"Kill", other, codes.NotFound},
		{"Kill", &taskv3.KillRequest{Signal: 9}, codes.InvalidArgument},
		{"Kill", &taskv3.KillRequest{ID: b.id, Signal: 65}, codes.InvalidArgument},
		{"Wait", &taskv3.WaitRequest{ID: "other"}, codes.NotFound},
		{"ResizePty", &taskv3.ResizePtyRequest{ID: b.id, Width: 1, Height: 1}, codes.FailedPrecondition},
	} {
		err := conn.Call(b.ctx(), "containerd.task.v3.Task", c.method, c.request, &taskv3.StateResponse{})
		if code(err) != c.want {
			t.Errorf("%s %v: %v, want %s", c.method, c.request, err, c.want)
		}
	}
}

// A shim without a container ends when it is told so, and one that was not started with it.
func TestTaskAPIEnd(t *testing.T) {
	b := newBox(t)
	b.launch()
	if _, err := b.taskClient().Shutdown(b.ctx(), &taskv3.ShutdownRequest{}); err != nil {
		t.Error(err)
	}
	b.gone()

	b = newBox(t)
	pid := b.create(b.spec("true")).Pid
	r, err := b.taskClient().Delete(b.ctx(), &taskv3.DeleteRequest{ID: b.id})
	if err != nil || r.Pid != uint32(pid) || r.ExitStatus != 137 || r.ExitedAt == nil {
		t.Errorf("delete: %v, %v", r, err)
	}
	b.gone()
}

// A caller that goes away leaves no Wait behind.
func TestTaskAPIWaitEndsWithItsCaller(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	ctx, cancel := context.WithTimeout(b.ctx(), 100*time.Millisecond)
	defer cancel()
	_, err := b.taskClient().Wait(ctx, &taskv3.WaitRequest{ID: b.id})
	if err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("got %v", err)
	}
}
