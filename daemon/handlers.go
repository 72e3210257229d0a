package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/runc"
)

// handler is a runtime handler and what it can do.
type handler struct {
	Runtime
	recursiveReadOnly bool
	userns            bool // user namespaces, and mounts with mapped owners
}

// probeHandlers asks each OCI runtime once for its features. One that does not
// answer is kept: its containers fail with the reason, the others do not.
func probeHandlers(cfg Config, log *slog.Logger) (map[string]handler, error) {
	handlers := map[string]handler{}
	for name, r := range cfg.Runtimes {
		h := handler{Runtime: r}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		out, err := (&runc.Runtime{Path: r.Path, Root: filepath.Join(cfg.State, "runc")}).Features(ctx)
		cancel()
		var features struct {
			MountOptions []string `json:"mountOptions"`
			Linux        struct {
				Namespaces      []string `json:"namespaces"`
				MountExtensions struct {
					IDMap struct {
						Enabled bool `json:"enabled"`
					} `json:"idmap"`
				} `json:"mountExtensions"`
			} `json:"linux"`
		}
		if err == nil {
			err = json.Unmarshal(out, &features)
		}
		if err != nil {
			log.Warn("cannot ask the OCI runtime for its features", "handler", name, "path", r.Path, "error", err)
		}
		h.recursiveReadOnly = slices.Contains(features.MountOptions, "rro")
		h.userns = slices.Contains(features.Linux.Namespaces, "user") && features.Linux.MountExtensions.IDMap.Enabled
		handlers[name] = h
	}
	if _, ok := handlers[cfg.DefaultRuntime]; !ok {
		return nil, fmt.Errorf("default_runtime %q is not among the runtimes of the config", cfg.DefaultRuntime)
	}
	return handlers, nil
}

// handlerFor finds the handler that a pod asked for, the default one for "".
func (d *Daemon) handlerFor(name string) (handler, error) {
	if name == "" {
		name = d.cfg.DefaultRuntime
	}
	h, ok := d.handlers[name]
	if !ok {
		return handler{}, errorf(ErrInvalid, "runtime_handler: there is no handler %q in the config", name)
	}
	return h, nil
}

// Handlers lists the runtime handlers for Status, the default one also as "".
func (d *Daemon) Handlers() []*runtimeapi.RuntimeHandler {
	var list []*runtimeapi.RuntimeHandler
	add := func(name string, h handler) {
		list = append(list, &runtimeapi.RuntimeHandler{Name: name,
			Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: h.recursiveReadOnly,
				UserNamespaces: h.userns && d.noUserns == nil}})
	}
	add("", d.handlers[d.cfg.DefaultRuntime])
	for name, h := range d.handlers {
		add(name, h)
	}
	slices.SortFunc(list, func(a, b *runtimeapi.RuntimeHandler) int { return strings.Compare(a.Name, b.Name) })
	return list
}
