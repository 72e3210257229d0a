package e2e

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// ways to damage a file. Each leaves something else for a reader to find.
var ways = []struct {
	name   string
	damage func(path string, content []byte) error
}{
	{"emptied", func(path string, _ []byte) error { return os.Truncate(path, 0) }},
	{"cut", func(path string, b []byte) error { return os.Truncate(path, int64(len(b)/2)) }},
	{"garbled", func(path string, b []byte) error {
		b = bytes.Clone(b)
		for i := len(b) / 3; i < len(b)/3+20 && i < len(b); i++ {
			b[i] ^= 0x55
		}
		return os.WriteFile(path, b, 0o600)
	}},
	{"removed", func(path string, _ []byte) error { return os.Remove(path) }},
	{"flipped", func(path string, b []byte) error { // one bit
		if b = bytes.Clone(b); len(b) == 0 { // a mark
			b = []byte{0}
		}
		b[len(b)*2/3] ^= 4
		return os.WriteFile(path, b, 0o600)
	}},
	{"of a later version", func(path string, b []byte) error {
		return os.WriteFile(path, bytes.Replace(b, []byte(`"version":1`), []byte(`"version":99`), 1), 0o600)
	}},
	{"a link", func(path string, b []byte) error { // to what it was
		f, err := os.CreateTemp("", "hf-link-")
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		return errors.Join(err, f.Close(), os.Remove(path), os.Symlink(f.Name(), path))
	}},
	// Root reads any mode, so what cannot be read is a directory.
	{"unreadable", func(path string, _ []byte) error {
		if err := os.Remove(path); err != nil {
			return err
		}
		return os.Mkdir(path, 0o700)
	}},
}

// Each file under root and state is damaged while the daemon is down. The daemon
// starts, what runs goes on and is listed as running, and what has ended has its
// exit code.
func TestDamagedFiles(t *testing.T) {
	n := harness.New(t)
	t.Setenv("TMPDIR", t.TempDir()) // for what links lead to
	pod := n.RunPod("victim")
	running := pod.Run("running", []string{"testbox", "print"})
	ended := pod.Run("ended", []string{"sh", "-c", "exit 7"})
	ended.WaitExited(patience)
	created := pod.Create("created", []string{"sleep", "1000"})
	before, pid := running.Status(), running.Info().PID
	// The shim of what has ended ends as well, and writes nothing any more then.
	harness.Eventually(t, patience, "the shim of the ended container ends",
		func() bool { return n.ShimPIDs()[ended.ID] == 0 })

	n.Kill()
	files := stateFiles(t, n)
	t.Logf("%d files", len(files))
	for i, path := range files {
		for j, way := range ways {
			// Every way in the long form; one for each file otherwise.
			if os.Getenv("HOLDFAST_DRILL") == "" && j != i%len(ways) {
				continue
			}
			name := strings.TrimPrefix(path, n.Dir+"/")
			for id, short := range map[string]string{pod.ID: "POD", running.ID: "RUNNING", ended.ID: "ENDED",
				created.ID: "CREATED"} {
				name = strings.ReplaceAll(name, id, short)
			}
			t.Run(way.name+" "+name, func(t *testing.T) {
				n := n.With(t)
				content, err := os.ReadFile(path)
				if err != nil {
					t.Skipf("it is gone meanwhile: %v", err)
				}
				t.Cleanup(func() {
					n.Kill()
					restore(t, path, content)
				})
				check(t, way.damage(path, content))
				n.Start()
				checkSurvivors(t, running, ended, before, pid)
				// The daemon works. An exec starts from the spec and the OCI
				// runtime's own state, though.
				if path != filepath.Join(n.State, "containers", running.ID, "config.json") &&
					!strings.HasPrefix(path, filepath.Join(n.State, "runc", running.ID)) {
					if out := running.With(t).Output("echo", "fine"); out != "fine\n" {
						t.Errorf("exec says %q", out)
					}
				}
			})
		}
	}
	n.Start()
	checkSurvivors(t, running, ended, before, pid)
}

func checkSurvivors(t *testing.T, running, ended *harness.Container, before *cri.ContainerStatus, pid int) {
	t.Helper()
	if !harness.IsProcess(pid) {
		t.Fatal("the running container was killed")
	}
	r, e := running.With(t), ended.With(t)
	after := r.Status()
	if after.State != cri.ContainerState_CONTAINER_RUNNING || after.StartedAt != before.StartedAt ||
		after.Metadata.Name != before.Metadata.Name || r.Info().PID != pid {
		t.Errorf("the running container is %s (%s: %s), started at %d, before at %d",
			after.State, after.Reason, after.Message, after.StartedAt, before.StartedAt)
	}
	if s := e.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 7 {
		t.Errorf("the ended container is %s with code %d (%s: %s), want 7", s.State, s.ExitCode, s.Reason, s.Message)
	}
}

// stateFiles are the files that the daemon or a shim keeps, without the content
// of images and what containers wrote.
func stateFiles(t *testing.T, n *harness.Node) []string {
	t.Helper()
	var files []string
	for _, tree := range []string{n.Root, n.State} {
		err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // gone meanwhile
			}
			st, err := d.Info()
			if err != nil {
				return nil
			}
			if d.IsDir() {
				// Another file system is the root of a container, or its /dev/shm.
				var fst, dst syscall.Stat_t
				if syscall.Stat(path, &dst) == nil && syscall.Stat(n.Dir, &fst) == nil && fst.Dev != dst.Dev {
					return fs.SkipDir
				}
				switch d.Name() {
				case "layers", "blobs", "upper", "fs", "work", "quarantine":
					return fs.SkipDir
				}
				return nil
			}
			// A name that begins with a dot is a file in the making, in no reader's way.
			if st.Mode().IsRegular() && st.Size() > 0 && !strings.HasSuffix(path, ".log") &&
				!strings.HasPrefix(d.Name(), ".") {
				files = append(files, path)
			}
			return nil
		})
		check(t, err)
	}
	return files
}

// restore puts the content back, whatever the daemon has made of the file.
func restore(t *testing.T, path string, content []byte) {
	t.Helper()
	os.Remove(path) // an empty directory, or the file
	check(t, os.MkdirAll(filepath.Dir(path), 0o711))
	check(t, os.WriteFile(path, content, 0o600))
}

// All that the daemon knows of a live container is lost. The shim's files give
// it back.
func TestLostRecords(t *testing.T) {
	n := harness.New(t)
	pod := n.RunPod("lost")
	c := pod.Run("lost", []string{"testbox", "print"})
	before, podBefore, pid := c.Status(), pod.Status(), c.Info().PID
	n.Kill()
	for _, path := range []string{
		filepath.Join(n.Root, "containers", c.ID), filepath.Join(n.State, "containers", c.ID, "record.json"),
		filepath.Join(n.Root, "pods", pod.ID), filepath.Join(n.State, "pods", pod.ID, "record.json"),
	} {
		// What the container writes is a mount, and stays.
		if err := os.RemoveAll(path); err != nil && !errors.Is(err, syscall.EBUSY) {
			t.Fatal(err)
		}
	}
	n.Start()
	if !harness.IsProcess(pid) {
		t.Fatal("the container was killed")
	}
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING || s.StartedAt != before.StartedAt ||
		s.CreatedAt != before.CreatedAt {
		t.Errorf("the container was rebuilt as %v, and was %v", s, before)
	}
	if s := pod.Status(); s.State != cri.PodSandboxState_SANDBOX_READY ||
		s.GetNetwork().GetIp() != podBefore.GetNetwork().GetIp() {
		t.Errorf("the pod was rebuilt as %v, and was %v", s, podBefore)
	}
	c.Stop(60)
	if code := c.Status().ExitCode; code != 0 {
		t.Errorf("the rebuilt container exits with %d, want 0", code)
	}
	pod.Remove()
	n.CheckClean()
}

// Two records claim one name, as after a hand-made copy. The daemon starts, and
// the one that runs keeps the name.
func TestTwoRecordsOneName(t *testing.T) {
	n := harness.New(t)
	pod := n.RunPod("twin")
	c := pod.Run("twin", []string{"sleep", "1000"})
	pid := c.Info().PID
	n.Kill()
	twin := strings.Repeat("0", 60) + "7e17" // sorts before the real one, most likely
	for _, kind := range []struct{ dir, id string }{{"pods", pod.ID}, {"containers", c.ID}} {
		body := map[string]any{}
		check(t, record.Read(filepath.Join(n.Root, kind.dir, kind.id, "record.json"), &body))
		body["id"] = twin
		dir := filepath.Join(n.Root, kind.dir, twin)
		check(t, os.Mkdir(dir, 0o711))
		check(t, record.Write(filepath.Join(dir, "record.json"), body, false))
	}
	n.Start()
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING || !harness.IsProcess(pid) {
		t.Errorf("the real container is %s, alive: %v", s.State, harness.IsProcess(pid))
	}
	if s := pod.Status(); s.State != cri.PodSandboxState_SANDBOX_READY || s.GetNetwork().GetIp() == "" {
		t.Errorf("the real pod is %v", s)
	}
	if id := n.RunPod("twin").ID; id != pod.ID {
		t.Errorf("the name of the pod leads to %s, want %s", id, pod.ID)
	}
	c.Stop(0)
	c.WaitExited(patience)
	pod.Remove()
}
