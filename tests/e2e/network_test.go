package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// A pod serves a page, on its own address and on a port of the host. Both live
// on when the daemon is gone, and end with the pod.
func TestPodNetwork(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	port := harness.FreePort(t)
	pod := n.RunPod("web", func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{Protocol: cri.Protocol_TCP, HostPort: int32(port), ContainerPort: 80}}
		c.DnsConfig = &cri.DNSConfig{Servers: []string{"10.9.8.7"}, Searches: []string{"test.local"},
			Options: []string{"ndots:5"}}
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "20000 30000"}
	})
	c := pod.Run("web", []string{"httpd", "-f", "-p", "80", "-h", "/etc"})
	ip := pod.Status().GetNetwork().GetIp()
	if a, err := netip.ParseAddr(ip); err != nil || !netip.MustParsePrefix(n.Subnet).Contains(a) {
		t.Errorf("the pod's address is %q, want one of %s", ip, n.Subnet)
	}
	served := func(address string) func() bool {
		return func() bool {
			client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
			r, err := client.Get("http://" + address + "/passwd")
			if err != nil {
				return false
			}
			defer r.Body.Close()
			b, _ := io.ReadAll(r.Body)
			return strings.Contains(string(b), "nobody")
		}
	}
	direct, mapped := net.JoinHostPort(ip, "80"), fmt.Sprintf("127.0.0.1:%d", port)
	harness.Eventually(t, patience, "the page is served on the pod's address", served(direct))
	harness.Eventually(t, patience, "the page is served on the host's port", served(mapped))
	n.Kill()
	harness.Eventually(t, patience, "the page is served when the daemon is gone",
		func() bool { return served(direct)() && served(mapped)() })
	n.Start()
	if after := pod.Status().GetNetwork().GetIp(); after != ip {
		t.Errorf("the pod had the address %s, and has %s after the restart", ip, after)
	}
	resolv := c.Output("cat", "/etc/resolv.conf")
	for _, want := range []string{"nameserver 10.9.8.7", "search test.local", "options ndots:5"} {
		if !strings.Contains(resolv, want) {
			t.Errorf("resolv.conf lacks %q:\n%s", want, resolv)
		}
	}
	out := c.Output("cat", "/proc/sys/net/ipv4/ip_local_port_range")
	if strings.Join(strings.Fields(out), " ") != "20000 30000" {
		t.Errorf("the sysctl is %q", out)
	}
	if hosts := c.Output("cat", "/etc/hosts"); !strings.Contains(hosts, "localhost") {
		t.Errorf("/etc/hosts is %q", hosts)
	}

	// Another pod reaches it, and both have addresses of their own.
	letThrough(t, n.Bridge)
	other := n.RunPod("client")
	if o := other.Status().GetNetwork().GetIp(); o == ip || o == "" {
		t.Errorf("the pods have the addresses %s and %s", ip, o)
	}
	w := other.Run("wget", []string{"wget", "-q", "-O", "-", "http://" + direct + "/group"})
	if code := w.WaitExited(patience).ExitCode; code != 0 {
		t.Errorf("wget in another pod exits with %d", code)
	}

	n.RemoveAllPods()
	if served(mapped)() {
		t.Error("the host's port still answers when the pod is gone")
	}
	n.CheckClean()
}

// letThrough has the machine forward what goes from pod to pod, where it drops
// that: Docker sets the policy, and no plugin of the test's network undoes it.
func letThrough(t *testing.T, bridge string) {
	t.Helper()
	policy, err := exec.Command("iptables", "-w", "-S", "FORWARD").Output()
	if err != nil || !strings.HasPrefix(string(policy), "-P FORWARD DROP") {
		return
	}
	rule := []string{"FORWARD", "-i", bridge, "-o", bridge, "-j", "ACCEPT"}
	if out, err := exec.Command("iptables", append([]string{"-w", "-I"}, rule...)...).CombinedOutput(); err != nil {
		t.Fatalf("iptables: %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("iptables", append([]string{"-w", "-D"}, rule...)...).Run() })
}

// A stopped pod has given its network back, and stays so after a restart.
func TestStoppedPod(t *testing.T) {
	t.Parallel()
	n := harness.New(t)
	pod := n.RunPod("stopped")
	c := pod.Run("c", []string{"sleep", "1000"})
	for range 2 {
		ctx, cancel := harness.Deadline()
		if _, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.ID}); err != nil {
			t.Fatal(err)
		}
		cancel()
		if s := pod.Status(); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("a stopped pod is %s", s.State)
		}
		if s := c.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 && s.ExitCode != 143 {
			t.Errorf("the container of a stopped pod is %s with code %d", s.State, s.ExitCode)
		}
		for _, what := range n.Leftovers() {
			if strings.HasPrefix(what, "lease") || strings.HasPrefix(what, "veth") || strings.HasPrefix(what, "netns") {
				t.Errorf("a stopped pod still has %s", what)
			}
		}
		n.Restart()
	}
	pod.Remove()
	n.CheckClean()
}
