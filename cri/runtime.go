package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	runtimeName = "holdfast"
	apiVersion  = "v1"
	// kubeletVersion is what the CRI's text asks for in VersionResponse.version.
	kubeletVersion = "0.1.0"
)

// Version answers with the names and versions that the kubelet shows.
func (s *Server) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:           kubeletVersion,
		RuntimeName:       runtimeName,
		RuntimeVersion:    s.version,
		RuntimeApiVersion: apiVersion,
	}, nil
}

// Status says whether pods can be made, and what the runtime can do.
func (s *Server) Status(ctx context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	network := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := s.d.NetworkReady(ctx); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkPluginNotReady", err.Error()
	}
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			{Type: runtimeapi.RuntimeReady, Status: true},
			network,
		}},
		RuntimeHandlers: s.d.Runtimes.List(s.d.Userns()),
		Features: &runtimeapi.RuntimeFeatures{
			SupplementalGroupsPolicy:  true,
			MountOptions:              true,
			UserNamespacesHostNetwork: s.d.Userns(),
		},
	}
	if !r.GetVerbose() {
		return resp, nil
	}
	var err error
	resp.Info, err = s.d.Info()
	return resp, err
}

// RuntimeConfig tells the kubelet the cgroup driver.
func (s *Server) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest,
) (*runtimeapi.RuntimeConfigResponse, error) {
	driver := runtimeapi.CgroupDriver_CGROUPFS
	if s.d.SystemdCgroups() {
		driver = runtimeapi.CgroupDriver_SYSTEMD
	}
	return &runtimeapi.RuntimeConfigResponse{
		Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: driver},
	}, nil
}

// UpdateRuntimeConfig takes the pod CIDR of the node.
func (s *Server) UpdateRuntimeConfig(_ context.Context, r *runtimeapi.UpdateRuntimeConfigRequest,
) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	var err error
	if cidr := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(); cidr != "" {
		err = s.d.SetPodCIDR(cidr)
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, err
}

// RunPodSandbox makes a pod.
func (s *Server) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest,
) (*runtimeapi.RunPodSandboxResponse, error) {
	id, err := s.d.Pods.Run(ctx, r.GetConfig(), r.GetRuntimeHandler())
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, err
}

// StopPodSandbox kills what runs in a pod and gives back its network.
func (s *Server) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest,
) (*runtimeapi.StopPodSandboxResponse, error) {
	return &runtimeapi.StopPodSandboxResponse{}, s.d.Pods.Stop(ctx, r.GetPodSandboxId())
}

// RemovePodSandbox removes a pod with all its containers.
func (s *Server) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest,
) (*runtimeapi.RemovePodSandboxResponse, error) {
	return &runtimeapi.RemovePodSandboxResponse{}, s.d.Pods.Remove(ctx, r.GetPodSandboxId())
}

// PodSandboxStatus tells about one pod.
func (s *Server) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest,
) (*runtimeapi.PodSandboxStatusResponse, error) {
	return s.d.Pods.Status(r.GetPodSandboxId(), r.GetVerbose())
}

// ListPodSandbox lists pods.
func (s *Server) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: s.d.Pods.List(r.GetFilter())}, nil
}

// CreateContainer makes a container in a pod.
func (s *Server) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest,
) (*runtimeapi.CreateContainerResponse, error) {
	pod, err := s.d.Pods.Find(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	id, err := s.d.Containers.Create(ctx, pod, r.GetConfig(), r.GetSandboxConfig())
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, err
}

// StartContainer runs a created container.
func (s *Server) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest,
) (*runtimeapi.StartContainerResponse, error) {
	return &runtimeapi.StartContainerResponse{}, s.d.Containers.Start(ctx, r.GetContainerId())
}

// StopContainer stops a container within its grace period.
func (s *Server) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest,
) (*runtimeapi.StopContainerResponse, error) {
	return &runtimeapi.StopContainerResponse{}, s.d.Containers.Stop(ctx, r.GetContainerId(), seconds(r.GetTimeout()))
}

// RemoveContainer removes a container, running or not.
func (s *Server) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest,
) (*runtimeapi.RemoveContainerResponse, error) {
	return &runtimeapi.RemoveContainerResponse{}, s.d.Containers.Remove(ctx, r.GetContainerId())
}

// ListContainers lists containers.
func (s *Server) ListContainers(_ context.Context, r *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: s.d.Containers.List(r.GetFilter())}, nil
}

// ContainerStatus tells about one container.
func (s *Server) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	return s.d.Containers.Status(r.GetContainerId(), r.GetVerbose())
}

// UpdateContainerResources changes the limits of a container that has not ended.
func (s *Server) UpdateContainerResources(ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest,
) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	return &runtimeapi.UpdateContainerResourcesResponse{}, s.d.Containers.Update(ctx, r.GetContainerId(), r.GetLinux())
}

// ContainerStats tells what one container uses.
func (s *Server) ContainerStats(_ context.Context, r *runtimeapi.ContainerStatsRequest,
) (*runtimeapi.ContainerStatsResponse, error) {
	stats, err := s.d.Stats.Container(r.GetContainerId())
	return &runtimeapi.ContainerStatsResponse{Stats: stats}, err
}

// ListContainerStats tells what containers use.
func (s *Server) ListContainerStats(ctx context.Context, r *runtimeapi.ListContainerStatsRequest,
) (*runtimeapi.ListContainerStatsResponse, error) {
	list, err := s.d.Stats.Containers(ctx, r.GetFilter())
	return &runtimeapi.ListContainerStatsResponse{Stats: list}, err
}

// PodSandboxStats tells what one pod and its containers use.
func (s *Server) PodSandboxStats(_ context.Context, r *runtimeapi.PodSandboxStatsRequest,
) (*runtimeapi.PodSandboxStatsResponse, error) {
	stats, err := s.d.Stats.Pod(r.GetPodSandboxId())
	return &runtimeapi.PodSandboxStatsResponse{Stats: stats}, err
}

// ListPodSandboxStats tells what pods and their containers use.
func (s *Server) ListPodSandboxStats(ctx context.Context, r *runtimeapi.ListPodSandboxStatsRequest,
) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	list, err := s.d.Stats.Pods(ctx, r.GetFilter())
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: list}, err
}

// ListMetricDescriptors tells which metrics there are.
func (s *Server) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest,
) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	return &runtimeapi.ListMetricDescriptorsResponse{Descriptors: s.d.Stats.Descriptors()}, nil
}

// ListPodSandboxMetrics gives the metrics of all pods and their containers.
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest,
) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	list, err := s.d.Stats.Metrics(ctx)
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: list}, err
}

// UpdatePodSandboxResources notes other resources and overhead of a pod.
func (s *Server) UpdatePodSandboxResources(ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest,
) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, s.d.Pods.Update(ctx, r)
}

// ExecSync runs a command in a container.
func (s *Server) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	return s.d.Containers.ExecSync(ctx, r.GetContainerId(), r.GetCmd(), seconds(r.GetTimeout()))
}

// Exec gives the address at which a command is run as a stream.
func (s *Server) Exec(ctx context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	url, err := s.d.Containers.Exec(ctx, r)
	return &runtimeapi.ExecResponse{Url: url}, err
}

// Attach gives the address at which the process of a container is spoken to.
func (s *Server) Attach(ctx context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	url, err := s.d.Containers.Attach(ctx, r)
	return &runtimeapi.AttachResponse{Url: url}, err
}

// PortForward gives the address at which ports of a pod are reached.
func (s *Server) PortForward(ctx context.Context, r *runtimeapi.PortForwardRequest,
) (*runtimeapi.PortForwardResponse, error) {
	url, err := s.d.Pods.PortForward(ctx, r.GetPodSandboxId(), r.GetPort())
	return &runtimeapi.PortForwardResponse{Url: url}, err
}

// ReopenContainerLog switches a container to a new log file.
func (s *Server) ReopenContainerLog(ctx context.Context, r *runtimeapi.ReopenContainerLogRequest,
) (*runtimeapi.ReopenContainerLogResponse, error) {
	return &runtimeapi.ReopenContainerLogResponse{}, s.d.Containers.ReopenLog(ctx, r.GetContainerId())
}

// CheckpointContainer writes an archive of a running container, which goes on.
func (s *Server) CheckpointContainer(ctx context.Context, r *runtimeapi.CheckpointContainerRequest,
) (*runtimeapi.CheckpointContainerResponse, error) {
	return &runtimeapi.CheckpointContainerResponse{},
		s.d.Containers.Checkpoint(ctx, r.GetContainerId(), r.GetLocation(), seconds(r.GetTimeout()))
}

// CheckpointPod writes a checkpoint of containers of a pod, which go on.
func (s *Server) CheckpointPod(ctx context.Context, r *runtimeapi.CheckpointPodRequest,
) (*runtimeapi.CheckpointPodResponse, error) {
	return &runtimeapi.CheckpointPodResponse{}, s.d.Pods.Checkpoint(ctx, r)
}

// RestorePod makes a pod and its containers of a checkpoint.
func (s *Server) RestorePod(ctx context.Context, r *runtimeapi.RestorePodRequest,
) (*runtimeapi.RestorePodResponse, error) {
	return s.d.Pods.Restore(ctx, r)
}
