package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// called runs a request through the interceptor. reached says whether its handler
// was called, which answers with err.
func called(method string, req any, err error) (reached bool, _ error) {
	info := &grpc.UnaryServerInfo{FullMethod: method}
	_, got := answer(slog.New(slog.DiscardHandler), nil)(context.Background(), req, info,
		func(context.Context, any) (any, error) {
			reached = true
			return nil, err
		})
	return reached, got
}

// methods are all calls of the CRI, by their full names, with an empty request.
func methods(t *testing.T) map[string]proto.Message {
	t.Helper()
	all := map[string]proto.Message{}
	services := new(runtimeapi.VersionRequest).ProtoReflect().Descriptor().ParentFile().Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			m := s.Methods().Get(j)
			req, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
			must.Succeed(t, err)
			all[fmt.Sprintf("/%s/%s", s.FullName(), m.Name())] = req.New().Interface()
		}
	}
	return all
}

// Every request that names a pod, a container or an image is refused without that
// name, and the error says which field it is. New calls of the CRI are seen here.
func TestEmptyRequests(t *testing.T) {
	named := map[protoreflect.Name]string{
		"pod_sandbox_id": "pod_sandbox_id",
		"container_id":   "container_id",
		"image":          "image.image",
	}
	optional := []string{"ListContainersRequest", "ListPodSandboxRequest"} // hold a filter, no name
	// What is looked at first.
	other := map[string]string{"ExecSyncRequest": "cmd", "RestorePodRequest": "config"}
	checked := 0
	for method, req := range methods(t) {
		d := req.ProtoReflect().Descriptor()
		field := other[string(d.Name())]
		for name, text := range named {
			if field == "" && d.Fields().ByName(name) != nil {
				field = text
			}
		}
		reached, err := called(method, req, nil)
		if field == "" || slices.Contains(optional, string(d.Name())) {
			if !reached || err != nil {
				t.Errorf("%s: %v", method, err)
			}
			continue
		}
		checked++
		names := strings.HasPrefix(status.Convert(err).Message(), field+": ")
		if reached || status.Code(err) != codes.InvalidArgument || !names {
			t.Errorf("%s: %v, want one about %s; the daemon was called: %t", method, err, field, reached)
		}
	}
	if checked < 20 {
		t.Errorf("only %d calls were checked", checked)
	}
}

func TestCheck(t *testing.T) {
	image := func(length int) *runtimeapi.ImageSpec {
		return &runtimeapi.ImageSpec{Image: strings.Repeat("x", length)}
	}
	for name, c := range map[string]struct {
		req   any
		field string // of the error; empty: none
	}{
		"create without a config": {&runtimeapi.CreateContainerRequest{PodSandboxId: "p"}, "config"},
		"create without an image": {
			&runtimeapi.CreateContainerRequest{PodSandboxId: "p", Config: &runtimeapi.ContainerConfig{}},
			"config.image.image",
		},
		"create with a long image": {
			&runtimeapi.CreateContainerRequest{PodSandboxId: "p",
				Config: &runtimeapi.ContainerConfig{Image: image(maxRef + 1)}},
			"config.image.image",
		},
		"create": {
			&runtimeapi.CreateContainerRequest{PodSandboxId: "p",
				Config: &runtimeapi.ContainerConfig{Image: image(maxRef)}},
			"",
		},
		"exec without a container": {&runtimeapi.ExecSyncRequest{Cmd: []string{"x"}}, "container_id"},
		"exec":                     {&runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}}, ""},
		"exec of a long command": {
			&runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{strings.Repeat("x", maxCommand)}},
			"cmd",
		},
		"exec with a negative timeout": {
			&runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}, Timeout: -1}, "timeout",
		},
		"stop with a negative timeout": {&runtimeapi.StopContainerRequest{ContainerId: "c", Timeout: -1}, "timeout"},
		"checkpoint to nowhere":        {&runtimeapi.CheckpointContainerRequest{ContainerId: "c"}, "location"},
		"checkpoint with a negative timeout": {
			&runtimeapi.CheckpointContainerRequest{ContainerId: "c", Location: "/l", Timeout: -1}, "timeout",
		},
		"update of Windows": {
			&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c",
				Windows: &runtimeapi.WindowsContainerResources{}}, "windows",
		},
		"update with options": {
			&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c",
				Annotations: map[string]string{"a": "b"}}, "annotations",
		},
		"checkpoint of a pod to nowhere": {&runtimeapi.CheckpointPodRequest{PodSandboxId: "p"}, "output_path"},
		"restore of nothing": {
			&runtimeapi.RestorePodRequest{Config: &runtimeapi.PodSandboxConfig{}}, "checkpoint_path",
		},
		"session without a command": {
			&runtimeapi.ExecRequest{ContainerId: "c", Stdout: true}, "cmd",
		},
		"session with a long command": {
			&runtimeapi.ExecRequest{ContainerId: "c", Stdout: true, Cmd: []string{strings.Repeat("x",
				maxCommand)}}, "cmd",
		},
		"session without streams": {&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"x"}}, "stdout"},
		"session of a terminal with two outputs": {
			&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Tty: true, Stdout: true,
				Stderr: true}, "stderr",
		},
		"session of a terminal": {
			&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Tty: true, Stdin: true, Stdout: true}, "",
		},
		"session that takes no output": {
			&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Stdin: true}, "",
		},
		"attach to nobody":       {&runtimeapi.AttachRequest{Stdout: true}, "container_id"},
		"attach without streams": {&runtimeapi.AttachRequest{ContainerId: "c", Tty: true}, "stdout"},
		"attach to a terminal with two outputs": {
			&runtimeapi.AttachRequest{ContainerId: "c", Tty: true, Stderr: true}, "stderr",
		},
		"attach": {&runtimeapi.AttachRequest{ContainerId: "c", Stderr: true}, ""},
		"forward port 0": {&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: []int32{80, 0}},
			"port[1]"},
		"forward port -1": {&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: []int32{-1}}, "port[0]"},
		"forward port 65536": {&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: []int32{65536}},
			"port[0]"},
		"forward many": {&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: make([]int32, 1<<16)},
			"port"},
		"forward ports":              {&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: []int32{1, 65535}}, ""},
		"forward what is said later": {&runtimeapi.PortForwardRequest{PodSandboxId: "p"}, ""},
		"pull of a long name":        {&runtimeapi.PullImageRequest{Image: image(maxRef + 1)}, "image.image"},
		"status of a long name":      {&runtimeapi.ImageStatusRequest{Image: image(maxRef + 1)}, "image.image"},
		"remove of a long name":      {&runtimeapi.RemoveImageRequest{Image: image(maxRef + 1)}, "image.image"},
		"pull":                       {&runtimeapi.PullImageRequest{Image: image(maxRef)}, ""},
	} {
		want, err := kind.Invalid, check(c.req)
		if _, update := c.req.(*runtimeapi.UpdateContainerResourcesRequest); update {
			want = kind.Unsupported
		}
		if c.field == "" && err == nil {
			continue
		}
		if c.field == "" || !errors.Is(err, want) || !strings.HasPrefix(err.Error(), c.field+": ") {
			t.Errorf("%s: got %v, want one about %q", name, err, c.field)
		}
	}
}

// The codes of errors, of which the kubelet reads some.
func TestCodes(t *testing.T) {
	const start = runtimeapi.RuntimeService_StartContainer_FullMethodName
	req := &runtimeapi.StartContainerRequest{ContainerId: "c"}
	create := &runtimeapi.CreateContainerRequest{
		PodSandboxId: "p",
		Config:       &runtimeapi.ContainerConfig{Image: &runtimeapi.ImageSpec{Image: "i"}},
	}
	pull := &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "i"}}
	for _, c := range []struct {
		method string
		req    any
		err    error
		code   codes.Code
		text   string // at the beginning
	}{
		{start, req, nil, codes.OK, ""},
		{start, req, kind.Errorf(kind.Invalid, "x"), codes.InvalidArgument, "x"},
		{start, req, kind.Errorf(kind.NotFound, "x"), codes.NotFound, "x"},
		{start, req, kind.Errorf(kind.Exists, "x"), codes.AlreadyExists, "x"},
		{start, req, kind.Errorf(kind.State, "x"), codes.FailedPrecondition, "x"},
		{start, req, kind.Errorf(kind.Unavailable, "x"), codes.Unavailable, "x"},
		{start, req, kind.Errorf(kind.Unsupported, "x"), codes.Unimplemented, "x"},
		{start, req, kind.Errorf(kind.Timeout, "x"), codes.DeadlineExceeded, "x"},
		{start, req, kind.As(kind.Unavailable, context.Canceled), codes.Canceled, ""},
		{start, req, kind.As(kind.Unavailable, syscall.ENOSPC), codes.ResourceExhausted, ""},
		{start, req, fmt.Errorf("while: %w", kind.Errorf(kind.State, "x")), codes.FailedPrecondition, "while: x"},
		{start, req, errors.New("x"), codes.Unknown, "x"},
		{pullImage, pull, kind.Errorf(kind.Unavailable, "x"), codes.Unknown, "RegistryUnavailable: x"},
		{pullImage, pull, kind.Errorf(kind.Rejected, "x"), codes.Unknown, "SignatureValidationFailed: x"},
		{pullImage, pull, kind.As(kind.Unavailable, context.Canceled), codes.Canceled, ""},
		{pullImage, pull, kind.As(kind.Unavailable, context.DeadlineExceeded), codes.DeadlineExceeded, ""},
		{pullImage, pull, kind.Errorf(kind.NotFound, "x"), codes.NotFound, "x"},
		{createContainer, create, nil, codes.OK, ""},
		{createContainer, create, kind.Errorf(kind.Invalid, "config.mounts[12].host_path: x"), codes.InvalidArgument,
			"config.mounts[12].host_path: x"},
		{createContainer, create, kind.Errorf(kind.NotFound, "config.mounts[0].image: x"), codes.NotFound,
			"ImageVolumeMountFailed: config.mounts[0].image: x"},
		{createContainer, create, kind.Errorf(kind.Invalid, "config.mounts[3].image_sub_path: x"), codes.InvalidArgument,
			"ImageVolumeMountFailed: config.mounts[3].image_sub_path: x"},
		{createContainer, create, kind.Errorf(kind.Unsupported, "config.mounts[1].recursive_read_only: x"),
			codes.Unimplemented, "RROUnsupported: config.mounts[1].recursive_read_only: x"},
		{createContainer, create, kind.Errorf(kind.Invalid, "config.mounts[1].recursive_read_only: x"),
			codes.InvalidArgument, "config.mounts[1].recursive_read_only: x"},
	} {
		reached, err := called(c.method, c.req, c.err)
		if !reached || status.Code(err) != c.code || !strings.HasPrefix(status.Convert(err).Message(), c.text) {
			t.Errorf("%s, %v: got %v, want %s, %q", c.method, c.err, err, c.code, c.text)
		}
	}
}

func TestSeconds(t *testing.T) {
	for n, want := range map[int64]time.Duration{0: 0, 30: 30 * time.Second} {
		if got := seconds(n); got != want {
			t.Errorf("%d: %s", n, got)
		}
	}
	if got := seconds(math.MaxInt64); got < 24*time.Hour || got+got < got {
		t.Errorf("as long as can be: %s", got)
	}
}
