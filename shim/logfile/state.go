package logfile

// State is what a File remembers beyond what is in the file. It holds no
// pointers, so it may lie in memory that is handed from one process to another,
// which then goes on with the log (Resume). It changes during calls of File.
type State struct {
	// Of output: see Counters.
	bytes, lines, droppedBytes uint64

	// open says that the stream's last record in the file is a P.
	open [streams]bool
	loss loss
}

// loss is what went wrong since the log was last in order. The zero loss is none.
type loss struct {
	bytes uint64        // of output, dropped
	of    [streams]bool // whose
	cause text          // the first
	torn  text          // completes a torn record at the end of the file
}

func (l *loss) add(s Stream, n int, cause error) {
	l.bytes += uint64(n)
	l.of[s] = true
	if l.cause.n == 0 {
		l.cause.set(cause.Error())
	}
}

// text is a short string without a pointer. What does not fit is cut off.
type text struct {
	n uint8
	b [200]byte
}

func (t *text) set(s string)  { t.n = uint8(copy(t.b[:], s)) }
func (t *text) bytes() []byte { return t.b[:t.n] }
