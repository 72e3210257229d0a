// Command bench measures how fast images are pulled: wall time, processor time
// and peak memory of holdfastd and, where there is one, of containerd, on the
// same disk, from the same registry, in turns. With -execs it measures instead how
// long ExecSync takes, which probes are, alone and four at a time. With -sessions it
// measures sessions of exec, alone and 16 at a time, over SPDY and WebSocket: how long
// they take from the call of the CRI to the exit code, and the time and processor time
// of a GiB of stdout and of stdin.
//
//	make bench [CONTAINERD=path-of-containerd] [BENCH='-layers 1 -bytes 1G']
//	make bench [CONTAINERD=path-of-containerd] BENCH='-execs 100'
//	make bench [CONTAINERD=path-of-containerd] BENCH='-sessions 64'
//
// It needs root and what `make build` makes, and room for three times the size
// of the image. It leaves nothing behind but the logs of a run that failed; with
// -dir it keeps the images for the next run.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

type options struct {
	dir        string // for the images and the logs of the daemons, and to pull into
	bin        string // folder of holdfastd
	containerd string // the program; empty: none
	images     int    // pulled at the same time
	layers     int    // of each image
	bytes      int64  // of all images, unpacked
	compress   string
	rounds     int
	plain      bool // on the file system of dir, not on a fresh one
	execs      int  // instead of pulls: so many by each daemon, alone and four at a time
	sessions   int  // instead of pulls: so many short ones by each daemon, alone and 16 at a time
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench: ")
	if len(os.Args) == 3 && os.Args[1] == serveCommand {
		log.Fatal(serve(os.Args[2]))
	}
	o := options{bytes: 2 << 30}
	flag.StringVar(&o.dir, "dir", "",
		"scratch `folder` on the disk to be measured; images stay in it (default: a temporary one)")
	flag.StringVar(&o.bin, "bin", "bin", "`folder` of holdfastd")
	flag.StringVar(&o.containerd, "containerd", "",
		"containerd `program` to compare with, 2.0 or later (default: on PATH; none: no comparison)")
	flag.IntVar(&o.images, "images", 1, "images pulled at the same time")
	flag.IntVar(&o.layers, "layers", 60, "layers of each image")
	flag.Func("bytes", "content of all images, or of a transfer, such as 40M (default 2G)", func(s string) (err error) {
		o.bytes, err = parseBytes(s)
		return err
	})
	flag.StringVar(&o.compress, "compression", "gzip", "of the layers: gzip, zstd or none")
	flag.BoolVar(&o.plain, "plain", false,
		"use the file system of -dir as it is, instead of a fresh ext4 in a file there for every pull")
	flag.IntVar(&o.execs, "execs", 0, "measure so many ExecSync of each daemon instead of pulls")
	flag.IntVar(&o.sessions, "sessions", 0,
		"measure so many sessions of each daemon, and bytes through them, instead of pulls")
	flag.IntVar(&o.rounds, "rounds", 3, "pulls by each daemon, or transfers through sessions")
	flag.Parse()
	if err := command(o); err != nil {
		log.Fatal(err)
	}
}

func command(o options) (err error) {
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if os.Geteuid() != 0 {
		return errors.New("cannot run daemons: this needs root")
	}
	if o.containerd == "" {
		o.containerd, _ = exec.LookPath("containerd")
	} else if o.containerd, err = exec.LookPath(o.containerd); err != nil {
		return fmt.Errorf("cannot compare: %w", err)
	}
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "hf-bench-"); err != nil {
			return err
		}
		defer func() {
			if err == nil {
				os.RemoveAll(o.dir)
				return
			}
			// The error may name a log, so the logs stay.
			images, _ := filepath.Glob(filepath.Join(o.dir, "image-*"))
			for _, dir := range images {
				os.RemoveAll(dir)
			}
		}()
	}
	for _, p := range []*string{&o.dir, &o.bin} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if o.execs > 0 || o.sessions > 0 {
		t, err := benchCalls(o)
		if err == nil {
			t.print(os.Stdout)
		}
		return err
	}
	r, err := bench(o, log.Printf)
	if err != nil {
		return err
	}
	r.print(os.Stdout)
	return nil
}

// benchCalls measures what is done with a container that runs.
func benchCalls(o options) (table, error) {
	if o.execs > 0 {
		return benchExecs(o)
	}
	return benchSessions(o, log.Printf)
}

// parseBytes reads a number with K, M or G for powers of 1024.
func parseBytes(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMG")
	n, err := strconv.ParseInt(digits, 10, 64)
	shift, ok := map[string]int{"": 0, "K": 10, "M": 20, "G": 30}[s[len(digits):]]
	if err != nil || !ok || n <= 0 || n > 1<<50>>shift {
		return 0, fmt.Errorf("%q is no size such as 40M or 2G", s)
	}
	return n << shift, nil
}
