// Package checkpoint is what a checkpoint is on a disk: the archive of a container, in the
// form that checkpointctl and other runtimes know, and files that appear whole or not at
// all. It also asks whether CRIU can work on this machine.
//
// An archive that somebody gives is hostile: its entries are bounded in number and size,
// their kinds are checked, and of their names none is used as a path. What CRIU makes of the
// files in it is another matter: whoever may restore an archive is root of the machine.
package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/reaper/group"
)

const (
	probeTimeout = time.Minute // CRIU looks at each feature of the kernel
	maxProbe     = 64 << 10    // bytes of what it says
)

// Probe says why no checkpoint can be made or restored on this machine; nil if one can. An
// error is of the kind kind.State.
func Probe(ctx context.Context) error {
	program, err := exec.LookPath("criu")
	if err != nil {
		return kind.Errorf(kind.State, "there is no CRIU on this machine (%w): install the package criu", err)
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	says, err := run(ctx, program, "check")
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return kind.As(kind.State, fmt.Errorf("cannot ask %s whether it can work on this machine: %w", program, err))
	}
	version, verr := run(ctx, program, "--version")
	if verr != nil {
		version = verr.Error()
	}
	return kind.Errorf(kind.State, "CRIU cannot work on this machine, as %s check says: %s (%s)",
		program, cause(says, err), strings.Join(strings.Fields(version), " "))
}

// cause is the first error among what CRIU says.
func cause(says string, err error) string {
	for line := range strings.Lines(says) {
		if strings.HasPrefix(strings.TrimSpace(line), "Error") {
			return strings.TrimSpace(line)
		}
	}
	return strings.TrimSpace(says + " " + err.Error())
}

func run(ctx context.Context, program string, args ...string) (string, error) {
	cmd := exec.Command(program, args...)
	out := &group.Head{Max: maxProbe}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = time.Second
	err := group.Run(ctx, cmd, nil, group.Kill)
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	return string(bytes.ToValidUTF8(out.Bytes(), nil)), err
}
