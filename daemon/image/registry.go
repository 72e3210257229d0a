package image

import (
	"context"
	"encoding/base64"
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
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	clog "github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

const (
	maxManifest = 4 << 20 // bytes; what registries promise to take
	maxConfig   = 8 << 20
	maxAnswer   = 4 << 10 // of an error's text

	attempts   = 4 // without any progress, per host
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
	token  string // a bearer token given by the caller
	creds  credentials
	down   sync.Map // by host: mirrors that this pull could not connect to
}

// candidates are the hosts to ask for something, best first. The last of all is
// the registry itself, unless hosts.toml says otherwise; it is always tried.
func (r *registry) candidates(caps docker.HostCapabilities) (l []docker.RegistryHost) {
	for i, h := range r.hosts {
		_, down := r.down.Load(h.Host)
		if h.Capabilities.Has(caps) && (!down || i == len(r.hosts)-1) {
			l = append(l, h)
		}
	}
	return l
}

// again says whether a request that failed may work later at the same host, and
// how long to wait. A mirror without connection is left out from then on.
func (r *registry) again(h docker.RegistryHost, err error, failures int) (time.Duration, bool) {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" && h.Host != r.hosts[len(r.hosts)-1].Host {
		r.down.Store(h.Host, true)
		return 0, false
	}
	if !errors.Is(err, ErrUnavailable) || failures >= attempts {
		return 0, false
	}
	wait := 100 * time.Millisecond << failures
	if e, ok := errors.AsType[*statusError](err); ok {
		wait = max(wait, e.retryAfter)
	}
	return min(wait, maxBackoff) + rand.N(50*time.Millisecond), true
}

// credentials as the caller gave them. host limits them, "" does not.
type credentials struct{ host, user, secret, token string }

// given says whether there are any.
func (c credentials) given() bool { return c.secret != "" || c.user != "" || c.token != "" }

// match says whether the credentials are for this host. All names of Docker
// Hub are one.
func (c credentials) match(host string) bool {
	return c.host == "" || hubName(c.host) == hubName(host)
}

func hubName(host string) string {
	switch host {
	case "docker.io", "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}

func (a *Auth) credentials() (c credentials, err error) {
	if a == nil {
		return c, nil
	}
	if a.ServerAddress != "" {
		addr := a.ServerAddress
		if !strings.Contains(addr, "://") {
			addr = "https://" + addr
		}
		u, err := url.Parse(addr)
		if err != nil || u.Host == "" {
			return c, fmt.Errorf("%w: cannot use the credentials: server address %q", ErrUnauthorized, a.ServerAddress)
		}
		c.host = u.Host
	}
	switch {
	case a.RegistryToken != "":
		c.token = a.RegistryToken
	case a.IdentityToken != "":
		c.secret = a.IdentityToken
	case a.Username != "":
		c.user, c.secret = a.Username, a.Password
	case a.Auth != "":
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		user, secret, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return c, fmt.Errorf("%w: cannot use the credentials: auth is not base64 of user:password", ErrUnauthorized)
		}
		c.user, c.secret = user, strings.Trim(secret, "\x00")
	}
	return c, nil
}

// quiet keeps the libraries from writing to stderr by themselves.
var quiet = func() *clog.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}()

func (s *Store) newRegistry(ctx context.Context, name reference.Named, a *Auth) (*registry, error) {
	creds, err := a.credentials()
	if err != nil {
		return nil, err
	}
	r := &registry{name: name, domain: reference.Domain(name), creds: creds}
	// A mirror named in hosts.toml is trusted with the credentials, as its
	// users expect; a host that a redirect leads to never asks here.
	secrets := func(host string) (string, string, error) {
		if !creds.match(host) || !slices.ContainsFunc(r.hosts, func(h docker.RegistryHost) bool { return h.Host == host }) {
			return "", "", nil
		}
		return creds.user, creds.secret, nil
	}
	o := config.HostOptions{
		Credentials: secrets,
		UpdateClient: func(c *http.Client) error {
			c.CheckRedirect = checkRedirect(nil)
			return nil
		},
	}
	if s.o.RegistryConfigDir != "" {
		o.HostDir = config.HostDirFromRoot(s.o.RegistryConfigDir)
	}
	r.hosts, err = config.ConfigureHosts(clog.WithLogger(ctx, quiet), o)(r.domain)
	if err != nil {
		return nil, fmt.Errorf("cannot read the registry configuration of %s in %s: %w", r.domain, s.o.RegistryConfigDir, err)
	}
	for i := range r.hosts {
		h := &r.hosts[i]
		if len(h.Header) == 0 {
			continue
		}
		h.Header = h.Header.Clone()
		if creds.given() && creds.match(h.Host) {
			// The caller is asked who it is, not the node: whom the registry
			// does not know gets nothing that the node could.
			maps.DeleteFunc(h.Header, func(k string, _ []string) bool { return http.CanonicalHeaderKey(k) == "Authorization" })
		}
		// A host with headers has a client of its own. The token server gets
		// the headers too; where that one redirects to does not.
		client := *h.Client
		client.CheckRedirect = checkRedirect(h.Header)
		h.Client = &client
		h.Authorizer = docker.NewDockerAuthorizer(docker.WithAuthClient(h.Client), docker.WithAuthCreds(secrets), docker.WithAuthHeader(h.Header))
	}
	return r, nil
}

// close lets go of idle connections.
func (r *registry) close() {
	for _, h := range r.hosts {
		h.Client.CloseIdleConnections()
	}
}

// checkRedirect keeps what is secret on the host that it was meant for: a
// redirect elsewhere (another scheme or port counts) is followed without
// credentials and without the headers of hosts.toml, and never with a body.
func checkRedirect(secret http.Header) func(*http.Request, []*http.Request) error {
	return func(req *http.Request, via []*http.Request) error {
		if len(via) >= 10 {
			return errors.New("stopped after 10 redirects")
		}
		first := via[0].URL
		if req.URL.Scheme == first.Scheme && req.URL.Host == first.Host {
			return nil
		}
		if req.Method != http.MethodGet && req.Method != http.MethodHead {
			return fmt.Errorf("refused a redirect of %s to %s", req.Method, req.URL.Host)
		}
		for _, k := range slices.Concat([]string{"Authorization", "Cookie", "Proxy-Authorization"}, slices.Collect(maps.Keys(secret))) {
			req.Header.Del(k)
			delete(req.Header, k) // hosts.toml may have it in another spelling
		}
		return nil
	}
}

// do sends one request to one host, authorizing it as the host asks. The caller
// closes the body. An answer of 300 and above is an error.
func (r *registry) do(ctx context.Context, h docker.RegistryHost, method string, header http.Header, what ...string) (*http.Response, error) {
	u := url.URL{Scheme: h.Scheme, Host: h.Host, Path: path.Join(append([]string{"/", h.Path, reference.Path(r.name)}, what...)...)}
	if h.Host != r.domain && hubName(h.Host) != hubName(r.domain) {
		u.RawQuery = url.Values{"ns": {r.domain}}.Encode()
	}
	ctx = clog.WithLogger(ctx, quiet)
	ctx = docker.WithScope(ctx, "repository:"+reference.Path(r.name)+":pull")
	var answers []*http.Response
	for {
		req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
		if err != nil {
			return nil, err
		}
		for k, v := range h.Header {
			req.Header[k] = v
		}
		for k, v := range header {
			req.Header[k] = v
		}
		if req.Header.Get("User-Agent") == "" {
			req.Header.Set("User-Agent", userAgent)
		}
		if r.creds.token != "" && r.creds.match(h.Host) {
			req.Header.Set("Authorization", "Bearer "+r.creds.token)
		} else if err := h.Authorizer.Authorize(ctx, req); err != nil {
			return nil, authError(h.Host, err)
		}
		resp, err := h.Client.Do(req)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, withoutQuery(err))
		}
		if resp.StatusCode < 300 {
			return resp, nil
		}
		err = answerError(resp)
		if resp.StatusCode != http.StatusUnauthorized || r.creds.token != "" || len(answers) >= 3 {
			return nil, err
		}
		if resp.Request.URL.Host != h.Host {
			return nil, err // somebody else, whom a redirect led to, wants credentials
		}
		if err := r.checkRealm(h, resp); err != nil {
			return nil, err
		}
		answers = append(answers, resp)
		if aerr := h.Authorizer.AddResponses(ctx, answers); aerr != nil {
			return nil, fmt.Errorf("%w (%w)", err, aerr)
		}
	}
}

// withoutQuery takes the query out of the error's text: object stores have
// signatures there.
func withoutQuery(err error) error {
	e, ok := err.(*url.Error)
	if !ok {
		return err
	}
	u, _, _ := strings.Cut(e.URL, "?")
	return &url.Error{Op: e.Op, URL: u, Err: e.Err}
}

// checkRealm refuses to send a secret in the clear for a host that is asked
// through TLS.
func (r *registry) checkRealm(h docker.RegistryHost, resp *http.Response) error {
	if resp.TLS == nil || len(h.Header) == 0 && (r.creds.secret == "" || !r.creds.match(h.Host)) {
		return nil
	}
	for _, c := range auth.ParseAuthHeader(resp.Header) {
		if realm := c.Parameters["realm"]; c.Scheme == auth.BearerAuth && !strings.HasPrefix(strings.ToLower(realm), "https://") {
			return fmt.Errorf("%w: %s wants the credentials sent to %q, without TLS", ErrUnauthorized, h.Host, realm)
		}
	}
	return nil
}

// authError is about a token that could not be got.
func authError(host string, err error) error {
	kind := ErrUnavailable
	if st, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok && st.StatusCode/100 == 4 && st.StatusCode != http.StatusTooManyRequests {
		kind = ErrUnauthorized
	}
	return fmt.Errorf("cannot authorize at %s: %w: %w", host, kind, err)
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
	e := &statusError{status: resp.StatusCode}
	switch c := resp.StatusCode; {
	case c == http.StatusUnauthorized, c == http.StatusForbidden:
		e.kind = ErrUnauthorized
	case c == http.StatusNotFound:
		e.kind = ErrNotFound
	case c == http.StatusTooManyRequests, c == http.StatusRequestTimeout, c >= 500:
		e.kind = ErrUnavailable
	}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
		e.retryAfter = time.Duration(n) * time.Second
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	var said struct {
		Errors []struct{ Code, Message string } `json:"errors"`
	}
	var says []string
	if json.Unmarshal(b, &said) == nil {
		for _, m := range said.Errors {
			says = append(says, strings.TrimSpace(m.Code+" "+m.Message))
		}
	}
	u := *resp.Request.URL
	u.RawQuery = "" // signatures of object stores
	e.text = fmt.Sprintf("%s %s: %s", resp.Request.Method, u.Redacted(), resp.Status)
	if len(says) > 0 {
		e.text += ": " + strings.Join(says, ", ")
	}
	if e.kind != nil {
		e.text = e.kind.Error() + ": " + e.text
	}
	return e
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
	for _, e := range slices.Backward(errs[:len(errs)-1]) {
		last = fmt.Errorf("%w (before: %v)", last, e)
	}
	return last
}

var manifestTypes = []string{
	ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest,
	typeDockerList, typeDockerManifest,
}

// head asks for the digest behind the tag without fetching anything. It is
// empty if the registry does not say.
func (r *registry) head(ctx context.Context, tag string) (d digest.Digest, err error) {
	err = r.onHosts(ctx, docker.HostCapabilityResolve, func(h docker.RegistryHost) error {
		ctx, cancel := context.WithTimeout(ctx, smallTimeout)
		defer cancel()
		resp, err := r.do(ctx, h, http.MethodHead, http.Header{"Accept": {strings.Join(manifestTypes, ", ")}}, "manifests", tag)
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
	caps := docker.HostCapabilityResolve
	want := digest.Digest(object)
	if want.Validate() == nil {
		caps = docker.HostCapabilityPull
	} else {
		want = ""
	}
	err = r.onHosts(ctx, caps, func(h docker.RegistryHost) error {
		var typ string
		b, typ, err = r.small(ctx, h, maxManifest, http.Header{"Accept": {strings.Join(manifestTypes, ", ")}}, "manifests", object)
		if err != nil {
			return err
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
