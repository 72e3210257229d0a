// Package registry speaks to container registries: it finds the hosts that have a
// repository (hosts.toml, mirrors), logs in, fetches manifests and blobs, tries
// again and goes on where a transfer broke off. It knows nothing of what is stored
// here.
package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// The errors of this package wrap one of these where it applies. Each has a kind.
var (
	// ErrNotFound: the registry has no such image.
	ErrNotFound = kind.Errorf(kind.NotFound, "image not found")
	// ErrUnauthorized: the registry refused the credentials, or the lack of them.
	ErrUnauthorized = kind.Errorf(kind.Unauthorized, "not authorized by the registry")
	// ErrUnavailable: the registry cannot be reached, is overloaded or too slow.
	ErrUnavailable = kind.Errorf(kind.Unavailable, "registry unavailable")
	// ErrUnsupported: what the registry has is beyond the limits.
	ErrUnsupported = kind.Errorf(kind.Unsupported, "unsupported image")
	// ErrCorrupt: what the registry sent is not what its digest or size says. It
	// has no kind: no caller can do anything about it.
	ErrCorrupt = errors.New("corrupt image")
	// ErrTooSlow: a transfer brought less than Config.MinRate. It is ErrUnavailable
	// too.
	ErrTooSlow = errors.New("too slow")
)

const (
	// MaxManifest is the limit of a manifest in bytes: what registries promise to
	// take.
	MaxManifest = 4 << 20

	attempts       = 4 // of the registry, without any progress
	mirrorAttempts = 2 // of each mirror: there is another host to ask
	maxBackoff     = 30 * time.Second
)

// Media types of Docker's image manifest, schema 2.
const (
	TypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	TypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
)

// ManifestTypes are the media types of manifests and indexes that are asked for.
var ManifestTypes = []string{
	ocispec.MediaTypeImageIndex,
	ocispec.MediaTypeImageManifest,
	TypeDockerList,
	TypeDockerManifest,
}

// Config is the node's part. It may be used for any number of repositories.
type Config struct {
	// Dir has a directory per registry host, or _default, with a hosts.toml as
	// containerd's users have it. It may be a list as in PATH. Empty: none.
	Dir string
	Log *slog.Logger
	// ProgressTimeout ends a request for a blob when it brings less than MinRate
	// bytes per second for so long. 0: none does.
	ProgressTimeout time.Duration
	MinRate         int64
}

// Repository speaks to the hosts that have one repository, as one caller: each
// pull has its own, so that no credentials are shared. It is safe for concurrent
// use. Close ends it.
type Repository struct {
	config Config
	name   reference.Named
	domain string
	hosts  []host
	creds  credentials
	down   sync.Map // by addressOf: mirrors that are not asked any more
	logins sync.Map // by address: *login
}

// Open reads what hosts.toml says about the registry of a name, each time anew.
// It sends no request yet. a may be nil.
func (c Config) Open(ctx context.Context, name reference.Named, a *Auth) (*Repository, error) {
	creds, err := a.credentials()
	if err != nil {
		return nil, err
	}
	r := &Repository{config: c, name: name, domain: reference.Domain(name), creds: creds}
	if r.hosts, err = c.hosts(ctx, r.domain); err != nil {
		return nil, fmt.Errorf("cannot use the registry configuration of %s: %w", r.domain, err)
	}
	for i := range r.hosts {
		r.prepare(&r.hosts[i])
	}
	return r, nil
}

// prepare gives a host its address, its headers, and a client that keeps them to
// it.
func (r *Repository) prepare(h *host) {
	if h.Host == "docker.io" && h.Path == "/v2" {
		h.Host = "registry-1.docker.io" // docker.io itself is a web site
	}
	if len(h.Header) == 0 {
		return
	}
	header := http.Header{}
	for k, v := range h.Header { // the file may have it in any spelling
		k = http.CanonicalHeaderKey(k)
		header[k] = append(header[k], v...)
	}
	if r.creds.given() && r.creds.match(h.Host) {
		// The caller's credentials replace the node's: a caller that the registry
		// does not know must not get what the node may have.
		header.Del("Authorization")
	}
	// A host with headers has a client of its own. The token server gets
	// the headers too; where that one redirects to does not.
	client := *h.Client
	client.CheckRedirect = checkRedirect(header)
	h.Header, h.Client = header, &client
}

// Close lets go of idle connections.
func (r *Repository) Close() {
	for _, h := range r.hosts {
		h.Client.CloseIdleConnections()
	}
}

// Domain is the registry's name, with its port if there is one.
func (r *Repository) Domain() string { return r.domain }

// host is one of those to ask, as hosts.toml has it.
type host = docker.RegistryHost

// addressOf tells hosts apart: the same one may be named for HTTPS and for HTTP.
func addressOf(h host) string { return h.Scheme + "://" + h.Host }

// candidates are the hosts to ask for something, best first. The last of all is
// the registry itself, unless hosts.toml says otherwise; it is always tried.
func (r *Repository) candidates(caps docker.HostCapabilities) (l []host) {
	for i, h := range r.hosts {
		_, down := r.down.Load(addressOf(h))
		if h.Capabilities.Has(caps) && (!down || i == len(r.hosts)-1) {
			l = append(l, h)
		}
	}
	return l
}

// AsksMirror says whether a mirror sends the manifest of a tag once another host
// has said which digest that is.
func (r *Repository) AsksMirror(object string) bool {
	if capability(object) != docker.HostCapabilityResolve {
		return false
	}
	l := r.candidates(docker.HostCapabilityPull)
	return len(l) > 0 && !l[0].Capabilities.Has(docker.HostCapabilityResolve)
}

// again says whether a request that failed may work later at the same host, and
// how long to wait. A mirror that does not answer, or lies, is left out from then
// on.
func (r *Repository) again(h host, err error, failures int) (time.Duration, bool) {
	dial, silent, hopeless := reachable(err)
	mirror := addressOf(h) != addressOf(r.hosts[len(r.hosts)-1])
	if mirror && (dial || silent || hopeless || errors.Is(err, ErrCorrupt)) {
		r.down.Store(addressOf(h), true)
		return 0, false
	}
	limit := attempts
	if mirror {
		limit = mirrorAttempts
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

// reachable says how far a request came. dial: there was no connection; silent:
// there was no answer in time; hopeless: another attempt will fail too.
func reachable(err error) (dial, silent, hopeless bool) {
	op, ok := errors.AsType[*net.OpError](err)
	// An alert comes where TLS does: there is no client certificate for it, say.
	dial = ok && (op.Op == "dial" || op.Op == "remote error")
	timeout, ok := errors.AsType[net.Error](err)
	silent = ok && timeout.Timeout() || errors.Is(err, ErrTooSlow)
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

// Distrust leaves out mirrors, by their addresses, from now on.
func (r *Repository) Distrust(mirrors []string) {
	for _, m := range mirrors {
		r.down.Store(m, true)
	}
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
func (r *Repository) onHosts(ctx context.Context, caps docker.HostCapabilities, f func(host) error) error {
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

// accept also takes what cannot be used: the error tells what it is, then.
var accept = http.Header{"Accept": {strings.Join(append(slices.Clip(ManifestTypes), "*/*"), ", ")}}

// capability is what a host needs to be asked for a manifest: any may give what
// a digest names, not any may say what a tag means.
func capability(object string) docker.HostCapabilities {
	if digest.Digest(object).Validate() == nil {
		return docker.HostCapabilityPull
	}
	return docker.HostCapabilityResolve
}

// Head asks for the digest behind a tag or digest without fetching anything. It
// is empty if the registry does not say.
func (r *Repository) Head(ctx context.Context, object string) (d digest.Digest, err error) {
	err = r.onHosts(ctx, capability(object), func(h host) error {
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

// Manifest fetches a manifest or index by tag or digest.
func (r *Repository) Manifest(ctx context.Context, object string) (desc ocispec.Descriptor, b []byte, err error) {
	want := digest.Digest(object)
	if want.Validate() != nil {
		want = ""
	}
	err = r.onHosts(ctx, capability(object), func(h host) error {
		var typ string
		b, typ, err = r.small(ctx, h, MaxManifest, accept, "manifests", object)
		if err != nil {
			return err
		}
		if !json.Valid(b) { // such as the page of a portal
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

// Blob fetches and verifies a small blob, such as a config.
func (r *Repository) Blob(ctx context.Context, d ocispec.Descriptor, limit int64) (b []byte, err error) {
	if d.Size > limit {
		return nil, fmt.Errorf("%w: %s of %d bytes, the limit is %d", ErrUnsupported, d.MediaType, d.Size, limit)
	}
	err = r.onHosts(ctx, docker.HostCapabilityPull, func(h host) error {
		b, _, err = r.small(ctx, h, limit, nil, "blobs", d.Digest.String())
		if err == nil && (int64(len(b)) != d.Size || d.Digest.Algorithm().FromBytes(b) != d.Digest) {
			err = fmt.Errorf("%w: %s sent %d bytes that are not %s", ErrCorrupt, h.Host, len(b), d.Digest)
		}
		return err
	})
	return b, err
}
