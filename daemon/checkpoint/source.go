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

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Bounds of what is read.
const (
	maxArchive = 512 << 30 // bytes, of an archive and of all that is in it
	maxEntries = 1 << 18   // CRIU saves some files for each process
	maxFDs     = 64 << 10  // bytes of descriptors.json
	// maxDecoded bounds the bytes of all of one checkpoint that is decoded: JSON takes some
	// fifty times its size when it is.
	maxDecoded = 4 << 20
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
	dir  *os.File

	decoded    int64 // bytes
	withoutIPC bool
}

// WithoutIPC leaves out objects of System V IPC, or does not: another container of the pod
// has had them restored.
func (s *Source) WithoutIPC(leave bool) { s.withoutIPC = leave }

// OpenArchive opens an archive of the host. The caller closes it.
func OpenArchive(name string) (*Source, error) {
	dir, err := Directory(filepath.Dir(name))
	if err == nil {
		defer dir.Close()
		return OpenIn(dir, filepath.Base(name))
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = kind.Errorf(kind.NotFound, "%w", err)
	}
	return nil, fmt.Errorf("cannot open the checkpoint %.200q: %w", name, err)
}

// OpenIn is OpenArchive for a name in an open directory, which stays the caller's.
func OpenIn(dir *os.File, name string) (*Source, error) {
	path := filepath.Join(dir.Name(), name)
	f, err := beneath.FileAt(dir, name, maxArchive)
	if err == nil {
		var st os.FileInfo
		if st, err = f.Stat(); err == nil {
			return &Source{name: path, file: f, size: st.Size()}, nil
		}
		f.Close()
	}
	of := kind.Invalid
	if errors.Is(err, fs.ErrNotExist) {
		of = kind.NotFound
	}
	return nil, kind.Errorf(of, "cannot open the checkpoint %.200q: %w", path, err)
}

// In says whether a directory has a checkpoint in it.
func In(dir *os.File) bool {
	f, err := beneath.FileAt(dir, configName, maxArchive)
	if err == nil {
		f.Close()
	}
	return err == nil
}

// OfDirectory is a checkpoint whose members lie in a directory, which is the Source's from
// now on.
func OfDirectory(dir *os.File) *Source { return &Source{dir: dir} }

// Close ends the use of it.
func (s *Source) Close() error {
	if s.file != nil {
		return s.file.Close()
	}
	return s.dir.Close()
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
	fd, err := beneath.DirAt(int(s.dir.Fd()), imagesName)
	if err != nil {
		return s.bad("cannot open %s: %w", imagesName, err)
	}
	held := os.NewFile(uintptr(fd), imagesName)
	defer held.Close()
	dir, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return s.bad("%w", err)
	}
	defer dir.Close()
	entries, err := dir.Readdirnames(maxEntries)
	if err != nil && err != io.EOF {
		return s.bad("%w", err)
	}
	for _, name := range entries {
		names = append(names, path.Join(imagesName, name))
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
	file, err := beneath.FileAt(s.dir, name, limit)
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
	return st.Size(), f(name, st.Size(), io.LimitReader(file, st.Size()))
}

// decode reads a member that is JSON.
func (s *Source) decode(name string, size, limit int64, r io.Reader, v any) error {
	if s.decoded += size; size > limit || s.decoded > maxDecoded {
		return s.bad("%s is larger than %d bytes, or all such files than %d", name, limit, int64(maxDecoded))
	}
	b, err := io.ReadAll(io.LimitReader(r, size))
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return s.bad("%s: %w", name, err)
	}
	return nil
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
		return s.decode(name, size, maxDecoded, r, v)
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

// create makes the file of a member.
func (s *Source) create(to string) (*os.File, error) {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	switch {
	case errors.Is(err, fs.ErrExist):
		return nil, s.bad("%.200q is in it twice", filepath.Base(to))
	case errors.Is(err, unix.ENAMETOOLONG):
		return nil, s.bad("%.200q: %w", filepath.Base(to), unix.ENAMETOOLONG)
	case err != nil:
		return nil, fmt.Errorf("cannot unpack the %s: %w", s, err)
	}
	return f, nil
}

// put writes a member. Its holes, and what is as good as one, stay holes: a checkpoint that
// takes no room on one disk is to take none on the other.
func (s *Source) put(ctx context.Context, to string, size int64, r io.Reader) error {
	f, err := s.create(to)
	if err != nil {
		return err
	}
	w := &Spare{File: f}
	err = copyN(ctx, w, r, size)
	if err == nil {
		err = w.Finish()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cannot unpack the %s: %w", s, err)
	}
	return nil
}

// checkDescriptors makes sure that runc gets descriptors of three standard files: it would
// pass on any number of them.
func (s *Source) checkDescriptors(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return s.bad("it has no %s/%s", imagesName, descriptorsName)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return s.bad("%w", err)
	}
	var list []string
	if err := s.decode(descriptorsName, st.Size(), maxFDs, f, &list); err != nil {
		return err
	}
	if len(list) > 3 {
		return s.bad("%s is no list of three standard files", descriptorsName)
	}
	return nil
}

// whiteouts makes a layer that removes the files of a list.
func (s *Source) whiteouts(size int64, r io.Reader) ([]byte, error) {
	var list []string
	if err := s.decode(deletedName, size, maxDecoded, r, &list); err != nil {
		return nil, err
	}
	if len(list) > maxEntries {
		return nil, s.bad("%s is too long", deletedName)
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
