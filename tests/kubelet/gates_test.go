package kubelet

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	core "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

const statsGate = "PodAndContainerStatsFromCRI"

// call makes a call of the runtime, to see whether there is one.
type call func(context.Context, cri.RuntimeServiceClient) error

// gates are features of the kubelet, each with the calls of the runtime that it needs.
var gates = []struct {
	names []string
	calls []call
}{
	{names: []string{statsGate}, calls: []call{containerStats, podStats, podMetrics, descriptors}},
	{names: []string{"EventedPLEG", "PLEGOnDemandRelist"}, calls: []call{events}},
	{names: []string{"CRIListStreaming"}, calls: []call{streamPods, streamContainers}},
}

// hasCall says whether the runtime has a call. What else it answers is no matter.
func hasCall(n *harness.Node, c call) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second) // some streams have no end
	defer cancel()
	return status.Code(c(ctx, n.Runtime)) != codes.Unimplemented
}

func containerStats(ctx context.Context, r cri.RuntimeServiceClient) error {
	_, err := r.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
	return err
}

// The kubelet asks the same way.
func podStats(ctx context.Context, r cri.RuntimeServiceClient) error {
	_, err := r.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{})
	return err
}

func podMetrics(ctx context.Context, r cri.RuntimeServiceClient) error {
	_, err := r.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
	return err
}

func descriptors(ctx context.Context, r cri.RuntimeServiceClient) error {
	_, err := r.ListMetricDescriptors(ctx, &cri.ListMetricDescriptorsRequest{})
	return err
}

func events(ctx context.Context, r cri.RuntimeServiceClient) error {
	return first(r.GetContainerEvents(ctx, &cri.GetEventsRequest{}))
}

func streamPods(ctx context.Context, r cri.RuntimeServiceClient) error {
	return first(r.StreamPodSandboxes(ctx, &cri.StreamPodSandboxesRequest{}))
}

func streamContainers(ctx context.Context, r cri.RuntimeServiceClient) error {
	return first(r.StreamContainers(ctx, &cri.StreamContainersRequest{}))
}

// first waits for the first message of a stream.
func first[T any](s grpc.ServerStreamingClient[T], err error) error {
	if err == nil {
		_, err = s.Recv()
	}
	return err
}

// summary is what the test looks at of /stats/summary.
type summary struct {
	Pods []struct {
		PodRef     struct{ Name string }
		CPU        struct{ UsageCoreNanoSeconds uint64 }
		Memory     struct{ WorkingSetBytes uint64 }
		Network    struct{ RxBytes uint64 }
		Containers []struct {
			Name   string
			CPU    struct{ UsageCoreNanoSeconds uint64 }
			Memory struct{ WorkingSetBytes uint64 }
			Rootfs struct{ UsedBytes uint64 }
		}
	}
}

// checkFigures looks at the figures of one pod, in both places where there are some.
func (k *kubelet) checkFigures() {
	k.t.Helper()
	const pod = "probes"
	k.until(pod, "the summary has all figures of "+pod, func(*core.Pod) bool {
		b, err := k.get("/stats/summary")
		var s summary
		if err != nil || json.Unmarshal(b, &s) != nil {
			return false
		}
		for _, p := range s.Pods {
			if p.PodRef.Name != podName(pod) || len(p.Containers) != 3 {
				continue
			}
			ok := p.CPU.UsageCoreNanoSeconds > 0 && p.Memory.WorkingSetBytes > 0 && p.Network.RxBytes > 0
			for _, c := range p.Containers {
				ok = ok && c.CPU.UsageCoreNanoSeconds > 0 && c.Memory.WorkingSetBytes > 0 && c.Rootfs.UsedBytes > 0
			}
			return ok
		}
		return false
	})
	b, err := k.get("/metrics/cadvisor")
	if err != nil {
		k.t.Errorf("cannot get the metrics: %v", err)
	}
	for _, name := range []string{"container_cpu_usage_seconds_total", "container_memory_working_set_bytes",
		"container_network_receive_bytes_total", "container_fs_usage_bytes"} {
		found := false
		for line := range strings.Lines(string(b)) {
			found = found || strings.HasPrefix(line, name+"{") && strings.Contains(line, `pod="`+podName(pod)+`"`)
		}
		if !found {
			k.t.Errorf("/metrics/cadvisor has no %s of %s", name, pod)
		}
	}
}
