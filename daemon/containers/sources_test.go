package containers

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// mountServer mounts a file system whose server is the holder of the device, and gives a function
// that closes it.
func mountServer(t *testing.T) (device int, dir string, end func()) {
	t.Helper()
	device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and FUSE: ", err)
	}
	closed := false
	end = func() {
		if !closed {
			unix.Close(device)
		}
		closed = true
	}
	t.Cleanup(end)
	dir = t.TempDir()
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device)
	if err := unix.Mount("nobody", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		t.Skip("cannot mount FUSE: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil { // whoever waits gets an error
			t.Error(err)
		}
	})
	return device, dir, end
}

// DeadServer mounts a file system of which nobody answers, and gives a function that ends it.
func DeadServer(t *testing.T) (dir string, end func()) {
	t.Helper()
	_, dir, end = mountServer(t)
	return dir, end
}

// unreadFile is a file of a server that answers all but who reads it, which it tells of. Nobody
// is to poll it: while a server does not answer that, nothing in the process is polled.
func unreadFile(t *testing.T) (path string, asked <-chan struct{}) {
	t.Helper()
	var server sync.WaitGroup
	t.Cleanup(server.Wait) // it ends with the mount
	device, dir, _ := mountServer(t)
	reads := make(chan struct{}, 100)
	server.Go(func() {
		b := make([]byte, 128<<10)
		for {
			n, err := unix.Read(device, b)
			if err != nil {
				return
			}
			opcode, unique := binary.LittleEndian.Uint32(b[4:n]), binary.LittleEndian.Uint64(b[8:n])
			switch opcode {
			case 15: // READ
				reads <- struct{}{}
				continue
			case 40: // POLL
				t.Error("a file that somebody named is polled")
			}
			if a := answerOf(opcode, unique, binary.LittleEndian.Uint64(b[16:n])); a != nil {
				unix.Write(device, a)
			}
		}
	})
	return filepath.Join(dir, "archive.tar"), reads
}

// answerOf is what the kernel gets for a request, as linux/fuse.h has it: there is one directory,
// and in it a file of each name. nil: it wants no answer.
func answerOf(opcode uint32, unique, node uint64) []byte {
	attr := make([]byte, 88)
	binary.LittleEndian.PutUint64(attr, 2)
	binary.LittleEndian.PutUint64(attr[8:], 1<<20)
	binary.LittleEndian.PutUint32(attr[60:], unix.S_IFREG|0o600)
	if opcode == 3 && node == 1 {
		binary.LittleEndian.PutUint32(attr[60:], unix.S_IFDIR|0o700)
	}
	var body []byte
	errno := int32(0)
	switch opcode {
	case 2, 36, 42: // FORGET, INTERRUPT, BATCH_FORGET
		return nil
	case 26: // INIT
		body = make([]byte, 64)
		binary.LittleEndian.PutUint32(body, 7)
		binary.LittleEndian.PutUint32(body[4:], 31)
		binary.LittleEndian.PutUint32(body[20:], 4096)
	case 1: // LOOKUP
		body = append(make([]byte, 40), attr...)
		binary.LittleEndian.PutUint64(body, 2)
	case 3: // GETATTR
		body = append(make([]byte, 16), attr...)
	case 14, 27: // OPEN, OPENDIR
		body = make([]byte, 16)
		binary.LittleEndian.PutUint32(body[8:], 1<<5) // FOPEN_NOFLUSH: this process can end
	case 18, 29: // RELEASE, RELEASEDIR
	default:
		errno = -int32(unix.ENOSYS)
	}
	head := make([]byte, 16)
	binary.LittleEndian.PutUint32(head, uint32(len(head)+len(body)))
	binary.LittleEndian.PutUint32(head[4:], uint32(errno))
	binary.LittleEndian.PutUint64(head[8:], unique)
	return append(head, body...)
}

// podOf is a pod that is nothing but its record.
type podOf struct {
	Pod
	record *records.Pod
}

func (p podOf) Record() *records.Pod { return p.record }

// A checkpoint whose server is gone holds a creation no longer than that may take, wherever it
// is: when the archive is opened, when it is looked into, when it is unpacked.
func TestArchiveThatDoesNotAnswer(t *testing.T) {
	m := newManager(t)
	m.NoCRIU = func(context.Context) error { return nil }
	config, err := records.Encoded(&runtimeapi.PodSandboxConfig{})
	must.Succeed(t, err)
	pod := podOf{record: &records.Pod{Config: config}}
	hold := func(ctx context.Context, path string) error {
		cfg := &runtimeapi.ContainerConfig{Image: &runtimeapi.ImageSpec{Image: path}}
		_, _, _, err := m.holdImage(ctx, cfg, pod, nil)
		return err
	}
	dead, _ := DeadServer(t)
	unread, asked := unreadFile(t)
	other, askedOther := unreadFile(t)
	source, err := checkpoint.OpenArchive(other)
	must.Succeed(t, err)
	must.Succeed(t, m.State.Create(state.Containers, "c"))
	for name, c := range map[string]struct {
		stuck <-chan struct{} // nil: one need not wait for that
		f     func(context.Context) error
	}{
		"opened":      {nil, func(ctx context.Context) error { return hold(ctx, filepath.Join(dead, "archive.tar")) }},
		"looked into": {asked, func(ctx context.Context) error { return hold(ctx, unread) }},
		"unpacked": {askedOther, func(ctx context.Context) error {
			b := &builder{m: m, pod: pod.record, rec: &records.Container{ID: "c"}, from: &origin{source: source}}
			defer b.from.close()
			return b.unpack(ctx)
		}},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.f(ctx) }()
		if c.stuck != nil {
			<-c.stuck
		}
		cancel()
		if err := <-done; !errors.Is(err, errNoAnswer) || !errors.Is(err, kind.Unavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.RemoveAll(m.State.Dir(state.Containers, "c")); err != nil {
		t.Errorf("what was unpacked: %v", err)
	}
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
			{HostPath: dir, ContainerPath: "/dead"}, // first: what answers could be too late for this limit, too
			{HostPath: "/", ContainerPath: "/root"},
		},
	})
	must.Succeed(t, err)
	rec := &records.Container{PodID: "p", Config: config}
	for range 3 {
		err := (&builder{m: m, rec: rec}).checkSources(t.Context())
		if !errors.Is(err, kind.Unavailable) || !strings.HasPrefix(err.Error(), "config.mounts[0].host_path: ") {
			t.Errorf("got %v", err)
		}
	}
	key := NameOf(rec).Name + "config.mounts[0]." + dir + "false"
	answer := m.sources.DoChan(key, func() (any, error) { return nil, errors.New("there are two looks") })
	end()
	if r := <-answer; !errors.Is(r.Err, kind.Invalid) || !strings.Contains(r.Err.Error(), unix.ENOTCONN.Error()) {
		t.Errorf("the end of the server gives %v", r.Err)
	}
}
