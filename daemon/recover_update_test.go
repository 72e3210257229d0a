package daemon

import (
	"os"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/fake"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// Wherever a daemon was killed during an update, and whatever it lost: the next one shows
// what the shim has on record, and writes it down.
func TestRecoverUpdate(t *testing.T) {
	const before, after = 200, 300
	for name, c := range map[string]struct {
		damage func(b *bed, id string) error // of what an update from before to after has left
		want   int64
	}{
		"restart": {func(*bed, string) error { return nil }, after},
		"no record": {func(b *bed, id string) error { return os.RemoveAll(b.Durable(state.Containers, id)) },
			after},
		"no update.json": {func(b *bed, id string) error { return os.Remove(b.Dir(id).Path(rundir.UpdateName)) },
			after},
		"damaged update.json": {func(b *bed, id string) error {
			return os.WriteFile(b.Dir(id).Path(rundir.UpdateName), []byte("{}"), 0o600)
		}, after},
		"killed before the shim was asked": {func(b *bed, id string) error {
			b.setShares(id, before, true)
			return os.Remove(b.Dir(id).Path(rundir.UpdateName))
		}, before},
		"killed after the shim has done it": {func(b *bed, id string) error {
			b.setShares(id, before, true)
			return nil
		}, after},
		"an older record": {func(b *bed, id string) error { // the disk was full
			b.setShares(id, before, false)
			return nil
		}, after},
	} {
		for _, shim := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				b := newBed(t)
				pod := b.RunPod(t, "pod")
				cfg := fake.ContainerConfig("c")
				cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 100}
				id := b.Run(t, pod, cfg)
				for _, shares := range []int64{before, after} {
					check(t, b.Containers.Update(t.Context(), id,
						&runtimeapi.LinuxContainerResources{CpuShares: shares}))
				}
				b.close()
				check(t, c.damage(b, id))
				if !shim {
					b.KillShim(t, id)
				}
				b.open()
				if got := b.Status(t, id).GetResources().GetLinux().GetCpuShares(); got != c.want {
					t.Errorf("with a shim %t: shares of %d, want %d", shim, got, c.want)
				}
				var rec records.Container
				must.Come(t, "the end of the update on record", func() bool {
					rec = records.Container{}
					return b.Store.Get(state.Containers, id, &rec) == nil && !rec.Updating
				})
				if !shim {
					b.Ended(t, id)
				} else if again := b.Create(t, pod, cfg); again != id {
					t.Errorf("the same request again made %s beside %s", again, id)
				}
				b.removeAll(pod)
			})
		}
	}
}

// setShares changes the record of a container that no daemon has open.
func (b *bed) setShares(id string, shares int64, updating bool) {
	b.t.Helper()
	b.put(id, func(r *records.Container) {
		r.Updating = updating
		check(b.t, r.SetResources(&runtimeapi.LinuxContainerResources{CpuShares: shares}))
	})
}
