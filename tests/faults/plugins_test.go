package faults

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// insane is the last plugin of the chain. The file "mode" beside it has the verb at
// which it misbehaves, and how. At all others it passes on what it was given.
const insane = `#!/bin/sh
read verb how <"${0%/*}/mode"
if [ "$CNI_COMMAND" = "$verb" ]; then
	case $how in
	hang) echo $$ >>"${0%/*}/hangs"; exec sleep 100000 ;;
	deaf) echo $$ >>"${0%/*}/hangs"; trap '' TERM HUP INT; while :; do sleep 1; done ;;
	killed) kill -9 $$ ;;
	fail) exit 1 ;;
	words) head -c 3000000 /dev/zero | tr '\0' x >&2; exit 1 ;;
	error) echo '{"cniVersion": "1.1.0", "code": 100, "msg": "on purpose", "details": "x"}'; exit 1 ;;
	lie) echo '{"cniVersion": "1.1.0", "code": 100, "msg": "on purpose"}'; exit 0 ;;
	empty) exit 0 ;;
	endless) head -c 200000000 /dev/zero | tr '\0' '[' ; exit 0 ;;
	json) echo '{"cniVersion": "1.1.0", "ips": [' ; exit 0 ;;
	list) echo '[1, 2]'; exit 0 ;;
	noips) echo '{"cniVersion": "1.1.0", "ips": []}'; exit 0 ;;
	address) echo '{"cniVersion": "1.1.0", "ips": [{"address": "banana/300"}]}'; exit 0 ;;
	version) echo '{"cniVersion": "9.9.9", "ips": [{"address": "10.0.0.1/8"}]}'; exit 0 ;;
	controls)
		printf '{"cniVersion": "1.1.0", "code": 100, "msg": "\\u0000\\u001b[2J%s"}' "$(head -c 5000 /dev/zero | tr '\0' y)"
		exit 1 ;;
	esac
fi
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "1.1.0", "supportedVersions": ["0.4.0", "1.0.0", "1.1.0"]}' ;;
ADD) exec "${CNI_PATH%%:*}/portmap" ;;
esac
exit 0
`

// insaneNode is a node with that plugin.
type insaneNode struct {
	*harness.Node
	*harness.Tally
}

func newInsane(t *testing.T, name string) *insaneNode {
	n := harness.New(t, harness.Options{Plugins: map[string]string{"insane": insane}})
	i := &insaneNode{n, harness.Drill(t, name)}
	i.set(t, "none", "none")
	conf := n.Path("net.d/10-test.conflist")
	b, err := os.ReadFile(conf)
	check(t, err)
	check(t, os.WriteFile(conf, []byte(strings.Replace(string(b), "1.0.0", "1.1.0", 1)), 0o600))
	return i
}

func (n *insaneNode) set(t *testing.T, verb, how string) {
	t.Helper()
	check(t, os.WriteFile(n.Path("plugins/mode"), []byte(verb+" "+how+"\n"), 0o600))
}

// release ends plugins that hang, which the daemon does after some minutes. The full
// length waits for it.
func (n *insaneNode) release(t *testing.T) {
	t.Helper()
	n.set(t, "none", "none")
	b, _ := os.ReadFile(n.Path("plugins/hangs")) // none: none does
	for _, word := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(word)
		check(t, err)
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		ours := strings.Contains(string(cmdline), "sleep\x00100000") || strings.Contains(string(cmdline), n.Dir)
		if ours && !harness.Full {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// run runs a pod of that network, for so long at most.
func (n *insaneNode) run(limit time.Duration, name string) (*harness.Pod, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	p := &harness.Pod{N: n.Node, Config: n.PodConfig(name)}
	r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.Config})
	p.ID = r.GetPodSandboxId()
	return p, err
}

// wantShort fails unless an error can be shown to a person.
func wantShort(t *testing.T, err error) {
	t.Helper()
	if err != nil && len(err.Error()) > 8<<10 {
		t.Errorf("the error has %d bytes: %.300s", len(err.Error()), err)
	}
}

// Ways of ADD and DEL; those that hang take the time that the call is given.
var (
	hangs    = []string{"hang", "deaf"}
	failures = []string{"killed", "fail", "words", "error", "controls"}
	nonsense = []string{"lie", "empty", "endless", "json", "list", "noips", "address", "version"}
)

// A plugin hangs, is killed, fails, or answers nonsense when a pod is added: there is no
// pod, an error that can be read, and nothing left. A pod without that network does not
// notice.
func TestPluginsAtADD(t *testing.T) {
	t.Parallel()
	n := newInsane(t, "plugins, ADD")
	for _, how := range append(append(hangs, failures...), nonsense...) {
		t.Run(how, func(t *testing.T) {
			n.set(t, "ADD", how)
			n.Kills(1)
			limit := time.Minute
			if how == "hang" || how == "deaf" {
				limit = 2 * time.Second
			}
			pod, err := n.run(limit, "insane")
			if err == nil {
				t.Errorf("there is a pod %s", pod.ID)
			}
			wantShort(t, err)
			t.Logf("%.300v", err)
			n.With(t).RunPod("host", hostNetwork).Remove()
			n.release(t)
			wantClean(t, n.Tally, n.With(t))
		})
	}
	n.set(t, "none", "none")
	pod, err := n.run(time.Minute, "insane")
	check(t, err)
	if pod.Status().GetNetwork().GetIp() == "" {
		t.Error("the pod has no address")
	}
}

// The same when a pod is stopped: what the plugin holds stays a debt until it is paid, and
// the pod's containers are killed in any case.
func TestPluginsAtDEL(t *testing.T) {
	t.Parallel()
	n := newInsane(t, "plugins, DEL")
	for i, how := range append(hangs, failures...) {
		t.Run(how, func(t *testing.T) {
			n := &insaneNode{n.With(t), n.Tally}
			n.set(t, "none", "none")
			pod, err := n.run(time.Minute, fmt.Sprint("del-", i))
			check(t, err)
			c := pod.Run("c", []string{"sleep", "1000"})
			pid := c.Info().PID
			n.set(t, "DEL", how)
			n.Kills(1)
			stop := func(limit time.Duration) error {
				ctx, cancel := context.WithTimeout(context.Background(), limit)
				defer cancel()
				_, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.ID})
				return err
			}
			// A slow machine may need another try until the container is killed.
			harness.Eventually(t, patience, "the container is killed", func() bool {
				err = stop(3 * time.Second)
				return err == nil || !harness.IsProcess(pid)
			})
			if err == nil {
				t.Error("the pod was stopped, and its plugin has given nothing back")
			}
			wantShort(t, err)
			n.Restart()
			if s := pod.Status(); s.State == cri.PodSandboxState_SANDBOX_READY {
				n.Lost(harness.Statuses, "the pod is ready again")
			}
			n.release(t)
			harness.Eventually(t, patience, "the plugin's debt is paid",
				func() bool { return stop(time.Minute) == nil })
			pod.Remove()
			wantClean(t, n.Tally, n.Node)
		})
	}
}

// The same when plugins are asked whether they are ready: Status answers, with the reason.
func TestPluginsAtSTATUS(t *testing.T) {
	t.Parallel()
	n := newInsane(t, "plugins, STATUS")
	ready := func(t *testing.T) (bool, string) {
		t.Helper()
		ctx, cancel := harness.Deadline()
		defer cancel()
		r, err := n.Runtime.Status(ctx, &cri.StatusRequest{Verbose: true})
		check(t, err)
		for _, c := range r.Status.Conditions {
			if c.Type == "NetworkReady" {
				return c.Status, c.Reason + c.Message
			}
		}
		return false, ""
	}
	for _, how := range append(hangs[:1:1], failures...) {
		n.set(t, "STATUS", how)
		n.Kills(1)
		is, why := ready(t)
		if is || why == "" || len(why) > 8<<10 {
			t.Errorf("%s: the network is ready: %v, %d bytes: %.300s", how, is, len(why), why)
		}
		if !strings.Contains(why, "insane") || strings.ContainsRune(why, '\x1b') {
			t.Errorf("%s: %.300q", how, why)
		}
	}
	n.set(t, "none", "none")
	if is, why := ready(t); !is {
		t.Errorf("the network is not ready: %s", why)
	}
}

// The same when plugins are to give back what belongs to no pod, at the start of a daemon:
// that one serves, and pods have a network.
func TestPluginsAtGC(t *testing.T) {
	t.Parallel()
	n := newInsane(t, "plugins, GC")
	b, err := os.ReadFile(n.Path("config.toml"))
	check(t, err)
	config := strings.Replace(string(b), "[cni]\n", "[cni]\ngc = true\n", 1)
	check(t, os.WriteFile(n.Path("config.toml"), []byte(config), 0o600))
	stays, err := n.run(time.Minute, "stays")
	check(t, err)
	ways := failures
	if harness.Full {
		ways = append(ways[:len(ways):len(ways)], hangs...) // the first pods wait for half a minute
	}
	for i, how := range ways {
		n.set(t, "GC", how)
		n.Kills(1)
		n.Restart()
		n.RunPod("host", hostNetwork).Remove()
		pod, err := n.run(time.Minute, fmt.Sprint("gc-", i))
		if err != nil {
			t.Fatalf("%s: no pod gets a network: %v", how, err)
		}
		pod.Remove()
	}
	if s := stays.Status(); s.State != cri.PodSandboxState_SANDBOX_READY || s.GetNetwork().GetIp() == "" {
		n.Lost(harness.Statuses, "the pod is %v", s)
	}
	stays.Remove()
	n.set(t, "none", "none")
	n.Restart() // what the last one has left undone
	wantClean(t, n.Tally, n.Node)
}
