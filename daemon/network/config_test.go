package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

func (w *world) wantNetwork(name string) {
	w.t.Helper()
	b, err := w.Config()
	if err != nil {
		w.t.Errorf("want network %s: %v", name, err)
		return
	}
	var got struct{ Name string }
	if err := json.Unmarshal(b, &got); err != nil || got.Name != name {
		w.t.Errorf("network in force is %q (%v), want %q", got.Name, err, name)
	}
	if err := w.Ready(w.t.Context()); err != nil {
		w.t.Errorf("Ready: %v", err)
	}
}

func (w *world) wantNone(says ...string) {
	w.t.Helper()
	b, err := w.Config()
	if !errors.Is(err, ErrNoNetwork) || b != nil {
		w.t.Errorf("Config: %s, %v, want ErrNoNetwork", b, err)
	}
	err = w.Ready(w.t.Context())
	if !errors.Is(err, ErrNoNetwork) {
		w.t.Errorf("Ready: %v, want ErrNoNetwork", err)
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			w.t.Errorf("%q does not mention %q", err, s)
		}
	}
}

func list(name string) string {
	return `{"cniVersion": "1.0.0", "name": "` + name + `", "plugins": [{"type": "loopback"}]}`
}

func TestConfigFollowsTheDirectory(t *testing.T) {
	w := newWorld(t)
	dir := w.opts.ConfDir
	remove := func(name string) {
		check(t, os.RemoveAll(filepath.Join(dir, name)))
	}
	w.wantNone(dir)

	w.write("50-b.conflist", list("b"))
	w.wantNetwork("b")
	w.write("50-b.conflist", list("c")) // same length, at once
	w.wantNetwork("c")
	w.write("10-a.conf", `{"cniVersion": "0.3.1", "name": "single", "type": "loopback"}`)
	w.wantNetwork("single")
	w.write("05-x.json", list("json"))
	w.wantNetwork("json")
	w.write("00-readme.txt", list("no"))
	w.write("00-backup.conflist.bak", list("no"))
	w.wantNetwork("json")

	w.write("00-half.conflist", `{"cniVersion": "1.0.0", "name": "half", "plug`)
	w.write("01-empty.conflist", `{"cniVersion": "1.0.0", "name": "empty", "plugins": []}`)
	w.write("02-noname.conf", `{"cniVersion": "1.0.0", "plugins": [{"type": "loopback"}]}`)
	for range 3 {
		w.wantNetwork("json")
	}
	for _, name := range []string{"00-half.conflist", "01-empty.conflist", "02-noname.conf"} {
		if got := strings.Count(w.log.String(), name); got != 1 {
			t.Errorf("%s is in the log %d times, want once:\n%s", name, got, w.log)
		}
	}
	w.write("00-half.conflist", list("whole"))
	w.wantNetwork("whole")

	remove("00-half.conflist")
	remove("05-x.json")
	remove("10-a.conf")
	remove("50-b.conflist")
	w.wantNone("2 CNI configs")
	remove("01-empty.conflist")
	remove("02-noname.conf")
	w.wantNone(dir)
	remove("")
	w.wantNone(dir)
	check(t, os.Mkdir(dir, 0o755))
	w.write("50-b.conflist", list("back"))
	w.wantNetwork("back")
}

// What is no file, or is no size for a config, neither blocks nor hides the others.
func TestConfigIsNoFile(t *testing.T) {
	w := newWorld(t)
	w.write("50-b.conflist", list("b"))
	for _, name := range []string{"00-fifo.conflist", "01-large.conflist", "02-directory.conflist"} {
		path := filepath.Join(w.opts.ConfDir, name)
		var err error
		switch name[:4] {
		case "00-f":
			err = unix.Mkfifo(path, 0o600)
		case "01-l":
			if err = os.WriteFile(path, nil, 0o600); err == nil {
				err = os.Truncate(path, 1<<40)
			}
		case "02-d":
			err = os.Mkdir(path, 0o700)
		}
		check(t, err)
		w.wantNetwork("b")
	}
	check(t, os.Mkdir(filepath.Join(w.opts.ConfDir, "b"), 0o700))
	check(t, unix.Mkfifo(filepath.Join(w.opts.ConfDir, "b", "10-fifo.conf"), 0o600))
	w.wantNone("can be used") // nor is a network used without a plugin that it names
	if !strings.Contains(w.log.String(), "10-fifo.conf") {
		t.Errorf("not in the log:\n%s", w.log)
	}
}

func TestConfigNamesMissingPlugins(t *testing.T) {
	w := newWorld(t)
	w.write("10.conflist",
		`{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "loopback"},
			{"type": "late", "ipam": {"type": "late-ipam"}}]}`)
	w.wantNone("late", w.scripts, w.opts.BinDirs[1], "10.conflist")
	w.script("late", "exit 0")
	w.wantNone("late-ipam", w.scripts)
	w.script("late-ipam", "exit 0")
	w.wantNetwork("n")
}

// Plugins in a directory of the network's name belong to the list, and have to
// be in what is recorded.
func TestConfigStandsAlone(t *testing.T) {
	w := newWorld(t)
	sub := filepath.Join(w.opts.ConfDir, "n")
	check(t, os.Mkdir(sub, 0o755))
	w.write("10.conflist", list("n"))
	w.write("n/50-more.conf", `{"type": "portmap", "capabilities": {"portMappings": true}}`)
	w.wantNetwork("n")
	types := func() []string {
		t.Helper()
		b, err := w.Config()
		check(t, err)
		var c struct {
			LoadOnlyInlinedPlugins bool
			Plugins                []struct{ Type string }
		}
		check(t, json.Unmarshal(b, &c))
		var out []string
		for _, p := range c.Plugins {
			out = append(out, p.Type)
		}
		return out
	}
	if got := strings.Join(types(), " "); got != "loopback portmap" {
		t.Errorf("plugins: %s", got)
	}
	w.write("n/60-more.conf", `{"type": "bridge"}`)
	if got := strings.Join(types(), " "); got != "loopback portmap bridge" {
		t.Errorf("plugins after one was added: %s", got)
	}
}

func TestBuiltinNetwork(t *testing.T) {
	builtin := func(o *Options) { o.DefaultNetwork, o.Subnet = true, "10.230.1.0/24" }
	ranges := func(w *world) string {
		t.Helper()
		b, err := w.Config()
		check(t, err)
		var c struct {
			Plugins []struct {
				IPAM struct {
					DataDir string
					Ranges  json.RawMessage
				}
			}
		}
		check(t, json.Unmarshal(b, &c))
		if dir := c.Plugins[0].IPAM.DataDir; !strings.HasPrefix(dir, w.opts.CacheDir) {
			t.Errorf("leases in %s", dir)
		}
		return string(c.Plugins[0].IPAM.Ranges)
	}

	w := newWorld(t, builtin)
	w.wantNetwork(netns.BuiltinNetwork)
	if got := ranges(w); got != `[[{"subnet":"10.230.1.0/24"}]]` {
		t.Errorf("ranges %s", got)
	}
	err := w.SetPodCIDR("10.230.2.0/33")
	if !errors.Is(err, kind.Invalid) || !strings.HasPrefix(err.Error(), "runtime_config.network_config.pod_cidr: ") {
		t.Errorf("bad CIDR: %v", err)
	}
	if err := w.SetPodCIDR(""); err != nil {
		t.Errorf("empty CIDR: %v", err)
	}
	check(t, w.SetPodCIDR("10.230.2.0/24,fd00:230::/64"))
	const dual = `[[{"subnet":"10.230.2.0/24"}],[{"subnet":"fd00:230::/64"}]]`
	if got := ranges(w); got != dual {
		t.Errorf("ranges %s", got)
	}
	again, err := New(w.opts)
	check(t, err)
	if got := ranges(&world{Network: again, t: t}); got != dual {
		t.Errorf("ranges after a restart: %s", got)
	}
	check(t, os.WriteFile(w.podCIDRFile(), []byte("torn"), 0o600))
	again, err = New(w.opts)
	check(t, err)
	if got := ranges(&world{Network: again, t: t}); got != `[[{"subnet":"10.230.1.0/24"}]]` {
		t.Errorf("ranges with a damaged file: %s", got)
	}

	w.write("10.conflist", list("real")) // the cluster's own CNI goes first
	w.wantNetwork("real")
	// And where it is broken the built-in one must not take its place.
	w.write("10.conflist", "{")
	w.wantNone()

	t.Setenv("PATH", t.TempDir())
	w = newWorld(t, builtin)
	w.wantNetwork(netns.BuiltinNetwork)
	b, err := w.Config()
	if err != nil || strings.Contains(string(b), "portmap") || !strings.Contains(string(b), `"ipMasq":false`) {
		t.Errorf("without iptables: %s, %v", b, err)
	}
	if got := strings.Count(w.log.String(), "without masquerading"); got != 1 {
		t.Errorf("said %d times that masquerading is missing", got)
	}

	o := w.opts
	o.Subnet = "10.230.1.0"
	if _, err := New(o); err == nil {
		t.Error("bad subnet taken")
	}
	o.DefaultNetwork = false
	n, err := New(o)
	check(t, err)
	if err := n.SetPodCIDR("10.230.9.0/24"); err != nil {
		t.Error(err)
	}
	if err := n.Ready(t.Context()); !errors.Is(err, ErrNoNetwork) {
		t.Errorf("Ready without a config: %v", err)
	}
}

// A template becomes a config with the ranges of the node, unless there is one.
func TestTemplate(t *testing.T) {
	const text = `{"cniVersion": "1.0.0", "name": "templated", "plugins": [{"type": "loopback", "cidr": "{{.PodCIDR}}",
  "ranges": [{{range $i, $r := .PodCIDRRanges}}{{if $i}},{{end}}"{{$r}}"{{end}}],
  "routes": [{{range $i, $r := .Routes}}{{if $i}},{{end}}"{{$r}}"{{end}}]}]}`
	const ranges = "10.230.2.0/24,fd00:230::/64,10.231.0.0/24"
	file := filepath.Join(t.TempDir(), "template")
	w := newWorld(t, func(o *Options) { o.ConfTemplate = file })
	for name, bad := range map[string]string{
		"missing": "", "broken": "{{", "without such a field": "{{.Nothing}}", "not a config": "{}",
	} {
		if bad != "" {
			check(t, os.WriteFile(file, []byte(bad), 0o600))
		}
		if err := w.SetPodCIDR(ranges); !errors.Is(err, kind.Unavailable) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", name, err)
		}
		w.wantNone()
	}
	check(t, os.WriteFile(file, []byte(text), 0o600))
	check(t, w.SetPodCIDR(ranges))
	w.wantNetwork("templated")
	b, err := w.Config()
	check(t, err)
	for _, want := range []string{
		`"cidr": "10.230.2.0/24"`,
		`"ranges": ["10.230.2.0/24","fd00:230::/64","10.231.0.0/24"]`,
		`"routes": ["0.0.0.0/0","::/0"]`,
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the config %s lacks %s", b, want)
		}
	}
	check(t, w.SetPodCIDR("10.230.9.0/24"))
	if again, err := w.Config(); err != nil || !bytes.Equal(again, b) {
		t.Errorf("a config that was there is now %s, %v", again, err)
	}
}

func TestQuantity(t *testing.T) {
	for s, want := range map[string]uint64{
		"10M": 10_000_000, "1Gi": 1 << 30, "1.5k": 1500, "1000": 1000, "2000000m": 2000, "1e6": 1_000_000, "1P": 1e15,
		"": 0, "M": 0, "10MB": 0, "-1M": 0, "999": 0, "2P": 0, "1/2k": 0, "0x10M": 0, "1e99999999999": 0,
		"1_000_000": 0, "10 M": 0,
	} {
		got, err := parseQuantity(s)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %d, %v, want %d", s, got, err, want)
		}
	}
}

// Plugins of CNI 1.1 say themselves whether they are ready.
func TestReadyAsksThePlugins(t *testing.T) {
	w := newWorld(t)
	told := filepath.Join(w.dir, "told")
	const refuses = `
[ "$CNI_COMMAND" = STATUS ] || exit 9
echo '{"cniVersion": "1.1.0", "code": 50, "msg": "no route reflector", "details": "ask the one on call"}'
exit 1
`
	for name, c := range map[string]struct{ version, script, want string }{
		"ready":      {"1.1.0", `[ "$CNI_COMMAND" = STATUS ] && cat >` + told, ""},
		"not ready":  {"1.1.0", refuses, "no route reflector; ask the one on call"},
		"cannot say": {"1.0.0", refuses, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w.script("status", c.script)
			w.write("10.conflist", `{"cniVersion": "`+c.version+`", "name": "asked", "plugins": [{"type": "status"}]}`)
			err := w.Ready(t.Context())
			if c.want == "" && err != nil {
				t.Error(err)
			}
			if c.want != "" && (!errors.Is(err, ErrNoNetwork) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if _, err := w.Config(); err != nil {
				t.Errorf("a pod may be tried anyway: %v", err)
			}
		})
	}
	if b, err := os.ReadFile(told); err != nil || !strings.Contains(string(b), `"name":"asked"`) {
		t.Errorf("the plugin was told %s, %v", b, err)
	}
}

// A plugin that hangs costs the one who asks, and no longer than allowed.
func TestReadyEndsAHangingPlugin(t *testing.T) {
	w := newWorld(t)
	gate := filepath.Join(w.dir, "gate")
	check(t, unix.Mkfifo(gate, 0o600))
	w.script("status", "echo >"+gate+"; exec sleep 1000")
	w.write("10.conflist", `{"cniVersion": "1.1.0", "name": "hangs", "plugins": [{"type": "status"}]}`)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Ready(ctx) }()
	if _, err := os.ReadFile(gate); err != nil { // it runs
		t.Fatal(err)
	}
	if _, err := w.Config(); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || !errors.Is(err, ErrNoNetwork) {
		t.Errorf("got %v", err)
	}
}
