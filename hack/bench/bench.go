package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sample is what one pull took.
type sample struct {
	wall    time.Duration // until the last PullImage was answered
	settled time.Duration // until everything was on the disk
	cpu     time.Duration // of the daemon, user and system, until then
	server  time.Duration // of the registry
	rss     int64         // peak, of which pages of its program are a part
	anon    int64         // peak of what the daemon allocated
}

// results are the samples of each daemon, in the order of the rounds.
type results struct {
	options
	made
	names   []string
	samples map[string][]sample
}

func bench(o options, logf func(string, ...any)) (r results, err error) {
	image := filepath.Join(o.dir, fmt.Sprintf("image-%d-%d-%d-%s", o.images, o.layers, o.bytes, o.compress))
	r = results{options: o, samples: map[string][]sample{}}
	if r.made, err = makeImages(image, o); err != nil {
		return r, err
	}
	reg, err := startRegistry(image)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, reg.stop()) }()
	list := kinds(o)
	for _, k := range list {
		r.names = append(r.names, k.name)
	}
	for i := range o.rounds {
		for _, k := range list {
			s, err := r.measure(k, reg)
			if err != nil {
				return r, fmt.Errorf("%s: %w", k.name, err)
			}
			logf("round %d: %-10s %s", i+1, k.name, s)
			r.samples[k.name] = append(r.samples[k.name], s)
		}
		slices.Reverse(list) // who goes first may matter
	}
	return r, nil
}

// measure pulls all images once into an empty root.
func (r results) measure(k kind, reg *registry) (s sample, err error) {
	o := r.options
	dir, err := os.MkdirTemp(o.dir, k.name+"-")
	if err != nil {
		return s, err
	}
	defer os.RemoveAll(dir)
	defer os.RemoveAll(socketDir(dir))
	if !o.plain {
		unmount, err := freshDisk(dir, 3*(r.Packed+r.Unpacked)+4<<30)
		if err != nil {
			return s, fmt.Errorf("cannot make a fresh file system, -plain does without: %w", err)
		}
		defer unmount()
	}
	unix.Sync() // of what was before
	d, err := k.start(dir, reg.host, o.dir)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	cpu, err := d.cpu()
	server, err2 := reg.proc.cpu()
	// 5: the peak of the RSS begins anew; proc_pid_clear_refs(5).
	err3 := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", d.cmd.Process.Pid), []byte("5"), 0)
	if err := errors.Join(err, err2, err3); err != nil {
		return s, err
	}
	stop := d.peak()
	began := time.Now()
	err = d.pull(o.images)
	s.wall = time.Since(began)
	if err == nil {
		unix.Sync()
	}
	s.settled = time.Since(began)
	s.anon = stop()
	if err != nil {
		return s, err
	}
	after, err := d.cpu()
	serverAfter, err2 := reg.proc.cpu()
	s.rss, err3 = d.memory("VmHWM")
	s.cpu, s.server = after-cpu, serverAfter-server
	return s, errors.Join(err, err2, err3)
}

// freshDisk mounts a new ext4 on dir, from a file in dir's parent. What was
// deleted on a file system slows down for minutes what is created there later:
// ext4 passes over every inode that was freed lately. The one who comes second
// would pay for the one before.
func freshDisk(dir string, size int64) (unmount func(), err error) {
	file := dir + ".img"
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if err == nil {
		err = tool("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", file)
	}
	if err == nil {
		err = tool("mount", "-o", "loop", file, dir)
	}
	if err != nil {
		os.Remove(file)
		return nil, err
	}
	// Else every page would be cached twice.
	if out, err := exec.Command("losetup", "-n", "-O", "NAME", "-j", file).Output(); err == nil {
		tool("losetup", "--direct-io=on", strings.TrimSpace(string(out)))
	}
	return func() {
		tool("umount", dir)
		os.Remove(file)
	}, nil
}

func tool(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

func (d *daemon) pull(images int) error {
	ctx, cancel := context.WithTimeout(context.Background(), pullTimeout)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	for i := range images {
		g.Go(func() error {
			_, err := d.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: reference(i)}})
			return err
		})
	}
	return g.Wait()
}

// reference is the name of one of the images.
func reference(n int) string { return fmt.Sprintf("registry.test/bench:%d", n) }

func (s sample) String() string {
	return fmt.Sprintf("%6.2fs, on the disk %6.2fs, cpu %6.2fs, memory %4d MiB, anonymous %4d MiB (registry cpu %.2fs)",
		s.wall.Seconds(), s.settled.Seconds(), s.cpu.Seconds(), s.rss>>20, s.anon>>20, s.server.Seconds())
}

// figures are the rows of the report: what they are, and what holdfast may take
// of what containerd takes.
var figures = []struct {
	name string
	goal float64 // 0: none
	unit string
	of   func(sample) float64
}{
	{"time until the answer", 0.7, "s", func(s sample) float64 { return s.wall.Seconds() }},
	{"time until on the disk", 0, "s", func(s sample) float64 { return s.settled.Seconds() }},
	{"processor time", 0, "s", func(s sample) float64 { return s.cpu.Seconds() }},
	{"peak memory (RSS)", 0.5, "MiB", func(s sample) float64 { return float64(s.rss) / (1 << 20) }},
	{"peak anonymous memory", 0.5, "MiB", func(s sample) float64 { return float64(s.anon) / (1 << 20) }},
	{"registry's processor time", 0, "s", func(s sample) float64 { return s.server.Seconds() }},
}

func median[T cmp.Ordered](l []T) T {
	l = slices.Sorted(slices.Values(l))
	return l[len(l)/2]
}

func (r results) print(w io.Writer) {
	fmt.Fprintf(w, "%d image(s) of %d layers, %s: %.2f GiB in %d files, %.2f GiB compressed; median of %d\n\n",
		r.images, r.layers, r.compress, float64(r.Unpacked)/(1<<30), r.Files, float64(r.Packed)/(1<<30), r.rounds)
	t := table{names: r.names}
	for _, f := range figures {
		values := map[string][]float64{}
		for n, samples := range r.samples {
			for _, s := range samples {
				values[n] = append(values[n], f.of(s))
			}
		}
		t.rows = append(t.rows, row{f.name, f.goal, f.unit, values})
	}
	t.print(w)
}

// table is a report: what each daemon took, and the ratio if there are two.
type table struct {
	names []string
	rows  []row
}

type row struct {
	name   string
	goal   float64 // of the ratio; 0: none
	unit   string
	values map[string][]float64 // of each daemon; their median is printed
}

// ratio is what the first daemon takes of what the second one takes.
func (t table) ratio(r row) float64 {
	return median(r.values[t.names[0]]) / median(r.values[t.names[1]])
}

func (t table) print(w io.Writer) {
	fmt.Fprintf(w, "%-26s", "")
	for _, n := range t.names {
		fmt.Fprintf(w, "%16s", n)
	}
	compared := len(t.names) == 2
	if compared {
		fmt.Fprintf(w, "%8s  goal", "ratio")
	}
	for _, r := range t.rows {
		fmt.Fprintf(w, "\n%-26s", r.name)
		for _, n := range t.names {
			fmt.Fprintf(w, "%12.1f %-3s", median(r.values[n]), r.unit)
		}
		if compared {
			fmt.Fprintf(w, "%8.2f", t.ratio(r))
			if r.goal > 0 {
				fmt.Fprintf(w, "  <= %.1f", r.goal)
			}
		}
	}
	fmt.Fprintln(w)
}
