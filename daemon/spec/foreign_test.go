package spec

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Files that somebody else names or brings.

func TestReadSeccompProfile(t *testing.T) {
	dir := t.TempDir()
	check(t, os.WriteFile(filepath.Join(dir, "good"), []byte("{}"), 0o600))
	check(t, os.WriteFile(filepath.Join(dir, "large"), make([]byte, maxProfile+1), 0o600))
	check(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	for path, want := range map[string]string{
		filepath.Join(dir, "good"):  "{}",
		filepath.Join(dir, "large"): "",
		filepath.Join(dir, "fifo"):  "",
		filepath.Join(dir, "none"):  "",
		dir:                         "",
		"/dev/zero":                 "",
	} {
		c := container()
		c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: profileLocalhost, LocalhostRef: path}
		b, err := ReadSeccompProfile(c)
		if want == "" {
			wantField(t, err, kind.Invalid, fieldSeccomp+".localhost_ref")
		} else if string(b) != want || err != nil {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
}

func TestFindUser(t *testing.T) {
	for name, c := range map[string]struct {
		passwd, group string // of a symbolic link: "-> target"
		user          string
		want          []uint32 // nil: kind.Invalid
	}{
		"no files": {user: "7", want: []uint32{7, 0, 0}},
		"plain": {passwd: passwd, group: group, user: "app", want: []uint32{1000, 1000, 10, 1000,
			50000}},
		"links inside the root": {passwd: "-> /real", group: "-> ../../../../real", user: "app", want: []uint32{5, 6,
			6}},
		"a link to the host":    {passwd: "-> /../../proc/self/environ", user: "app"},
		"no file but a FIFO":    {passwd: "-> /fifo", user: "app"},
		"no file but a folder":  {group: "-> /etc", user: "7"},
		"uid that is no number": {passwd: "app:x:root:0::\napp:x:3:4::", user: "app", want: []uint32{3, 4, 4}},
		"gid that is no number": {passwd: "app:x:3:root::", user: "app"},
		"a line without end":    {passwd: strings.Repeat("x", maxAccountLine+1), user: "app"},
		"lines that are none":   {passwd: "\n#\napp\n:::\napp:x:1:2", user: "app", want: []uint32{1, 2, 2}},
		"in more groups than may": {
			passwd: passwd,
			group:  strings.Repeat("g:x:5:app\n", maxGroups+1),
			user:   "app",
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			check(t, os.Mkdir(filepath.Join(root, "etc"), 0o755))
			check(t, unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
			for file, content := range map[string]string{"real": "app:x:5:6", "etc/passwd": c.passwd,
				"etc/group": c.group} {
				path := filepath.Join(root, file)
				var err error
				if to, ok := strings.CutPrefix(content, "-> "); ok {
					err = os.Symlink(to, path)
				} else if content != "" {
					err = os.WriteFile(path, []byte(content), 0o600)
				}
				check(t, err)
			}
			u, err := FindUser(root, container(), ocispec.ImageConfig{User: c.user})
			if c.want == nil {
				if !errors.Is(err, kind.Invalid) || len(err.Error()) > longestProblem+longestField {
					t.Errorf("got %v, %v", u, err)
				}
				return
			}
			if got := append([]uint32{u.UID, u.GID}, u.AdditionalGids...); err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %v, %v, want %v", got, err, c.want)
			}
		})
	}
}

// A group file of many lines costs time, and little memory.
func TestLargeGroupFile(t *testing.T) { // not parallel: it measures
	root := t.TempDir()
	check(t, os.Mkdir(filepath.Join(root, "etc"), 0o755))
	var b bytes.Buffer
	for i := range 800_000 {
		fmt.Fprintf(&b, "group%d:x:%d:\n", i, i)
	}
	check(t, os.WriteFile(filepath.Join(root, "etc/group"), b.Bytes(), 0o600))
	size := int64(b.Len())
	b = bytes.Buffer{}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	u, err := FindUser(root, container(), ocispec.ImageConfig{User: "7:group799999"})
	runtime.ReadMemStats(&after)
	if err != nil || u.UID != 7 || u.GID != 799999 {
		t.Errorf("%v, %v", u, err)
	}
	if took := int64(after.HeapSys) - int64(before.HeapSys); took > size/2 {
		t.Errorf("the heap grew by %d bytes for a file of %d", took, size)
	}
}

// What an image or a request says comes back shortened.
func TestErrorsAreShort(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	s := sandbox()
	s.Linux.Sysctls = map[string]string{long[:maxConfig/2]: "1"}
	_, _, err := StopSignal(container(), ocispec.ImageConfig{StopSignal: long})
	for _, err := range []error{err, ValidateSandbox(s)} {
		if n := len(err.Error()); n < 100 || n > 2*(longestField+longestProblem) {
			t.Errorf("an error of %d bytes", n)
		}
	}
}
