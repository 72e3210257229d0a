package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/runc"
)

const (
	// nodeCRIU is where whoever runs the node configures CRIU for runc.
	nodeCRIU    = "/etc/criu/runc.conf"
	maxNodeCRIU = 64 << 10
	// leaveStopped has restored processes stopped: they run when the container is started.
	leaveStopped = "leave-stopped\n"
)

// configureCRIU writes the configuration of CRIU that the spec of a container names: that
// of the node, and more. It makes the directory of its logs, too.
func (h *Host) configureCRIU(more string) error {
	node, err := record.ReadFile(nodeCRIU, maxNodeCRIU)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = os.WriteFile(h.Dir.Path(rundir.CRIUConfigName), append(node, "\n"+more...), 0o600)
	}
	if err == nil {
		if err = os.Mkdir(h.Dir.Path(rundir.CRIUName), 0o700); errors.Is(err, fs.ErrExist) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("cannot configure CRIU: %w", err)
	}
	return nil
}

// Checkpoint saves the container into a directory that exists. Its processes are frozen,
// and stay so.
func (h *Host) Checkpoint(ctx context.Context, images string) error {
	if err := h.configureCRIU(""); err != nil {
		return err
	}
	return h.Runtime.Checkpoint(ctx, h.Dir.ID(), runc.CheckpointOptions{
		Images: images,
		Work:   h.Dir.Path(rundir.CRIUName),
	})
}

// Resume lets the processes of a restored container run, all at once: none sees another
// one that has stopped.
func (p *Process) Resume(ctx context.Context) error {
	if err := p.Cgroups.Freeze(ctx); err != nil {
		return err
	}
	defer p.Cgroups.Thaw()
	return p.SignalTree(unix.SIGCONT)
}
