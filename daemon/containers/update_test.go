package containers_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

type resources = runtimeapi.LinuxContainerResources

// shares are those that the status of a container shows.
func (b *bed) shares(id string) int64 {
	b.t.Helper()
	return b.Status(b.t, id).GetResources().GetLinux().GetCpuShares()
}

// The status shows what was updated, and nothing of what was refused.
func TestUpdate(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	cfg := fake.ContainerConfig("c")
	cfg.Linux.Resources = &resources{CpuShares: 100, MemoryLimitInBytes: 1 << 20}
	id := b.Create(t, b.podID, cfg)
	if err := b.Containers.Update(ctx, id, &resources{CpuShares: 200}); err != nil { // created
		t.Fatal(err)
	}
	if s := b.Status(t, id).Resources.Linux; s.CpuShares != 200 || s.MemoryLimitInBytes != 1<<20 {
		t.Errorf("after an update: %v", s)
	}
	check(t, b.Containers.Start(ctx, id))
	if err := b.Containers.Update(ctx, id, &resources{CpuShares: 300}); err != nil { // runs
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		r     *resources
		kind  error
		words string
	}{
		"nothing":    {nil, kind.Invalid, "linux: "},
		"invalid":    {&resources{CpuShares: 400, CpuQuota: 1}, kind.Invalid, "linux.cpu_quota: "},
		"too little": {&resources{CpuShares: 400, MemoryLimitInBytes: fake.TooLittle}, kind.State, "uses more"},
	} {
		err := b.Containers.Update(ctx, id, c.r)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", name, err)
		}
		if got := b.shares(id); got != 300 {
			t.Errorf("%s: shares of %d", name, got)
		}
	}
	// It is the same container, whatever was updated.
	if again := b.Create(t, b.podID, cfg); again != id {
		t.Errorf("the same request again made %s beside %s", again, id)
	}
	check(t, b.Containers.Stop(ctx, id, time.Minute))
	if err := b.Containers.Update(ctx, id, &resources{CpuShares: 400}); !errors.Is(err, kind.State) {
		t.Errorf("of one that has ended: %v", err)
	}
	if got := b.shares(id); got != 300 {
		t.Errorf("after the end: shares of %d", got)
	}
	b.remove(id)
	if err := b.Containers.Update(ctx, id, &resources{CpuShares: 400}); !errors.Is(err, kind.NotFound) {
		t.Errorf("of one that was removed: %v", err)
	}
}

// An update whose answer does not come in time is not forgotten: the status shows what
// the shim has made of it, and the next update comes after it.
func TestUpdateUnanswered(t *testing.T) {
	b := newBed(t)
	id := b.run("c")
	b.StopShim(t, id)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.Containers.Update(ctx, id, &resources{CpuShares: 200}); err == nil {
		t.Fatal("a stopped shim answered")
	}
	if got := b.shares(id); got != 0 {
		t.Errorf("shares of %d, and the shim has not answered", got)
	}
	b.Signal(t, id, syscall.SIGCONT)
	must.Come(t, "the end of the update", func() bool {
		c, err := b.Containers.Find(id)
		return err == nil && !c.Record().Updating
	})
	if u, err := b.Dir(id).ReadUpdate(); err == nil && b.shares(id) != 200 || err != nil && b.shares(id) != 0 {
		t.Errorf("shares of %d, and the shim has %s, %v", b.shares(id), u.Record.Value, err)
	}
	if err := b.Containers.Update(t.Context(), id, &resources{CpuShares: 300}); err != nil || b.shares(id) != 300 {
		t.Errorf("the next update: shares of %d, %v", b.shares(id), err)
	}
}

// A shim that is killed during an update takes the container along, and the status shows
// what it has on record.
func TestUpdateShimKilled(t *testing.T) {
	b := newBed(t)
	id := b.run("c")
	check(t, b.Containers.Update(t.Context(), id, &resources{CpuShares: 200}))
	b.StopShim(t, id)
	updated := make(chan error)
	go func() { updated <- b.Containers.Update(t.Context(), id, &resources{CpuShares: 300}) }()
	must.Come(t, "the update to be on record", func() bool {
		c, err := b.Containers.Find(id)
		return err == nil && c.Record().Updating
	})
	b.KillShim(t, id)
	if err := <-updated; err == nil {
		t.Error("a killed shim answered")
	}
	b.Ended(t, id)
	must.Come(t, "the end of the update", func() bool {
		c, err := b.Containers.Find(id)
		return err == nil && !c.Record().Updating
	})
	if got := b.shares(id); got != 200 {
		t.Errorf("shares of %d", got)
	}
}

// Where no disk takes the record before, nothing happens.
func TestUpdateWithoutRecord(t *testing.T) {
	b := newBed(t)
	id := b.run("c")
	record := b.Durable("containers", id)
	check(t, os.Rename(record, record+"-away"))
	if err := b.Containers.Update(t.Context(), id, &resources{CpuShares: 200}); !errors.Is(err, kind.Unavailable) {
		t.Errorf("got %v", err)
	}
	check(t, os.Rename(record+"-away", record))
	if _, err := os.Stat(b.Dir(id).Path(rundir.UpdateName)); err == nil || b.shares(id) != 0 {
		t.Errorf("shares of %d", b.shares(id))
	}
}
