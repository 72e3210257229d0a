package cdi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	oci "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/tests/must"
)

var check = must.Succeed

// with is a file that gives devices an environment variable each, with a value.
func with(kind, value string, names ...string) string {
	text := "cdiVersion: 0.6.0\nkind: " + kind + "\ndevices:\n"
	for _, n := range names {
		text += fmt.Sprintf("- name: %s\n  containerEdits: {env: [\"%s=%s\"]}\n", n, strings.ToUpper(n), value)
	}
	return text
}

func write(t *testing.T, path, text string) {
	t.Helper()
	check(t, os.WriteFile(path, []byte(text), 0o644))
}

// inject adds one device to an empty spec.
func inject(s *Store, name string) (*oci.Spec, error) {
	spec := &oci.Spec{Process: &oci.Process{}, Linux: &oci.Linux{}}
	e, err := s.Find([]Device{{Field: "field", Name: name}})
	if err != nil {
		return nil, err
	}
	return spec, e.Apply(spec)
}

func wantEnv(t *testing.T, s *Store, name, want string) {
	t.Helper()
	spec, err := inject(s, name)
	if err != nil {
		t.Errorf("%s: %v", name, err)
	} else if got := strings.Join(spec.Process.Env, " "); got != want {
		t.Errorf("%s gives %q, want %q", name, got, want)
	}
}

func wantNone(t *testing.T, s *Store, name string, says ...string) {
	t.Helper()
	_, err := inject(s, name)
	if !errors.Is(err, kind.State) {
		t.Fatalf("%s: %v, want an error of the kind %v", name, err, kind.State)
	}
	for _, words := range append(says, "field", name) {
		if !strings.Contains(err.Error(), words) {
			t.Errorf("the error does not say %q: %v", words, err)
		}
	}
}

// A file is read again when it has changed, come or gone. A later directory counts, and
// of two files in one directory neither does.
func TestFilesChange(t *testing.T) {
	low, high := filepath.Join(t.TempDir(), "low"), t.TempDir()
	s := New([]string{low, high})
	wantNone(t, s, "v/c=a", low, high)
	check(t, os.Mkdir(low, 0o755))
	write(t, low+"/one.yaml", with("v/c", "1", "a", "b"))
	wantEnv(t, s, "v/c=a", "A=1")
	write(t, low+"/one.yaml", with("v/c", "2", "a", "b"))
	wantEnv(t, s, "v/c=a", "A=2")

	write(t, high+"/two.json", `{"cdiVersion": "0.3.0", "kind": "v/c", "devices": [
		{"name": "a", "containerEdits": {"env": ["A=high"]}}]}`)
	wantEnv(t, s, "v/c=a", "A=high")
	wantEnv(t, s, "v/c=b", "B=2")
	write(t, high+"/ignored.conf", with("v/c", "3", "a"))
	wantEnv(t, s, "v/c=a", "A=high")
	write(t, high+"/three.yaml", with("v/c", "3", "a"))
	wantNone(t, s, "v/c=a", "two.json", "three.yaml")
	check(t, os.Remove(high+"/two.json"))
	wantEnv(t, s, "v/c=a", "A=3")
	check(t, os.Remove(high+"/three.yaml"))
	check(t, os.Remove(low+"/one.yaml"))
	wantNone(t, s, "v/c=a")
}

// The edits of a file count once for all its devices. Applying them changes nothing
// for the next container.
func TestEdits(t *testing.T) {
	dir := t.TempDir()
	check(t, os.Symlink("null", dir+"/link"))
	write(t, dir+"/a.yaml", `
cdiVersion: 1.1.0
kind: v/c
containerEdits:
  env: ["FILE=1"]
  mounts: [{hostPath: /etc, containerPath: /mnt, options: [ro, bind]}]
  additionalGids: [7]
devices:
- name: a
  containerEdits:
    deviceNodes: [{path: /dev/a, hostPath: /dev/null}]
    hooks: [{hookName: createRuntime, path: /bin/sh, args: [sh, -c, "true"]}]
- name: b
  containerEdits:
    deviceNodes: [{path: /dev/zero, permissions: r}]
`)
	s := New([]string{dir})
	for range 2 {
		for _, userns := range []bool{false, true} {
			spec := &oci.Spec{Process: &oci.Process{}, Linux: &oci.Linux{}}
			if userns {
				spec.Linux.Namespaces = []oci.LinuxNamespace{{Type: oci.UserNamespace, Path: "/x"}}
			}
			e, err := s.Find([]Device{{Name: "v/c=a"}, {Name: "v/c=b"}})
			check(t, err)
			check(t, e.Apply(spec))
			devices, mounts := 2, 1
			if userns {
				devices, mounts = 1, 2 // nobody can make one there
			}
			if len(spec.Linux.Devices) != devices || len(spec.Mounts) != mounts || len(spec.Process.Env) != 1 ||
				len(spec.Hooks.CreateRuntime) != 1 || len(spec.Process.User.AdditionalGids) != 1 {
				t.Errorf("with userns %v the spec is %+v, %+v, %+v", userns, spec, spec.Process, spec.Linux)
			}
			allowed := spec.Linux.Resources.Devices
			if len(allowed) != 2 || *allowed[0].Minor != 3 || allowed[0].Access != "rwm" || allowed[1].Access != "r" {
				t.Errorf("allowed are %+v", allowed)
			}
		}
	}
	if d := s.files[dir+"/a.yaml"].spec.Devices[0].ContainerEdits.DeviceNodes[0]; d.Major != 0 || d.Type != "" {
		t.Errorf("what was read has become %+v", d)
	}
}

// What is no file of devices breaks nothing but itself, and nothing blocks. The error
// of a device that is missing says which files cannot be used.
func TestHostileFiles(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/good.yaml", with("v/good", "1", "a"))
	check(t, os.Symlink("good.yaml", filepath.Join(dir, "other.conf")))
	s := New([]string{filepath.Join(dir, "missing"), dir, filepath.Join(dir, "good.yaml")})
	bad := filepath.Join(dir, "bad.yaml")
	for name, make := range map[string]func() error{
		"fifo":       func() error { return unix.Mkfifo(bad, 0o644) },
		"socket":     func() error { return unix.Mknod(bad, unix.S_IFSOCK|0o644, 0) },
		"directory":  func() error { return os.Mkdir(bad, 0o755) },
		"loop":       func() error { return os.Symlink("bad.yaml", bad) },
		"dangling":   func() error { return os.Symlink("nothing", bad) },
		"device":     func() error { return os.Symlink("/dev/zero", bad) },
		"huge":       func() error { return errors.Join(os.WriteFile(bad, nil, 0o644), os.Truncate(bad, maxFile+1)) },
		"zeros":      func() error { return errors.Join(os.WriteFile(bad, nil, 0o644), os.Truncate(bad, 1000)) },
		"empty":      func() error { return os.WriteFile(bad, nil, 0o644) },
		"null":       text(bad, "~"),
		"no mapping": text(bad, "[]"),
		"version":    text(bad, strings.Replace(with("v/c", "1", "a"), "0.6.0", "99.0.0", 1)),
		"future":     text(bad, with("v/c", "1", "a")+"news: 1\n"),
		"kind":       text(bad, with("c", "1", "a")),
		"name":       text(bad, with("v/c", "1", "'a b'")),
		"twice":      text(bad, with("v/c", "1", "a", "a")),
		"env":        text(bad, strings.Replace(with("v/c", "1", "a"), "A=1", "=1", 1)),
		"nil node":   text(bad, with("v/c", "1", "a")+"containerEdits: {deviceNodes: [~]}\n"),
		"nil mount":  text(bad, strings.Replace(with("v/c", "1", "a"), "env:", "mounts: [~], env:", 1)),
		"nil hook":   text(bad, with("v/c", "1", "a")+"containerEdits: {hooks: [~]}\n"),
		"nil net":    text(bad, with("v/c", "1", "a")+"containerEdits: {netDevices: [~]}\n"),
		"relative":   text(bad, with("v/c", "1", "a")+"containerEdits: {hooks: [{hookName: poststop, path: sh}]}\n"),
		"root":       text(bad, with("v/c", "1", "a")+"containerEdits: {mounts: [{hostPath: /, containerPath: /}]}\n"),
		"bomb": text(bad,
			"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"+
				"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n"),
		"deep": text(bad, strings.Repeat("[", 100_000)),
	} {
		t.Run(name, func(t *testing.T) {
			check(t, make())
			defer os.RemoveAll(bad)
			wantEnv(t, s, "v/good=a", "A=1")
			wantNone(t, s, "v/c=a", bad)
		})
	}
}

func text(path, text string) func() error {
	return func() error { return os.WriteFile(path, []byte(text), 0o644) }
}

// All files together have a bound, and so has a directory.
func TestBounds(t *testing.T) {
	dir := t.TempDir()
	// The parser of YAML, slow with -race, does not look at what follows the first document.
	big := with("v/big", "1", "a") + "...\n---\nx: " + strings.Repeat("x", maxFile-200)
	for i := range maxBytes/maxFile + 1 {
		write(t, fmt.Sprintf("%s/%03d.yaml", dir, i), strings.Replace(big, "v/big", fmt.Sprintf("v/big%d", i), 1))
	}
	s := New([]string{dir})
	wantEnv(t, s, "v/big0=a", "A=1")
	wantNone(t, s, fmt.Sprintf("v/big%d=a", maxBytes/maxFile), "larger than")

	many := t.TempDir()
	for i := range maxEntries + 1 {
		check(t, os.Symlink("nothing", fmt.Sprintf("%s/%d.yaml", many, i)))
	}
	wantNone(t, New([]string{many}), "v/c=a", "entries")
}

// A device whose file promises what is not there is refused before the OCI runtime sees
// it.
func TestAbsent(t *testing.T) {
	dir := t.TempDir()
	s := New([]string{dir})
	for name, edits := range map[string]string{
		"device": "deviceNodes: [{path: /dev/nothing-here}]",
		"mount":  "mounts: [{hostPath: /nothing/here, containerPath: /mnt}]",
		"hook":   "hooks: [{hookName: createRuntime, path: /nothing/here}]",
	} {
		write(t, dir+"/a.yaml", with("v/c", "1", "a")+"containerEdits: {"+edits+"}\n")
		if _, err := inject(s, "v/c=a"); !errors.Is(err, kind.State) || !strings.Contains(err.Error(), "nothing") ||
			!strings.Contains(err.Error(), "v/c=a") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever a file holds, it is refused or its devices can be applied: nothing panics.
func FuzzParse(f *testing.F) {
	f.Add([]byte(with("v/c", "1", "a")))
	f.Add([]byte(with("v/c", "1", "a") + "containerEdits: {deviceNodes: [{path: /dev/null}], netDevices: [~]}\n"))
	f.Add([]byte(`{"cdiVersion":"1.1.0","kind":"v/c","devices":[{"name":"a","containerEdits":{"intelRdt":{}}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		spec, err := parse(b)
		if err != nil {
			return
		}
		l := &look{devices: map[string][]device{}}
		l.add(&file{spec: spec})
		for _, at := range l.devices {
			e := &Edits{}
			e.add(at[0])
			_ = e.Apply(&oci.Spec{Process: &oci.Process{}, Linux: &oci.Linux{}})
		}
	})
}
