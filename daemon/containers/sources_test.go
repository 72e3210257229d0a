package containers

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// DeadServer mounts a file system of which nobody answers, and gives a function that ends it.
func DeadServer(t *testing.T) (dir string, end func()) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and FUSE: ", err)
	}
	closed := false
	end = func() {
		if !closed {
			unix.Close(fd)
		}
		closed = true
	}
	t.Cleanup(end)
	dir = t.TempDir()
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount("nobody", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		t.Skip("cannot mount FUSE: ", err)
	}
	t.Cleanup(func() {
		end()
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir, end
}

// A volume whose server is gone holds a creation for a while, and not for ever. However often
// the container is asked for, one look at the volume waits for the kernel.
func TestSourceThatDoesNotAnswer(t *testing.T) {
	was := sourceLimit
	sourceLimit = 50 * time.Millisecond
	defer func() { sourceLimit = was }()
	m := newManager(t)
	dir, end := DeadServer(t)
	config, err := records.Encoded(&runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
		Mounts: []*runtimeapi.Mount{
			{HostPath: "/", ContainerPath: "/root"},
			{HostPath: dir, ContainerPath: "/dead"},
		},
	})
	must.Succeed(t, err)
	rec := &records.Container{PodID: "p", Config: config}
	for range 3 {
		err := (&builder{m: m, rec: rec}).checkSources(t.Context())
		if !errors.Is(err, kind.Unavailable) || !strings.HasPrefix(err.Error(), "config.mounts[1].host_path: ") {
			t.Errorf("got %v", err)
		}
	}
	key := NameOf(rec).Name + "config.mounts[1]." + dir + "false"
	answer := m.sources.DoChan(key, func() (any, error) { return nil, errors.New("there are two looks") })
	end()
	if r := <-answer; !errors.Is(r.Err, kind.Invalid) || !strings.Contains(r.Err.Error(), unix.ENOTCONN.Error()) {
		t.Errorf("the end of the server gives %v", r.Err)
	}
}
