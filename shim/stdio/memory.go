package stdio

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/shim/logfile"
)

const (
	bufferSize = 64 << 10
	streams    = 2    // logfile.Stdout, logfile.Stderr
	dataAt     = 1024 // of the first output; its idle part shares a page with what lies before
	memorySize = 4096 + streams*bufferSize
)

// layout is the version of what a Memory holds. A process that finds another one
// does not go on with it.
const layout = 1

// Memory is what is known of outputs but neither in a pipe nor in the log: the
// beginning of a line that has no end yet, and the state of the log. It is a memfd
// that is mapped, so that it outlives the process if its descriptor does.
//
// A process that is killed while it takes a read to the log leaves a Memory in
// which that read, and the beginning of a line before it, is missing. Nothing is
// ever in it that is in the log already.
type Memory struct {
	file *os.File
	data []byte
	head *memoryHead // at the beginning of data
}

type memoryHead struct {
	layout uint64
	held   [streams]atomic.Uint64 // bytes that wait at the beginning of an output's part
	log    logfile.State
}

// The compiler refuses a head that does not fit.
const _ = uint(dataAt - unsafe.Sizeof(memoryHead{}))

// NewMemory makes an empty one. Close it after the Hub that uses it.
func NewMemory() (*Memory, error) {
	fd, err := unix.MemfdCreate("holdfast-stdio", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make memory for outputs: %w", err)
	}
	file := os.NewFile(uintptr(fd), "memory of outputs")
	if err := unix.Ftruncate(fd, memorySize); err != nil {
		file.Close()
		return nil, fmt.Errorf("cannot make memory for outputs: %w", err)
	}
	m, err := mapMemory(fd, file)
	if err == nil {
		m.head.layout = layout
	}
	return m, err
}

// OpenMemory maps one that another process has left. It owns file, and closes it
// after an error, too.
func OpenMemory(file *os.File) (*Memory, error) {
	var st unix.Stat_t
	fd := int(file.Fd())
	err := unix.Fstat(fd, &st)
	if err == nil && st.Size != memorySize {
		err = fmt.Errorf("it has %d bytes, not %d", st.Size, memorySize)
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("cannot use memory of outputs: %w", err)
	}
	m, err := mapMemory(fd, file)
	if err == nil && m.head.layout != layout {
		err = fmt.Errorf("cannot use memory of outputs: its layout is %d, not %d", m.head.layout, layout)
		m.Close()
		return nil, err
	}
	return m, err
}

func mapMemory(fd int, file *os.File) (*Memory, error) {
	data, err := unix.Mmap(fd, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("cannot map memory of outputs: %w", err)
	}
	return &Memory{file: file, data: data, head: (*memoryHead)(unsafe.Pointer(&data[0]))}, nil
}

// Log is where the log remembers its state.
func (m *Memory) Log() *logfile.State { return &m.head.log }

// File stays owned by the Memory.
func (m *Memory) File() *os.File { return m.file }

// Close unmaps it. The Hub and the log that use it are closed before.
func (m *Memory) Close() {
	unix.Munmap(m.data)
	m.file.Close()
}

// part is the memory of one output.
func (m *Memory) part(s logfile.Stream) *part {
	at := dataAt
	if s > 0 {
		at = memorySize - int(s)*bufferSize
	}
	return &part{
		data:   m.data[at : at+bufferSize : at+bufferSize],
		held:   &m.head.held[s],
		advice: unix.MADV_REMOVE,
	}
}

// part is where an output is read to.
type part struct {
	data   []byte
	held   *atomic.Uint64 // bytes at the beginning: a line that has no end yet
	advice int            // takes pages out of memory
}

// privatePart is for an output that ends with this process. free it.
func privatePart() *part {
	data, err := unix.Mmap(-1, 0, bufferSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("cannot map %d bytes: %v", bufferSize, err)) // as the heap does
	}
	return &part{data: data, held: new(atomic.Uint64), advice: unix.MADV_DONTNEED}
}

func (p *part) free() {
	if p.advice == unix.MADV_DONTNEED {
		unix.Munmap(p.data)
	}
}

// trim gives back all pages but those of the first keep bytes, which are at least
// one. Pages are those of the kernel, to which a part is not aligned.
func (p *part) trim(keep int) {
	const page = 4096
	start := uintptr(unsafe.Pointer(&p.data[0]))
	first := int((start+uintptr(keep)+page-1)&^(page-1) - start)
	last := int((start+bufferSize+page-1)&^(page-1) - start) // nothing lies behind the part in its last page
	if first < last {
		unix.Madvise(unsafe.Slice(&p.data[0], last)[first:], p.advice)
	}
}
