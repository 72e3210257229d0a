// Command testbox is the one static program, beside busybox, of the images that
// the tests run. A process that writes lines for a long time must not fork for
// each of them, as a shell would.
//
//	testbox print [-every D] [-count N] [-exit CODE]
//	                                      numbered lines, one each D; exits with CODE
//	testbox flood [-rate BYTES] [-line N] numbered lines of N bytes, BYTES a second
//	testbox wait FIFO MARK                reads a number from FIFO, writes the time
//	                                      into MARK, and exits with that number
//	testbox echo PORT                     sends back what comes on connections, with
//	                                      its end
//	testbox pour N                        zeros: "-", and after a byte of input N bytes
//	testbox drain N                       "-", and then reads N bytes
//	testbox sigwait CODE                  waits for SIGTERM as small inits do, without a
//	                                      handler, and exits with CODE
//
// All others end with 0 on SIGTERM. Lines count from 1: "line 00000001".
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// A goroutine that waits for signals has to do so on the first thread.
func init() { runtime.LockOSThread() }

func main() {
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	go func() {
		<-term
		os.Exit(0)
	}()
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testbox:", err)
		os.Exit(125)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("say print, flood, wait, echo, pour, drain or sigwait")
	}
	f := flag.NewFlagSet(args[0], flag.ExitOnError)
	every := f.Duration("every", 10*time.Millisecond, "between lines")
	count := f.Int("count", 0, "of lines, 0 is no limit")
	rate := f.Int("rate", 1<<20, "bytes a second")
	length := f.Int("line", 1000, "bytes of a line, the newline included")
	code := f.Int("exit", 0, "code, after the last line")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	switch args[0] {
	case "print":
		err := lines(*every, *count, 1, func(n int) []byte { return fmt.Appendf(nil, "line %08d\n", n) })
		if err == nil {
			os.Exit(*code)
		}
		return err
	case "flood":
		const beat = 20 * time.Millisecond
		batch := max(1, *rate/(*length)/int(time.Second/beat))
		return lines(beat, *count, batch, func(n int) []byte {
			b := fmt.Appendf(nil, "flood %08d ", n)
			b = append(b, bytes.Repeat([]byte{'x'}, max(0, *length-len(b)-1))...)
			return append(b, '\n')
		})
	case "wait":
		if f.NArg() != 2 {
			return fmt.Errorf("wait needs FIFO and MARK")
		}
		return wait(f.Arg(0), f.Arg(1))
	case "echo":
		return echo(":" + f.Arg(0))
	case "sigwait":
		return sigwait(f.Arg(0))
	case "pour", "drain":
		return bulk(args[0] == "pour", f.Arg(0))
	}
	return fmt.Errorf("there is no %q", args[0])
}

func echo(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			io.Copy(conn, conn)
			conn.Close()
		}()
	}
}

// sigwait exits with a code when rt_sigtimedwait(2) has fetched a SIGTERM.
func sigwait(number string) error {
	code, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	signal.Ignore(syscall.SIGTERM) // without the handler of the Go runtime
	set := uint64(1) << (syscall.SIGTERM - 1)
	const block, size = 0, unsafe.Sizeof(set)
	_, _, errno := syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, block, uintptr(unsafe.Pointer(&set)), 0, size, 0, 0)
	if errno != 0 {
		return errno
	}
	fmt.Println("waiting")
	for {
		n, _, errno := syscall.Syscall6(syscall.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(&set)), 0, 0, size, 0, 0)
		switch {
		case errno == syscall.EINTR:
		case errno != 0:
			return errno
		case n == uintptr(syscall.SIGTERM):
			os.Exit(code)
		}
	}
}

// bulk writes or reads bytes, in pieces of what a pipe holds. A byte before shows that
// the process runs.
func bulk(write bool, number string) error {
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		return err
	}
	if _, err := os.Stdout.WriteString("-"); err != nil {
		return err
	}
	b := make([]byte, 64<<10)
	if write {
		if _, err := os.Stdin.Read(b[:1]); err != nil {
			return err
		}
		clear(b)
	}
	for n > 0 {
		piece := b[:min(n, int64(len(b)))]
		done := 0
		if write {
			done, err = os.Stdout.Write(piece)
		} else {
			done, err = os.Stdin.Read(piece)
		}
		if err != nil {
			return err
		}
		n -= int64(done)
	}
	return nil
}

// lines writes batch lines each time, until count is reached.
func lines(every time.Duration, count, batch int, line func(n int) []byte) error {
	w := bufio.NewWriterSize(os.Stdout, 64<<10)
	tick := time.NewTicker(every)
	for n := 1; ; {
		for range batch {
			if _, err := w.Write(line(n)); err != nil {
				return err
			}
			if n++; count > 0 && n > count {
				return w.Flush()
			}
		}
		if err := w.Flush(); err != nil {
			return err
		}
		<-tick.C
	}
}

func wait(fifo, mark string) error {
	b, err := os.ReadFile(fifo)
	if err != nil {
		return err
	}
	var code int
	if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &code); err != nil {
		return err
	}
	if err := os.WriteFile(mark, fmt.Appendf(nil, "%d\n", time.Now().UnixNano()), 0o644); err != nil {
		return err
	}
	fmt.Println("leaving with", code)
	os.Exit(code)
	return nil
}
