// Package record is the envelope of every file that a process leaves for another
// one: JSON with a version and a checksum, replaced atomically.
package record

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrDamaged is wrapped by every error about a record that is there but cannot
// be trusted: torn, empty, of a later format, or edited by hand.
var ErrDamaged = errors.New("damaged record")

// Format is the version of the record envelope. Unknown fields inside the body
// are ignored, so this rises only when an older reader would be misled.
const Format = 1

type envelope struct {
	Version  int             `json:"version"`
	ID       string          `json:"id,omitempty"` // of the object that the record is about
	Checksum string          `json:"checksum"`     // crc32c of body, as it stands in the file
	Body     json.RawMessage `json:"body"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(body []byte) string {
	return fmt.Sprintf("crc32c:%08x", crc32.Checksum(body, castagnoli))
}

// EncodeOf turns v into the record of the object that has the id, "" for none: JSON
// with a version and a checksum, one line.
func EncodeOf(id string, v any) ([]byte, error) {
	// As json.Marshal would write an envelope, but with one copy of the body: a shim keeps
	// what it has allocated.
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"version":%d,`, Format)
	if id != "" {
		name, err := json.Marshal(id)
		if err != nil {
			return nil, fmt.Errorf("cannot encode %q: %w", id, err)
		}
		fmt.Fprintf(&b, `"id":%s,`, name)
	}
	b.WriteString(`"checksum":"`)
	sumAt := b.Len()
	b.WriteString(checksum(nil) + `","body":`) // that of the body is as long
	bodyAt := b.Len()
	if err := json.NewEncoder(&b).Encode(v); err != nil {
		return nil, fmt.Errorf("cannot encode %T: %w", v, err)
	}
	line := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	copy(line[sumAt:], checksum(line[bodyAt:]))
	return append(line, "}\n"...), nil
}

// DecodeOf reads the record of the object that has the id, "" for any, into v. Every
// failure wraps ErrDamaged. The record of another object, which somebody has copied,
// is damaged. One that names no object, as older ones do, is taken for its own.
func DecodeOf(b []byte, id string, v any) error {
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if e.Version != Format {
		return fmt.Errorf("%w: version %d, want %d", ErrDamaged, e.Version, Format)
	}
	if id != "" && e.ID != "" && e.ID != id {
		return fmt.Errorf("%w: it is the record of %q", ErrDamaged, e.ID)
	}
	body := bytes.TrimSpace(e.Body)
	if got := checksum(body); got != e.Checksum {
		return fmt.Errorf("%w: checksum %s, want %s", ErrDamaged, got, e.Checksum)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// Write replaces the record at path, as ReplaceFile does. Mode 0600:
// environments hold secrets.
func Write(path string, v any, sync bool) error { return WriteOf(path, "", v, sync) }

// WriteOf is Write for the record of the object that has the id.
func WriteOf(path, id string, v any, sync bool) error {
	b, err := EncodeOf(id, v)
	if err != nil {
		return err
	}
	return ReplaceFile(path, b, 0o600, sync)
}

// ReplaceFile replaces the file at path atomically: b is written to a hidden
// name beside it, .NAME.RANDOM, and renamed. With sync it is also on the disk,
// name included, before ReplaceFile returns.
func ReplaceFile(path string, b []byte, mode fs.FileMode, sync bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	_, err = f.Write(b)
	if err == nil && mode != 0o600 {
		err = f.Chmod(mode)
	}
	if err == nil && sync {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	if err == nil && sync {
		err = SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return nil
}

// maxRecord bounds what a reader takes in: a record holds a CRI request at the
// most, and those are at most 16 MiB.
const maxRecord = 64 << 20

// Read reads the record at path into v. A missing file is fs.ErrNotExist;
// a file that is there and cannot be used, for whatever reason, is ErrDamaged.
func Read(path string, v any) error { return ReadOf(path, "", v) }

// ReadOf is Read for the record of the object that has the id; see DecodeOf.
func ReadOf(path, id string, v any) error {
	b, err := ReadFile(path, maxRecord)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, ErrDamaged):
		return fmt.Errorf("cannot read %s: %w", path, err)
	case err != nil:
		return fmt.Errorf("cannot read %s: %w: %w", path, ErrDamaged, err)
	}
	if err := DecodeOf(b, id, v); err != nil {
		return fmt.Errorf("cannot read %s: %w", path, err)
	}
	return nil
}

// ReadFile reads a regular file of at most limit bytes. It does not block, whatever
// has the name; what is no such file is ErrDamaged.
func ReadFile(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > limit {
		return nil, fmt.Errorf("%w: %s is no file of at most %d bytes: mode %s, size %d",
			ErrDamaged, path, limit, st.Mode(), st.Size())
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// SyncDir makes the names in a directory durable.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
