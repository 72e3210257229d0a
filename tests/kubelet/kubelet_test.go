package kubelet

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

const (
	nodeName  = machine.NodeName
	nodeIP    = machine.NodeIP
	patience  = machine.Patience
	namespace = "default"
	server    = "127.0.0.1:10250"
)

// kubelet is a kubelet that runs, and the node that it runs on.
type kubelet struct {
	t           *testing.T
	n           *harness.Node
	client      *http.Client
	killing     bool // the runtime is killed again and again, until stopKilling
	stopKilling func()
	process     *machine.Process // nil while it is stopped
}

// with is the same kubelet, reporting to another test.
func (k *kubelet) with(t *testing.T) *kubelet {
	c := *k
	c.t, c.n = t, k.n.With(t)
	return &c
}

// startKubelet starts a kubelet on a node. It ends with the test.
func startKubelet(t *testing.T, n *harness.Node, gates ...string) *kubelet {
	t.Helper()
	k := &kubelet{
		t:      t,
		n:      n,
		client: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}},
	}
	for _, dir := range []string{"manifests", "kubelet", "marks"} {
		if err := os.Mkdir(n.Path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	files := map[string]string{"resolv.conf": "nameserver 192.0.2.1\n", "kubelet.yaml": k.config(gates)}
	for name, content := range files {
		if err := os.WriteFile(n.Path(name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { machine.RemoveCgroups(n) })
	t.Cleanup(func() { k.stop(); machine.ShowLog(t, k.log()) })
	k.start()
	return k
}

// config is the kubelet's configuration.
func (k *kubelet) config(gates []string) string {
	return machine.KubeletConfig(k.n, fmt.Sprintf(`staticPodPath: %s
resolvConf: %s
address: 127.0.0.1
fileCheckFrequency: 1s
containerLogMaxSize: 200Ki
containerLogMaxFiles: 1000
containerLogMonitorInterval: 3s
`, k.n.Path("manifests"), k.n.Path("resolv.conf")), gates...)
}

func (k *kubelet) start() {
	k.t.Helper()
	err := machine.MakeCgroups(k.n)
	if err == nil {
		k.process, err = machine.Start(k.log(), machine.Program(), "--config", k.n.Path("kubelet.yaml"),
			"--root-dir", k.n.Path("kubelet"), "--hostname-override", nodeName, "--node-ip", nodeIP)
	}
	if err != nil {
		k.t.Fatal(err)
	}
	k.process.Await(k.t, "the kubelet serves", func() bool {
		_, err := k.get("/healthz")
		return err == nil
	})
}

func (k *kubelet) log() string { return k.n.Path("kubelet.log") }

// stop ends the kubelet.
func (k *kubelet) stop() {
	k.t.Helper()
	if k.process == nil {
		return
	}
	if err := k.process.Stop(); err != nil {
		k.t.Error(err)
	}
	k.process = nil
}

// get is what the kubelet answers to a request for a path.
func (k *kubelet) get(path string) ([]byte, error) {
	resp, err := k.client.Get("https://" + server + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, b)
	}
	return b, err
}

// pod is the pod as the kubelet sees it, nil if it sees none.
func (k *kubelet) pod(name string) *core.Pod {
	k.t.Helper()
	b, err := k.get("/pods")
	if err != nil {
		k.t.Fatalf("cannot list the pods: %v", err)
	}
	var list core.PodList
	if err := json.Unmarshal(b, &list); err != nil {
		k.t.Fatalf("cannot read the list of pods: %v", err)
	}
	for i := range list.Items {
		if list.Items[i].Name == podName(name) {
			return &list.Items[i]
		}
	}
	return nil
}

// podName is what the kubelet calls a static pod.
func podName(name string) string { return name + "-" + nodeName }

// until waits until a pod is as it has to be, and gives it. A pod that never is so
// is shown.
func (k *kubelet) until(name, what string, f func(*core.Pod) bool) *core.Pod {
	k.t.Helper()
	var p *core.Pod
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * harness.Tick) {
		if p = k.pod(name); p != nil && f(p) {
			return p
		}
		if time.Now().After(deadline) {
			var status any
			if p != nil {
				status = p.Status
			}
			b, _ := json.Marshal(status)
			k.t.Fatalf("after %s still not so: %s. The status of the pod is %s", patience, what, b)
		}
	}
}

// ready waits until all containers of a pod are ready.
func (k *kubelet) ready(name string) *core.Pod {
	k.t.Helper()
	return k.until(name, name+" is ready", func(p *core.Pod) bool {
		for _, c := range p.Status.Conditions {
			if c.Type == core.PodReady {
				return c.Status == core.ConditionTrue
			}
		}
		return false
	})
}

// startedAgain waits until the container main of a pod has been started again: once,
// but for starts that the runtime's death has made fail.
func (k *kubelet) startedAgain(name string) *core.Pod {
	k.t.Helper()
	return k.until(name, name+" was started again", func(p *core.Pod) bool {
		c := container(p, "main")
		return c.State.Running != nil && (c.RestartCount == 1 || c.RestartCount > 1 && k.killing)
	})
}

// container is the status of a container of any kind.
func container(p *core.Pod, name string) core.ContainerStatus {
	for _, all := range [][]core.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses} {
		for _, c := range all {
			if c.Name == name {
				return c
			}
		}
	}
	return core.ContainerStatus{}
}

// exited waits until a container has ended for good.
func (k *kubelet) exited(pod, name string) *core.ContainerStateTerminated {
	k.t.Helper()
	p := k.until(pod, name+" of "+pod+" has ended", func(p *core.Pod) bool {
		return container(p, name).State.Terminated != nil
	})
	return container(p, name).State.Terminated
}

// wantEnd fails unless a container has ended so.
func wantEnd(t *testing.T, end *core.ContainerStateTerminated, code int32, reason string) {
	t.Helper()
	switch {
	case end == nil:
		t.Errorf("it has not ended, want %d %s", code, reason)
	case end.ExitCode != code || end.Reason != reason:
		t.Errorf("it ended with %d %s (%s), want %d %s", end.ExitCode, end.Reason, end.Message, code, reason)
	case end.StartedAt.IsZero() || end.FinishedAt.Before(&end.StartedAt):
		t.Errorf("it started at %v and ended at %v", end.StartedAt, end.FinishedAt)
	}
}

// logs is what a container has written, as the kubelet serves it.
func (k *kubelet) logs(pod, name string) string {
	k.t.Helper()
	b, err := k.get("/containerLogs/" + namespace + "/" + podName(pod) + "/" + name)
	if err != nil {
		k.t.Fatalf("cannot get the log of %s: %v", name, err)
	}
	return string(b)
}

// logged waits until a container has written a text.
func (k *kubelet) logged(pod, name, text string) {
	k.t.Helper()
	path := "/containerLogs/" + namespace + "/" + podName(pod) + "/" + name
	harness.Eventually(k.t, patience, fmt.Sprintf("%s of %s has written %q", name, pod, text), func() bool {
		b, err := k.get(path)
		return err == nil && strings.Contains(string(b), text)
	})
}

// mark is what containers have written to a file of /marks.
func (k *kubelet) mark(name string) string {
	b, err := os.ReadFile(filepath.Join(k.n.Path("marks"), name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		k.t.Fatal(err)
	}
	return string(b)
}

// apply gives the kubelet the manifest of a static pod.
func (k *kubelet) apply(name, spec string) {
	k.t.Helper()
	spec = strings.NewReplacer("IMAGE", harness.Image, "MARKS", k.n.Path("marks")).Replace(spec)
	if !strings.Contains(spec, "GracePeriod") {
		spec = "  terminationGracePeriodSeconds: 1\n" + spec
	}
	manifest := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: %s}}\nspec:\n"+
		"  dnsPolicy: Default\n%s", name, name, spec)
	// The kubelet leaves out files with such a name, so it never reads half of one.
	hidden := filepath.Join(k.n.Path("manifests"), "."+name)
	if err := os.WriteFile(hidden, []byte(manifest), 0o644); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Rename(hidden, filepath.Join(k.n.Path("manifests"), name+".yaml")); err != nil {
		k.t.Fatal(err)
	}
}

// remove takes the manifest away.
func (k *kubelet) remove(name string) {
	k.t.Helper()
	if err := os.Remove(filepath.Join(k.n.Path("manifests"), name+".yaml")); err != nil {
		k.t.Fatal(err)
	}
}

// finish takes all manifests away, waits until the kubelet has stopped all pods and
// ends it. Nothing may be left of them.
func (k *kubelet) finish() {
	k.t.Helper()
	manifests, err := filepath.Glob(k.n.Path("manifests") + "/*.yaml")
	if err != nil {
		k.t.Fatal(err)
	}
	for _, path := range manifests {
		if err := os.Remove(path); err != nil {
			k.t.Fatal(err)
		}
	}
	harness.Eventually(k.t, patience, "all pods are stopped, and their directories gone", func() bool {
		dirs, _ := os.ReadDir(k.n.Path("kubelet/pods"))
		return len(dirs) == 0 && !slices.ContainsFunc(k.sandboxes(), func(s *cri.PodSandbox) bool {
			return s.State == cri.PodSandboxState_SANDBOX_READY
		})
	})
	k.stop()
	k.n.RemoveAllPods()
	machine.RemoveCgroups(k.n)
	if k.killing { // a token whose request died with the runtime stays until a later one finds it expired
		if err := os.RemoveAll(filepath.Join(k.n.State, "stream/tokens")); err != nil {
			k.t.Error(err)
		}
	}
	k.n.CheckClean()
}

// sandboxes are those of the runtime, dead or alive.
func (k *kubelet) sandboxes() []*cri.PodSandbox {
	k.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * harness.Tick) {
		ctx, cancel := harness.Deadline()
		r, err := k.n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
		cancel()
		if err == nil {
			return r.Items
		}
		if !k.killing || time.Now().After(deadline) {
			k.t.Fatalf("ListPodSandbox: %v", err)
		}
	}
}

// complaints are the warnings and errors of the kubelet, without their times.
func (k *kubelet) complaints() []string {
	k.t.Helper()
	lines, err := machine.Complaints(k.log())
	if err != nil {
		k.t.Fatal(err)
	}
	return lines
}
