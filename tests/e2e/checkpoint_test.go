package e2e

import (
	"archive/tar"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// noCRIU says why CRIU cannot work on this machine; "" if it can.
func noCRIU() string {
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		return strings.TrimSpace(fmt.Sprintf("criu check: %v: %s", err, out))
	}
	return ""
}

func needCRIU(t *testing.T) {
	t.Helper()
	if why := noCRIU(); why != "" {
		t.Skip(why)
	}
}

// counter counts on stdout, and keeps the count in memory alone.
const counter = `echo written >/written; rm /etc/group; mkdir /d; ln /written /d/link; i=0
while :; do i=$((i+1)); echo $i; sleep 0.05; done`

// counts are the numbers in the log of a counter.
func counts(t *testing.T, c *harness.Container) (list []int) {
	t.Helper()
	for _, line := range c.Log() {
		n, err := strconv.Atoi(line.Text)
		check(t, err)
		list = append(list, n)
	}
	return list
}

// inOrder fails unless the numbers go up one by one.
func inOrder(t *testing.T, list []int) {
	t.Helper()
	for i := 1; i < len(list); i++ {
		if list[i] != list[i-1]+1 {
			t.Errorf("%d comes after %d: lines are lost or doubled", list[i], list[i-1])
		}
	}
}

// goesOn waits until a counter counts further than it has.
func goesOn(t *testing.T, c *harness.Container) {
	t.Helper()
	before := len(counts(t, c))
	harness.Eventually(t, patience, "the counter goes on", func() bool { return len(counts(t, c)) > before+2 })
}

func checkpointTo(n *harness.Node, id, location string) error {
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := n.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: id, Location: location})
	return err
}

// members are those of an archive, with their sizes.
func members(t *testing.T, archive string) map[string]int64 {
	t.Helper()
	f, err := os.Open(archive)
	check(t, err)
	defer f.Close()
	all := map[string]int64{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return all
		}
		check(t, err)
		all[h.Name] = h.Size
	}
}

// TestCheckpointRefused asks for what cannot be: each time the container goes on, and no
// file is left.
func TestCheckpointRefused(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	p := n.RunPod("refused")
	running := p.Run("counter", []string{"sh", "-c", counter})
	created := p.Create("created", []string{"sleep", "1000"})
	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "there"), nil, 0o600))
	check(t, os.Symlink("/nowhere", filepath.Join(dir, "link")))
	ok := filepath.Join(dir, "ok.tar")
	for _, c := range []struct {
		id, location string
		code         codes.Code
		field        string
	}{
		{"", ok, codes.InvalidArgument, "container_id"},
		{running.ID, "", codes.InvalidArgument, "location"},
		{running.ID, "ok.tar", codes.InvalidArgument, "location"},
		{running.ID, dir + "/../ok.tar", codes.InvalidArgument, "location"},
		{running.ID, "/", codes.InvalidArgument, "location"},
		{running.ID, dir + "/absent/ok.tar", codes.InvalidArgument, "location"},
		{running.ID, dir + "/there/ok.tar", codes.InvalidArgument, "location"},
		{running.ID, dir + "/" + strings.Repeat("x", 300), codes.InvalidArgument, "location"},
		{running.ID, dir + "/there", codes.AlreadyExists, "location"},
		{running.ID, dir + "/link", codes.AlreadyExists, "location"},
		{strings.Repeat("0", 64), ok, codes.NotFound, "container_id"},
		{created.ID, ok, codes.FailedPrecondition, "container_id"},
	} {
		wantError(t, checkpointTo(n, c.id, c.location), c.code, c.field)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := n.Runtime.CheckpointContainer(ctx,
		&cri.CheckpointContainerRequest{ContainerId: running.ID, Location: ok, Timeout: -1})
	wantError(t, err, codes.InvalidArgument, "timeout")
	if why := noCRIU(); why != "" {
		err := checkpointTo(n, running.ID, ok)
		wantError(t, err, codes.FailedPrecondition, "CRIU")
		t.Logf("without CRIU: %v", err)
	}
	goesOn(t, running)
	inOrder(t, counts(t, running))
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("something is left: %v, %v", left, err)
	}
}

// TestCheckpointContainer makes an archive of a container that goes on.
func TestCheckpointContainer(t *testing.T) {
	t.Parallel()
	needCRIU(t)
	n := harness.New(t)
	p := n.RunPod("ckpt")
	c := p.Run("counter", []string{"sh", "-c", counter})
	goesOn(t, c)
	archive := filepath.Join(t.TempDir(), "counter.tar")
	for range 2 {
		check(t, checkpointTo(n, c.ID, archive))
		st, err := os.Stat(archive)
		check(t, err)
		if st.Mode() != 0o600 {
			t.Errorf("the mode of the archive is %o", st.Mode())
		}
		all := members(t, archive)
		for _, name := range []string{"config.dump", "spec.dump", "checkpoint/inventory.img", "checkpoint/pages-1.img",
			"checkpoint/descriptors.json", "rootfs-diff.tar", "dump.log", "stats-dump"} {
			if all[name] == 0 {
				t.Errorf("the archive has no %s", name)
			}
		}
		goesOn(t, c)
		inOrder(t, counts(t, c))
		check(t, os.Remove(archive))
	}
	if out := c.Output("cat", "/written"); out != "written\n" {
		t.Errorf("exec after a checkpoint says %q", out)
	}
}

// TestRestoreContainer makes containers of an archive, in another pod: they go on from where
// the checkpoint was made, when they are started.
func TestRestoreContainer(t *testing.T) {
	t.Parallel()
	needCRIU(t)
	n := harness.New(t)
	c := n.RunPod("before").Run("counter", []string{"sh", "-c", counter})
	goesOn(t, c)
	archive := filepath.Join(t.TempDir(), "counter.tar")
	check(t, checkpointTo(n, c.ID, archive))
	all := counts(t, c)
	last := all[len(all)-1]
	c.Remove()

	p := n.RunPod("after")
	for field, less := range map[string]*cri.LinuxContainerSecurityContext{
		"run_as_user":  {RunAsUser: &cri.Int64Value{Value: 1000}},
		"capabilities": {Capabilities: &cri.Capability{DropCapabilities: []string{"ALL"}}},
		"no_new_privs": {NoNewPrivs: true},
	} {
		cfg := harness.ContainerConfig("less", nil)
		cfg.Image.Image, cfg.Linux = archive, &cri.LinuxContainerConfig{SecurityContext: less}
		ctx, cancel := harness.Deadline()
		_, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
			PodSandboxId: p.ID, Config: cfg, SandboxConfig: p.Config})
		cancel()
		wantError(t, err, codes.InvalidArgument, field)
	}
	r := p.Create("counter", nil, func(cfg *cri.ContainerConfig) { cfg.Image.Image = archive })
	if s := r.Status(); s.State != cri.ContainerState_CONTAINER_CREATED || s.ImageId == "" {
		t.Errorf("a restored container that was not started: %v", s)
	}
	r.Start()
	goesOn(t, r)
	all = counts(t, r)
	inOrder(t, all)
	if all[0] < 3 || all[0] > last+1 {
		t.Errorf("it goes on with %d, the checkpoint was made at %d or before", all[0], last)
	}
	if out := r.Output("sh", "-c", "cat /written /d/link; ls -i /written /d/link | sort -u | wc -l; ls /etc/group"+
		" 2>&1 | tail -c 26; hostname"); out != "written\nwritten\n2\nNo such file or directory\nafter\n" {
		t.Errorf("the files of the restored container: %q", out)
	}
	// It is one like any other: it is saved again, and ends as it is told to.
	again := filepath.Join(t.TempDir(), "again.tar")
	check(t, checkpointTo(n, r.ID, again))
	goesOn(t, r)
	r.Stop(0)
	if s := r.WaitExited(patience); s.ExitCode != 137 {
		t.Errorf("it ended with %d, %s", s.ExitCode, s.Reason)
	}
	inOrder(t, counts(t, r))
	r2 := n.RunPod("once-more").Create("counter", nil, func(cfg *cri.ContainerConfig) { cfg.Image.Image = again })
	n.Kill()
	n.Start()
	r2.Start()
	goesOn(t, r2)
	if first := counts(t, r2)[0]; first <= all[0] {
		t.Errorf("the checkpoint of a restored container goes on with %d, it had been at %d", first, all[0])
	}
	// One that is never started can be removed.
	r3 := p.Create("never", nil, func(cfg *cri.ContainerConfig) { cfg.Image.Image = again })
	r3.Remove()
	n.RemoveAllPods()
	n.CheckClean()
}

// podCheckpoint saves containers of a pod in a new directory.
func podCheckpoint(t *testing.T, p *harness.Pod, list ...*harness.Container) (string, error) {
	t.Helper()
	req := &cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: t.TempDir()}
	for _, c := range list {
		req.ContainerIds = append(req.ContainerIds, c.ID)
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	_, err := p.N.Runtime.CheckpointPod(ctx, req)
	return req.OutputPath, err
}

// TestPodCheckpointRefused asks for what cannot be.
func TestPodCheckpointRefused(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	p, other := n.RunPod("refused"), n.RunPod("other")
	c := p.Run("counter", []string{"sh", "-c", counter})
	created := p.Create("created", []string{"sleep", "1000"})
	strange := other.Run("strange", []string{"sleep", "1000"})
	dir := t.TempDir()
	full := t.TempDir()
	check(t, os.WriteFile(filepath.Join(full, "there"), nil, 0o600))
	ids := func(id ...string) []string { return id }
	for _, x := range []struct {
		r     *cri.CheckpointPodRequest
		code  codes.Code
		field string
	}{
		{&cri.CheckpointPodRequest{OutputPath: dir, ContainerIds: ids(c.ID)}, codes.InvalidArgument, "pod_sandbox_id"},
		{&cri.CheckpointPodRequest{PodSandboxId: "nobody", OutputPath: dir, ContainerIds: ids(c.ID)}, codes.NotFound,
			"pod_sandbox_id"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, ContainerIds: ids(c.ID)}, codes.InvalidArgument, "output_path"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: "x", ContainerIds: ids(c.ID)}, codes.InvalidArgument,
			"output_path"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: dir + "/absent", ContainerIds: ids(c.ID)},
			codes.InvalidArgument, "output_path"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: full, ContainerIds: ids(c.ID)},
			codes.FailedPrecondition, "output_path"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: dir}, codes.InvalidArgument, "container_ids"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: dir, ContainerIds: ids(c.ID, c.ID)},
			codes.InvalidArgument, "container_ids[1]"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: dir, ContainerIds: ids(strange.ID)},
			codes.InvalidArgument, "container_ids[0]"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: dir, ContainerIds: ids("nobody")}, codes.NotFound,
			"container_ids[0]"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: dir, ContainerIds: ids(created.ID)},
			codes.FailedPrecondition, "container_ids[0]"},
		{&cri.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: dir, ContainerIds: ids(c.ID),
			Options: map[string]string{"a": "b"}}, codes.InvalidArgument, "options"},
	} {
		ctx, cancel := harness.Deadline()
		_, err := n.Runtime.CheckpointPod(ctx, x.r)
		cancel()
		wantError(t, err, x.code, x.field)
	}
	if noCRIU() != "" {
		_, err := podCheckpoint(t, p, c)
		wantError(t, err, codes.FailedPrecondition, "CRIU")
	}
	for path, want := range map[string]int{dir: 0, full: 1} {
		if left, err := os.ReadDir(path); err != nil || len(left) != want {
			t.Errorf("something is left in %s: %v, %v", path, left, err)
		}
	}
	goesOn(t, c)
	for _, x := range []struct {
		r     *cri.RestorePodRequest
		code  codes.Code
		field string
	}{
		{&cri.RestorePodRequest{CheckpointPath: dir}, codes.InvalidArgument, "config"},
		{&cri.RestorePodRequest{Config: n.PodConfig("new")}, codes.InvalidArgument, "checkpoint_path"},
		{&cri.RestorePodRequest{Config: n.PodConfig("new"), CheckpointPath: dir}, codes.InvalidArgument,
			"container_configs"},
		{&cri.RestorePodRequest{Config: n.PodConfig("new"), CheckpointPath: dir,
			ContainerConfigs: []*cri.ContainerConfig{c.Config}}, codes.InvalidArgument, "checkpoint_path"},
		{&cri.RestorePodRequest{Config: n.PodConfig("new"), CheckpointPath: dir, Options: map[string]string{"a": "b"}},
			codes.InvalidArgument, "options"},
		{&cri.RestorePodRequest{Config: n.PodConfig("new"), CheckpointPath: dir, RuntimeHandler: "unknown",
			ContainerConfigs: []*cri.ContainerConfig{c.Config}}, codes.InvalidArgument, "runtime_handler"},
	} {
		ctx, cancel := harness.Deadline()
		_, err := n.Runtime.RestorePod(ctx, x.r)
		cancel()
		wantError(t, err, x.code, x.field)
	}
}

// TestPodCheckpoint saves a pod of two containers as of one moment, and makes another one of it.
func TestPodCheckpoint(t *testing.T) {
	t.Parallel()
	needCRIU(t)
	n := harness.New(t)
	p := n.RunPod("before")
	// The first counts in a file of the pod, the second tells what it sees of that: nothing
	// runs between the two of them in one cut.
	writes := p.Run("writes", []string{"sh", "-c",
		"i=0; while :; do i=$((i+1)); echo $i >/dev/shm/new; mv /dev/shm/new /dev/shm/count; echo $i; sleep 0.02; done"})
	reads := p.Run("reads", []string{"sh", "-c",
		"while :; do cat /dev/shm/count 2>/dev/null; sleep 0.02; done"})
	goesOn(t, writes)
	goesOn(t, reads)
	dir, err := podCheckpoint(t, p, writes, reads)
	check(t, err)
	goesOn(t, writes)
	goesOn(t, reads)
	inOrder(t, counts(t, writes))
	at := len(counts(t, writes))
	p.Remove()

	req := &cri.RestorePodRequest{
		CheckpointPath:   dir,
		Config:           n.PodConfig("after"),
		ContainerConfigs: []*cri.ContainerConfig{writes.Config, reads.Config},
	}
	other := harness.ContainerConfig("reads", []string{"sleep", "1"})
	for _, bad := range [][]*cri.ContainerConfig{{writes.Config}, {writes.Config, other},
		{writes.Config, reads.Config, reads.Config}} {
		ctx, cancel := harness.Deadline()
		_, err := n.Runtime.RestorePod(ctx, &cri.RestorePodRequest{
			CheckpointPath: dir, Config: req.Config, ContainerConfigs: bad})
		cancel()
		wantError(t, err, codes.InvalidArgument, "container_configs")
	}
	ctx, cancel := harness.Deadline()
	defer cancel()
	// A daemon that was killed has left the pod, and a part of its /dev/shm.
	half, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: req.Config})
	check(t, err)
	check(t, os.WriteFile(n.Path(filepath.Join("state/pods", half.PodSandboxId, "shm/count")), []byte("0\n"), 0o644))
	resp, err := n.Runtime.RestorePod(ctx, req)
	check(t, err)
	if resp.PodSandboxId != half.PodSandboxId {
		t.Errorf("the pod is %s, not %s", resp.PodSandboxId, half.PodSandboxId)
	}
	again, err := n.Runtime.RestorePod(ctx, req)
	check(t, err)
	if len(resp.RestoredContainers) != 2 || !proto.Equal(resp, again) {
		t.Fatalf("the answers are %v, %v", resp, again)
	}
	after := &harness.Pod{N: n, ID: resp.PodSandboxId, Config: req.Config}
	restored := map[string]*harness.Container{}
	for _, r := range resp.RestoredContainers {
		c := &harness.Container{N: n, Pod: after, ID: r.ContainerId, Config: writes.Config}
		if r.Name == "reads" {
			c.Config = reads.Config
		}
		restored[r.Name] = c
		if s := c.Status(); s.State != cri.ContainerState_CONTAINER_CREATED || s.Metadata.Name != r.Name {
			t.Errorf("a restored container: %v", s)
		}
	}
	restored["reads"].Start()
	goesOn(t, restored["reads"])
	seen := counts(t, restored["reads"])
	restored["writes"].Start()
	goesOn(t, restored["writes"])
	wrote := counts(t, restored["writes"])
	inOrder(t, wrote)
	// The first number may be one that it had just read. All others are what the writer has
	// left, who goes on with the next one, or tells of that first.
	now := seen[len(seen)-1]
	if d := wrote[0] - now; d < 0 || d > 1 || seen[1] != now || now < 2 || now > at {
		t.Errorf("the reader sees %v, the writer goes on with %d", seen, wrote[0])
	}
	after.Remove()
	n.CheckClean()
}
