package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func TestBar(t *testing.T) {
	p := rundir.Pull{Bytes: 50 << 20, TotalBytes: 200 << 20, Layers: 1, TotalLayers: 3, Rate: 1234567}
	if got, want := pullText(p, true), "[#######.......................] 50 MiB of 200 MiB, 1 of 3 layers, 1.18 MiB/s"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	for _, p := range []rundir.Pull{{}, {Bytes: 5, TotalBytes: 3}, {Bytes: 3, TotalBytes: 3}} {
		if got := pullText(p, true); !strings.HasPrefix(got, "["+strings.Repeat("#", barWidth)+"]") {
			t.Errorf("%+v: %s", p, got)
		}
	}
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1 << 20: "1 MiB", 1023 << 20: "0.999 GiB", 5 << 50: "5.12e+03 TiB"} {
		if got := sizeText(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
	// Not on a terminal: no control characters, and not ten lines a second.
	var out bytes.Buffer
	b := bar{w: &out}
	for range 10 {
		b.show(p)
	}
	b.clear()
	if got := out.String(); strings.Count(got, "\n") != 1 || strings.ContainsAny(got, "\r\x1b") {
		t.Errorf("printed %q", got)
	}
}

func TestFindPull(t *testing.T) {
	dir := t.TempDir()
	since := time.Now()
	for name, p := range map[string]rundir.Pull{
		"1.json": {Asked: "busybox", Since: since.Add(-time.Hour), Bytes: 1}, // somebody else's
		"2.json": {Asked: "busybox", Since: since.Add(time.Second), Bytes: 2},
		"3.json": {Asked: "alpine", Since: since.Add(time.Minute), Bytes: 3},
	} {
		check(t, rundir.WriteRecord(filepath.Join(dir, name), p, false))
	}
	check(t, os.WriteFile(filepath.Join(dir, "4.json"), []byte("torn"), 0o600))
	if p, ok := findPull(dir, "busybox", since); !ok || p.Bytes != 2 {
		t.Errorf("found %+v", p)
	}
	if p, ok := findPull(dir, "none", since); ok {
		t.Errorf("found %+v", p)
	}
	if p, ok := findPull(filepath.Join(dir, "none"), "busybox", since); ok {
		t.Errorf("found %+v", p)
	}
}

func TestAddress(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	check(t, os.WriteFile(file, []byte("address = \"/x/y.sock\"\nroot = \"/z\"\n"), 0o600))
	for config, want := range map[string]string{"": "/s/holdfast.sock", file: "/x/y.sock"} {
		if got, err := addressFrom(config, "/s"); err != nil || got != want {
			t.Errorf("%q: %s %v", config, got, err)
		}
	}
	if _, err := addressFrom(file+".none", "/s"); err == nil {
		t.Error("a config that is missing was ignored")
	}
}
