package kind

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What one process answers with must be of the same kind in another.
func TestThereAndBack(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
		back error
	}{
		{Errorf(Invalid, "cmd: is empty"), codes.InvalidArgument, Invalid},
		{As(NotFound, errors.New("no container")), codes.NotFound, NotFound},
		{fmt.Errorf("cannot start: %w", State), codes.FailedPrecondition, State},
		{As(Unavailable, fmt.Errorf("no answer: %w", context.DeadlineExceeded)), codes.DeadlineExceeded,
			context.DeadlineExceeded},
		{Errorf(Closing, "the daemon ends"), codes.Unavailable, Unavailable},
		{Errorf(Exists, "another config"), codes.AlreadyExists, Exists},
		{Errorf(Aborted, "deleted"), codes.Aborted, Aborted},
		{As(Invalid, fmt.Errorf("cannot write: %w", syscall.ENOSPC)), codes.ResourceExhausted, Exhausted},
		{Errorf(Exhausted, "1000 wait"), codes.ResourceExhausted, Exhausted},
		{errors.New("no kind"), codes.Unknown, nil},
	} {
		wire := ToStatus(c.err)
		back := FromStatus(wire)
		if status.Code(wire) != c.code || back.Error() != c.err.Error() {
			t.Errorf("%v is %v, want %s; back: %v", c.err, wire, c.code, back)
		}
		for _, k := range []error{
			Invalid, NotFound, State, Unavailable, Exists, Aborted, Exhausted, Closing,
			context.DeadlineExceeded, syscall.ENOSPC,
		} {
			if errors.Is(back, k) != (k == c.back) {
				t.Errorf("%v came back as %v", c.err, k)
			}
		}
	}
	if ToStatus(nil) != nil || FromStatus(nil) != nil || As(Invalid, nil) != nil {
		t.Error("no error became one")
	}
	if s := status.Error(codes.DataLoss, "x"); ToStatus(s) != s {
		t.Error("a status was changed")
	}
}

// Whoever gave a long name is not told it again in full, and the log is not filled
// with it.
func TestTextsAreBounded(t *testing.T) {
	long := strings.Repeat("ä", 1<<20)
	err := Errorf(Invalid, "beginning %s end", long)
	s := ToStatus(err).Error()
	if len(s) > 2*maxText || !strings.Contains(s, "beginning") || !strings.HasSuffix(s, "end") || !utf8.ValidString(s) {
		t.Errorf("%d bytes: %.60q", len(s), s)
	}
	if s := ToStatus(Errorf(Invalid, "short")).Error(); !strings.HasSuffix(s, "short") {
		t.Errorf("a short text became %q", s)
	}
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: ShortenAttr}))
	log.Warn("failed", "error", err, "name", long, "took", time.Second)
	if line := b.String(); len(line) > 4*maxText || !strings.Contains(line, "took=1s") ||
		!strings.Contains(line, "level=WARN") {
		t.Errorf("%d bytes of log: %.200s", len(line), line)
	}
}
