// Package stream is the agreement of the daemon and holdfast-stream as files. The
// daemon writes what a session is to be and gives out a token for it; holdfast-stream
// serves whoever brings the token, and needs no daemon for that.
//
// The directory is STATE/stream, 0700, on a tmpfs:
//
//	tokens/TOKEN  Request, a record: a token that was not used yet (Put, Take)
//	stream.lock   held by holdfast-stream for life (Lock)
//	address       Address, a record: where it listens, and which process it is
//	stream.log    its log
//
// The directory itself is the gate (flock(2)): whoever puts a token, and
// holdfast-stream when it ends because it is idle, holds it, for some milliseconds.
// So no token is put for a process that has just decided to end.
package stream

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Kind is what a session is.
type Kind string

// The kinds, which are also the first part of the path in an URL.
const (
	Exec        Kind = "exec"
	Attach      Kind = "attach"
	PortForward Kind = "portforward"
)

// Request is what a token stands for: all that holdfast-stream has to know.
type Request struct {
	Kind   Kind     `json:"kind"`
	ID     string   `json:"id"`               // of the container, or of the pod, for logs
	RunDir string   `json:"runDir,omitempty"` // of the container: exec, attach
	Cmd    []string `json:"cmd,omitempty"`    // exec
	Stdin  bool     `json:"stdin,omitempty"`
	Stdout bool     `json:"stdout,omitempty"`
	Stderr bool     `json:"stderr,omitempty"`
	TTY    bool     `json:"tty,omitempty"`
	Netns  string   `json:"netns,omitempty"` // of the pod; empty: the host's: portforward
	Ports  []int32  `json:"ports,omitempty"` // that were asked for; none: any
}

// Lifetime is how long a token that is not used lives.
const Lifetime = time.Minute

// What is not used yet is bounded: in number, and in bytes, as a command has up to a
// MiB.
const (
	maxUnused = 1000
	maxBytes  = 16 << 20
)

// gateLimit bounds the wait for the gate: who holds it writes or removes some files.
const gateLimit = 10 * time.Second

// DirName is what the directory is called below the state directory.
const DirName = "stream"

// Names in the directory.
const (
	tokensName  = "tokens"
	lockName    = "stream.lock"
	addressName = "address"
	LogName     = "stream.log"
)

// Dir is STATE/stream.
type Dir string

// Path is the path of a name in the directory.
func (d Dir) Path(name string) string { return filepath.Join(string(d), name) }

// Make makes what is missing of the directory, open to nobody else.
func (d Dir) Make() error {
	for _, path := range []string{string(d), d.Path(tokensName)} {
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cannot make the directory of sessions: %w", err)
		}
		st, err := os.Lstat(path)
		if err == nil && !st.IsDir() {
			err = fmt.Errorf("%s is not a directory: remove it", path)
		}
		if err == nil && st.Mode().Perm() != 0o700 {
			err = os.Chmod(path, 0o700)
		}
		if err != nil {
			return fmt.Errorf("cannot make the directory of sessions: %w", err)
		}
	}
	return nil
}

// stored is the record of a token.
type stored struct {
	Request Request `json:"request"`
	BootID  string  `json:"bootId"`
}

// Put writes a request down and gives the token for it, which nobody can guess. It is
// valid once Put has returned, for Lifetime. kind.Exhausted: too many were not used.
func (d Dir) Put(ctx context.Context, r Request) (token string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot give out a token for a session: %w", err)
		}
	}()
	if err := d.Make(); err != nil {
		return "", err
	}
	gate, err := d.gate(ctx)
	if err != nil {
		return "", err
	}
	defer gate.Close()
	token = newToken(rundir.BootTime() + Lifetime)
	b, err := record.EncodeOf(token, stored{r, rundir.BootID()})
	if err != nil {
		return "", err
	}
	unused, size, err := d.sweepLocked()
	if err != nil {
		return "", err
	}
	if unused >= maxUnused || size+int64(len(b)) > maxBytes {
		return "", kind.Errorf(kind.Exhausted,
			"%d tokens with %d bytes are not used yet, of at most %d with %d bytes: "+
				"each lives for %s", unused, size, maxUnused, maxBytes, Lifetime)
	}
	return token, record.ReplaceFile(d.tokenPath(token), b, 0o600, false)
}

// Take gives the request of a token to exactly one caller, and the token is used then.
// kind.NotFound: there is no such token, or none any more. Anything may be asked for:
// what cannot be a token is never made a path.
func (d Dir) Take(token string) (Request, error) {
	missing := kind.Errorf(kind.NotFound, "no such token: it was used, has expired, or was never given out")
	if !isToken(token) {
		return Request{}, missing
	}
	path := d.tokenPath(token)
	var s stored
	err := record.ReadOf(path, token, &s)
	if errors.Is(err, fs.ErrNotExist) {
		return Request{}, missing
	}
	// Of those who have read it, one removes it.
	rerr := os.Remove(path)
	switch {
	case errors.Is(rerr, fs.ErrNotExist):
		return Request{}, missing
	case rerr != nil:
		return Request{}, fmt.Errorf("cannot use a token: %w", rerr)
	case err != nil:
		return Request{}, kind.As(kind.NotFound, fmt.Errorf("cannot use a token: %w", err))
	case s.BootID != rundir.BootID() || expired(token):
		return Request{}, missing
	}
	return s.Request, nil
}

// Sweep removes the tokens that have expired, and what a killed holdfast-stream has left.
func (d Dir) Sweep(ctx context.Context) error {
	if err := d.Make(); err != nil {
		return err
	}
	gate, err := d.gate(ctx)
	if err != nil {
		return err
	}
	defer gate.Close()
	_, _, err = d.sweepLocked()
	return errors.Join(err, d.sweepAddresses())
}

// sweepLocked removes the tokens that have expired and tells how many are left, with
// how many bytes. The caller has the gate: nobody else writes here now, so that a name
// that is no token was left by a killed process. One that vanishes was used.
func (d Dir) sweepLocked() (unused int, size int64, err error) {
	entries, err := os.ReadDir(d.Path(tokensName))
	if err != nil {
		return 0, 0, fmt.Errorf("cannot look for tokens: %w", err)
	}
	for _, e := range entries {
		if isToken(e.Name()) && !expired(e.Name()) {
			st, err := e.Info()
			switch {
			case err == nil:
				unused++
				size += st.Size()
				continue
			case errors.Is(err, fs.ErrNotExist):
				continue
			}
		}
		if err := os.RemoveAll(d.tokenPath(e.Name())); err != nil {
			return 0, 0, fmt.Errorf("cannot remove a token that has expired: %w", err)
		}
	}
	return unused, size, nil
}

// A token is when it expires, in ms on CLOCK_BOOTTIME, and 128 random bits. So nobody
// has to read the files in order to find those that have expired.
const (
	expiryDigits = 12
	randomBytes  = 16
)

var tokenForm = regexp.MustCompile(fmt.Sprintf("^[0-9a-f]{%d}$", expiryDigits+2*randomBytes))

func newToken(expires time.Duration) string {
	var random [randomBytes]byte
	rand.Read(random[:]) // never fails
	return fmt.Sprintf("%0*x%x", expiryDigits, expires.Milliseconds(), random)
}

func isToken(name string) bool { return tokenForm.MatchString(name) }

// expired says whether a token has expired, by its name.
func expired(token string) bool {
	since, ok := Expired(token)
	return !ok || since >= 0
}

func (d Dir) tokenPath(token string) string { return filepath.Join(string(d), tokensName, token) }

// gate waits for the gate, which is held until the file is closed. Nobody waits long:
// a killed holder has let go of it.
func (d Dir) gate(ctx context.Context) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, gateLimit)
	defer cancel()
	f, err := os.OpenFile(string(d), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot take the gate of sessions: %w", err)
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			select {
			case <-time.After(wait): // a wait in flock(2) could not be ended
				continue
			case <-ctx.Done():
				err = fmt.Errorf("another process holds it: %w", ctx.Err())
			}
		}
		f.Close()
		return nil, fmt.Errorf("cannot take the gate of sessions, %s: %w", d, err)
	}
}

// Expired says since when a token has expired, by its name alone; negative: it has not.
// not ok: it is no token.
func Expired(token string) (since time.Duration, ok bool) {
	if !isToken(token) {
		return 0, false
	}
	at, err := strconv.ParseInt(token[:expiryDigits], 16, 64)
	return rundir.BootTime() - time.Duration(at)*time.Millisecond, err == nil
}
