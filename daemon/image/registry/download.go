package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Destination is where a blob is written to. All calls come from the goroutine
// that called Download.
type Destination interface {
	// Write appends. Its error ends the download, which returns it.
	io.Writer
	// Asking says which host is asked next. What a mirror sends may be wrong, and
	// right when another host is asked: see Distrust.
	Asking(address string, mirror bool)
	// Failed says that a request failed. Others follow, as far as they may help.
	Failed(err error)
}

// progressed is the progress, in bytes, after which a broken connection is not
// counted as a failure.
const progressed = 16 << 10

// Download brings a blob, from byte offset on, from wherever it is to be had. The
// caller verifies the digest: what comes may have gaps filled by several hosts.
func (r *Repository) Download(ctx context.Context, blob ocispec.Descriptor, offset int64, to Destination) error {
	var errs []error
	hosts := r.candidates(docker.HostCapabilityPull)
	t := &transfer{blob: blob, at: offset, to: to}
	for i, h := range hosts {
		if t.complete() {
			return nil
		}
		to.Asking(addressOf(h), i < len(hosts)-1)
		err := r.transfer(ctx, h, t)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if t.writeErr != nil {
			return t.writeErr
		}
		errs = append(errs, err)
	}
	if t.complete() {
		return nil
	}
	return lastOf(errs, r.domain)
}

// transfer is the state of one Download.
type transfer struct {
	blob     ocispec.Descriptor
	at       int64 // bytes that to has
	to       Destination
	writeErr error // of to
}

func (t *transfer) complete() bool { return t.at >= t.blob.Size }

func (t *transfer) Write(b []byte) (int, error) {
	n, err := t.to.Write(b)
	t.at += int64(n)
	t.writeErr = err
	return n, err
}

// transfer brings the rest of a blob from one host.
func (r *Repository) transfer(ctx context.Context, h host, t *transfer) error {
	for failures := 0; !t.complete(); {
		before := t.at
		err := r.attempt(ctx, h, t)
		if err == nil {
			continue // the loop's condition decides
		}
		if ctx.Err() != nil || t.writeErr != nil {
			return err
		}
		t.to.Failed(err)
		if t.at-before >= progressed {
			failures = 0
			continue
		}
		failures++
		wait, ok := r.again(h, err, failures)
		if !ok || errors.Is(err, ErrTooSlow) {
			return err
		}
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
	return nil
}

// attempt is one request for the rest of a blob.
func (r *Repository) attempt(ctx context.Context, h host, t *transfer) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer func() { // at whatever it was
		if cause := context.Cause(ctx); err != nil && errors.Is(cause, ErrTooSlow) {
			err = cause
		}
	}()
	header := http.Header{"Accept-Encoding": {"identity"}} // the bytes as they are
	if t.at > 0 {
		// With its end: some registries do not know the open form.
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", t.at, t.blob.Size-1))
	}
	var received tally
	defer r.watch(&received, t.blob.Digest, cancel)()
	resp, err := r.do(ctx, h, http.MethodGet, header, "blobs", t.blob.Digest.String())
	if err != nil {
		if e, ok := errors.AsType[*statusError](err); ok && e.status == http.StatusRequestedRangeNotSatisfiable {
			err = fmt.Errorf("%w: %s is shorter than the manifest says: %w", ErrCorrupt, t.blob.Digest, err)
		}
		return err
	}
	defer resp.Body.Close()
	body, err := t.rest(h, resp, &received)
	if err != nil {
		return err
	}
	body = io.TeeReader(io.LimitReader(body, t.blob.Size-t.at), &received)
	if _, err = io.CopyBuffer(t, body, make([]byte, 64<<10)); err == nil && !t.complete() {
		err = io.ErrUnexpectedEOF
	}
	if err == nil || t.writeErr != nil {
		return err
	}
	return fmt.Errorf("%w: %s broke off at %d of %d bytes: %w", ErrUnavailable, h.Host, t.at, t.blob.Size, err)
}

// rest gives the body of an answer from the byte on that is needed next.
func (t *transfer) rest(h host, resp *http.Response, received *tally) (io.Reader, error) {
	switch resp.StatusCode {
	case http.StatusPartialContent:
		sent := resp.Header.Get("Content-Range")
		if !strings.HasPrefix(sent, fmt.Sprintf("bytes %d-", t.at)) {
			return nil, fmt.Errorf("%w: %s sent the range %q, asked for %d-", ErrCorrupt, h.Host, sent, t.at)
		}
		return resp.Body, nil
	case http.StatusOK:
	default:
		return nil, fmt.Errorf("%w: %s answered %s", ErrUnavailable, h.Host, resp.Status)
	}
	body, err := decode(resp, t.blob.Size)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, h.Host, err)
	}
	if resp.ContentLength >= 0 && resp.ContentLength != t.blob.Size && body == resp.Body {
		return nil, fmt.Errorf("%w: %s has %d bytes for %s, the manifest says %d",
			ErrCorrupt, h.Host, resp.ContentLength, t.blob.Digest, t.blob.Size)
	}
	// It does not know ranges: what is here already comes again.
	if _, err := io.CopyN(received, body, t.at); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, h.Host, err)
	}
	return body, nil
}

// tally counts what is written to it.
type tally struct{ atomic.Int64 }

func (t *tally) Write(b []byte) (int, error) {
	t.Add(int64(len(b)))
	return len(b), nil
}

// watchSteps is how many times a period watch looks.
const watchSteps = 10

// watch cancels an attempt that is not fast enough; call what it returns in the
// end. What came counts, also what was here already and is thrown away. One that
// stands still is noticed a period after its last bytes, or a step later.
func (r *Repository) watch(received *tally, of digest.Digest, cancel context.CancelCauseFunc) (stop func()) {
	period := r.config.ProgressTimeout
	if period == 0 {
		return func() {}
	}
	least := max(1, int64(period.Seconds()*float64(r.config.MinRate)))
	quit := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(max(1, period/watchSteps))
		defer tick.Stop()
		for past := []int64{0}; ; { // a step apart, the newest last
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			past = append(past, received.Load())
			if len(past) <= watchSteps {
				continue
			}
			if n := past[watchSteps] - past[0]; n < least {
				cancel(fmt.Errorf("%w: %w: %d bytes of %s in %s", ErrUnavailable, ErrTooSlow, n, of, period))
				return
			}
			past = past[1:]
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}
