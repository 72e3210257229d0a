package shim_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// update is one of memory and cpu, from and to.
func updateOf(from, to *specs.LinuxResources) *rundir.Update {
	u := &rundir.Update{Record: rundir.Opaque{TypeURL: "test", Value: []byte(fmt.Sprint(*to.CPU.Shares))}}
	u.Resources, _ = json.Marshal(to)
	u.Undo, _ = json.Marshal(from)
	return u
}

func limitsOf(shares uint64, memory int64) *specs.LinuxResources {
	return &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: &shares},
		Memory: &specs.LinuxMemory{Limit: &memory, Swap: &memory},
	}
}

func (b *box) update(u *rundir.Update) error {
	b.t.Helper()
	raw, err := json.Marshal(u)
	must.Succeed(b.t, err)
	_, err = b.client.Update(b.ctx(), &pb.UpdateRequest{Id: b.id, Update: raw})
	return err
}

// updateV1 says that cpu and memory are those of cgroup v1.
var updateV1 = func() bool {
	_, err := os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
	return err == nil
}()

// weights are what an OCI runtime makes of shares on cgroup v2.
var weights = map[uint64]int{128: 21, 256: 35, 512: 59, 1024: 100}

// limits are what the kernel has of cpu, memory, and swap.
func (b *box) limits() string {
	b.t.Helper()
	files := []string{"cpu/%s/cpu.shares", "memory/%s/memory.limit_in_bytes", "memory/%s/memory.memsw.limit_in_bytes"}
	if !updateV1 {
		files = []string{"%s/cpu.weight", "%s/memory.max", "%s/memory.swap.max"}
	}
	var all []string
	for _, f := range files {
		got, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", fmt.Sprintf(f, b.cgroup)))
		must.Succeed(b.t, err)
		all = append(all, strings.TrimSpace(string(got)))
	}
	return strings.Join(all, " ")
}

// has checks what kernel, OCI runtime and run directory say of the limits.
func (b *box) has(shares uint64, memory int64, kept string) {
	b.t.Helper()
	want := fmt.Sprintf("%d %d %d", shares, memory, memory)
	if !updateV1 {
		want = fmt.Sprintf("%d %d 0", weights[shares], memory)
	}
	if got := b.limits(); got != want {
		b.t.Errorf("the limits are %s, want %s", got, want)
	}
	var state struct {
		Config struct {
			Cgroups struct {
				Shares uint64 `json:"cpu_shares"`
				Memory int64  `json:"memory"`
			} `json:"cgroups"`
		} `json:"config"`
	}
	raw, err := os.ReadFile(filepath.Join(b.runc.Root, b.id, "state.json"))
	if err == nil {
		err = json.Unmarshal(raw, &state)
	}
	if c := state.Config.Cgroups; err != nil || c.Shares != shares || c.Memory != memory {
		b.t.Errorf("the OCI runtime has %+v, %v", c, err)
	}
	if u, err := b.dir.ReadUpdate(); err != nil && kept != "" || string(u.Record.Value) != kept {
		b.t.Errorf("update.json has %q, %v; want %q", u.Record.Value, err, kept)
	}
}

// An update changes all, for kernel, OCI runtime and the run directory, or nothing.
func TestUpdate(t *testing.T) {
	const mib = 1 << 20
	b := newBox(t)
	spec := b.spec("dd if=/dev/zero of=/tmp/f bs=1M count=20 2>/dev/null; echo full; exec sleep 1000")
	first, second, third := limitsOf(256, 64*mib), limitsOf(512, 128*mib), limitsOf(128, 40*mib)
	spec.Linux.Resources = limitsOf(256, 64*mib)
	b.create(spec)
	b.has(256, 64*mib, "")
	if err := b.update(updateOf(first, second)); err != nil { // created
		t.Fatal(err)
	}
	b.has(512, 128*mib, "512")
	b.start()
	b.says("full")
	if err := b.update(updateOf(second, third)); err != nil { // runs
		t.Fatal(err)
	}
	b.has(128, 40*mib, "128")

	// Below what is used: 20 MiB are in /tmp.
	if err := b.update(updateOf(third, limitsOf(1024, 10*mib))); code(err) != codes.FailedPrecondition ||
		!strings.Contains(err.Error(), "10485760") {
		t.Errorf("a limit below what is used: %v", err)
	}
	b.has(128, 40*mib, "128")

	// The kernel refuses one value of several.
	for name, r := range map[string]*specs.LinuxResources{
		"cpuset": limitsOf(300, 80*mib), "swap": limitsOf(300, 80*mib), "huge pages": limitsOf(300, 80*mib),
	} {
		switch name {
		case "cpuset":
			r.CPU.Cpus = "4000"
		case "swap":
			r.Memory.Swap = new(int64(30 * mib))
		case "huge pages":
			r.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "3MB", Limit: 1}}
		}
		if err := b.update(updateOf(third, r)); err == nil {
			t.Errorf("%s: no error", name)
		}
		b.has(128, 40*mib, "128")
	}

	// The record cannot be written.
	path := b.dir.Path(rundir.UpdateName)
	must.Succeed(t, os.Remove(path))
	must.Succeed(t, os.Mkdir(path, 0o700))
	if err := b.update(updateOf(third, second)); err == nil {
		t.Error("an update that is not on record succeeds")
	}
	must.Succeed(t, os.Remove(path))
	b.has(128, 40*mib, "")
	must.Succeed(t, b.update(updateOf(third, first)))
	b.has(256, 64*mib, "256")
	if left, _ := filepath.Glob(b.dir.Path(".update*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// What was never set has no limit again after an update that failed.
func TestUpdateOfNothing(t *testing.T) {
	b := newBox(t)
	b.run("exec sleep 1000")
	before := b.limits()
	r := limitsOf(300, 80<<20)
	r.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "3MB", Limit: 1}}
	if err := b.update(updateOf(limitsOf(1024, -1), r)); err == nil {
		t.Error("no error")
	}
	if now := b.limits(); now != before {
		t.Errorf("limits were %s and are %s", before, now)
	}
}

func TestUpdateRefused(t *testing.T) {
	empty := newBox(t)
	empty.launch()
	empty.connect()
	ok := updateOf(limitsOf(1024, -1), limitsOf(512, -1))
	if err := empty.update(ok); code(err) != codes.FailedPrecondition {
		t.Errorf("without a container: %v", err)
	}
	b := newBox(t)
	b.create(b.spec("read x"))
	_, err := b.client.Update(b.ctx(), &pb.UpdateRequest{Id: b.id, Update: []byte("{")})
	if code(err) != codes.InvalidArgument {
		t.Errorf("nonsense: %v", err)
	}
	if _, err := b.client.Update(b.ctx(), &pb.UpdateRequest{Id: "other"}); code(err) != codes.NotFound {
		t.Errorf("another container: %v", err)
	}
	if err := b.update(&rundir.Update{AskedAt: 7}); err != nil { // waits for nothing
		t.Error(err)
	}
	ok.AskedAt = 6
	if err := b.update(ok); code(err) != codes.Aborted {
		t.Errorf("an update that another call has overtaken: %v", err)
	}
}

// The processes that have the old oom_score_adj get the new one.
func TestUpdateOOMScoreAdj(t *testing.T) {
	b := newBox(t)
	spec := b.spec("sleep 1000 & echo 900 > /proc/self/oom_score_adj; echo ready; exec sleep 1001")
	spec.Process.OOMScoreAdj = new(800)
	b.create(spec)
	b.start()
	b.says("ready")
	u := updateOf(limitsOf(1024, -1), limitsOf(512, -1))
	u.OOMScoreAdj = [2]int{800, 850}
	must.Succeed(t, b.update(u))
	r, err := b.client.Pids(b.ctx(), &pb.PidsRequest{Id: b.id})
	must.Succeed(t, err)
	var all []string
	for _, pid := range r.Pids {
		adj, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		must.Succeed(t, err)
		all = append(all, strings.TrimSpace(string(adj)))
	}
	if got := strings.Join(all, " "); got != "900 850" && got != "850 900" {
		t.Errorf("oom_score_adj of the processes: %s", got)
	}
}
