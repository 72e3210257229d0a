package checkpoint

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Members of an archive.
const (
	specName    = "spec.dump"       // the OCI spec
	configName  = "config.dump"     // Config
	imagesName  = "checkpoint"      // the directory of what CRIU has saved
	diffName    = "rootfs-diff.tar" // what the container has written, as a layer
	deletedName = "deleted.files"   // what it has removed, in archives of other runtimes
	statsName   = "stats-dump"      // of CRIU
	logName     = "dump.log"        // of CRIU
)

// Annotation is that of an image which is a checkpoint. Its value is a name of the
// container.
const Annotation = "io.kubernetes.cri-o.annotations.checkpoint.name"

// Config is config.dump.
type Config struct {
	ID           string    `json:"id"`
	Name         string    `json:"name"`
	Image        string    `json:"rootfsImage,omitempty"`     // as it was asked for
	ImageRef     string    `json:"rootfsImageRef,omitempty"`  // its id
	ImageName    string    `json:"rootfsImageName,omitempty"` // its name with a digest
	Runtime      string    `json:"runtime,omitempty"`
	CreatedAt    time.Time `json:"createdTime"`
	Checkpointed time.Time `json:"checkpointedTime"`
	Restored     bool      `json:"restored"`
}

// Parts are the directories and files of which an archive is made. All are the runtime's
// own.
type Parts struct {
	Config Config
	Spec   *specs.Spec
	Dir    string // as ImagesDir and DiffPath have it
	Logs   string // directory of CRIU's own files
}

// ImagesDir is where what CRIU saves is in a directory of a checkpoint.
func ImagesDir(dir string) string { return filepath.Join(dir, imagesName) }

// DiffPath is where what the container has written is in a directory of a checkpoint.
func DiffPath(dir string) string { return filepath.Join(dir, diffName) }

// Write writes an archive.
func (p *Parts) Write(ctx context.Context, f *os.File) error {
	w := &Spare{File: f}
	if err := p.write(ctx, w); err != nil {
		return err
	}
	return w.Finish()
}

func (p *Parts) write(ctx context.Context, w io.Writer) error {
	tw := &writer{ctx: ctx, Writer: tar.NewWriter(w)}
	decoded := maxFDs // of runc's own file
	for _, member := range []struct {
		name string
		v    any
	}{{configName, p.Config}, {specName, p.Spec}} {
		b, err := json.MarshalIndent(member.v, "", "  ")
		if err == nil && decoded+len(b) > maxDecoded {
			err = kind.Errorf(kind.State, "it is larger than %d bytes, and would not be restored", maxDecoded)
		}
		decoded += len(b)
		if err == nil {
			err = tw.bytes(member.name, b)
		}
		if err != nil {
			return fmt.Errorf("cannot write %s: %w", member.name, err)
		}
	}
	entries, err := os.ReadDir(ImagesDir(p.Dir))
	if err != nil {
		return fmt.Errorf("cannot list what CRIU has saved: %w", err)
	}
	header := &tar.Header{Typeflag: tar.TypeDir, Name: imagesName + "/", Mode: 0o700, Format: tar.FormatPAX}
	if err := tw.WriteHeader(header); err != nil {
		return err
	}
	for _, e := range entries {
		if err := tw.file(path.Join(imagesName, e.Name()), filepath.Join(ImagesDir(p.Dir), e.Name())); err != nil {
			return err
		}
	}
	for name, from := range map[string]string{
		diffName: DiffPath(p.Dir), statsName: filepath.Join(p.Logs, statsName), logName: filepath.Join(p.Logs, logName),
	} {
		if err := tw.file(name, from); err != nil {
			return err
		}
	}
	return tw.Close()
}

// writer writes members. It gives up when ctx ends.
type writer struct {
	ctx context.Context
	*tar.Writer
}

func (w *writer) bytes(name string, b []byte) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(b)), Mode: 0o600, Format: tar.FormatPAX}
	err := w.WriteHeader(h)
	if err == nil {
		_, err = w.Write(b)
	}
	return err
}

func (w *writer) file(name, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("cannot archive %s: %w", name, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("cannot archive %s: %w", name, err)
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: st.Size(), Mode: 0o600, Format: tar.FormatPAX}
	if err := w.WriteHeader(h); err != nil {
		return fmt.Errorf("cannot archive %s: %w", name, err)
	}
	if err := copyN(w.ctx, w, f, st.Size()); err != nil {
		return fmt.Errorf("cannot archive %s: %w", name, err)
	}
	return nil
}

// copyN copies n bytes, unless ctx ends first. Less is io.ErrUnexpectedEOF.
func copyN(ctx context.Context, w io.Writer, r io.Reader, n int64) (err error) {
	const chunk = 8 << 20
	for n > 0 && err == nil {
		if err = ctx.Err(); err == nil {
			var m int64
			m, err = io.CopyN(w, r, min(chunk, n))
			n -= m
		}
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}
