package cdi

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"

	oci "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	specs "tags.cncf.io/container-device-interface/specs-go"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Edits are what devices change in an OCI spec.
type Edits struct {
	names []string
	files []*file // whose own edits are in all
	all   specs.ContainerEdits
}

func (e *Edits) add(d device) {
	edits := cdi.ContainerEdits{ContainerEdits: &e.all}
	if !slices.Contains(e.files, d.file) {
		e.files = append(e.files, d.file)
		edits.Append(&cdi.ContainerEdits{ContainerEdits: &d.file.spec.ContainerEdits})
	}
	edits.Append(&cdi.ContainerEdits{ContainerEdits: &d.ContainerEdits})
	e.names = append(e.names, d.file.spec.Kind+"="+d.Name)
}

// Apply edits a spec. It looks up the devices' numbers where their file has none. An
// error is of the kind kind.State.
func (e *Edits) Apply(spec *oci.Spec) error {
	edits := e.all
	edits.DeviceNodes = nil
	for _, d := range e.all.DeviceNodes {
		own := *d // the library fills in what is missing, which may be another tomorrow
		edits.DeviceNodes = append(edits.DeviceNodes, &own)
	}
	err := present(&edits)
	if err == nil {
		err = (&cdi.ContainerEdits{ContainerEdits: &edits}).Apply(spec)
	}
	if err != nil {
		return kind.Errorf(kind.State, "cannot add the CDI devices %.500q: %w", e.names, err)
	}
	if hasUserns(spec) {
		bindMoved(spec, edits.DeviceNodes)
	}
	return nil
}

// present makes sure that what a file refers to is there: the OCI runtime's words would
// blame the container.
func present(e *specs.ContainerEdits) error {
	for _, m := range e.Mounts {
		if m.Type != "" && m.Type != "bind" {
			continue
		}
		if _, err := os.Stat(m.HostPath); err != nil {
			return fmt.Errorf("cannot mount %s on %s: %w", m.HostPath, m.ContainerPath, err)
		}
	}
	for _, h := range e.Hooks {
		if h.HookName == cdi.StartContainerHook {
			continue // it is run in the container
		}
		if _, err := os.Stat(h.Path); err != nil {
			return fmt.Errorf("cannot run the %s hook: %w", h.HookName, err)
		}
	}
	return nil
}

func hasUserns(spec *oci.Spec) bool {
	return slices.ContainsFunc(spec.Linux.Namespaces, func(n oci.LinuxNamespace) bool {
		return n.Type == oci.UserNamespace
	})
}

// bindMoved turns devices that have another path on the host into mounts. Nobody can
// make a device in a user namespace, and OCI runtimes bind the one of the same path.
func bindMoved(spec *oci.Spec, nodes []*specs.DeviceNode) {
	for _, n := range nodes {
		if n.HostPath == "" || n.HostPath == n.Path {
			continue
		}
		spec.Linux.Devices = slices.DeleteFunc(spec.Linux.Devices, func(d oci.LinuxDevice) bool {
			return d.Path == n.Path
		})
		spec.Mounts = append(spec.Mounts, oci.Mount{
			Destination: n.Path,
			Type:        "bind",
			Source:      n.HostPath,
			Options:     []string{"bind", "rprivate", "nosuid", "noexec", "rw"},
		})
	}
}

// hasNil finds entries of lists without anything in them, at which the library panics.
func hasNil(e *specs.ContainerEdits) bool {
	return slices.Contains(e.DeviceNodes, nil) || slices.Contains(e.Mounts, nil) || slices.Contains(e.Hooks, nil) ||
		slices.Contains(e.NetDevices, nil)
}

// validate checks edits: what the library does, and that paths are none that depend on
// where somebody stands.
func validate(e *specs.ContainerEdits) error {
	if err := (&cdi.ContainerEdits{ContainerEdits: e}).Validate(); err != nil {
		return err
	}
	var paths []string
	for _, m := range e.Mounts {
		if path.Clean(m.ContainerPath) == "/" {
			return errors.New("it mounts something on the root of the container")
		}
		paths = append(paths, m.ContainerPath)
		if m.Type == "" || m.Type == "bind" {
			paths = append(paths, m.HostPath)
		}
	}
	for _, d := range e.DeviceNodes {
		paths = append(paths, d.Path)
		if d.HostPath != "" {
			paths = append(paths, d.HostPath)
		}
	}
	for _, h := range e.Hooks {
		paths = append(paths, h.Path)
	}
	for _, p := range paths {
		if !path.IsAbs(p) {
			return fmt.Errorf("%.200q is not an absolute path", p)
		}
	}
	return nil
}
