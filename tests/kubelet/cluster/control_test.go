package cluster

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

const (
	apiAddress = "127.0.0.1:6443"
	adminToken = "admin-of-the-tests"
	patience   = machine.Patience
)

// cluster is a cluster of one node.
type cluster struct {
	t       *testing.T
	n       *harness.Node
	client  *http.Client
	space   string // the namespace of the row
	killing bool   // the runtime is killed again and again
	*parts
}

// parts is what all views of a cluster have in common.
type parts struct {
	names        []string // of the processes, in the order of their starts
	processes    map[string]*machine.Process
	seen         *history
	stopWatching func() // ends what notes the history
}

// with is the same cluster, reporting to another test.
func (c *cluster) with(t *testing.T) *cluster {
	d := *c
	d.t, d.n = t, c.n.With(t)
	return &d
}

// startCluster starts all programs of a cluster on a node. They end with the test.
func startCluster(t *testing.T, n *harness.Node) *cluster {
	t.Helper()
	begin := time.Now()
	c := &cluster{
		t:      t,
		n:      n,
		client: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}},
		parts:  &parts{processes: map[string]*machine.Process{}, stopWatching: func() {}},
	}
	if err := c.writeFiles(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { machine.RemoveCgroups(n) })
	t.Cleanup(c.stop)
	c.start("etcd", func() bool { return c.healthy("http://127.0.0.1:2379/health") })
	c.start("kube-apiserver", func() bool { return c.healthy("https://" + apiAddress + "/readyz") })
	c.watch()
	c.start("kube-controller-manager", func() bool { return c.healthy("https://127.0.0.1:10257/healthz") })
	c.start("kube-scheduler", func() bool { return c.healthy("https://127.0.0.1:10259/healthz") })
	if err := machine.MakeCgroups(n); err != nil {
		t.Fatal(err)
	}
	c.start("kubelet", func() bool {
		var node core.Node
		return c.get("/api/v1/nodes/"+machine.NodeName, &node) == nil && isReady(node.Status.Conditions)
	})
	t.Logf("the cluster is up after %v", time.Since(begin).Round(time.Second))
	return c
}

// isReady says whether the conditions of a node have Ready.
func isReady(conditions []core.NodeCondition) bool {
	return slices.ContainsFunc(conditions, func(c core.NodeCondition) bool {
		return c.Type == core.NodeReady && c.Status == core.ConditionTrue
	})
}

// start starts one of the programs and waits until it is ready.
func (c *cluster) start(name string, ready func() bool) {
	c.t.Helper()
	args := append([]string{name}, c.arguments(name)...)
	p, err := machine.Start(c.log(name), machine.Program(), args...)
	if err != nil {
		c.t.Fatalf("cannot start %s: %v", name, err)
	}
	c.names, c.processes[name] = append(c.names, name), p
	p.Await(c.t, name+" is ready", ready)
}

func (c *cluster) log(name string) string { return c.n.Path(name + ".log") }

// stop ends all programs, the last one first.
func (c *cluster) stop() {
	c.t.Helper()
	c.stopWatching()
	for _, name := range slices.Backward(c.names) {
		if p := c.processes[name]; p != nil {
			if err := p.Stop(); err != nil {
				c.t.Error(err)
			}
			machine.ShowLog(c.t, c.log(name))
		}
	}
	c.names = nil
}

// arguments are those of a program.
func (c *cluster) arguments(name string) []string {
	kubeconfig := "--kubeconfig=" + c.n.Path("kubeconfig")
	keys := c.n.Path("keys") + "/"
	switch name {
	case "etcd":
		return []string{"--data-dir=" + c.n.Path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380"}
	case "kube-apiserver":
		return c.apiserverArguments(keys)
	case "kube-controller-manager":
		return []string{kubeconfig, "--leader-elect=false", "--bind-address=127.0.0.1",
			"--root-ca-file=" + keys + "ca.crt", "--service-account-private-key-file=" + keys + "accounts.key"}
	case "kube-scheduler":
		return []string{kubeconfig, "--leader-elect=false", "--bind-address=127.0.0.1"}
	case "kubelet":
		return []string{kubeconfig, "--config=" + c.n.Path("kubelet.yaml"), "--root-dir=" + c.n.Path("kubelet"),
			"--hostname-override=" + machine.NodeName, "--node-ip=" + machine.NodeIP}
	case "metrics-server":
		return []string{kubeconfig, "--authentication-kubeconfig=" + c.n.Path("kubeconfig"),
			"--authorization-kubeconfig=" + c.n.Path("kubeconfig"), "--bind-address=" + machine.NodeIP,
			"--secure-port=4443", "--cert-dir=" + c.n.Path("metrics"), "--kubelet-insecure-tls",
			"--kubelet-preferred-address-types=InternalIP",
			"--metric-resolution=10s", "--kubelet-request-timeout=8s"}
	}
	panic("there is no program " + name)
}

func (c *cluster) apiserverArguments(keys string) []string {
	return []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--bind-address=0.0.0.0",
		"--advertise-address=" + machine.NodeIP,
		"--endpoint-reconciler-type=none",
		"--kubelet-preferred-address-types=InternalIP",
		"--service-cluster-ip-range=10.96.0.0/16",
		"--authorization-mode=RBAC",
		"--allow-privileged",
		"--token-auth-file=" + keys + "tokens",
		"--tls-cert-file=" + keys + "apiserver.crt",
		"--tls-private-key-file=" + keys + "apiserver.key",
		"--client-ca-file=" + keys + "ca.crt",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + keys + "accounts.key",
		"--service-account-signing-key-file=" + keys + "accounts.key",
		"--enable-aggregator-routing", // without kube-proxy, addresses of services lead nowhere
		"--requestheader-client-ca-file=" + keys + "ca.crt",
		"--requestheader-allowed-names=" + frontProxy,
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + keys + frontProxy + ".crt",
		"--proxy-client-key-file=" + keys + frontProxy + ".key",
	}
}

// writeFiles writes what the programs read.
func (c *cluster) writeFiles() error {
	for _, dir := range []string{"keys", "kubelet", "marks", "home", "volumes/a", "volumes/b"} {
		if err := os.MkdirAll(c.n.Path(dir), 0o755); err != nil {
			return err
		}
	}
	files := map[string]string{
		"resolv.conf": "nameserver 192.0.2.1\n",
		"keys/tokens": adminToken + ",admin,1,system:masters\n",
		"kubeconfig": fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://%s", certificate-authority: %q}}]
users: [{name: u, user: {token: %s}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, apiAddress, c.n.Path("keys/ca.crt"), adminToken),
		"kubelet.yaml": machine.KubeletConfig(c.n, fmt.Sprintf(`resolvConf: %s
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
`, c.n.Path("resolv.conf")), "PodAndContainerStatsFromCRI"),
	}
	for name, content := range files {
		if err := os.WriteFile(c.n.Path(name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return makeKeys(c.n.Path("keys"))
}

// request asks something of the API server, or of another address.
func (c *cluster) request(ctx context.Context, address string) (*http.Response, error) {
	if strings.HasPrefix(address, "/") {
		address = "https://" + apiAddress + address
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+adminToken)
	resp, err := c.client.Do(req)
	if err == nil && resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		return nil, fmt.Errorf("%s: %s: %s", address, resp.Status, b)
	}
	return resp, err
}

// read is what the API server, or another address, answers.
func (c *cluster) read(address string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	resp, err := c.request(ctx, address)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

func (c *cluster) healthy(address string) bool {
	_, err := c.read(address)
	return err == nil
}

// get reads an object of the API.
func (c *cluster) get(path string, object any) error {
	b, err := c.read(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, object)
}
