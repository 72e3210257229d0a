package kubelet

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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
