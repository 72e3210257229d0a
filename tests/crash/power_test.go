package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// What this test prints, for those who read it: the next one that finds the disk,
// and package tests/vm.
const (
	powerPulled   = "power: pulled "
	powerRemoving = "power: removing "
	powerBroken   = "power: broken: " // the store is not what it has to be
	powerDark     = "power: dark"     // the disk is gone, or may go
)

// The power goes while images are pulled and removed. A pull that was answered
// before is there afterwards, and the store mends the rest by itself, without
// fetching again what it has. It is one life of a machine whose power package
// tests/vm cuts: HOLDFAST_DISK is the disk that outlives it, HOLDFAST_BEFORE the
// file with what the earlier lives have printed, and HOLDFAST_LOAD how long it
// goes on once the store is found whole.
func TestPowerCut(t *testing.T) {
	device := os.Getenv("HOLDFAST_DISK")
	if device == "" {
		t.Skip("HOLDFAST_DISK is not set: make vm-test runs this, in a machine whose power it can cut")
	}
	load, err := time.ParseDuration(os.Getenv("HOLDFAST_LOAD"))
	if err != nil {
		t.Fatalf("HOLDFAST_LOAD: %v", err)
	}
	before, err := os.ReadFile(os.Getenv("HOLDFAST_BEFORE"))
	check(t, err)
	n := harness.New(t, harness.Options{Root: filepath.Join(mountDisk(t, device), "root")})
	d := openDepot(t, n)
	ctx, cancel := harness.Deadline()
	defer cancel()
	if err := remove(ctx, n, harness.Image); err != nil {
		t.Fatalf("RemoveImage: %v", err)
	}

	broken := func(format string, args ...any) {
		t.Helper()
		t.Errorf("%s%s", powerBroken, fmt.Sprintf(format, args...))
	}
	found := take(n)
	for ref := range answeredBefore(d, string(before)) {
		if _, ok := found.refs[ref]; !ok {
			broken("the pull of %s was answered, and it is gone", ref)
		}
	}
	d.taken()
	for ref := range found.refs {
		// Its layers may be gone, its blobs not.
		if err := pull(ctx, n, ref); err != nil {
			t.Errorf("PullImage %s, which is here: %v", ref, err)
		}
	}
	for _, a := range d.taken() {
		if _, ok := found.blobs[a.blob]; ok {
			broken("%s is here, and is fetched again", a.blob)
		}
	}
	settle(t, n, d)
	fmt.Printf("power: whole, with %d references, %d interrupted pulls and %d partial downloads found\n",
		len(found.refs), len(found.pending), len(found.partial))
	if t.Failed() || load == 0 {
		return
	}
	use(t, n, d, load)
	if !t.Failed() {
		awaitDark()
	}
}

// awaitDark says that the power may go, and waits for that.
func awaitDark() {
	fmt.Println(powerDark)
	time.Sleep(10 * time.Minute)
}

// mountDisk mounts the disk, and makes its file system in its first life.
func mountDisk(t *testing.T, device string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("blkid", device).CombinedOutput(); err != nil { // there is none
		if out, err = exec.Command("mkfs.ext4", "-q", device).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.ext4: %v: %s", err, out)
		}
	}
	if out, err := exec.Command("mount", "-t", "ext4", device, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		// The disk goes before the rest of the machine, and what is made of it
		// is nobody's fault.
		if err := probe(dir); err != nil {
			t.Logf("the disk is gone: %v", err)
			awaitDark()
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("cannot unmount the disk: %v", err)
		}
	})
	return dir
}

// probe says whether the disk takes writes.
func probe(dir string) error {
	f, err := os.Create(filepath.Join(dir, "probe"))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// answeredBefore are the references whose pull was answered, and that nobody
// began to remove since.
func answeredBefore(d *depot, printed string) map[string]bool {
	refs := map[string]bool{}
	for line := range strings.Lines(printed) {
		line = strings.TrimSpace(line)
		if ref, ok := strings.CutPrefix(line, powerPulled); ok && d.of(ref) != nil {
			refs[ref], refs[d.of(ref).digestRef(ref)] = true, true
		}
		if id, ok := strings.CutPrefix(line, powerRemoving); ok {
			for ref := range refs {
				if d.of(ref).id == id {
					delete(refs, ref)
				}
			}
		}
	}
	return refs
}

// use pulls and removes images, and prints what it has been promised.
func use(t *testing.T, n *harness.Node, d *depot, load time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), load)
	defer cancel()
	refs := d.refs()
	turn := map[*picture]*sync.Mutex{} // one call at a time for an image, so that the order of the lines is theirs
	for _, p := range d.pictures {
		turn[p] = &sync.Mutex{}
	}
	var wg sync.WaitGroup
	for range 3 {
		chance := rand.New(rand.NewPCG(rand.Uint64(), 0))
		wg.Go(func() {
			for ctx.Err() == nil {
				ref := refs[chance.IntN(len(refs))]
				p := d.of(ref)
				turn[p].Lock()
				var err error
				if chance.IntN(3) == 0 {
					fmt.Println(powerRemoving + p.id)
					err = remove(ctx, n, p.id)
				} else if err = pull(ctx, n, ref); err == nil {
					fmt.Println(powerPulled + ref)
				}
				turn[p].Unlock()
				// The server may notice the end of the time before this process does.
				if err != nil && ctx.Err() == nil && status.Code(err) != codes.DeadlineExceeded {
					t.Errorf("%s: %v", ref, err)
					return
				}
			}
		})
	}
	wg.Wait()
}
