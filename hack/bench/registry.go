package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const serveCommand = "serve"

// registry is a process of its own, so that what it costs is not mistaken for
// what a daemon costs.
type registry struct {
	host string // host:port
	proc *process
	pipe io.Closer // the process ends with it
}

func startRegistry(dir string) (*registry, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, serveCommand, dir)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p, err := startProcess(cmd)
	if err != nil {
		return nil, fmt.Errorf("cannot start a registry: %w", err)
	}
	host, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the registry does not serve: %w", err), p.stop())
	}
	return &registry{host: strings.TrimSpace(host), proc: p, pipe: stdin}, nil
}

func (r *registry) stop() error {
	r.pipe.Close()
	return r.proc.stop()
}

// serve serves a folder of images until stdin ends. Blobs go from the page
// cache to the socket by sendfile, so the registry is not what is measured.
func serve(dir string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	s := &http.Server{Handler: handler(dir), ReadHeaderTimeout: time.Minute}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	return s.Serve(l)
}

// handler is the part of a registry that a pull needs: /v2/NAME/manifests/N or
// its digest, and /v2/NAME/blobs/DIGEST.
func handler(dir string) http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /v2/{$}", func(http.ResponseWriter, *http.Request) {})
	m.HandleFunc("GET /v2/bench/blobs/{digest}", func(w http.ResponseWriter, r *http.Request) {
		d, err := digest.Parse(r.PathValue("digest"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeFile(w, r, filepath.Join(dir, "blobs", d.Encoded()))
	})
	manifest := func(w http.ResponseWriter, b []byte) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(b).String())
		w.Write(b)
	}
	m.HandleFunc("GET /v2/bench/manifests/{name}", func(w http.ResponseWriter, r *http.Request) {
		files, _ := filepath.Glob(filepath.Join(dir, "manifest-*"))
		for _, f := range files {
			b, err := os.ReadFile(f)
			name := r.PathValue("name")
			if err == nil && (f == filepath.Join(dir, "manifest-"+name) || name == digest.FromBytes(b).String()) {
				manifest(w, b)
				return
			}
		}
		http.NotFound(w, r)
	})
	return m
}
