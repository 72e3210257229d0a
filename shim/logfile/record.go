package logfile

import "time"

// Stream says which of a container's outputs a record belongs to.
type Stream uint8

const (
	Stdout Stream = iota
	Stderr
	streams // how many there are
)

func (s Stream) String() string {
	if s == Stderr {
		return "stderr"
	}
	return "stdout"
}

// MaxLine is the most text, in bytes, that one record holds. A longer line
// becomes several.
const MaxLine = 16 << 10

const (
	full    = 'F' // a newline follows the text
	partial = 'P' // the text goes on in the stream's next record
)

// The zone is always UTC: one length for all, and a log that sorts.
const timeLayout = "2006-01-02T15:04:05.000000000Z"

const (
	headerLen = len(timeLayout) + len(" stdout F ")
	tagAt     = headerLen - 2
	maxRecord = headerLen + MaxLine + len("\n")
)

// header is what stands before the text of a record.
func header(at time.Time, s Stream, tag byte) [headerLen]byte {
	var h [headerLen]byte
	b := at.UTC().AppendFormat(h[:0], timeLayout)
	b = append(b, ' ')
	b = append(b, s.String()...)
	b = append(b, ' ', tag, ' ')
	return [headerLen]byte(b)
}

// outputLen is how many bytes of a container's output the records in b stand for.
func outputLen(b []byte, records, partials int) int {
	return len(b) - records*headerLen - partials
}
