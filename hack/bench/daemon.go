package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	startTimeout = 2 * time.Minute
	stopTimeout  = 2 * time.Minute
	pullTimeout  = 30 * time.Minute
)

// process is a child that is waited for. It dies with this program.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd, make(chan struct{})}
	go func() {
		cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

func (p *process) stop() error {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(stopTimeout):
		p.cmd.Process.Kill()
		<-p.ended
		return fmt.Errorf("%s did not end within %s of SIGTERM", p.cmd.Path, stopTimeout)
	}
}

// cpu is the processor time of the process and of its children that have ended.
func (p *process) cpu() (time.Duration, error) {
	own, children, err := cpuOf(p.cmd.Process.Pid)
	return own + children, err
}

// cpuOf is the processor time of a process, user and system, and that of its children
// that have ended.
func cpuOf(pid int) (own, children time.Duration, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The name may have spaces. After it: state is field 3, utime field 14.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 15 {
		return 0, 0, fmt.Errorf("cannot use /proc/%d/stat", pid)
	}
	for i, s := range f[11:15] {
		n, err := strconv.Atoi(s)
		if err != nil {
			return 0, 0, err
		}
		ticks := time.Duration(n) * (time.Second / 100) // USER_HZ, on every Linux architecture that Go has
		if i < 2 {
			own += ticks
		} else {
			children += ticks
		}
	}
	return own, children, nil
}

// memory reads fields of /proc/PID/status that are in kB, as bytes.
func (p *process) memory(field string) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), field+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("no %s in the status of process %d", field, p.cmd.Process.Pid)
}

// peak samples the anonymous memory until stop is called, which gives the
// largest value seen. (The kernel keeps a peak of the whole RSS only.)
func (p *process) peak() (stop func() int64) {
	quit, result := make(chan struct{}), make(chan int64)
	go func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		most := int64(0)
		for {
			if n, err := p.memory("RssAnon"); err == nil {
				most = max(most, n)
			}
			select {
			case <-tick.C:
			case <-quit:
				result <- most
				return
			}
		}
	}()
	return func() int64 { close(quit); return <-result }
}

// daemon is a runtime with everything it has below dir.
type daemon struct {
	*process
	conn    *grpc.ClientConn
	images  cri.ImageServiceClient
	runtime cri.RuntimeServiceClient
}

// A kind of daemon: how it is configured and started.
type kind struct {
	name string
	make func(dir, socket, certs string) (config string, args []string)
}

// socketDir is for the sockets of containerd's shims: it takes 42 bytes at most,
// which a temporary directory below another one exceeds.
func socketDir(dir string) string { return filepath.Join("/run", "hf-bench-"+filepath.Base(dir)) }

func kinds(o options) []kind {
	l := []kind{{"holdfast", func(dir, socket, certs string) (string, []string) {
		return fmt.Sprintf("root = %q\nstate = %q\naddress = %q\n[registry]\nconfig_dir = %q\n[cni]\nconf_dir = %q\n",
				filepath.Join(dir, "root"), filepath.Join(dir, "state"), socket, certs, filepath.Join(dir, "net.d")),
			[]string{filepath.Join(o.bin, "holdfastd"), "-config"}
	}}}
	if o.containerd == "" {
		return l
	}
	// Its defaults, but for the paths, and for what a machine like a container needs: a
	// process without CAP_SYS_RESOURCE cannot lower the oom_score_adj of a sandbox. The
	// OCI runtime is the same for both.
	return append(l, kind{"containerd", func(dir, socket, certs string) (string, []string) {
		return fmt.Sprintf(`version = 3
root = '%[1]s/root'
state = '%[1]s/state'
imports = []
[grpc]
  address = '%[2]s'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '%[3]s'
[plugins.'io.containerd.transfer.v1.local']
  config_path = '%[3]s'
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = '%[4]s'
[plugins.'io.containerd.internal.v1.opt']
  path = '%[1]s/opt'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '%[5]s'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  conf_dir = '%[1]s/net.d'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = '%[6]s'
  Root = '%[1]s/state/runc'
`, dir, socket, certs, socketDir(dir), reference(0), filepath.Join(o.bin, "runc")), []string{o.containerd, "-c"}
	}})
}

// start starts a daemon with an empty root that has all images from host.
func (k kind) start(dir, host, logDir string) (*daemon, error) {
	certs := filepath.Join(dir, "certs.d")
	url := "http://" + host
	hosts := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", url, url)
	config, args := k.make(dir, filepath.Join(dir, "sock"), certs)
	err := errors.Join(os.MkdirAll(filepath.Join(certs, "_default"), 0o755),
		os.WriteFile(filepath.Join(certs, "_default/hosts.toml"), []byte(hosts), 0o644),
		os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o644))
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(logDir, k.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(args[0], append(args[1:], filepath.Join(dir, "config.toml"))...)
	cmd.Stdout, cmd.Stderr = log, log
	// containerd looks for its shim on the path.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(args[0])+":"+os.Getenv("PATH"))
	p, err := startProcess(cmd)
	if err != nil {
		return nil, err
	}
	d := &daemon{process: p}
	plain := grpc.WithTransportCredentials(insecure.NewCredentials())
	if d.conn, err = grpc.NewClient("unix://"+filepath.Join(dir, "sock"), plain); err == nil {
		d.images = cri.NewImageServiceClient(d.conn)
		d.runtime = cri.NewRuntimeServiceClient(d.conn)
		err = d.ready()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s does not serve, see %s: %w", k.name, log.Name(), err), d.stop())
	}
	return d, nil
}

func (d *daemon) ready() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() { // a daemon that ended will not be ready
		select {
		case <-d.ended:
			cancel()
		case <-stop:
		}
	}()
	for {
		_, err := d.images.ListImages(ctx, &cri.ListImagesRequest{})
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond): // grpc gives no event for it
		}
	}
}

func (d *daemon) stop() error {
	if d.conn != nil {
		d.conn.Close()
	}
	return d.process.stop()
}
