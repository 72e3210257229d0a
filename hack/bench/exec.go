package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// execTimeout bounds everything that is done for a container, in each call.
const execTimeout = time.Minute

// goalExec is what ExecSync may take of what it takes in containerd.
const goalExec = 0.7

// The command in the container writes a line and ends; the container waits.
var (
	execCommand = []string{"/program", "print", "-count", "1"}
	execOutput  = "line 00000001\n"
	waitCommand = []string{"/program", "print", "-every", "24h"}
)

// benchExecs runs ExecSync in one container of each daemon. They take turns from call to
// call.
func benchExecs(o options) (t table, err error) {
	targets, stop, err := startTargets(o)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return t, err
	}
	for _, x := range targets {
		t.names = append(t.names, x.name)
	}
	for _, at := range []int{1, 4} {
		r := newRow(fmt.Sprintf("ExecSync, %d at a time", at), goalExec)
		err := inTurns(targets, 2+o.execs/at, func(round int, x *target) error {
			took, err := x.execs(at)
			if round >= 2 { // the first ones find nothing in caches
				r.values[x.name] = append(r.values[x.name], took...)
			}
			return err
		})
		if err != nil {
			return t, err
		}
		t.rows = append(t.rows, r)
	}
	return t, nil
}

// startTargets starts all daemons, each with a container. Call stop, after an error too.
func startTargets(o options) (targets []*target, stop func() error, err error) {
	var stops []func() error
	stop = func() (err error) {
		for _, f := range slices.Backward(stops) {
			err = errors.Join(err, f())
		}
		return err
	}
	image := filepath.Join(o.dir, "image-program")
	if err := makeProgramImage(image); err != nil {
		return nil, stop, err
	}
	reg, err := startRegistry(image)
	if err != nil {
		return nil, stop, err
	}
	stops = append(stops, reg.stop)
	for _, k := range kinds(o) {
		x, err := newTarget(o, k, reg.host)
		if x != nil {
			stops = append(stops, x.remove)
		}
		if err != nil {
			return nil, stop, fmt.Errorf("%s: %w", k.name, err)
		}
		targets = append(targets, x)
	}
	return targets, stop, nil
}

// makeProgramImage makes an image with one static program.
func makeProgramImage(dir string) error {
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Join(dir, "blobs"), 0o755)); err != nil {
		return err
	}
	program := filepath.Join(dir, "program")
	build := exec.Command("go", "build", "-o", program, "github.com/holdfast-cri/holdfast/tests/harness/testbox")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build the program of the image: %w: %s", err, out)
	}
	l := layer{program: program}
	if err := l.make(dir, "gzip"); err != nil {
		return fmt.Errorf("cannot make a layer: %w", err)
	}
	return writeManifest(dir, 0, ocispec.ImageConfig{Entrypoint: waitCommand}, []layer{l})
}

// target is a daemon with a container. Everything lies in dir.
type target struct {
	*daemon
	name, dir      string
	pod, container string
}

// newTarget gives, beside an error, what there is to remove.
func newTarget(o options, k kind, host string) (*target, error) {
	dir, err := os.MkdirTemp(o.dir, k.name+"-")
	if err != nil {
		return nil, err
	}
	x := &target{name: k.name, dir: dir}
	if err := os.Mkdir(filepath.Join(dir, "net.d"), 0o755); err != nil {
		return x, err
	}
	if x.daemon, err = k.start(dir, host, o.dir); err != nil {
		return x, err
	}
	if err := x.pull(1); err != nil {
		return x, err
	}
	return x, x.run()
}

// run starts the container, with the filter of system calls that is usual.
func (x *target) run() error {
	ctx, cancel := context.WithTimeout(context.Background(), execTimeout)
	defer cancel()
	namespaces := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}
	filter := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "bench", Namespace: "default", Uid: filepath.Base(x.dir)},
		LogDirectory: filepath.Join(x.dir, "logs"),
		Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: namespaces, Seccomp: filter},
		},
	}
	pod, err := x.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return err
	}
	x.pod = pod.PodSandboxId
	c, err := x.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: x.pod,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "bench"},
			Image:    &cri.ImageSpec{Image: reference(0)},
			LogPath:  "log",
			Linux: &cri.LinuxContainerConfig{
				SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: namespaces, Seccomp: filter},
			},
		},
		SandboxConfig: config,
	})
	if err != nil {
		return err
	}
	x.container = c.ContainerId
	_, err = x.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: x.container})
	return err
}

// execs runs so many at a time and says how long each took, in ms.
func (x *target) execs(n int) ([]float64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), execTimeout)
	defer cancel()
	took := make([]float64, n)
	var g errgroup.Group
	for i := range took {
		g.Go(func() error {
			began := time.Now()
			r, err := x.runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: x.container, Cmd: execCommand,
				Timeout: 10})
			took[i] = float64(time.Since(began)) / float64(time.Millisecond)
			if err == nil && (r.ExitCode != 0 || string(r.Stdout) != execOutput) {
				err = fmt.Errorf("ExecSync answered %d, %q, %q", r.ExitCode, r.Stdout, r.Stderr)
			}
			return err
		})
	}
	return took, g.Wait()
}

// remove removes the pod, stops the daemon and removes what it has left.
func (x *target) remove() error {
	var errs []error
	if x.pod != "" {
		ctx, cancel := context.WithTimeout(context.Background(), execTimeout)
		defer cancel()
		_, err := x.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: x.pod})
		_, err2 := x.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: x.pod})
		errs = append(errs, err, err2)
	}
	if x.daemon != nil {
		errs = append(errs, x.stop(), x.endRest())
	}
	os.RemoveAll(socketDir(x.dir))
	return errors.Join(append(errs, os.RemoveAll(x.dir))...)
}
