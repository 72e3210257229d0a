// Package runtimes is the OCI runtimes of the config, one for each runtime
// handler of the CRI: what each can do, and the little that has to be known of
// its inside when there is no shim left that could ask it.
package runtimes

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/runc"
)

const (
	featuresTimeout = 10 * time.Second
	deleteTimeout   = 30 * time.Second
)

// Handler is a runtime handler and what it can do with this kernel.
type Handler struct {
	Name string
	Path string // of the binary, absolute
	// RecursiveReadOnly: a read-only mount may cover all that is mounted below.
	RecursiveReadOnly bool
	// Userns: user namespaces, and mounts with mapped owners.
	Userns bool
	// NoSeccomp: the OCI runtime says that it cannot filter system calls.
	NoSeccomp bool
}

// Set is the handlers of a config.
type Set struct {
	root     string // --root of the OCI runtimes: where they keep their state
	systemd  bool   // the cgroup driver
	fallback string
	handlers map[string]Handler
}

// Probe asks each OCI runtime once for its features. One that does not answer is
// kept: its containers fail with the reason, the others do not. paths are the
// binaries by handler, of which fallback has to be one.
func Probe(paths map[string]string, fallback, root string, systemd bool, log *slog.Logger) (*Set, error) {
	if _, ok := paths[fallback]; !ok {
		return nil, fmt.Errorf("default_runtime %q is not among the runtimes of the config", fallback)
	}
	s := &Set{root: root, systemd: systemd, fallback: fallback, handlers: map[string]Handler{}}
	for name, path := range paths {
		h := Handler{Name: name, Path: path}
		if err := s.probe(&h); err != nil {
			log.Warn("cannot ask the OCI runtime for its features", "handler", name, "path", path, "error", err)
		}
		s.handlers[name] = h
	}
	return s, nil
}

func (s *Set) probe(h *Handler) error {
	ctx, cancel := context.WithTimeout(context.Background(), featuresTimeout)
	defer cancel()
	out, err := s.runtime(*h).Features(ctx)
	if err != nil {
		return err
	}
	var f struct {
		MountOptions []string `json:"mountOptions"`
		Linux        struct {
			Namespaces      []string `json:"namespaces"`
			MountExtensions struct {
				IDMap struct {
					Enabled bool `json:"enabled"`
				} `json:"idmap"`
			} `json:"mountExtensions"`
			Seccomp struct {
				Enabled *bool `json:"enabled"`
			} `json:"seccomp"`
		} `json:"linux"`
	}
	if err := json.Unmarshal(out, &f); err != nil {
		return err
	}
	kernel := mountSetattr()
	h.RecursiveReadOnly = kernel && slices.Contains(f.MountOptions, "rro")
	h.Userns = kernel && slices.Contains(f.Linux.Namespaces, "user") && f.Linux.MountExtensions.IDMap.Enabled
	h.NoSeccomp = f.Linux.Seccomp.Enabled != nil && !*f.Linux.Seccomp.Enabled
	return nil
}

// mountSetattr says whether the kernel has what OCI runtimes use for mounts that are read-only
// to the bottom, and for mapped owners (Linux 5.12): they say that they know these on any
// kernel. It asks with arguments that cannot succeed. Tests have another one.
var mountSetattr = func() bool {
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	return !errors.Is(err, unix.ENOSYS)
}

func (s *Set) runtime(h Handler) *runc.Runtime {
	return &runc.Runtime{Path: h.Path, Root: s.root, SystemdCgroup: s.systemd}
}

// Root is where the OCI runtimes keep their state.
func (s *Set) Root() string { return s.root }

// Names lists the handlers.
func (s *Set) Names() []string { return slices.Sorted(maps.Keys(s.handlers)) }

// For finds the handler that a pod asked for, the default one for "".
func (s *Set) For(name string) (Handler, error) {
	name = cmp.Or(name, s.fallback)
	h, ok := s.handlers[name]
	if !ok {
		return Handler{}, kind.Errorf(kind.Invalid, "runtime_handler: there is no handler %q in the config", name)
	}
	return h, nil
}

// Check refuses an image that the request has under the name field, for a handler that
// is not known.
func (s *Set) Check(field string, image *runtimeapi.ImageSpec) error {
	if name := image.GetRuntimeHandler(); name != "" && s.handlers[name].Path == "" {
		return kind.Errorf(kind.Invalid, "%s.runtime_handler: there is no handler %.200q in the config", field, name)
	}
	return nil
}

// List describes the handlers for the kubelet, the default one also as "".
// userns says whether this machine has user namespaces for pods.
func (s *Set) List(userns bool) []*runtimeapi.RuntimeHandler {
	var list []*runtimeapi.RuntimeHandler
	for _, name := range append([]string{""}, s.Names()...) {
		h, _ := s.For(name)
		list = append(list, &runtimeapi.RuntimeHandler{
			Name: name,
			Features: &runtimeapi.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: h.RecursiveReadOnly,
				UserNamespaces:          h.Userns && userns,
			},
		})
	}
	return list
}

// Delete has the OCI runtime forget a container whose shim cannot ask it to,
// killing what is left. One that it does not know is no error. If the handler is
// in the config no more, the files are removed that the runtime kept; the caller
// has killed the processes.
func (s *Set) Delete(ctx context.Context, handler, id string) error {
	dir := (&runc.Runtime{Root: s.root}).StateDir(id)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	h, err := s.For(handler)
	if err != nil {
		return os.RemoveAll(dir)
	}
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	return s.runtime(h).Delete(ctx, id, true)
}

// Unstarted says whether a container certainly waits to be started: the runtime
// keeps the FIFO on which its init waits. False says nothing.
func (s *Set) Unstarted(id string) bool { return (&runc.Runtime{Root: s.root}).HasFifo(id) }
