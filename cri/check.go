package cri

import (
	"cmp"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

const (
	// maxRef is more than any registry takes as a name, tag and digest, in bytes.
	maxRef = 4096
	// maxCommand bounds a command that is handed to a shim, in bytes of protobuf.
	// It is far more than a kernel takes as arguments.
	maxCommand = 1 << 20
)

// check refuses a request that lacks what its call cannot do without. The fields
// of configs are for daemon/spec to check.
func check(req any) error {
	switch r := req.(type) {
	case *runtimeapi.CreateContainerRequest:
		if err := require("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
			return err
		}
		if r.GetConfig() == nil {
			return invalid("config", "is missing")
		}
		return checkRef("config.image.image", r.GetConfig().GetImage())
	case *runtimeapi.ExecSyncRequest:
		return cmp.Or(
			checkCommand(r.GetCmd(), r),
			require("container_id", r.GetContainerId()),
			checkTimeout(r))
	case *runtimeapi.StopContainerRequest:
		return cmp.Or(require("container_id", r.GetContainerId()), checkTimeout(r))
	case *runtimeapi.ExecRequest:
		return cmp.Or(
			require("container_id", r.GetContainerId()),
			checkCommand(r.GetCmd(), r),
			checkStreams(r))
	case *runtimeapi.AttachRequest:
		return cmp.Or(require("container_id", r.GetContainerId()), checkStreams(r))
	case *runtimeapi.UpdateContainerResourcesRequest:
		return cmp.Or(require("container_id", r.GetContainerId()), checkUpdate(r))
	case *runtimeapi.CheckpointContainerRequest:
		return cmp.Or(
			require("container_id", r.GetContainerId()),
			require("location", r.GetLocation()),
			checkTimeout(r))
	case *runtimeapi.CheckpointPodRequest:
		return cmp.Or(
			require("pod_sandbox_id", r.GetPodSandboxId()),
			require("output_path", r.GetOutputPath()))
	case *runtimeapi.RestorePodRequest:
		if r.GetConfig() == nil {
			return invalid("config", "is missing")
		}
		return require("checkpoint_path", r.GetCheckpointPath())
	case *runtimeapi.PortForwardRequest:
		return cmp.Or(require("pod_sandbox_id", r.GetPodSandboxId()), checkPorts(r.GetPort()))
	case interface{ GetImage() *runtimeapi.ImageSpec }:
		return checkRef("image.image", r.GetImage())
	}
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		return require("container_id", r.GetContainerId())
	}
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok {
		return require("pod_sandbox_id", r.GetPodSandboxId())
	}
	return nil
}

func checkCommand(cmd []string, r proto.Message) error {
	if len(cmd) == 0 {
		return invalid("cmd", "is empty")
	}
	if proto.Size(r) > maxCommand {
		return invalid("cmd", "is larger than 1 MiB")
	}
	return nil
}

// checkStreams checks which streams a session has. A terminal has one output.
func checkStreams(r interface {
	GetTty() bool
	GetStdin() bool
	GetStdout() bool
	GetStderr() bool
}) error {
	switch {
	case r.GetTty() && r.GetStderr():
		return invalid("stderr", "is true with tty: all output of a terminal is stdout")
	case !r.GetStdin() && !r.GetStdout() && !r.GetStderr():
		return invalid("stdout", "is false, as stdin and stderr are: at least one of them is needed")
	}
	return nil
}

// checkUpdate refuses what an update would leave out.
func checkUpdate(r *runtimeapi.UpdateContainerResourcesRequest) error {
	switch {
	case r.GetWindows() != nil:
		return kind.Errorf(kind.Unsupported, "windows: is set, and this is Linux")
	case len(r.GetAnnotations()) > 0:
		return kind.Errorf(kind.Unsupported, "annotations: no option of an update is known by that way")
	}
	return nil
}

func checkPorts(ports []int32) error {
	if len(ports) > math.MaxUint16 {
		return invalid("port", "has more ports than there are")
	}
	for i, p := range ports {
		if p < 1 || p > math.MaxUint16 {
			return invalid(fmt.Sprintf("port[%d]", i), fmt.Sprintf("is %d, want 1 to %d", p, math.MaxUint16))
		}
	}
	return nil
}

// invalid is an InvalidArgument that names the field.
func invalid(field, problem string) error { return kind.Errorf(kind.Invalid, "%s: %s", field, problem) }

func require(field, value string) error {
	if value == "" {
		return invalid(field, "is empty")
	}
	return nil
}

func checkRef(field string, image *runtimeapi.ImageSpec) error {
	if len(image.GetImage()) > maxRef {
		return invalid(field, fmt.Sprintf("is longer than %d bytes", maxRef))
	}
	return require(field, image.GetImage())
}

func checkTimeout(r interface{ GetTimeout() int64 }) error {
	if r.GetTimeout() < 0 {
		return invalid("timeout", "is negative")
	}
	return nil
}

// seconds turns a timeout of the CRI, which is not negative, into a duration.
func seconds(n int64) time.Duration {
	return time.Duration(min(n, math.MaxInt64/int64(4*time.Second))) * time.Second
}
