package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	clog "github.com/containerd/log"
	"github.com/distribution/reference"
)

// Auth is CRI's AuthConfig. ServerAddress, where given, limits the rest to that
// host. Order of use: RegistryToken, IdentityToken, Username and Password, Auth
// (base64 of "user:password").
type Auth struct {
	Username, Password, Auth, ServerAddress, IdentityToken, RegistryToken string
}

// credentials as the caller gave them. host limits them, "" does not.
type credentials struct {
	host, user, secret, token string
	// basic is for a host that knows no tokens, where secret is an identity token.
	basic struct{ user, secret string }
}

// given says whether there are any.
func (c credentials) given() bool { return c.secret != "" || c.user != "" || c.token != "" }

// match says whether the credentials are for this host. All names of Docker
// Hub are one.
func (c credentials) match(host string) bool {
	return c.host == "" || hostName(c.host) == hostName(host)
}

// hostName gives a host the one name that it can be compared by.
func hostName(host string) string {
	host = strings.ToLower(host)
	if h, port, err := net.SplitHostPort(host); err == nil && port == "443" {
		host = h
	}
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
	user, secret := a.Username, a.Password
	if user == "" {
		user, secret, err = decodeAuth(a.Auth)
	}
	if user == "<token>" { // how credential helpers mark an identity token
		user = ""
	}
	switch {
	case a.RegistryToken != "": // a broken auth is no error, beside a token
		c.token = a.RegistryToken
	case a.IdentityToken != "":
		c.secret = a.IdentityToken
		c.basic.user, c.basic.secret = user, secret
	case err != nil && a.Auth != "":
		return credentials{}, err
	default:
		c.user, c.secret = user, secret
	}
	return c, nil
}

// decodeAuth reads base64 of user:password, as people and tools make it: with
// and without padding, for URLs or not, and with the end of a line in it.
func decodeAuth(s string) (user, secret string, err error) {
	s = strings.NewReplacer("-", "+", "_", "/", "\n", "", "\r", "").Replace(strings.TrimSpace(s))
	b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(s, "="))
	user, secret, ok := strings.Cut(string(b), ":")
	if err != nil || !ok {
		return "", "", fmt.Errorf("%w: cannot use the credentials: auth is not base64 of user:password",
			ErrUnauthorized)
	}
	return user, strings.TrimRight(secret, "\x00\r\n"), nil
}

// login is what a host wants to be shown, and how to get it. It is the zero
// one until the host asks. turn guards it, and is held while a token is
// fetched, so that a host's requests share one.
type login struct {
	turn   chan struct{} // of length 1
	token  *auth.TokenOptions
	header string    // Authorization; "" if there is none yet
	until  time.Time // of header; the zero time if that is not known
}

func (r *Repository) login(ctx context.Context, h host) (*login, error) {
	l, _ := r.logins.LoadOrStore(h.Scheme+"://"+h.Host+h.Path, &login{turn: make(chan struct{}, 1)})
	select {
	case l.(*login).turn <- struct{}{}:
		return l.(*login), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *login) release() { <-l.turn }

// authorization is what to send to a host: nothing, before it asks.
func (r *Repository) authorization(ctx context.Context, h host) (string, error) {
	if r.creds.token != "" && r.creds.match(h.Host) {
		return "Bearer " + r.creds.token, nil
	}
	l, err := r.login(ctx, h)
	if err != nil {
		return "", err
	}
	defer l.release()
	if l.token == nil || l.header != "" && (l.until.IsZero() || time.Now().Before(l.until)) {
		return l.header, nil
	}
	t, life, err := r.fetchToken(ctx, h, *l.token)
	if err != nil {
		return "", err // not kept: the next request asks again
	}
	l.header, l.until = "Bearer "+t, time.Time{}
	if life > 0 {
		l.until = time.Now().Add(life)
	}
	return l.header, nil
}

// challenged learns from an answer how the host wants to be asked. sent is the
// authorization that it turned down; fresh says that it was got for this very
// request. The error says why asking again makes no sense.
func (r *Repository) challenged(ctx context.Context, h host, resp *http.Response,
	sent string, fresh bool) error {
	if r.creds.token != "" && r.creds.match(h.Host) {
		return errors.New("the registry token is not accepted")
	}
	l, err := r.login(ctx, h)
	if err != nil {
		return err
	}
	defer l.release()
	if l.header != sent {
		return nil // another request has got a newer one
	}
	for _, c := range auth.ParseAuthHeader(apart(resp.Header)) { // the best first
		switch c.Scheme {
		case auth.BearerAuth:
			o, err := r.tokenOptions(h, resp, c)
			if err != nil {
				return err
			}
			if fresh && l.token != nil && slices.Equal(l.token.Scopes, o.Scopes) && l.token.Realm == o.Realm {
				return errors.New("the token is not accepted")
			}
			l.token, l.header = &o, ""
			return nil
		case auth.BasicAuth:
			user, secret := r.secrets(h)
			if b := r.creds.basic; b.user != "" && r.creds.match(h.Host) {
				user, secret = b.user, b.secret
			}
			if user == "" {
				return errors.New("it wants a user name and a password, there are none for it")
			}
			header := "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+secret))
			if sent == header {
				return errors.New("the password is not accepted")
			}
			l.token, l.header = nil, header
			return nil
		}
	}
	return errors.New("it does not say how to log in")
}

// apart gives each challenge a line of its own, as the parser needs it. A line
// may have several, with commas between them and within them (RFC 9110, 11.6.1).
func apart(h http.Header) http.Header {
	var lines []string
	for _, line := range h.Values("WWW-Authenticate") {
		quoted := false
		parts := strings.FieldsFunc(line, func(c rune) bool {
			quoted = quoted != (c == '"')
			return c == ',' && !quoted
		})
		for i, p := range parts {
			p = strings.TrimSpace(p)
			name, _, param := strings.Cut(p, "=")
			if begins := !param || strings.ContainsAny(strings.TrimSpace(name), " \t"); begins || i == 0 {
				lines = append(lines, p)
			} else {
				lines[len(lines)-1] += "," + p
			}
		}
	}
	return http.Header{"Www-Authenticate": lines}
}

// secrets are the caller's for this host.
func (r *Repository) secrets(h host) (user, secret string) {
	if !r.creds.match(h.Host) {
		return "", ""
	}
	return r.creds.user, r.creds.secret
}

// tokenOptions says where the host's token is to be had. A secret never goes
// in the clear for a host that is asked through TLS.
func (r *Repository) tokenOptions(h host, resp *http.Response, c auth.Challenge) (o auth.TokenOptions, err error) {
	realm, err := resp.Request.URL.Parse(c.Parameters["realm"])
	if err != nil || c.Parameters["realm"] == "" {
		return o, fmt.Errorf("it names no token server: realm %q", c.Parameters["realm"])
	}
	o = auth.TokenOptions{Realm: realm.String(), Service: c.Parameters["service"]}
	o.Username, o.Secret = r.secrets(h)
	o.Scopes = r.scopes(h, resp, c.Parameters["scope"])
	if resp.TLS != nil && realm.Scheme != "https" && (o.Secret != "" || len(h.Header) > 0) {
		return o, fmt.Errorf("%s wants the credentials sent to %q, without TLS", h.Host, o.Realm)
	}
	return o, nil
}

// scopes of a token are those that the host asks for: a mirror may have the
// repository by another name, and some token servers refuse all where they do
// not know one. A host that asks for none, or at its root for an example, is
// taken to have the repository where its path leads.
func (r *Repository) scopes(h host, resp *http.Response, asked string) []string {
	l := strings.Fields(asked)
	if resp.Request.URL.Path == rootOf(h) {
		l = nil
	}
	if !slices.ContainsFunc(l, func(s string) bool { return strings.HasPrefix(s, "repository:") }) {
		_, prefix, _ := strings.Cut(h.Path+"/", "/v2/")
		l = append(l, "repository:"+prefix+reference.Path(r.name)+":pull")
	}
	slices.Sort(l)
	return slices.Compact(l)
}

// maxToken bounds the answer of a token server, in bytes.
const maxToken = 256 << 10

// fetchToken asks the token server, in the newer way where there is a secret,
// and in the older one where that is not understood.
func (r *Repository) fetchToken(ctx context.Context, h host, o auth.TokenOptions) (
	token string, life time.Duration, err error) {
	ctx, cancel := context.WithTimeout(clog.WithLogger(ctx, quiet), smallTimeout)
	defer cancel()
	header := http.Header{"User-Agent": {userAgent}}
	maps.Copy(header, h.Header)
	answer := &tokenTransport{base: h.Client.Transport}
	client := *h.Client
	client.Transport = answer
	seconds := 0
	if o.Secret != "" {
		var t *auth.OAuthTokenResponse
		if t, err = auth.FetchTokenWithOAuth(ctx, &client, header, userAgent, o); err == nil {
			token, seconds = t.AccessToken, t.ExpiresInSeconds
		}
	}
	if o.Secret == "" || err != nil && onlyOlder(err, o) {
		var t *auth.FetchTokenResponse
		if t, err = auth.FetchToken(ctx, &client, header, o); err == nil {
			token, seconds = t.Token, t.ExpiresInSeconds
		}
	}
	if err != nil {
		return "", 0, fmt.Errorf("cannot get a token for %s: %w", h.Host, tokenError(err, answer.retryAfter))
	}
	if strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		return "", 0, fmt.Errorf("%w: cannot get a token for %s: what %s sent is none", ErrUnavailable, h.Host, o.Realm)
	}
	return token, time.Duration(seconds) * time.Second, nil
}

// onlyOlder says whether a token server that refused a POST may take a GET. An
// overloaded or unreachable one is not asked twice.
func onlyOlder(err error, o auth.TokenOptions) bool {
	e, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	code := e.StatusCode
	switch {
	case !ok: // an answer that is no token, or no answer
		_, unreachable := errors.AsType[*url.Error](err)
		return o.Username != "" && !unreachable
	case o.Username == "":
		return slices.Contains([]int{http.StatusBadRequest, http.StatusUnauthorized, http.StatusNotFound}, code)
	}
	return code/100 == 4 && code != http.StatusTooManyRequests || code == http.StatusNotImplemented
}

// tokenError gives what went wrong with a token its kind.
func tokenError(err error, retryAfter string) error {
	if e, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		code, sentinel := e.StatusCode, ErrUnauthorized
		if code/100 != 4 || code == http.StatusTooManyRequests || code == http.StatusRequestTimeout {
			sentinel = ErrUnavailable
		}
		text := fmt.Sprintf("%s %s: %s", e.RequestMethod, e.RequestURL, e.Status)
		return newStatusError(sentinel, code, text, e.Body, retryAfter)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// tokenTransport bounds what a token server may send.
type tokenTransport struct {
	base       http.RoundTripper
	retryAfter string // of the last answer
}

func (t *tokenTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	t.retryAfter = resp.Header.Get("Retry-After")
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxToken), resp.Body}
	return resp, nil
}
