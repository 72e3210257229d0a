package cri

import (
	"context"
	"math"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/placement"
)

const (
	runtimeName = "holdfast"
	apiVersion  = "v1"
	// kubeletVersion is what the CRI's text asks for in VersionResponse.version.
	kubeletVersion = "0.1.0"
)

// Version answers with the names and versions that the kubelet shows.
func (s *Server) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: kubeletVersion, RuntimeName: runtimeName, RuntimeVersion: s.version, RuntimeApiVersion: apiVersion}, nil
}

// Status says whether pods can be made, and what the runtime can do.
func (s *Server) Status(ctx context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	network := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := s.d.NetworkReady(ctx); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkPluginNotReady", err.Error()
	}
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			{Type: runtimeapi.RuntimeReady, Status: true}, network}},
		RuntimeHandlers: s.d.Handlers(),
		Features:        &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true, UserNamespacesHostNetwork: true},
	}
	if r.GetVerbose() {
		var err error
		if resp.Info, err = s.d.Info(); err != nil {
			return nil, toStatus(err)
		}
	}
	return resp, nil
}

// RuntimeConfig tells the kubelet the cgroup driver.
func (s *Server) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	driver := runtimeapi.CgroupDriver_CGROUPFS
	if s.d.Driver() == placement.Systemd {
		driver = runtimeapi.CgroupDriver_SYSTEMD
	}
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig takes the pod CIDR of the node.
func (s *Server) UpdateRuntimeConfig(_ context.Context, r *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	if cidr := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(); cidr != "" {
		if err := s.d.SetPodCIDR(cidr); err != nil {
			return nil, toStatus(err)
		}
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}

// RunPodSandbox makes a pod.
func (s *Server) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	id, err := s.d.RunPod(ctx, r.GetConfig(), r.GetRuntimeHandler())
	if err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// StopPodSandbox kills what runs in a pod and gives back its network.
func (s *Server) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	if r.GetPodSandboxId() == "" {
		return nil, invalid("pod_sandbox_id", "is empty")
	}
	if err := s.d.StopPod(ctx, r.GetPodSandboxId()); err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

// RemovePodSandbox removes a pod with all its containers.
func (s *Server) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	if r.GetPodSandboxId() == "" {
		return nil, invalid("pod_sandbox_id", "is empty")
	}
	if err := s.d.RemovePod(ctx, r.GetPodSandboxId()); err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// PodSandboxStatus tells about one pod.
func (s *Server) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	if r.GetPodSandboxId() == "" {
		return nil, invalid("pod_sandbox_id", "is empty")
	}
	resp, err := s.d.PodStatus(r.GetPodSandboxId(), r.GetVerbose())
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

// ListPodSandbox lists pods.
func (s *Server) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: s.d.ListPods(r.GetFilter())}, nil
}

// CreateContainer makes a container in a pod.
func (s *Server) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	switch {
	case r.GetPodSandboxId() == "":
		return nil, invalid("pod_sandbox_id", "is empty")
	case r.GetConfig() == nil:
		return nil, invalid("config", "is missing")
	}
	if err := checkRef("config.image.image", r.GetConfig().GetImage().GetImage()); err != nil {
		return nil, err
	}
	id, err := s.d.CreateContainer(ctx, r.GetPodSandboxId(), r.GetConfig())
	if err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

// StartContainer runs a created container.
func (s *Server) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	if r.GetContainerId() == "" {
		return nil, invalid("container_id", "is empty")
	}
	if err := s.d.StartContainer(ctx, r.GetContainerId()); err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

// seconds turns a timeout of the CRI into a duration.
func seconds(field string, n int64) (time.Duration, error) {
	if n < 0 {
		return 0, invalid(field, "is negative")
	}
	return time.Duration(min(n, math.MaxInt64/int64(4*time.Second))) * time.Second, nil
}

// StopContainer stops a container within its grace period.
func (s *Server) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	if r.GetContainerId() == "" {
		return nil, invalid("container_id", "is empty")
	}
	grace, err := seconds("timeout", r.GetTimeout())
	if err != nil {
		return nil, err
	}
	if err := s.d.StopContainer(ctx, r.GetContainerId(), grace); err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.StopContainerResponse{}, nil
}

// RemoveContainer removes a container, running or not.
func (s *Server) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	if r.GetContainerId() == "" {
		return nil, invalid("container_id", "is empty")
	}
	if err := s.d.RemoveContainer(ctx, r.GetContainerId()); err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.RemoveContainerResponse{}, nil
}

// ListContainers lists containers.
func (s *Server) ListContainers(_ context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: s.d.ListContainers(r.GetFilter())}, nil
}

// ContainerStatus tells about one container.
func (s *Server) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	if r.GetContainerId() == "" {
		return nil, invalid("container_id", "is empty")
	}
	resp, err := s.d.ContainerStatus(r.GetContainerId(), r.GetVerbose())
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

// maxCommand bounds a command that is handed to a shim, in bytes of protobuf. It
// is far more than a kernel takes as arguments.
const maxCommand = 1 << 20

// ExecSync runs a command in a container.
func (s *Server) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	switch {
	case r.GetContainerId() == "":
		return nil, invalid("container_id", "is empty")
	case len(r.GetCmd()) == 0:
		return nil, invalid("cmd", "is empty")
	}
	if proto.Size(r) > maxCommand {
		return nil, invalid("cmd", "is larger than 1 MiB")
	}
	timeout, err := seconds("timeout", r.GetTimeout())
	if err != nil {
		return nil, err
	}
	resp, err := s.d.ExecSync(ctx, r.GetContainerId(), r.GetCmd(), timeout)
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

// ReopenContainerLog switches a container to a new log file.
func (s *Server) ReopenContainerLog(ctx context.Context, r *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	if r.GetContainerId() == "" {
		return nil, invalid("container_id", "is empty")
	}
	if err := s.d.ReopenLog(ctx, r.GetContainerId()); err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.ReopenContainerLogResponse{}, nil
}
