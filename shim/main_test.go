package shim_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc"
	"github.com/holdfast-cri/holdfast/runc/cgroup"
	_ "github.com/holdfast-cri/holdfast/shim" // so that a change of it is one of these tests, too
	"github.com/holdfast-cri/holdfast/tests/must"
	"github.com/holdfast-cri/holdfast/tests/refusals"
)

// limit is how long any condition may take. It only decides how long a broken
// build hangs.
const limit = 3 * time.Minute

var (
	shimBinary string
	runcBinary string
	rootfs     string
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if dir := os.Getenv("HOLDFAST_TEST_LAUNCH"); dir != "" {
		return launcherMain(dir)
	}
	if dir := os.Getenv("HOLDFAST_TEST_REOPEN"); dir != "" {
		return reopeningMain(dir)
	}
	if os.Geteuid() != 0 {
		return m.Run() // every test skips
	}
	tmp, err := os.MkdirTemp("", "hf-shim")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(tmp)
	rootfs = filepath.Join(tmp, "rootfs")
	// On a machine without a compiler a binary can be given.
	if shimBinary = os.Getenv("HOLDFAST_TEST_SHIM"); shimBinary == "" {
		shimBinary = filepath.Join(tmp, "holdfast-shim")
		args := []string{"build", "-tags=refusals", "-o", shimBinary, "../cmd/holdfast-shim"}
		if raceEnabled {
			args = slices.Insert(args, 1, "-race")
		}
		if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "cannot build the shim: %v\n%s", err, out)
			return 1
		}
	}
	if runcBinary, err = filepath.Abs("../bin/runc"); err == nil {
		_, err = os.Stat(runcBinary)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "no OCI runtime, run make build first:", err)
		return 1
	}
	if err := makeRootfs(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return refusals.Tests{Dirs: []string{".", "taskapi"}}.Main(m.Run)
}

func makeRootfs() error {
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			return err
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("no static busybox: %w", err)
	}
	if err := os.WriteFile(filepath.Join(rootfs, "bin/busybox"), b, 0o755); err != nil {
		return err
	}
	const applets = "sh sleep echo cat true stty head tail dd ps yes id setsid kill env wc"
	for a := range strings.FieldsSeq(applets) {
		if err := os.Symlink("busybox", filepath.Join(rootfs, "bin", a)); err != nil {
			return err
		}
	}
	return nil
}

// start starts a shim for a run directory and does the launcher's part of the
// handshake up to "go".
func start(dir string, args ...string) (*exec.Cmd, *os.File, error) {
	return startProgram(shimBinary, nil, dir, args...)
}

func startProgram(binary string, env []string, dir string, args ...string) (*exec.Cmd, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "shim"), os.NewFile(uintptr(fds[1]), "launcher")
	defer theirs.Close()
	log, err := os.OpenFile(filepath.Join(dir, rundir.ShimLogName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer log.Close()
	cmd := exec.Command(binary, append([]string{"--dir", dir, "--log-level", "debug"}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0 halt_on_error=1", "GOMAXPROCS=1")
	cmd.Env = append(cmd.Env, env...)
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	if _, err := ours.Write([]byte{'g'}); err != nil {
		return nil, nil, err
	}
	return cmd, ours, nil
}

// launcherMain is this test binary as the daemon: it starts a shim and then
// waits to be killed.
func launcherMain(dir string) int {
	shimBinary = os.Getenv("HOLDFAST_TEST_SHIM")
	_, handshake, err := start(dir)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	b := make([]byte, 512)
	n, err := handshake.Read(b)
	fmt.Printf("%q %v\n", b[:n], err)
	select {}
}

// box is a shim and its container in a test.
type box struct {
	t       *testing.T
	id      string
	dir     rundir.Dir
	logs    string
	durable string
	client  pb.ShimService
	conn    *ttrpc.Client
	runc    *runc.Runtime
	cgroup  string
	cmd     *exec.Cmd // of the shim, if it is a child
	// reopening makes the shim one that can execute itself (reopeningMain).
	reopening bool
}

// newBox makes the directories of a container. All is gone after the test.
func newBox(t *testing.T) *box {
	t.Helper()
	must.BeRoot(t)
	tmp, err := os.MkdirTemp("", "hf")
	must.Succeed(t, err)
	id := "c" + strings.TrimPrefix(filepath.Base(tmp), "hf")
	b := &box{
		t: t, id: id,
		dir:     rundir.Dir(filepath.Join(tmp, "containers", id)),
		logs:    filepath.Join(tmp, "logs"),
		durable: filepath.Join(tmp, "durable"),
		runc:    &runc.Runtime{Path: runcBinary, Root: filepath.Join(tmp, "runc")},
		cgroup:  "/holdfast-shim-test-" + id,
	}
	for _, d := range []string{string(b.dir), b.logs, b.durable, b.runc.Root} {
		must.Succeed(t, os.MkdirAll(d, 0o700))
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(b.dir.Path(rundir.ShimLogName))
			t.Logf("shim.log:\n%s", log)
		}
		b.destroy()
		os.RemoveAll(tmp)
	})
	return b
}

// destroy ends whatever the test has left and then demands that nothing is left.
func (b *box) destroy() {
	if id, err := b.dir.ReadIdentity(); err == nil && id.Shim.Alive() {
		if b.client != nil {
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			b.client.Delete(ctx, &pb.DeleteRequest{Id: b.id, Force: true})
			cancel()
		}
	}
	if b.conn != nil {
		b.conn.Close()
	}
	b.gone()
	if b.cmd != nil {
		b.cmd.Wait()
	}
}

// gone waits for the shim to end and fails if it left anything.
func (b *box) gone() {
	b.t.Helper()
	b.until("the shim has ended", func() bool {
		held, err := b.dir.Held()
		return err == nil && !held
	})
	if at := cgroup.At(b.cgroup); len(at) > 0 {
		b.t.Errorf("cgroups left: %v", at)
	}
	if _, err := os.Stat(b.runc.StateDir(b.id)); err == nil {
		b.t.Errorf("state of the OCI runtime left in %s", b.runc.StateDir(b.id))
	}
	if _, err := os.Stat(b.dir.Path(rundir.SocketName)); err == nil {
		b.t.Error("socket left")
	}
	left, _ := filepath.Glob(b.dir.ExecPath("*", ""))
	more, _ := filepath.Glob(b.dir.ExecPath(".*", ""))
	left = append(left, more...)
	hidden, _ := filepath.Glob(filepath.Join(string(b.dir), ".*"))
	if left = append(left, hidden...); len(left) > 0 {
		b.t.Errorf("files left: %v", left)
	}
}

func (b *box) until(what string, done func() bool) {
	b.t.Helper()
	must.Come(b.t, what, done)
}

// launch starts the shim and connects to it.
func (b *box) launch() *exec.Cmd {
	b.t.Helper()
	binary, env := shimBinary, []string{}
	if b.reopening {
		binary, env = os.Args[0], []string{"HOLDFAST_TEST_REOPEN=" + string(b.dir)}
	}
	cmd, handshake, err := startProgram(binary, env, string(b.dir))
	must.Succeed(b.t, err)
	defer handshake.Close()
	b.cmd = cmd
	answer := make([]byte, 4096)
	n, err := handshake.Read(answer)
	if err != nil || n != 1 || answer[0] != 0 {
		b.t.Fatalf("shim not ready: %q, %v", answer[:n], err)
	}
	b.connect()
	return cmd
}

func (b *box) dial() (pb.ShimService, *ttrpc.Client, net.Conn) {
	b.t.Helper()
	c, err := b.dir.Dial(b.t.Context())
	must.Succeed(b.t, err)
	conn := ttrpc.NewClient(c)
	return pb.NewShimClient(conn), conn, c
}

func (b *box) connect() { b.client, b.conn, _ = b.dial() }

func (b *box) ctx() context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), limit)
	b.t.Cleanup(cancel)
	return ctx
}

// spec is a small container that runs a shell script.
func (b *box) spec(script string) *specs.Spec {
	adj := 0
	if cur, err := os.ReadFile("/proc/self/oom_score_adj"); err == nil {
		adj, _ = strconv.Atoi(strings.TrimSpace(string(cur)))
	}
	caps := []string{"CAP_KILL", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE"}
	return &specs.Spec{
		Version: "1.2.0",
		Root:    &specs.Root{Path: rootfs, Readonly: true},
		Process: &specs.Process{
			Args: []string{"/bin/sh", "-c", script}, Cwd: "/",
			Env:          []string{"PATH=/bin", "WHERE=container"},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
			OOMScoreAdj:  &adj,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{
				Destination: "/dev/pts", Type: "devpts", Source: "devpts",
				Options: []string{"newinstance", "ptmxmode=0666", "mode=0620"},
			},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"},
		},
		Linux: &specs.Linux{
			CgroupsPath: b.cgroup,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace},
			},
			Resources: &specs.LinuxResources{},
		},
	}
}

func (b *box) request(spec *specs.Spec) *pb.CreateRequest {
	b.t.Helper()
	a, err := pb.MarshalAny(spec)
	must.Succeed(b.t, err)
	return &pb.CreateRequest{
		Id: b.id, RequestId: "r1", Spec: a,
		Runtime:    &pb.Runtime{Path: b.runc.Path, Root: b.runc.Root},
		Log:        &pb.Log{Directory: b.logs, Path: "0.log"},
		DurableDir: b.durable,
	}
}

// create launches a shim and creates a container in it.
func (b *box) create(spec *specs.Spec) *pb.Process {
	b.t.Helper()
	b.launch()
	r, err := b.client.Create(b.ctx(), b.request(spec))
	if err != nil {
		b.t.Fatalf("create: %v", err)
	}
	return r.Init
}

func (b *box) start() *pb.Process {
	b.t.Helper()
	r, err := b.client.Start(b.ctx(), &pb.StartRequest{Id: b.id})
	if err != nil {
		b.t.Fatalf("start: %v", err)
	}
	return r.Init
}

// run is create and start.
func (b *box) run(script string) {
	b.t.Helper()
	b.create(b.spec(script))
	b.start()
}

// wait asks the shim for the exit, and the record once the shim has ended.
func (b *box) wait() *pb.Exit {
	b.t.Helper()
	r, err := b.client.Wait(b.ctx(), &pb.WaitRequest{Id: b.id, TimeoutMs: uint32(limit.Milliseconds())})
	if errors.Is(err, ttrpc.ErrClosed) {
		e, err := b.dir.ReadExit()
		if err != nil {
			b.t.Fatalf("the shim has ended: %v", err)
		}
		return pb.ExitOf(&e)
	}
	if err != nil || !r.Exited {
		b.t.Fatalf("wait: %v, %v", r, err)
	}
	return r.Exit
}

func (b *box) state() *pb.StateResponse {
	b.t.Helper()
	r, err := b.client.State(b.ctx(), &pb.StateRequest{Id: b.id})
	if err != nil {
		b.t.Fatalf("state: %v", err)
	}
	return r
}

var record = regexp.MustCompile(`^\S+ (stdout|stderr) ([FP])[^ ]* (.*)$`)

// output is what the log holds, without the framing.
func (b *box) output() string {
	b.t.Helper()
	f, err := os.Open(filepath.Join(b.logs, "0.log"))
	must.Succeed(b.t, err)
	defer f.Close()
	var s strings.Builder
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		m := record.FindStringSubmatch(sc.Text())
		if m == nil {
			b.t.Fatalf("no log record: %q", sc.Text())
		}
		s.WriteString(m[3])
		if m[2] == "F" {
			s.WriteByte('\n')
		}
	}
	return s.String()
}

// says waits until the container has printed a text.
func (b *box) says(text string) {
	b.t.Helper()
	b.until("the container says "+text, func() bool { return strings.Contains(b.output(), text) })
}

func code(err error) codes.Code {
	s, _ := status.FromError(err)
	return s.Code()
}

func alive(pid int) bool {
	_, err := rundir.FindProcess(pid)
	return !errors.Is(err, rundir.ErrNoProcess)
}
