package rootfs

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxExtents bounds the pieces of one file with holes: a reader keeps a list of them.
	maxExtents = 1 << 18
	tarBlock   = 512
	// gnuSparse begins the attributes of a file with holes (GNU tar, format 1.0), which
	// archive/tar reads and does not write. sparseAlias is as long, and is written instead.
	gnuSparse   = "GNU.sparse."
	sparseAlias = "GNU:sparse:"
)

// extent is a piece of a file that is not a hole.
type extent struct{ at, size int64 }

// extents are those of a file of which less is on the disk than it is long; nil if it has no
// hole. Nobody writes to it. More than max are ErrNoDiff.
func extents(f *os.File, st *unix.Stat_t, max int) (list []extent, err error) {
	if st.Blocks*512 >= st.Size {
		return nil, nil
	}
	list = []extent{}
	for at := int64(0); at < st.Size; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole up to the end
		}
		to := st.Size
		if err == nil {
			to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot find its holes: %w", err)
		}
		at = min(to, st.Size)
		if list = append(list, extent{from, at - from}); len(list) > max {
			return nil, fmt.Errorf("%w: a file has more than %d holes", ErrNoDiff, max)
		}
	}
	return list, nil
}

// sparse writes a file with holes. What it takes in the archive are its pieces, and a list of
// them.
func (d *differ) sparse(h *tar.Header, f *os.File, list []extent) error {
	var m strings.Builder
	data := int64(0)
	fmt.Fprintf(&m, "%d\n", len(list))
	for _, e := range list {
		fmt.Fprintf(&m, "%d\n%d\n", e.at, e.size)
		data += e.size
	}
	if rest := m.Len() % tarBlock; rest > 0 {
		m.WriteString(strings.Repeat("\x00", tarBlock-rest))
	}
	if err := d.count(h.Size); err != nil {
		return err
	}
	for key, value := range map[string]string{
		"major": "1", "minor": "0", "name": h.Name, "realsize": strconv.FormatInt(h.Size, 10),
	} {
		h.PAXRecords[sparseAlias+key] = value
	}
	h.Size = int64(m.Len()) + data
	if err := d.sparseHeader(h); err != nil {
		return err
	}
	readers := []io.Reader{strings.NewReader(m.String())}
	for _, e := range list {
		readers = append(readers, io.NewSectionReader(f, e.at, e.size))
	}
	padding := (tarBlock - h.Size%tarBlock) % tarBlock
	readers = append(readers, bytes.NewReader(make([]byte, padding)))
	n, err := io.Copy(d.to, &cancelled{d.ctx, io.MultiReader(readers...)})
	if err == nil && n != h.Size+padding {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// sparseHeader writes the headers of a file with holes, and leaves its content to the caller. The
// attributes are in a block of their own, which has no checksum.
func (d *differ) sparseHeader(h *tar.Header) error {
	if err := d.Flush(); err != nil {
		return err
	}
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(h); err != nil {
		return err
	}
	block := b.Bytes()
	// The first header is of the attributes: each is its length, a space, key=value, a newline.
	size, err := strconv.ParseInt(strings.Trim(string(block[124:136]), " \x00"), 8, 64)
	if err != nil {
		return err
	}
	for rest := block[tarBlock : tarBlock+size]; len(rest) > 0; {
		length, record, ok := bytes.Cut(rest, []byte(" "))
		n, err := strconv.Atoi(string(length))
		if !ok || err != nil || n > len(rest) {
			return fmt.Errorf("cannot write the header of a file with holes: %q", length)
		}
		if bytes.HasPrefix(record, []byte(sparseAlias)) {
			copy(record, gnuSparse)
		}
		rest = rest[n:]
	}
	_, err = d.to.Write(block)
	return err
}
