// Package mounts reads the mount table of a process, however long its lines are: an overlay
// has the names of all its layers in one.
package mounts

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is a line of the table; proc_pid_mountinfo(5) has the fields.
type Mount struct {
	ID        string
	Root      string // of the mount in its file system
	Point     string // where it is mounted, for the process
	Peers     string // the optional fields, such as shared:7
	Kind      string // of the file system
	FSOptions string // of the file system, as they stand in the table: some characters are escaped
}

// Self is the table of this process.
const Self = "/proc/self/mountinfo"

// maxLine is far above what the kernel takes as options of one mount, in bytes.
const maxLine = 64 << 20

// Read reads the table at path. What is mounted on top of something comes after it.
func Read(path string) ([]Mount, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parse(f)
}

func parse(table io.Reader) (all []Mount, err error) {
	lines := bufio.NewScanner(table)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		before, after, _ := strings.Cut(lines.Text(), " - ")
		m := strings.Fields(before)
		super := strings.SplitN(after, " ", 3) // the second, the source, may be empty
		if len(m) < 6 || len(super) < 3 {
			continue
		}
		all = append(all, Mount{
			ID:        m[0],
			Root:      unescape(m[3]),
			Point:     unescape(m[4]),
			Peers:     strings.Join(m[6:], " "),
			Kind:      super[0],
			FSOptions: super[2],
		})
	}
	return all, lines.Err()
}

// unescape replaces \OOO, three octal digits, by the byte that it stands for.
func unescape(text string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(text, `\`)
		if !found {
			break
		}
		b.WriteString(before)
		text = after
		if len(text) >= 3 {
			if c, err := strconv.ParseUint(text[:3], 8, 8); err == nil {
				b.WriteByte(byte(c))
				text = text[3:]
				continue
			}
		}
		b.WriteByte('\\')
	}
	b.WriteString(text)
	return b.String()
}

// Below says whether it is mounted on a directory or below it. dir is absolute and clean,
// and has no links.
func (m *Mount) Below(dir string) bool {
	return dir == "/" || m.Point == dir || strings.HasPrefix(m.Point, dir+"/")
}

// Holds says whether path is on its mount point or below it; another mount may be nearer.
// path is absolute and clean, and has no links.
func (m *Mount) Holds(path string) bool {
	return m.Point == "/" || m.Point == path || strings.HasPrefix(path, m.Point+"/")
}

// Mounted says whether something is mounted at path. The table is read only on a kernel
// before Linux 5.8: many mounts take long to list.
func Mounted(path string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		return false, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
	}
	return listed(path)
}

func listed(path string) (bool, error) {
	path, err := filepath.Abs(path)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return false, err
	}
	all, err := Read(Self)
	for _, m := range all {
		if m.Point == path {
			return true, nil
		}
	}
	return false, err
}
