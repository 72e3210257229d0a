package rundir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// ErrExists says that there is an exit record already. The first one stays.
var ErrExists = errors.New("an exit record exists")

// ExitFile is an exit record to come. Its room on the file system is taken when
// it is prepared, so that a full one cannot lose the record later.
type ExitFile struct {
	dir  string
	f    *os.File
	sync bool
	// again says that it was made in the place of another one, which is enough.
	again bool
}

// exitRoom is more than an encoded Exit takes; Commit cuts the file to size.
const exitRoom = 4096

// PrepareExit takes the room for an exit record in dir. With sync, Commit also
// puts it on the disk. Close or Commit it.
func PrepareExit(dir string, sync bool) (*ExitFile, error) {
	f, err := os.CreateTemp(dir, "."+ExitName+".*")
	if err != nil {
		return nil, fmt.Errorf("cannot prepare the exit record in %s: %w", dir, err)
	}
	e := &ExitFile{dir: dir, f: f, sync: sync}
	err = syscall.Fallocate(int(f.Fd()), 0, 0, exitRoom)
	if err != nil && !errors.Is(err, syscall.EOPNOTSUPP) {
		e.Close()
		return nil, fmt.Errorf("cannot take room for the exit record in %s: %w", dir, err)
	}
	return e, nil
}

// ResumeExit finds the room that PrepareExit has taken in dir, or takes it. Only the
// holder of the run directory's lock may call it.
func ResumeExit(dir string, sync bool) (*ExitFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot prepare the exit record in %s: %w", dir, err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "."+ExitName+".") || !e.Type().IsRegular() {
			continue
		}
		if f, err := os.OpenFile(filepath.Join(dir, e.Name()), os.O_RDWR, 0); err == nil {
			return &ExitFile{dir: dir, f: f, sync: sync}, nil
		}
	}
	return PrepareExit(dir, sync)
}

// Commit writes the record under its final name, once: if there is one already,
// it stays and the error is ErrExists. The ExitFile is closed in any case.
//
// Nobody but the holder of the run directory's lock may commit.
func (e *ExitFile) Commit(r Exit) error {
	defer e.Close()
	const keep = exitRoom / 4 // of a message at most: a shim keeps what it has allocated
	r.Message = r.Message[:min(keep, len(r.Message))]
	b, err := record.EncodeOf(filepath.Base(e.dir), r)
	for len(b) > exitRoom && r.Message != "" { // JSON can make six bytes of one
		r.Message = r.Message[:len(r.Message)/2]
		b, err = record.EncodeOf(filepath.Base(e.dir), r)
	}
	if err == nil {
		_, err = e.f.WriteAt(b, 0)
	}
	if err == nil {
		err = e.f.Truncate(int64(len(b)))
	}
	if err == nil && e.sync {
		err = e.f.Sync()
	}
	path := filepath.Join(e.dir, ExitName)
	if err == nil {
		if err = e.rename(path); errors.Is(err, fs.ErrExist) {
			err = ErrExists
		}
	}
	if err != nil && !errors.Is(err, ErrExists) && !e.again {
		// Somebody has removed the prepared file, or the disk failed. What room there is now
		// must do.
		var second *ExitFile
		if second, err = PrepareExit(e.dir, e.sync); err == nil {
			second.again = true
			return second.Commit(r)
		}
	}
	if err == nil && e.sync {
		if err = record.SyncDir(e.dir); err != nil {
			err = record.SyncDir(e.dir) // nobody else will try again
		}
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return nil
}

// rename gives the record its name. What has it already stays, unless that is no exit
// record of this container.
func (e *ExitFile) rename(path string) error {
	err := renameOnce(e.f.Name(), path)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if _, rerr := ReadExitIn(e.dir); !errors.Is(rerr, record.ErrDamaged) {
		return err
	}
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	return renameOnce(e.f.Name(), path)
}

// renameOnce replaces nothing: write-once by the kernel. On a file system that has no such
// rename it makes a link, for which a tmpfs needs an inode more.
func renameOnce(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return os.Link(from, to)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// Close gives the room back if Commit was not called. It may be called twice.
func (e *ExitFile) Close() {
	os.Remove(e.f.Name())
	e.f.Close()
}
