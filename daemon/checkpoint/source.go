package checkpoint

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Bounds of what is read.
const (
	maxArchive = 512 << 30 // bytes, of an archive and of all that is in it
	maxEntries = 1 << 18   // CRIU saves some files for each process
	maxDump    = 64 << 20  // bytes of spec.dump, as of a spec elsewhere
	maxDeleted = 16 << 20  // bytes of deleted.files
	maxFDs     = 64 << 10  // bytes of descriptors.json
)

// descriptorsName is a file of runc: what the standard files were.
const descriptorsName = "descriptors.json"

// Source is a checkpoint that somebody gives: an archive, or a directory with its members,
// such as a layer of an image. Its errors are of the kind kind.Invalid where the checkpoint
// is at fault.
type Source struct {
	name string
	file *os.File // nil: it is a directory
	size int64
	root *os.Root

	withoutIPC bool
}

// WithoutIPC leaves out objects of System V IPC, or does not: another container of the pod
// has had them restored.
func (s *Source) WithoutIPC(leave bool) { s.withoutIPC = leave }

// OpenArchive opens an archive of the host. The caller closes it.
func OpenArchive(name string) (*Source, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, kind.Errorf(kind.NotFound, "cannot open the checkpoint %.200q: %w", name, err)
		}
		return nil, kind.Errorf(kind.Invalid, "cannot open the checkpoint %.200q: %w", name, err)
	}
	return OfFile(os.NewFile(uintptr(fd), name), name)
}

// OfFile is OpenArchive for one that is open, which is called name. The file is the Source's
// from now on, also after an error.
func OfFile(f *os.File, name string) (*Source, error) {
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = errors.New("it is not a regular file")
	case st.Size() > maxArchive:
		err = fmt.Errorf("it is larger than %d bytes", int64(maxArchive))
	}
	if err != nil {
		f.Close()
		return nil, kind.Errorf(kind.Invalid, "cannot read the checkpoint %.200q: %w", name, err)
	}
	return &Source{name: name, file: f, size: st.Size()}, nil
}

// In says whether a directory has a checkpoint in it.
func In(root *os.Root) bool {
	st, err := root.Lstat(configName)
	return err == nil && st.Mode().IsRegular()
}

// OfDirectory is a checkpoint whose members lie in a directory, which is the Source's from
// now on.
func OfDirectory(root *os.Root) *Source { return &Source{root: root} }

// Close ends the use of it.
func (s *Source) Close() error {
	if s.file != nil {
		return s.file.Close()
	}
	return s.root.Close()
}

// String names it in errors.
func (s *Source) String() string {
	if s.file != nil {
		return fmt.Sprintf("checkpoint %.200q", s.name)
	}
	return "checkpoint in the image"
}

// bad is an error that is the checkpoint's fault.
func (s *Source) bad(format string, args ...any) error {
	return kind.As(kind.Invalid, fmt.Errorf("cannot use the %s: %w", s, fmt.Errorf(format, args...)))
}

// member is called with each member that means something. r ends after size bytes.
type member func(name string, size int64, r io.Reader) error

// each calls f for all members, in whatever order.
func (s *Source) each(f member) error {
	if s.file == nil {
		return s.eachInDirectory(f)
	}
	tr := tar.NewReader(io.NewSectionReader(s.file, 0, s.size))
	total := int64(0)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return s.bad("it is not a tar archive, or a damaged one: %w", err)
		}
		name := path.Clean(strings.TrimLeft(h.Name, "/"))
		if total += h.Size; n >= maxEntries || h.Size < 0 || total > s.size {
			return s.bad("it has too many entries, or more in them than the file has (entry %.200q)", h.Name)
		}
		if !means(name) {
			continue
		}
		if h.Typeflag == tar.TypeDir && name == imagesName {
			continue
		}
		if h.Typeflag != tar.TypeReg {
			return s.bad("%.200q is not a regular file but type %q", h.Name, h.Typeflag)
		}
		if err := f(name, h.Size, tr); err != nil {
			return err
		}
	}
}

// means says whether a member is used.
func means(name string) bool {
	switch name {
	case specName, configName, diffName, deletedName, imagesName:
		return true
	}
	return path.Dir(name) == imagesName
}

func (s *Source) eachInDirectory(f member) error {
	names := []string{specName, configName, diffName, deletedName}
	dir, err := s.root.OpenFile(imagesName, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return s.bad("%w", err)
	}
	defer dir.Close()
	entries, err := dir.ReadDir(maxEntries)
	if err != nil && err != io.EOF {
		return s.bad("%w", err)
	}
	for _, e := range entries {
		names = append(names, path.Join(imagesName, e.Name()))
	}
	total := int64(0)
	for _, name := range names {
		size, err := s.inDirectory(name, maxArchive-total, f)
		if err != nil {
			return err
		}
		total += size
	}
	return nil
}

// inDirectory calls f for one member, unless it is missing.
func (s *Source) inDirectory(name string, limit int64, f member) (int64, error) {
	file, err := s.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, s.bad("%w", err)
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return 0, s.bad("%w", err)
	}
	if !st.Mode().IsRegular() || st.Size() > limit {
		return 0, s.bad("%.200q is not a regular file, or too large", name)
	}
	return st.Size(), f(name, st.Size(), io.LimitReader(file, st.Size()))
}

// Info is what has to be known of a checkpoint before it is restored.
type Info struct {
	Config Config
	Spec   specs.Spec
}

// Info reads it.
func (s *Source) Info() (*Info, error) {
	info := new(Info)
	missing := map[string]any{specName: &info.Spec, configName: &info.Config}
	err := s.each(func(name string, size int64, r io.Reader) error {
		v := missing[name]
		if v == nil {
			return nil
		}
		delete(missing, name)
		if size > maxDump {
			return s.bad("%s is larger than %d bytes", name, int64(maxDump))
		}
		b, err := io.ReadAll(r)
		if err == nil {
			err = json.Unmarshal(b, v)
		}
		if err != nil {
			return s.bad("%s: %w", name, err)
		}
		return nil
	})
	if err == nil && len(missing) > 0 {
		err = s.bad("it has no %s, or no %s", configName, specName)
	}
	if err == nil && (info.Spec.Process == nil || len(info.Spec.Process.Args) == 0 || info.Spec.Linux == nil) {
		err = s.bad("%s has no process", specName)
	}
	return info, err
}

// Unpack puts what a container is made from into an empty directory, as ImagesDir and
// DiffPath have it. hostname is that of the pod. whiteouts is a layer more, which removes what other runtimes list.
func (s *Source) Unpack(ctx context.Context, dir, hostname string) (whiteouts []byte, err error) {
	if err := os.Mkdir(ImagesDir(dir), 0o700); err != nil {
		return nil, fmt.Errorf("cannot unpack the %s: %w", s, err)
	}
	err = s.each(func(name string, size int64, r io.Reader) (err error) {
		switch {
		case name == deletedName:
			whiteouts, err = s.whiteouts(size, r)
		case s.withoutIPC && isIPC(name):
		case strings.HasPrefix(name, path.Join(imagesName, utsPrefix)):
			err = s.putNames(filepath.Join(dir, name), hostname, size, r)
		case name == diffName, path.Dir(name) == imagesName:
			err = s.put(ctx, filepath.Join(dir, name), size, r)
		}
		return err
	})
	if err == nil {
		err = s.checkDescriptors(filepath.Join(ImagesDir(dir), descriptorsName))
	}
	return whiteouts, err
}

func (s *Source) put(ctx context.Context, to string, size int64, r io.Reader) error {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return s.bad("%.200q is in it twice", filepath.Base(to))
	}
	if err != nil {
		return fmt.Errorf("cannot unpack the %s: %w", s, err)
	}
	_, err = copyN(ctx, f, r, size)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cannot unpack the %s: %w", s, err)
	}
	return nil
}

// checkDescriptors makes sure that runc gets descriptors of three standard files: it would
// pass on any number of them.
func (s *Source) checkDescriptors(name string) error {
	st, err := os.Lstat(name)
	if err != nil {
		return s.bad("it has no %s/%s", imagesName, descriptorsName)
	}
	var list []string
	var b []byte
	if st.Size() <= maxFDs {
		b, err = os.ReadFile(name)
	}
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil || len(list) > 3 {
		return s.bad("%s is no list of three standard files", descriptorsName)
	}
	return nil
}

// whiteouts makes a layer that removes the files of a list.
func (s *Source) whiteouts(size int64, r io.Reader) ([]byte, error) {
	var list []string
	if size > maxDeleted {
		return nil, s.bad("%s is larger than %d bytes", deletedName, int64(maxDeleted))
	}
	b, err := io.ReadAll(r)
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil || len(list) > maxEntries {
		return nil, s.bad("%s is no list of files, or too long", deletedName)
	}
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for _, name := range list {
		name = path.Clean("/" + name)[1:]
		if name == "" {
			return nil, s.bad("%s names the root", deletedName)
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: path.Join(path.Dir(name), ".wh."+path.Base(name)), Mode: 0o600}
		if err := tw.WriteHeader(h); err != nil {
			return nil, s.bad("%s: %w", deletedName, err)
		}
	}
	return layer.Bytes(), tw.Close()
}
