package rootfs

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// stream is an archive that is made while it is read: next gives the following
// piece, or nil at the end. It notes how large the heap gets meanwhile.
type stream struct {
	next  func() []byte
	rest  []byte
	reads int
	peak  uint64
}

func (s *stream) Read(p []byte) (int, error) {
	if s.reads++; s.reads%64 == 1 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		s.peak = max(s.peak, m.HeapInuse)
	}
	if len(s.rest) == 0 {
		if s.rest = s.next(); s.rest == nil {
			return 0, io.EOF
		}
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// pieces of an archive, one after the other.
func pieces(l ...[]byte) func() []byte {
	return func() []byte {
		if len(l) == 0 {
			return nil
		}
		b := l[0]
		l = l[1:]
		return b
	}
}

// endless repeats what piece makes of a number, up to so many times.
func endless(times int, piece func(i int) []byte) func() []byte {
	i := -1
	return func() []byte {
		if i++; i >= times {
			return nil
		}
		return piece(i)
	}
}

// header is one entry with a size or records that may be lies, without its end.
func header(kind byte, name string, size int64, change func(block []byte)) []byte {
	var b bytes.Buffer
	rawHeader{kind: kind, name: name, size: max(size, 0)}.write(&b, "")
	if change != nil {
		change(b.Bytes())
		repair(b.Bytes())
	}
	return b.Bytes()
}

func withPAX(records string, entry []byte) []byte {
	var b bytes.Buffer
	rawHeader{kind: tar.TypeXHeader, name: "pax", size: int64(len(records))}.write(&b, records)
	b.Write(entry)
	return b.Bytes()
}

// What is made to exhaust a node is refused, for what it is, and costs the
// daemon no memory to speak of.
func TestBombs(t *testing.T) {
	needRoot(t)
	many, total := 30_000, int64(128<<20)
	if os.Getenv("HOLDFAST_DRILL") != "" {
		many, total = 2_000_000, 4<<30
	}
	zeros := make([]byte, 1<<20)
	file := header(tar.TypeReg, "f", 0, nil)
	xattrs := func(n, size int) string {
		var b strings.Builder
		for i := range n {
			b.WriteString(paxRecord(fmt.Sprintf("SCHILY.xattr.user.%d", i), strings.Repeat("v", size)))
		}
		return b.String()
	}
	// Each link leads to the bottom of what is there.
	var deep []entry
	for i := range 60 {
		at := strings.Repeat("d/", 900)
		if i > 0 {
			at = fmt.Sprintf("l%d/", i-1) + at
		}
		deep = append(
			deep,
			entry{kind: tar.TypeDir, name: at},
			entry{kind: tar.TypeSymlink, name: fmt.Sprint("l", i), link: at},
		)
	}
	type bomb struct {
		next func() []byte
		want string // in the error; "" for a layer that is fine
	}
	bombs := map[string]bomb{
		"zeros after the end": {endless(1<<20, func(int) []byte { return zeros }), "larger than the limit"},
		"zeros in a file":     {pieces(header(tar.TypeReg, "big", 1<<33-1, nil)), `entry "big": bad layer: more than`},
		"a size of 8 EiB": {pieces(
			withPAX(paxRecord("size", fmt.Sprint(math.MaxInt64)), file),
		), `entry "f": bad layer: more than`},
		"a size beyond 64 bits": {pieces(withPAX(paxRecord("size", "9223372036854775808"), file)),
			"invalid tar header"},
		"a negative size": {pieces(withPAX(paxRecord("size", "-1"), file)), "invalid tar header"},
		"a negative size, base 256": {pieces(header(tar.TypeReg, "f", 0, func(b []byte) {
			copy(b[124:136], bytes.Repeat([]byte{0xff}, 12))
		})), "invalid tar header"},
		"a size of 95 bits": {pieces(header(tar.TypeReg, "f", 0, func(b []byte) {
			copy(b[124:136], append([]byte{0x80}, bytes.Repeat([]byte{0x7f}, 11)...))
		})), "invalid tar header"},
		"an octal size of 12 digits": {
			pieces(header(tar.TypeReg, "f", 0, func(b []byte) { copy(b[124:136], "777777777777") })),
			"more than",
		},
		"no octal size": {pieces(
			header(tar.TypeReg, "f", 0, func(b []byte) { copy(b[124:136], "89abcdefghi") }),
		), "invalid tar header"},
		"a user of 40 bits": {pieces(header(tar.TypeReg, "f", 0, func(b []byte) {
			copy(b[108:116], []byte{0x80, 0, 0, 0xff, 0, 0, 0, 0})
		})), `entry "f": bad layer: owner`},
		"a hole of 8 EiB": {pieces(withPAX(paxRecord("GNU.sparse.major", "1")+paxRecord("GNU.sparse.minor", "0")+
			paxRecord("GNU.sparse.name", "hole")+paxRecord("GNU.sparse.realsize", fmt.Sprint(math.MaxInt64)),
			append(
				header(tar.TypeReg, "f", 512, nil),
				"1\n9223372036854775807\n0\n"+strings.Repeat("\x00", 512-24)...,
			))), `entry "hole": bad layer: more than`},
		"a sparse map without end": {pieces(withPAX(paxRecord("GNU.sparse.major", "1")+paxRecord("GNU.sparse.minor",
			"0")+
			paxRecord("GNU.sparse.name", "hole")+paxRecord("GNU.sparse.realsize", "1000"),
			append(header(tar.TypeReg, "f", 1<<29, nil), strings.Repeat("99999999999999\n",
				1000)...)), zeros), "bad layer"},
		"PAX records of 1 GiB": {pieces(
			header(tar.TypeXHeader, "pax", 1<<30, nil),
			zeros,
			zeros,
		), "header field too long"},
		"a long name of 1 GiB": {pieces(
			header(tar.TypeGNULongName, "long", 1<<30, nil),
			zeros,
			zeros,
		), "header field too long"},
		"100,000 attributes":     {pieces(withPAX(xattrs(100_000, 10), file)), "header field too long"},
		"an attribute of 64 KiB": {pieces(withPAX(xattrs(1, 64<<10+1), file)), `entry "f"`},
		"a name of 256 bytes": {pieces(withPAX(paxRecord("path", strings.Repeat("n", 256)), file)),
			"file name too long"},
		"a name of 500 KiB": {pieces(
			withPAX(paxRecord("path", strings.Repeat("n/", 250<<10)), file),
		), "file name too long"},
		"10,000 directories deep": {
			pieces(withPAX(paxRecord("path", strings.Repeat("d/", 10_000)), file)),
			"file name too long",
		},
		"54,000 deep, by links": {pieces(archiveOf(deep)), "file name too long"},
		"the end of time": {pieces(withPAX(paxRecord("mtime", fmt.Sprint(math.MaxInt64)), file), zeros[:1024]),
			""},
		"the year 1e20": {pieces(
			withPAX(paxRecord("mtime", "31556952"+strings.Repeat("0", 20)), file),
		), "invalid tar header"},
		"many entries": {endless(1<<30, func(i int) []byte { return header(tar.TypeFifo, fmt.Sprint(i%1000), 0, nil) }),
			fmt.Sprintf("more than %d entries", many)},
		"many attributes": {endless(100, func(int) []byte {
			return withPAX(strings.Repeat(paxRecord("c", strings.Repeat("v", 80)), 10_000), file)
		}), ""},
		"names that are dots": {endless(1<<30, func(i int) []byte {
			return withPAX(
				paxRecord("path", fmt.Sprint(strings.Repeat("/.", 100_000), i%1000)),
				header(tar.TypeDir, "d", 0, nil),
			)
		}), "larger than the limit"},
	}
	const remembered = "directories to remember"
	if os.Getenv("HOLDFAST_DRILL") != "" {
		bombs[remembered] = bomb{endless(1<<30, func(i int) []byte {
			return withPAX(paxRecord("path", fmt.Sprint(strings.Repeat("d/", 1950), i)), header(tar.TypeDir, "d", 0,
				nil))
		}), "too many directories"}
	}
	for name, c := range bombs {
		t.Run(name, func(t *testing.T) {
			g := newGuarded(t)
			g.Limits = Limits{Bytes: total, Entries: int64(many)}
			var before runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			s := &stream{next: c.next}
			err := g.Apply(t.Context(), digest.FromString("a lie"), s)
			if after := g.state(t); after != g.before {
				t.Fatalf("changed outside of the layer:\n%s\nwas\n%s", after, g.before)
			}
			want := c.want
			if want == "" {
				want = "its digest is"
			}
			if !errors.Is(err, ErrBadLayer) || errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
			if len(err.Error()) > 2000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			allowed := int64(64 << 20)
			if name == remembered {
				allowed += 2 * maxMemory
			}
			if grown := int64(s.peak) - int64(before.HeapInuse); grown > allowed {
				t.Errorf("it took %d MiB", grown>>20)
			}
			empty(t, filepath.Join(g.dir, tmpName))
		})
	}
}

// ext4 has 4 KiB for all attributes of a file. That is no full disk, which a
// pull would make room for.
func TestAttributesBeyondTheFileSystem(t *testing.T) {
	s := open(t, filepath.Join(smallDisk(t, "32M"), "layers"))
	b := archive(t, e{name: "f", pax: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("x", 5000)}})
	err := s.Apply(t.Context(), digest.FromBytes(b), bytes.NewReader(b))
	if !errors.Is(err, ErrBadLayer) || errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), `entry "f"`) {
		t.Errorf("got %v", err)
	}
	s.Close()
}

// Attributes of directories without entries are copied one directory at a time.
func TestImpliedAttributesTakeLittleMemory(t *testing.T) { // not parallel: it measures
	s := open(t, t.TempDir())
	const dirs, size = 2000, 3500
	var below, above []e
	pax := map[string]string{"SCHILY.xattr.user.a": strings.Repeat("x", size)}
	for i := range dirs {
		below = append(below, e{name: fmt.Sprintf("d/%d", i), typ: tar.TypeDir, pax: pax})
		above = append(above, e{name: fmt.Sprintf("d/%d/f", i)})
	}
	ids := []digest.Digest{apply(t, s, below...), apply(t, s, above...)}
	below, above = nil, nil
	live := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, most := live(), uint64(0)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				most = max(most, live())
			}
		}
	}()
	err := s.prepareUpper(t.Context(), t.TempDir(), ids, nil)
	close(stop)
	<-done
	if took := int64(most) - int64(before); err != nil || took > dirs*size {
		t.Errorf("%d bytes for %d directories: %v", took, dirs, err)
	}
}
