package stdio

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/shim/logfile"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// With this in its environment the test binary is a program that writes lines
// of so many bytes to its standard output.
const producerLines = "STDIO_TEST_LINES"

const benchBytes = 256 << 20

func TestMain(m *testing.M) {
	if n, err := strconv.Atoi(os.Getenv(producerLines)); err == nil {
		produce(n)
	}
	os.Exit(m.Run())
}

func produce(length int) {
	line := append(bytes.Repeat([]byte("x"), length-1), '\n')
	b := bytes.Repeat(line, 32<<10/length)
	for n := 0; n < benchBytes; n += len(b) {
		if _, err := os.Stdout.Write(b); err != nil {
			os.Exit(1)
		}
	}
	os.Exit(0)
}

// bench measures how fast consume takes what another process writes, and the
// CPU time that it says it took for that.
func bench(b *testing.B, consume func(r *os.File, dir string) unix.Rusage) {
	for _, length := range []int{80, 1000} {
		b.Run(fmt.Sprintf("%d-byte-lines", length), func(b *testing.B) {
			b.SetBytes(benchBytes)
			var cpu int64
			for b.Loop() {
				dir, err := os.MkdirTemp("", "")
				must.Succeed(b, err)
				r, w := pipe(b, true)
				producer := exec.Command("/proc/self/exe")
				producer.Env = append(os.Environ(), fmt.Sprintf("%s=%d", producerLines, length))
				producer.Stdout = w
				must.Succeed(b, producer.Start())
				w.Close()
				used := consume(r, dir)
				cpu += used.Utime.Nano() + used.Stime.Nano()
				if err := producer.Wait(); err != nil {
					b.Error(err)
				}
				b.StopTimer()
				os.RemoveAll(dir)
				b.StartTimer()
			}
			b.ReportMetric(float64(cpu)/float64(b.N)/benchBytes, "cpu-s/GB")
		})
	}
}

func BenchmarkCopy(b *testing.B) {
	usage := func() (u unix.Rusage) {
		must.Succeed(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
		return u
	}
	bench(b, func(r *os.File, dir string) unix.Rusage {
		log, err := logfile.Open(dir, "0.log")
		must.Succeed(b, err)
		defer log.Close()
		memory, err := NewMemory() // as a shim has it
		must.Succeed(b, err)
		defer memory.Close()
		before := usage()
		s := New(log, memory)
		s.Add(logfile.Stdout, r)
		<-s.Drained()
		after := usage()
		if c := log.Counters(); c.Bytes < benchBytes {
			b.Errorf("%+v", c)
		}
		return unix.Rusage{
			Utime: unix.NsecToTimeval(after.Utime.Nano() - before.Utime.Nano()),
			Stime: unix.NsecToTimeval(after.Stime.Nano() - before.Stime.Nano()),
		}
	})
}

// BenchmarkCat is what the kernel allows for the same pipe and disk, without a
// log format.
func BenchmarkCat(b *testing.B) {
	bench(b, func(r *os.File, dir string) unix.Rusage {
		defer r.Close()
		out, err := os.Create(filepath.Join(dir, "0.log"))
		must.Succeed(b, err)
		defer out.Close()
		cat := exec.Command("cat")
		cat.Stdin, cat.Stdout = r, out
		must.Succeed(b, cat.Run())
		return unix.Rusage{
			Utime: unix.NsecToTimeval(cat.ProcessState.UserTime().Nanoseconds()),
			Stime: unix.NsecToTimeval(cat.ProcessState.SystemTime().Nanoseconds()),
		}
	})
}
