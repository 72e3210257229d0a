package image

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxManifest = 4 << 20 // bytes; what registries promise to take
	maxConfig   = 8 << 20
	maxAnswer   = 4 << 10 // of an error's text

	attempts   = 4 // without any progress, of the registry
	ofMirror   = 2 // the same, of each mirror: there is somebody else to ask
	maxBackoff = 30 * time.Second
)

const userAgent = "holdfast"

// parse turns a name as users write it into its full form: with a registry, a
// repository, and a tag or a digest. A tag beside a digest means nothing.
func parse(ref string) (reference.Named, error) {
	n, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrInvalidReference, ref, err)
	}
	return n, nil
}

// registry speaks to the hosts that have one repository, as one caller: each
// pull has its own, so that no credentials are shared.
type registry struct {
	name   reference.Named
	domain string
	hosts  []docker.RegistryHost
	creds  credentials
	down   sync.Map // by addressOf: mirrors that this pull does not ask any more
	logins sync.Map // by address: *login
}

// addressOf tells hosts apart: the same one may be named for HTTPS and for HTTP.
func addressOf(h docker.RegistryHost) string { return h.Scheme + "://" + h.Host }

// candidates are the hosts to ask for something, best first. The last of all is
// the registry itself, unless hosts.toml says otherwise; it is always tried.
func (r *registry) candidates(caps docker.HostCapabilities) (l []docker.RegistryHost) {
	for i, h := range r.hosts {
		_, down := r.down.Load(addressOf(h))
		if h.Capabilities.Has(caps) && (!down || i == len(r.hosts)-1) {
			l = append(l, h)
		}
	}
	return l
}

// pullsFirst says whether the first to be asked for blobs may not say what a tag
// means.
func (r *registry) pullsFirst() bool {
	l := r.candidates(docker.HostCapabilityPull)
	return len(l) > 0 && !l[0].Capabilities.Has(docker.HostCapabilityResolve)
}

// again says whether a request that failed may work later at the same host, and
// how long to wait. A mirror that does not answer, or lies, is left out from then
// on.
func (r *registry) again(h docker.RegistryHost, err error, failures int) (time.Duration, bool) {
	dial, silent, hopeless := reachable(err)
	mirror := addressOf(h) != addressOf(r.hosts[len(r.hosts)-1])
	if mirror && (dial || silent || hopeless || errors.Is(err, ErrCorrupt)) {
		r.down.Store(addressOf(h), true)
		return 0, false
	}
	limit := attempts
	if mirror {
		limit = ofMirror
	}
	if !errors.Is(err, ErrUnavailable) || failures >= limit || hopeless || dial && silent {
		return 0, false
	}
	wait := 100 * time.Millisecond << failures
	if e, ok := errors.AsType[*statusError](err); ok {
		wait = max(wait, e.retryAfter)
		if mirror && e.retryAfter > time.Second {
			return 0, false // the next host may have time now
		}
	}
	return min(wait, maxBackoff) + rand.N(50*time.Millisecond), true
}

// reachable says how far a request came: there was no connection, there was
// nobody in time, there is nothing to wait for.
func reachable(err error) (dial, silent, hopeless bool) {
	op, ok := errors.AsType[*net.OpError](err)
	// An alert comes where TLS does: there is no client certificate for it, say.
	dial = ok && (op.Op == "dial" || op.Op == "remote error")
	timeout, ok := errors.AsType[net.Error](err)
	silent = ok && timeout.Timeout() || errors.Is(err, errTooSlow)
	name, ok := errors.AsType[*net.DNSError](err)
	hopeless = ok && name.IsNotFound
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		hopeless = true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok || errors.Is(err, http.ErrSchemeMismatch) {
		hopeless = true // it speaks no TLS
	}
	return dial, silent, hopeless
}

// do sends one request to one host, authorizing it as the host asks. The caller
// closes the body. An answer of 300 and above is an error.
func (r *registry) do(ctx context.Context, h docker.RegistryHost, method string, header http.Header, what ...string) (*http.Response, error) {
	u := url.URL{Scheme: h.Scheme, Host: h.Host, Path: path.Join(append([]string{"/", h.Path, reference.Path(r.name)}, what...)...)}
	if hostName(h.Host) != hostName(r.domain) {
		u.RawQuery = url.Values{"ns": {r.domain}}.Encode()
	}
	pinged := false
	for tries := 1; ; tries++ {
		resp, sent, err := r.send(ctx, h, method, header, u)
		if err != nil || resp.StatusCode < 300 {
			return resp, err
		}
		err = answerError(resp)
		redirected := resp.Request.Response != nil
		if resp.Request.URL.Host != h.Host || redirected && h.Scheme == "https" && resp.TLS == nil || tries == 4 {
			return nil, err // somebody else, whom a redirect led to, wants credentials
		}
		switch {
		case resp.StatusCode == http.StatusUnauthorized:
		case sent == "" && !pinged && r.creds.given() && r.creds.match(h.Host) && (resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusNotFound):
			// Some hide from strangers what they have, and say only at the
			// root how to log in.
			pinged = true
			if resp = r.ping(ctx, h); resp == nil {
				return nil, err
			}
		default:
			return nil, err
		}
		if cerr := r.challenged(ctx, h, resp, sent, tries > 1); cerr != nil {
			return nil, fmt.Errorf("%w (%w)", err, cerr)
		}
	}
}

// send sends one request once; sent is the authorization that it had.
func (r *registry) send(ctx context.Context, h docker.RegistryHost, method string, header http.Header, u url.URL) (resp *http.Response, sent string, err error) {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("User-Agent", userAgent)
	maps.Copy(req.Header, h.Header)
	maps.Copy(req.Header, header)
	if sent, err = r.authorization(ctx, h); err != nil {
		return nil, "", err
	}
	if sent != "" {
		req.Header.Set("Authorization", sent)
	}
	if resp, err = h.Client.Do(req); err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return resp, sent, nil
}

// rootOf is where a host tells whether it is a registry, and how to log in.
func rootOf(h docker.RegistryHost) string {
	before, _, _ := strings.Cut(h.Path+"/", "/v2/")
	return before + "/v2/"
}

// ping asks the root of a host how to log in; nil: it does not say.
func (r *registry) ping(ctx context.Context, h docker.RegistryHost) *http.Response {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, (&url.URL{Scheme: h.Scheme, Host: h.Host, Path: rootOf(h)}).String(), nil)
	if err != nil {
		return nil
	}
	req.Header.Set("User-Agent", userAgent)
	maps.Copy(req.Header, h.Header)
	resp, err := h.Client.Do(req)
	if err != nil {
		return nil
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized || resp.Request.URL.Host != h.Host {
		return nil
	}
	return resp
}

// statusError is an answer of a registry that is no success.
type statusError struct {
	kind       error // one of the package's, or nil
	status     int
	text       string
	retryAfter time.Duration
}

func (e *statusError) Error() string { return e.text }
func (e *statusError) Unwrap() error { return e.kind }

// answerError reads the answer's text and closes it.
func answerError(resp *http.Response) error {
	defer resp.Body.Close()
	var kind error
	before := resp.Request.Response // the redirect, if there was one
	switch c := resp.StatusCode; {
	case before != nil && before.Request.URL.Host != resp.Request.URL.Host && (c == http.StatusBadRequest || c == http.StatusForbidden):
		kind = ErrUnavailable // a link that has expired; there will be a new one
	case c == http.StatusUnauthorized, c == http.StatusForbidden:
		kind = ErrUnauthorized
	case c == http.StatusNotFound:
		kind = ErrNotFound
	case c == http.StatusTooManyRequests, c == http.StatusRequestTimeout, c >= 500 && c != http.StatusNotImplemented:
		kind = ErrUnavailable
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	text := fmt.Sprintf("%s %s: %s", resp.Request.Method, resp.Request.URL.Redacted(), resp.Status)
	return newStatusError(kind, resp.StatusCode, text, body, resp.Header.Get("Retry-After"))
}

// newStatusError adds what the body says to the text. Of bodies that are not
// as the specification has them, those of token servers have "details".
func newStatusError(kind error, status int, text string, body []byte, retryAfter string) error {
	e := &statusError{kind: kind, status: status, text: text}
	if n, err := strconv.Atoi(retryAfter); err == nil && n > 0 {
		e.retryAfter = time.Duration(min(n, int(time.Hour/time.Second))) * time.Second
	} else if t, err := http.ParseTime(retryAfter); err == nil {
		e.retryAfter = max(0, time.Until(t))
	}
	var said struct {
		Errors  []struct{ Code, Message string } `json:"errors"`
		Details string                           `json:"details"`
	}
	var says []string
	if json.Unmarshal(body, &said) == nil {
		for _, m := range said.Errors {
			says = append(says, strings.TrimSpace(m.Code+" "+m.Message))
		}
		if said.Details != "" {
			says = append(says, said.Details)
		}
	}
	if len(says) > 0 {
		e.text += ": " + strings.Join(says, ", ")
	}
	if kind != nil {
		e.text = kind.Error() + ": " + e.text
	}
	return e
}

// toldError is an error as it may be shown. Registries have a say in the text
// of many: it is on one line, not too long and without what a terminal obeys,
// and addresses have no query, where object stores put signatures.
type toldError struct {
	text string
	error
}

func (e *toldError) Error() string { return e.text }
func (e *toldError) Unwrap() error { return e.error }

// maxTold is in bytes.
const maxTold = 8 << 10

var queries = regexp.MustCompile(`(https?://[^\s"?]*)\?[^\s"]*`)

func told(err error) error {
	text := strings.Map(func(c rune) rune {
		switch {
		case c == utf8.RuneError:
			return '?'
		case unicode.IsPrint(c):
			return c
		}
		return ' '
	}, err.Error())
	text = queries.ReplaceAllString(text, "$1")
	if len(text) > maxTold {
		text = strings.ToValidUTF8(text[:maxTold], "") + "..."
	}
	return &toldError{text, err}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// onHosts tries f on each host that may be asked, and repeats it where that may
// help, until it succeeds. The kind of the error is that of the last host: the
// registry itself, after its mirrors.
func (r *registry) onHosts(ctx context.Context, caps docker.HostCapabilities, f func(docker.RegistryHost) error) error {
	var errs []error
	for _, h := range r.candidates(caps) {
		var err error
		for failures := 1; ; failures++ {
			if err = f(h); err == nil {
				return nil
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			wait, ok := r.again(h, err, failures)
			if !ok {
				break
			}
			if err := pause(ctx, wait); err != nil {
				return err
			}
		}
		errs = append(errs, err)
	}
	return lastOf(errs, r.domain)
}

// lastOf makes one error of those of several hosts: the text of all, the kind
// of the last.
func lastOf(errs []error, domain string) error {
	if len(errs) == 0 {
		return fmt.Errorf("%w: hosts.toml names no host that may be asked for images of %s", ErrUnavailable, domain)
	}
	last := errs[len(errs)-1]
	text := last.Error()
	for _, e := range slices.Backward(errs[:len(errs)-1]) {
		if e.Error() != text { // a host may be named twice
			last = fmt.Errorf("%w (before: %v)", last, e)
		}
	}
	return last
}

var manifestTypes = []string{
	ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest,
	typeDockerList, typeDockerManifest,
}

// accept also takes what cannot be used: the error tells what it is, then.
var accept = http.Header{"Accept": {strings.Join(append(slices.Clip(manifestTypes), "*/*"), ", ")}}

// capability is what a host needs to be asked for a manifest: any may give what
// a digest names, not any may say what a tag means.
func capability(object string) docker.HostCapabilities {
	if digest.Digest(object).Validate() == nil {
		return docker.HostCapabilityPull
	}
	return docker.HostCapabilityResolve
}

// head asks for the digest behind a tag or digest without fetching anything. It
// is empty if the registry does not say.
func (r *registry) head(ctx context.Context, object string) (d digest.Digest, err error) {
	err = r.onHosts(ctx, capability(object), func(h docker.RegistryHost) error {
		ctx, cancel := context.WithTimeout(ctx, smallTimeout)
		defer cancel()
		resp, err := r.do(ctx, h, http.MethodHead, accept, "manifests", object)
		if err != nil {
			return err
		}
		resp.Body.Close()
		d = digest.Digest(resp.Header.Get("Docker-Content-Digest"))
		if d.Validate() != nil {
			d = ""
		}
		return nil
	})
	return d, err
}

// manifest fetches a manifest or index by tag or digest.
func (r *registry) manifest(ctx context.Context, object string) (desc ocispec.Descriptor, b []byte, err error) {
	want := digest.Digest(object)
	if want.Validate() != nil {
		want = ""
	}
	err = r.onHosts(ctx, capability(object), func(h docker.RegistryHost) error {
		var typ string
		b, typ, err = r.small(ctx, h, maxManifest, accept, "manifests", object)
		if err != nil {
			return err
		}
		if !json.Valid(b) { // a page of a portal, for one
			return fmt.Errorf("%w: %s sent %q for a manifest, not JSON", ErrCorrupt, h.Host, typ)
		}
		algorithm := digest.Canonical
		if want != "" {
			algorithm = want.Algorithm()
		}
		desc = ocispec.Descriptor{MediaType: typ, Digest: algorithm.FromBytes(b), Size: int64(len(b))}
		if want != "" && desc.Digest != want {
			return fmt.Errorf("%w: %s sent a manifest with digest %s for %s", ErrCorrupt, h.Host, desc.Digest, want)
		}
		return nil
	})
	return desc, b, err
}

// blob fetches a small blob, such as a config.
func (r *registry) blob(ctx context.Context, d ocispec.Descriptor, limit int64) (b []byte, err error) {
	if d.Size > limit {
		return nil, fmt.Errorf("%w: %s of %d bytes, the limit is %d", ErrUnsupported, d.MediaType, d.Size, limit)
	}
	err = r.onHosts(ctx, docker.HostCapabilityPull, func(h docker.RegistryHost) error {
		b, _, err = r.small(ctx, h, limit, nil, "blobs", d.Digest.String())
		if err == nil && (int64(len(b)) != d.Size || d.Digest.Algorithm().FromBytes(b) != d.Digest) {
			err = fmt.Errorf("%w: %s sent %d bytes that are not %s", ErrCorrupt, h.Host, len(b), d.Digest)
		}
		return err
	})
	return b, err
}

// decode undoes the Content-Encoding that some proxies add unasked. Storage may
// also call a blob encoded that is so by itself; its length tells.
func decode(resp *http.Response, size int64) (io.Reader, error) {
	switch strings.ToLower(resp.Header.Get("Content-Encoding")) {
	case "gzip", "x-gzip":
		if resp.ContentLength != size {
			return gzip.NewReader(resp.Body)
		}
	}
	return resp.Body, nil
}

// smallTimeout is for one small answer, its headers included.
const smallTimeout = time.Minute

func (r *registry) small(ctx context.Context, h docker.RegistryHost, limit int64, header http.Header, what ...string) ([]byte, string, error) {
	ctx, cancel := context.WithTimeout(ctx, smallTimeout)
	defer cancel()
	resp, err := r.do(ctx, h, http.MethodGet, header, what...)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, "", fmt.Errorf("%w: cannot read %s from %s: %w", ErrUnavailable, strings.Join(what, "/"), h.Host, err)
	}
	if int64(len(b)) > limit {
		return nil, "", fmt.Errorf("%w: %s from %s is larger than %d bytes", ErrUnsupported, strings.Join(what, "/"), h.Host, limit)
	}
	typ, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		typ = ""
	}
	return b, typ, nil
}
