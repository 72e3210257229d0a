package cri

import (
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxPart bounds a message of a streaming list, in bytes, unless a single item is
// larger: far below what any client takes in.
const maxPart = 1 << 20

// StreamPodSandboxes is ListPodSandbox in parts.
func (s *Server) StreamPodSandboxes(r *runtimeapi.StreamPodSandboxesRequest,
	to grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxesResponse]) error {
	return sendParts(s.d.Pods.List(r.GetFilter()), func(part []*runtimeapi.PodSandbox) error {
		return to.Send(&runtimeapi.StreamPodSandboxesResponse{PodSandboxes: part})
	})
}

// StreamContainers is ListContainers in parts.
func (s *Server) StreamContainers(r *runtimeapi.StreamContainersRequest,
	to grpc.ServerStreamingServer[runtimeapi.StreamContainersResponse]) error {
	return sendParts(s.d.Containers.List(r.GetFilter()), func(part []*runtimeapi.Container) error {
		return to.Send(&runtimeapi.StreamContainersResponse{Containers: part})
	})
}

// StreamImages is ListImages in parts.
func (s *Server) StreamImages(r *runtimeapi.StreamImagesRequest,
	to grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	if err := s.d.Runtimes.Check("filter.image", r.GetFilter().GetImage()); err != nil {
		return err
	}
	images := s.d.Images.List(r.GetFilter().GetImage().GetImage())
	return sendParts(images, func(part []*runtimeapi.Image) error {
		return to.Send(&runtimeapi.StreamImagesResponse{Images: part})
	})
}

// StreamContainerStats is ListContainerStats in parts.
func (s *Server) StreamContainerStats(r *runtimeapi.StreamContainerStatsRequest,
	to grpc.ServerStreamingServer[runtimeapi.StreamContainerStatsResponse]) error {
	list, err := s.d.Stats.Containers(to.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return sendParts(list, func(part []*runtimeapi.ContainerStats) error {
		return to.Send(&runtimeapi.StreamContainerStatsResponse{ContainerStats: part})
	})
}

// StreamPodSandboxStats is ListPodSandboxStats in parts.
func (s *Server) StreamPodSandboxStats(r *runtimeapi.StreamPodSandboxStatsRequest,
	to grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxStatsResponse]) error {
	list, err := s.d.Stats.Pods(to.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return sendParts(list, func(part []*runtimeapi.PodSandboxStats) error {
		return to.Send(&runtimeapi.StreamPodSandboxStatsResponse{PodSandboxStats: part})
	})
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in parts.
func (s *Server) StreamPodSandboxMetrics(_ *runtimeapi.StreamPodSandboxMetricsRequest,
	to grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxMetricsResponse]) error {
	list, err := s.d.Stats.Metrics(to.Context())
	if err != nil {
		return err
	}
	return sendParts(list, func(part []*runtimeapi.PodSandboxMetrics) error {
		return to.Send(&runtimeapi.StreamPodSandboxMetricsResponse{PodSandboxMetrics: part})
	})
}

// GetContainerEvents tells what happens to pods and containers from now on.
func (s *Server) GetContainerEvents(_ *runtimeapi.GetEventsRequest,
	to grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	return s.d.Events.Serve(to.Context(), to.Send)
}

// sendParts sends each item once, in parts of at most maxPart bytes and at least one
// item. A list without items is no part.
func sendParts[T proto.Message](list []T, send func(part []T) error) error {
	for len(list) > 0 {
		n, size := 1, proto.Size(list[0])
		for n < len(list) {
			if size += proto.Size(list[n]); size > maxPart {
				break
			}
			n++
		}
		if err := send(list[:n]); err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}
