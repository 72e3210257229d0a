package cluster

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

// A pod that works all the time, has written 5 MiB and holds 8 MiB more in memory.
const figuresManifest = `
apiVersion: v1
kind: Pod
metadata: {name: busy}
spec:
  volumes: [{name: memory, emptyDir: {medium: Memory}}]
  containers:
  - name: main
    image: IMAGE
    command:
    - sh
    - -c
    - |
      trap 'exit 0' TERM
      dd if=/dev/zero of=/written bs=1M count=5 && dd if=/dev/zero of=/memory/x bs=1M count=8
      testbox echo 8080 &
      while :; do i=0; while [ $i -lt 10000 ]; do i=$((i+1)); done; sleep 0.5; done
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
    volumeMounts: [{name: memory, mountPath: /memory}]
`

// proxied is the path of what the kubelet serves, through the API server.
const proxied = "/api/v1/nodes/" + machine.NodeName + "/proxy"

// checkFigures looks at the figures of a pod in all places where there are some.
func checkFigures(c *cluster) {
	c.ready("busy")
	var before *figures
	c.untilDone("the summary has all figures of the pod", func() (err error) {
		if before, err = c.summary(); err == nil {
			err = before.plausible()
		}
		return err
	})
	c.untilDone("they grow with its work", func() error { return c.grows(before) })
	const main, eth0, none = `container="main"`, `interface="eth0"`, ""
	c.checkMetrics("/metrics/cadvisor", []metric{
		{"container_cpu_usage_seconds_total", main, 0.01},
		{"container_memory_working_set_bytes", main, 8 << 20},
		{"container_memory_usage_bytes", main, 8 << 20},
		{"container_fs_usage_bytes", main, 5 << 20},
		{"container_processes", main, 2},
		{"container_network_receive_bytes_total", eth0, 100},
		{"container_network_transmit_bytes_total", eth0, 100},
	})
	c.checkMetrics("/metrics/resource", []metric{
		{"container_cpu_usage_seconds_total", main, 0.01},
		{"container_memory_working_set_bytes", main, 8 << 20},
		{"pod_cpu_usage_seconds_total", none, 0.01},
		{"pod_memory_working_set_bytes", none, 8 << 20},
	})
	c.checkTop()
}

// figures is what the test looks at of a pod in /stats/summary.
type figures struct {
	PodRef  struct{ Name string }
	CPU     struct{ UsageCoreNanoSeconds uint64 }
	Memory  struct{ WorkingSetBytes uint64 }
	Network struct { // the one that is not among further interfaces
		Name             string
		RxBytes, TxBytes uint64
	}
	Storage struct {
		UsedBytes uint64
	} `json:"ephemeral-storage"`
	Processes struct {
		Count uint64 `json:"process_count"`
	} `json:"process_stats"`
	Containers []struct {
		CPU    struct{ UsageCoreNanoSeconds uint64 }
		Memory struct{ WorkingSetBytes uint64 }
		Rootfs struct{ UsedBytes uint64 }
	}
}

// summary has the figures of the pod busy.
func (c *cluster) summary() (*figures, error) {
	var s struct{ Pods []figures }
	if err := c.get(proxied+"/stats/summary", &s); err != nil {
		return nil, err
	}
	for _, p := range s.Pods {
		if p.PodRef.Name == "busy" {
			return &p, nil
		}
	}
	return nil, fmt.Errorf("the pod is not in the summary")
}

// plausible says what can't be true.
func (f *figures) plausible() error {
	if len(f.Containers) != 1 || f.Network.Name != "eth0" {
		return fmt.Errorf("%d containers, the interface %q", len(f.Containers), f.Network.Name)
	}
	c, net := f.Containers[0], f.Network
	for _, v := range []struct {
		name           string
		is, from, upto uint64
	}{
		{"cpu of the container", c.CPU.UsageCoreNanoSeconds, 1e6, f.CPU.UsageCoreNanoSeconds + 1e9},
		{"memory of the container", c.Memory.WorkingSetBytes, 8 << 20, 200 << 20},
		{"memory of the pod", f.Memory.WorkingSetBytes, c.Memory.WorkingSetBytes / 2, 200 << 20},
		{"writable layer", c.Rootfs.UsedBytes, 5 << 20, 6 << 20},
		{"ephemeral storage", f.Storage.UsedBytes, 5 << 20, 14 << 20},
		{"received", net.RxBytes, 100, 1 << 30},
		{"sent", net.TxBytes, 100, 1 << 30},
		{"processes", f.Processes.Count, 2, 20},
	} {
		if v.is < v.from || v.is > v.upto {
			return fmt.Errorf("%s: %d, want %d to %d", v.name, v.is, v.from, v.upto)
		}
	}
	return nil
}

// grows says what the pod has not more of than before.
func (c *cluster) grows(before *figures) error {
	now, err := c.summary()
	if err == nil {
		err = now.plausible()
	}
	if err != nil {
		return err
	}
	was, is := before.CPU.UsageCoreNanoSeconds, now.CPU.UsageCoreNanoSeconds
	if is <= was {
		return fmt.Errorf("cpu was %d and is %d", was, is)
	}
	was, is = before.Network.RxBytes, now.Network.RxBytes
	if is <= was {
		return fmt.Errorf("%d bytes were received, and are now %d", was, is)
	}
	return nil
}

// metric is one with a label, and the least value that is plausible.
type metric struct {
	name, label string
	least       float64
}

// checkMetrics waits until all these metrics of the pod busy have plausible values.
func (c *cluster) checkMetrics(path string, want []metric) {
	c.t.Helper()
	pod := fmt.Sprintf(`namespace=%q,pod="busy"`, c.space)
	c.untilDone(path+" has all figures", func() error {
		b, err := c.read(proxied + path)
		if err != nil {
			return err
		}
		for _, m := range want {
			if v := value(string(b), m.name, m.label, pod); v < m.least {
				return fmt.Errorf("%s with %s is %v, want at least %v", m.name, m.label, v, m.least)
			}
		}
		return nil
	})
}

// value is that of the first line of a metric with these labels, -1 if there is none.
func value(text, name string, labels ...string) float64 {
	for line := range strings.Lines(text) {
		begin, rest, _ := strings.Cut(line, "} ")
		missing := func(label string) bool { return !strings.Contains(begin, label) }
		if !strings.HasPrefix(begin, name+"{") || slices.ContainsFunc(labels, missing) {
			continue
		}
		number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		if v, err := strconv.ParseFloat(number, 64); err == nil {
			return v
		}
	}
	return -1
}

// A metrics server needs the figures of the kubelet. It serves a part of the API.
const metricsManifest = `
apiVersion: v1
kind: Service
metadata: {name: metrics, namespace: kube-system}
spec: {ports: [{port: 443, targetPort: 4443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: metrics, namespace: kube-system, labels: {kubernetes.io/service-name: metrics}}
addressType: IPv4
ports: [{port: 4443}]
endpoints: [{addresses: [ADDRESS]}]
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  service: {name: metrics, namespace: kube-system}
  group: metrics.k8s.io
  version: v1beta1
  insecureSkipTLSVerify: true
  groupPriorityMinimum: 100
  versionPriority: 100
`

// startMetrics starts the metrics server. It is ready when it has figures of the node.
func (c *cluster) startMetrics() {
	c.t.Helper()
	c.space = "kube-system"
	manifests := strings.ReplaceAll(metricsManifest, "ADDRESS", machine.NodeIP)
	if r := c.run(manifests, "apply", "-f", "-"); r.code != 0 {
		c.t.Fatalf("kubectl apply: %s", r.errs)
	}
	c.start("metrics-server", func() bool { return c.healthy("https://" + machine.NodeIP + ":4443/livez") })
}

// top is a line of kubectl top: NAME, cpu in thousandths, memory in MiB.
var top = regexp.MustCompile(`(?m)^(\S+)\s+(\d+)m\s+(?:\d+%\s+)?(\d+)Mi`)

func (c *cluster) checkTop() {
	c.t.Helper()
	for object, name := range map[string]string{"pods": "busy", "nodes": machine.NodeName} {
		var r result
		c.untilDone("top has figures of "+name, func() error {
			r = c.once("", "top", object)
			found := top.FindStringSubmatch(r.out)
			if found == nil || found[1] != name {
				return fmt.Errorf("%+v", r)
			}
			cpu, _ := strconv.Atoi(found[2])
			memory, _ := strconv.Atoi(found[3])
			if cpu <= 0 || memory < 8 {
				return fmt.Errorf("too little: %s", r.out)
			}
			return nil
		})
		c.t.Logf("kubectl top %s:\n%s", object, r.out)
	}
}
