package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// maxProcess bounds process.json, in bytes. It has an environment of up to some MiB, of
// which JSON makes at most six times as much.
const maxProcess = 64 << 20

// SaveProcess keeps the process of the container's spec for execs.
func (h *Host) SaveProcess(process json.RawMessage) error {
	return record.WriteOf(h.Dir.Path(rundir.ProcessName), h.Dir.ID(), process, false)
}

// Complete fills what p leaves empty from the container's own process. An empty user
// is the container's, unless setUser says that root is meant.
func (h *Host) Complete(p *specs.Process, setUser bool) (*specs.Process, error) {
	q, err := h.ownProcess()
	if err != nil {
		return nil, fmt.Errorf("cannot exec: cannot learn the container's own process: %w", err)
	}
	q.Terminal, q.ConsoleSize, q.CommandLine = p.Terminal, p.ConsoleSize, ""
	q.Args = p.Args
	if p.Env != nil {
		q.Env = p.Env
	}
	if q.Terminal && !slices.ContainsFunc(q.Env, isTERM) {
		q.Env = append(q.Env, "TERM=xterm")
	}
	if p.Cwd != "" {
		q.Cwd = p.Cwd
	}
	u := p.User
	if setUser || u.UID != 0 || u.GID != 0 || u.Username != "" || len(u.AdditionalGids) > 0 || u.Umask != nil {
		q.User = u
	}
	if p.Capabilities != nil {
		q.Capabilities = p.Capabilities
	}
	if p.Rlimits != nil {
		q.Rlimits = p.Rlimits
	}
	if p.ApparmorProfile != "" {
		q.ApparmorProfile = p.ApparmorProfile
	}
	if p.SelinuxLabel != "" {
		q.SelinuxLabel = p.SelinuxLabel
	}
	if p.OOMScoreAdj != nil {
		q.OOMScoreAdj = p.OOMScoreAdj
	}
	if p.Scheduler != nil {
		q.Scheduler = p.Scheduler
	}
	if p.IOPriority != nil {
		q.IOPriority = p.IOPriority
	}
	if p.ExecCPUAffinity != nil {
		q.ExecCPUAffinity = p.ExecCPUAffinity
	}
	q.NoNewPrivileges = q.NoNewPrivileges || p.NoNewPrivileges
	return q, nil
}

func isTERM(kv string) bool { return strings.HasPrefix(kv, "TERM=") }

// ownProcess is the process of the container's spec: as it was saved, or else as the
// whole spec has it.
func (h *Host) ownProcess() (*specs.Process, error) {
	q := new(specs.Process)
	b, err := record.ReadFile(h.Dir.Path(rundir.ProcessName), maxProcess)
	if err == nil {
		err = record.DecodeOf(b, h.Dir.ID(), q)
	}
	if err == nil {
		return q, nil
	}
	spec, serr := record.ReadFile(h.Dir.Path(rundir.SpecName), maxProcess)
	whole := struct{ Process *specs.Process }{}
	if serr == nil {
		serr = json.Unmarshal(spec, &whole)
	}
	if serr != nil || whole.Process == nil {
		return nil, errors.Join(err, serr)
	}
	return whole.Process, nil
}
