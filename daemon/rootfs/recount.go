package rootfs

import (
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
)

// recount measures what is there. It is for archives that name something twice:
// what the second one took away may have been a whole tree, or one of several
// hard links.
func (x *extractor) recount() error {
	x.bytes, x.inodes = 0, 1
	linked := map[uint64]bool{}
	for todo := []string{"."}; len(todo) > 0; {
		name := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if name != "." {
			x.bytes += block // as for each directory that is made
		}
		fd, err := beneath.At(x.root, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if err != nil {
			return fmt.Errorf("cannot count %q: %w", name, err)
		}
		dir := os.NewFile(uintptr(fd), name)
		for err == nil {
			var names []string
			names, err = dir.Readdirnames(1024)
			for _, base := range names {
				var st unix.Stat_t
				if err := unix.Fstatat(fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
					dir.Close()
					return fmt.Errorf("cannot count %q: %w", path.Join(name, base), err)
				}
				isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
				if isDir {
					todo = append(todo, path.Join(name, base))
				} else if st.Nlink > 1 {
					if linked[st.Ino] {
						continue
					}
					linked[st.Ino] = true
				}
				x.inodes++
				if !isDir {
					x.bytes += uint64(st.Blocks) * 512
				}
			}
		}
		dir.Close()
		if err != io.EOF {
			return fmt.Errorf("cannot count %q: %w", name, err)
		}
	}
	return nil
}
