package logfile

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkFormat is Append without the file system.
func BenchmarkFormat(b *testing.B) {
	for _, length := range []int{1, 80, 1000, 100_000} {
		b.Run(fmt.Sprintf("%d-byte-lines", length), func(b *testing.B) {
			fd, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
			check(b, err)
			f := Resume("", "", fd, new(State))
			defer f.Close()
			line := append(bytes.Repeat([]byte("x"), length-1), '\n')
			data := bytes.Repeat(line, 1+64<<10/length)[:64<<10]
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				f.Append(Stdout, time.Now(), data, false)
			}
		})
	}
}

// BenchmarkOneLine is what a single line costs before it is written.
func BenchmarkOneLine(b *testing.B) {
	fd, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	check(b, err)
	f := Resume("", "", fd, new(State))
	defer f.Close()
	line := append(bytes.Repeat([]byte("x"), 79), '\n')
	b.ReportAllocs()
	for b.Loop() {
		f.Append(Stdout, time.Now(), line, false)
	}
}
