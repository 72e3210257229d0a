package spec

import (
	"cmp"
	"path"
	"slices"
	"strings"
)

// defaultPath is what Docker gave to images that set no PATH, so images expect it.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func (b *builder) process() error {
	p := b.spec.Process
	if p.Args = b.args(); len(p.Args) == 0 {
		return invalid("config.command",
			"is empty, and so are config.args and the image's entrypoint and command: nothing to run")
	}
	p.Env = b.env()
	if err := b.checkExec(); err != nil {
		return err
	}
	p.Cwd = "/"
	if dir := b.Container.GetWorkingDir(); dir != "" {
		p.Cwd = path.Clean(dir)
	} else if dir := b.Image.WorkingDir; dir != "" {
		p.Cwd = path.Join("/", dir)
	}
	adj := int(b.Container.GetLinux().GetResources().GetOomScoreAdj())
	p.OOMScoreAdj = b.clampOOM(adj)
	return nil
}

// execRest is more than the kernel takes for the rest of what it gives a program: the
// path, and what the OCI runtime adds to the environment.
const execRest = 8 << 10

// checkExec refuses what execve(2) would: the container would be seen to start, and to
// end with an error that names nothing. Strings count with their terminating zero and
// a pointer each.
func (b *builder) checkExec() error {
	total := execRest
	for _, l := range []struct {
		field string
		items []string
	}{{"config.command", b.spec.Process.Args}, {"config.envs", b.spec.Process.Env}} {
		for _, s := range l.items {
			if len(s) >= maxString { // of the image: Validate has seen those of the config
				return invalid(l.field, "one of the image's has %d bytes, and the kernel takes less than %d", len(s),
					maxString)
			}
			total += len(s) + 1 + 8
		}
	}
	if limit := cmp.Or(b.ExecLimit, execDefault); total > limit {
		return invalid("config.envs", "arguments and environment take %d bytes, and the kernel takes %d at most", total,
			limit)
	}
	return nil
}

// args follows the table of the Kubernetes documentation: a command replaces
// the image's entrypoint and its command, args replace only its command.
func (b *builder) args() []string {
	command, args := b.Container.GetCommand(), b.Container.GetArgs()
	if len(command) == 0 {
		command = b.Image.Entrypoint
		if len(args) == 0 {
			args = b.Image.Cmd
		}
	}
	// Builders write [""] to remove the entrypoint of a base image.
	if len(command) == 1 && command[0] == "" {
		command = nil
	}
	return slices.Concat(command, args)
}

func (b *builder) env() []string {
	var e environment
	e.set("PATH", defaultPath)
	if b.Container.GetTty() {
		e.set("TERM", "xterm")
	}
	if host := cmp.Or(b.Sandbox.GetHostname(), b.NodeName); host != "" {
		e.set("HOSTNAME", host)
	}
	for _, kv := range b.Image.Env {
		key, value, _ := strings.Cut(kv, "=")
		e.set(key, value)
	}
	for _, kv := range b.Container.GetEnvs() {
		e.set(kv.GetKey(), string(kv.GetValue()))
	}
	return e.list
}

// environment holds each key once, in the order of its first appearance, with
// its last value.
type environment struct {
	list []string
	at   map[string]int
}

func (e *environment) set(key, value string) {
	if e.at == nil {
		e.at = map[string]int{}
	}
	i, ok := e.at[key]
	if !ok {
		i = len(e.list)
		e.at[key] = i
		e.list = append(e.list, "")
	}
	e.list[i] = key + "=" + value
}

// clampOOM raises adj to what the machine allows. It is never left unset, or
// the container would inherit the supervisor's.
func (b *builder) clampOOM(adj int) *int {
	if adj < b.MinOOMScoreAdj {
		b.warn("oom_score_adj %d is below what this daemon may set: %d is used", adj, b.MinOOMScoreAdj)
		adj = b.MinOOMScoreAdj
	}
	return &adj
}
