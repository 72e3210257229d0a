package image

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The tests of this file pull from registries that are served with TLS.

// authority is a certificate authority that nobody trusts who is not told to.
type authority struct {
	t    testing.TB
	dir  string
	file string // its certificate, PEM
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key = a.issue("authority", nil, nil)
	a.file, _ = a.write("authority", a.cert, a.key)
	return a
}

// issue makes a certificate; without a parent it is one's own.
func (a *authority) issue(cn string, parent *x509.Certificate, by *ecdsa.PrivateKey) (
	*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(a.t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: cn},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: parent == nil, BasicConstraintsValid: true,
	}
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, by)
	check(a.t, err)
	if c, err = x509.ParseCertificate(der); err != nil {
		a.t.Fatal(err)
	}
	return c, key
}

func (a *authority) write(name string, c *x509.Certificate, key *ecdsa.PrivateKey) (cert, keyFile string) {
	a.t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	cert, keyFile = filepath.Join(a.dir, name+".crt"), filepath.Join(a.dir, name+".key")
	err = errors.Join(err, os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), 0o600),
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	check(a.t, err)
	return cert, keyFile
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// serve serves with TLS. Requests are recorded.
func (a *authority) serve(h http.Handler, change ...func(*tls.Config)) *tlsServer {
	a.t.Helper()
	s := &tlsServer{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.seen = append(s.seen, r.Clone(r.Context()))
		s.mu.Unlock()
		h.ServeHTTP(w, r)
	}))
	c, key := a.issue("server", a.cert, a.key)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{c.Raw}, PrivateKey: key}}}
	for _, f := range change {
		f(s.TLS)
	}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	a.t.Cleanup(s.Close)
	s.host = strings.TrimPrefix(s.URL, "https://")
	return s
}

type tlsServer struct {
	*httptest.Server
	host string
	mu   sync.Mutex
	seen []*http.Request
}

// requests gives what came since the last call.
func (s *tlsServer) requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.seen
	s.seen = nil
	return l
}

// depot is the storage that several registries of a test show.
type depot struct {
	t       testing.TB
	storage http.Handler
}

func newDepot(t testing.TB) *depot {
	return &depot{t, ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))}
}

// guard lets a request for a repository in, or says how to log in ("" for the
// repository: at the root).
type guard func(r *http.Request, repository string) (challenge string, ok bool)

// app is a registry on the depot. g may be nil: all may come in.
func (d *depot) app(g guard) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g != nil {
			repository, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/manifests/")
			repository, _, _ = strings.Cut(repository, "/blobs/")
			if challenge, ok := g(r, repository); !ok {
				w.Header().Set("WWW-Authenticate", challenge)
				w.WriteHeader(http.StatusUnauthorized)
				io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
				return
			}
		}
		d.storage.ServeHTTP(w, r)
	})
}

func (d *depot) push(repo string, img remote.Taggable) {
	d.t.Helper()
	s := httptest.NewServer(d.app(nil))
	defer s.Close()
	r, err := name.ParseReference(strings.TrimPrefix(s.URL, "http://") + "/" + repo)
	check(d.t, err)
	if x, ok := img.(v1.ImageIndex); ok {
		err = remote.WriteIndex(r, x)
	} else {
		err = remote.Write(r, img.(v1.Image))
	}
	check(d.t, err)
}

// password is the guard of a registry that wants one.
func password(user, password string) guard {
	return func(r *http.Request, _ string) (string, bool) {
		u, p, _ := r.BasicAuth()
		return `Basic realm="test"`, u == user && p == password
	}
}

// tokens is a token server as registries name it in their challenge.
type tokens struct {
	*tlsServer
	mu     sync.Mutex
	stale  int // so many tokens are given out that have expired
	issued map[string]grant
}

// grant is what a token is good for.
type grant struct {
	repositories []string
	until        time.Time
}

func newTokens(a *authority) *tokens {
	s := &tokens{issued: map[string]grant{}}
	s.tlsServer = a.serve(s)
	return s
}

// guard lets in who has a token of s. realm is where the challenge sends others.
func (s *tokens) guard(realm string) guard {
	return func(r *http.Request, repository string) (string, bool) {
		challenge := fmt.Sprintf(`Bearer realm=%q,service="service"`, realm)
		if repository != "" {
			challenge += fmt.Sprintf(`,scope="repository:%s:pull"`, repository)
		}
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok {
			return challenge, false
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		g, ok := s.issued[token]
		if !ok || time.Now().After(g.until) {
			return challenge + `,error="invalid_token"`, false
		}
		return challenge + `,error="insufficient_scope"`, slices.Contains(g.repositories, repository)
	}
}

// ServeHTTP knows me:secret and the refresh token "identity"; strangers get a
// token that is good for nothing.
func (s *tokens) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.ParseForm()
	user, password, _ := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, password = r.Form.Get("username"), r.Form.Get("password")
	}
	known := user == "me" && password == "secret" ||
		r.Form.Get("grant_type") == "refresh_token" && r.Form.Get("refresh_token") == "identity"
	if !known && (password != "" || r.Method == http.MethodPost) || r.Form.Get("service") != "service" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	var repositories []string
	for _, scope := range strings.Fields(strings.Join(r.Form["scope"], " ")) {
		if p := strings.Split(scope, ":"); known && len(p) == 3 && p[0] == "repository" && p[2] == "pull" {
			repositories = append(repositories, p[1])
		}
	}
	asJSON(w, s.issue(repositories...), "token", "access_token")
}

// issue makes a token that is good for repositories.
func (s *tokens) issue(repositories ...string) string {
	token := rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	g := grant{repositories, time.Now().Add(5 * time.Minute)}
	if s.stale > 0 {
		s.stale--
		g.until = time.Now().Add(-time.Hour)
	}
	s.issued[token] = g
	return token
}

// hostsToml writes the hosts.toml of a registry host.
func hostsToml(t testing.TB, certs, host, text string) {
	t.Helper()
	if i := strings.LastIndex(host, ":"); i > 0 { // the name of a directory has no colon
		host = host[:i] + "_" + host[i+1:] + "_"
	}
	dir := filepath.Join(certs, host)
	if err := errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644),
	); err != nil {
		t.Fatal(err)
	}
}

// pullOnce pulls into a store of its own.
func pullOnce(t testing.TB, certs, ref string, a *Auth) (Image, error) {
	t.Helper()
	s := openAt(t, t.TempDir(), func(o *Options) { o.RegistryConfigDir = certs })
	defer s.Close()
	var k sink
	r := k.request(ref)
	r.Auth = a
	img, err := s.Pull(t.Context(), r)
	verify(t, s)
	if err != nil {
		noRefs(t, s)
	}
	return img, err
}

func someImage(t testing.TB) v1.Image {
	return imageOf(t, "x", layerOf(t, "a", 300_000, 1, types.OCILayer), layerOf(t, "b", 200_000, 2, types.OCILayerZStd))
}

func TestLogins(t *testing.T) {
	t.Parallel()
	a, d := newAuthority(t), newDepot(t)
	img := someImage(t)
	d.push("team/app:1", img)
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	d.push("team/index:1", mutate.AppendManifests(index, mutate.IndexAddendum{
		Add:        img,
		Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}},
	}))
	token := newTokens(a)
	open := a.serve(d.app(nil))
	basic := a.serve(d.app(password("me", "secret")))
	bearer := a.serve(d.app(token.guard(token.URL + "/token")))
	certs := t.TempDir()
	for _, s := range []*tlsServer{open, basic, bearer} {
		hostsToml(t, certs, s.host, fmt.Sprintf("server = %q\nca = %q\n", s.URL, a.file))
	}
	secret := &Auth{Username: "me", Password: "secret"}
	encoded := &Auth{Auth: base64.StdEncoding.EncodeToString([]byte("me:secret"))}
	with := func(a *Auth, server string) *Auth {
		c := *a
		c.ServerAddress = server
		return &c
	}
	signed := &Auth{RegistryToken: token.issue("team/app")}
	for _, c := range []struct {
		name string
		s    *tlsServer
		auth *Auth
		ok   bool
	}{
		{"open", open, nil, true},
		{"open, needless credentials", open, secret, true},
		{"basic", basic, secret, true},
		{"basic, encoded", basic, encoded, true},
		{"basic, encoded badly", basic, &Auth{Auth: "%%%"}, false},
		{"basic, none", basic, nil, false},
		{"basic, wrong", basic, &Auth{Username: "me", Password: "guess"}, false},
		{"basic, for this host", basic, with(secret, basic.URL), true},
		{"basic, for this host, with a path", basic, with(secret, basic.URL+"/v1/"), true},
		{"basic, for this host, bare", basic, with(secret, basic.host), true},
		{"basic, for another host", basic, with(secret, "https://registry.example"), false},
		{"basic, for another port", basic, with(secret, "127.0.0.1:1"), false},
		{"basic, identity token", basic, &Auth{IdentityToken: "identity"}, false},
		{"token", bearer, secret, true},
		{"token, encoded", bearer, encoded, true},
		{"token, none", bearer, nil, false},
		{"token, wrong", bearer, &Auth{Username: "me", Password: "guess"}, false},
		{"token, for another host", bearer, with(secret, token.URL), false},
		{"identity token", bearer, &Auth{IdentityToken: "identity"}, true},
		{
			"identity token, and a user",
			bearer,
			&Auth{IdentityToken: "identity", Username: "00000000-0000-0000-0000-000000000000"},
			true,
		},
		{"identity token, wrong", bearer, &Auth{IdentityToken: "other"}, false},
		{
			"identity token for another host",
			bearer,
			with(&Auth{IdentityToken: "identity"}, "https://registry.example"),
			false,
		},
		{"registry token", bearer, signed, true},
		{"registry token for another host", bearer, with(signed, "registry.example"), false},
		{"registry token, wrong", bearer, &Auth{RegistryToken: "x.y.z"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := pullOnce(t, certs, c.s.host+"/team/app:1", c.auth)
			if c.ok && (err != nil || got.ID != idOf(t, img)) || !c.ok && !errors.Is(err, ErrUnauthorized) {
				t.Errorf("%s: %v", got.ID, err)
			}
			if s := fmt.Sprint(err); strings.Contains(s, "secret") || strings.Contains(s, "identity") {
				t.Errorf("it tells the secret: %v", err)
			}
		})
	}
	if _, err := pullOnce(t, certs, bearer.host+"/team/index:1", secret); err != nil {
		t.Errorf("index: %v", err)
	}
	if _, err := pullOnce(t, certs, open.host+"/team/none:1", nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("none: %v", err)
	}
	// The credentials go to the token server alone, those for another host to none.
	for _, r := range bearer.requests() {
		if h := r.Header.Get("Authorization"); h != "" && !strings.HasPrefix(h, "Bearer ") {
			t.Errorf("the registry got %q", h)
		}
	}
}

// A token that expires in the middle of a pull is replaced.
func TestExpiredToken(t *testing.T) {
	t.Parallel()
	a, d := newAuthority(t), newDepot(t)
	d.push("team/app:1", someImage(t))
	token := newTokens(a)
	registry := d.app(token.guard(token.URL + "/token"))
	token.stale = 1
	expired, once := token.issue(), sync.Once{}
	s := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			once.Do(func() { r.Header.Set("Authorization", "Bearer "+expired) })
		}
		registry.ServeHTTP(w, r)
	}))
	certs := t.TempDir()
	hostsToml(t, certs, s.host, fmt.Sprintf("server = %q\nca = %q\n", s.URL, a.file))
	if _, err := pullOnce(t, certs, s.host+"/team/app:1", &Auth{Username: "me", Password: "secret"}); err != nil {
		t.Error(err)
	}
}

// What hosts.toml says about TLS, headers and paths.
func TestHostsToml(t *testing.T) {
	t.Parallel()
	a, d := newAuthority(t), newDepot(t)
	img := someImage(t)
	d.push("team/app:1", img)
	c, k := a.issue("client", a.cert, a.key)
	cert, key := a.write("client", c, k)
	both := filepath.Join(a.dir, "both.pem")
	check(t, os.WriteFile(both, append(read(t, cert), read(t, key)...), 0o600))
	plain := a.serve(d.app(nil))
	strict := a.serve(
		d.app(nil),
		func(c *tls.Config) { c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, a.pool() },
	)
	prefixed := a.serve(http.StripPrefix("/mirrors", d.app(nil)))
	app := d.app(nil)
	header := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Key") != "open sesame" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		app.ServeHTTP(w, r)
	}))
	dead := "https://127.0.0.1:1"
	for _, c := range []struct {
		name, host, toml string
		want             error
	}{
		{"ca", "", fmt.Sprintf("server = %q\nca = %q\n", plain.URL, a.file), nil},
		{"unknown ca", "", fmt.Sprintf("server = %q\n", plain.URL), ErrUnavailable},
		{"skip_verify", "", fmt.Sprintf("server = %q\nskip_verify = true\n", plain.URL), nil},
		{
			"client certificate",
			"",
			fmt.Sprintf("server = %q\nca = %q\nclient = [[%q, %q]]\n", strict.URL, a.file, cert, key),
			nil,
		},
		{
			"client certificate in one file",
			"",
			fmt.Sprintf("server = %q\nca = %q\nclient = %q\n", strict.URL, a.file, both),
			nil,
		},
		{"no client certificate", "", fmt.Sprintf("server = %q\nca = %q\n", strict.URL, a.file), ErrUnavailable},
		{
			"header",
			"",
			fmt.Sprintf("server = %q\nca = %q\n[header]\nx-key = \"open sesame\"\n", header.URL, a.file),
			nil,
		},
		{"no header", "", fmt.Sprintf("server = %q\nca = %q\n", header.URL, a.file), ErrUnauthorized},
		{"path", "", fmt.Sprintf("[host.%q]\nca = %q\n", prefixed.URL+"/mirrors", a.file), nil},
		{
			"override_path",
			"",
			fmt.Sprintf("[host.%q]\nca = %q\noverride_path = true\n", prefixed.URL+"/mirrors/v2", a.file),
			nil,
		},
		{
			"second mirror",
			"",
			fmt.Sprintf("server = %q\n[host.%q]\n[host.%q]\nca = %q\n", dead, dead, plain.URL, a.file),
			nil,
		},
		{"server after mirrors", "", fmt.Sprintf("server = %q\nca = %q\n[host.%q]\n", plain.URL, a.file, dead), nil},
		{"default", "_default", fmt.Sprintf("server = %q\nca = %q\n", plain.URL, a.file), nil},
		{
			"default mirrors",
			"_default",
			fmt.Sprintf(
				"[host.%q]\n[host.%q]\nca = %q\ncapabilities = [\"pull\", \"resolve\"]\n",
				dead,
				plain.URL,
				a.file,
			),
			nil,
		},
		{
			"a mirror that may not resolve",
			"",
			fmt.Sprintf("server = %q\n[host.%q]\nca = %q\ncapabilities = [\"pull\"]\n", dead, plain.URL, a.file),
			ErrUnavailable,
		},
		{"all down", "", fmt.Sprintf("server = %q\n", dead), ErrUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			certs := t.TempDir()
			if c.host == "" {
				c.host = "registry.example"
			}
			hostsToml(t, certs, c.host, c.toml)
			got, err := pullOnce(t, certs, "registry.example/team/app:1", nil)
			if !errors.Is(err, c.want) || c.want == nil && got.ID != idOf(t, img) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if err == nil && got.RepoTags[0] != "registry.example/team/app:1" {
				t.Errorf("tags %v", got.RepoTags)
			}
		})
	}
}

// The credentials of a pull count more than those of the node in hosts.toml:
// a pod does not get an image because the node may have it.
func TestNodeCredentials(t *testing.T) {
	t.Parallel()
	a, d := newAuthority(t), newDepot(t)
	d.push("team/app:1", someImage(t))
	token := newTokens(a)
	header := fmt.Sprintf(
		"[header]\nauthorization = \"Basic %s\"\n",
		base64.StdEncoding.EncodeToString([]byte("me:secret")),
	)
	for kind, auth := range map[string]guard{
		"basic": password("me", "secret"),
		"token": token.guard(token.URL + "/token"),
	} {
		t.Run(kind, func(t *testing.T) {
			s := a.serve(d.app(auth))
			certs := t.TempDir()
			hostsToml(t, certs, s.host, fmt.Sprintf("server = %q\nca = %q\n%s", s.URL, a.file, header))
			ref := s.host + "/team/app:1"
			if _, err := pullOnce(t, certs, ref, nil); err != nil {
				t.Errorf("as the node: %v", err)
			}
			if _, err := pullOnce(
				t,
				certs,
				ref,
				&Auth{Username: "me", Password: "secret", ServerAddress: s.host},
			); err != nil {
				t.Errorf("as a user: %v", err)
			}
			for name, c := range map[string]*Auth{
				"password": {Username: "you", Password: "guess"},
				"identity": {IdentityToken: "guess"},
				"token":    {RegistryToken: "guess"},
			} {
				if _, err := pullOnce(t, certs, ref, c); !errors.Is(err, ErrUnauthorized) {
					t.Errorf("a user with a wrong %s: %v", name, err)
				}
			}
			// Credentials for somewhere else are none for here.
			if _, err := pullOnce(
				t,
				certs,
				ref,
				&Auth{Username: "you", Password: "guess", ServerAddress: "elsewhere.example"},
			); err != nil {
				t.Errorf("with credentials for elsewhere: %v", err)
			}
		})
	}
}

// Whoever joins the download of a private image with wrong credentials, or
// none, gets no image, and the one who may have it does.
func TestJoinerNeedsCredentials(t *testing.T) {
	t.Parallel()
	a, d := newAuthority(t), newDepot(t)
	img := someImage(t)
	d.push("team/app:1", img)
	token := newTokens(a)
	for kind, auth := range map[string]guard{
		"basic": password("me", "secret"),
		"token": token.guard(token.URL + "/token"),
	} {
		t.Run(kind, func(t *testing.T) {
			app := d.app(auth)
			refused := make(chan struct{})
			s := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.Contains(r.URL.Path, "/blobs/") {
					<-refused // the layers flow while the others try
				}
				app.ServeHTTP(w, r)
			}))
			certs := t.TempDir()
			hostsToml(t, certs, s.host, fmt.Sprintf("server = %q\nca = %q\n", s.URL, a.file))
			store := openAt(t, t.TempDir(), func(o *Options) { o.RegistryConfigDir = certs })
			pull := func(k *sink, a *Auth) error {
				r := k.request(s.host + "/team/app:1")
				r.Auth = a
				_, err := store.Pull(t.Context(), r)
				return err
			}
			strangers := []*Auth{
				nil,
				{Username: "me", Password: "guess"},
				{IdentityToken: "guess"},
				{RegistryToken: "guess"},
				{Username: "me", Password: "secret", ServerAddress: "elsewhere.example"},
			}
			var good, bad sink
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := pull(&good, &Auth{Username: "me", Password: "secret"}); err != nil {
					t.Error(err)
				}
			})
			eventually(t, "the layers are on their way", func() bool {
				store.mu.Lock()
				defer store.mu.Unlock()
				return len(store.downloads) == 2
			})
			var tried sync.WaitGroup
			for _, c := range strangers {
				tried.Go(func() {
					if err := pull(&bad, c); !errors.Is(err, ErrUnauthorized) {
						t.Errorf("%+v: %v", c, err)
					}
				})
			}
			tried.Wait()
			close(refused)
			wg.Wait()
			for _, c := range strangers { // all of it is here now
				if err := pull(&bad, c); !errors.Is(err, ErrUnauthorized) {
					t.Errorf("%+v, afterwards: %v", c, err)
				}
			}
			if len(good.layers) != 2 || len(bad.layers) != 0 {
				t.Errorf("unpacked %v for the one, %v for the others", good.layers, bad.layers)
			}
			verify(t, store)
		})
	}
}

// Neither the storage behind a redirect, nor one behind the token server's,
// ever sees a credential.
func TestRedirectsAmongServers(t *testing.T) {
	t.Parallel()
	a, d := newAuthority(t), newDepot(t)
	d.push("team/app:1", someImage(t))
	token := newTokens(a)
	files := d.app(nil)
	storage := a.serve(files)
	elsewhere := a.serve(token)
	app := d.app(token.guard(token.URL + "/token"))
	s := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Authorization") != "" {
			http.Redirect(w, r, storage.URL+r.URL.Path+"?signature=hush", http.StatusTemporaryRedirect)
			return
		}
		app.ServeHTTP(w, r)
	}))
	certs := t.TempDir()
	hostsToml(t, certs, s.host, fmt.Sprintf("server = %q\nca = %q\n[header]\nx-key = \"key\"\n", s.URL, a.file))
	ref := s.host + "/team/app:1"
	for name, c := range map[string]*Auth{
		"password": {Username: "me", Password: "secret"},
		"identity": {IdentityToken: "identity"},
		"token":    {RegistryToken: token.issue("team/app")},
	} {
		if _, err := pullOnce(t, certs, ref, c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	seen := storage.requests()
	if len(seen) < 6 {
		t.Errorf("%d requests were redirected", len(seen))
	}
	// A token server that sends its callers away, with all that they have.
	away := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code := http.StatusTemporaryRedirect
		if r.Method == http.MethodPost && r.URL.Query().Get("get") == "" {
			code = http.StatusPermanentRedirect
		}
		http.Redirect(w, r, elsewhere.URL+r.URL.Path+"?"+r.URL.RawQuery, code)
	}))
	s2 := a.serve(d.app(token.guard(away.URL + "/token")))
	hostsToml(t, certs, s2.host, fmt.Sprintf("server = %q\nca = %q\n[header]\nx-key = \"key\"\n", s2.URL, a.file))
	for name, c := range map[string]*Auth{
		"password": {Username: "me", Password: "secret"},
		"identity": {IdentityToken: "identity"},
		"none":     nil,
	} {
		if _, err := pullOnce(t, certs, s2.host+"/team/app:1", c); err == nil {
			t.Errorf("%s: pulled", name)
		}
	}
	for _, r := range append(seen, elsewhere.requests()...) {
		body := url.Values{}
		if r.Form != nil {
			body = r.Form
		}
		if h := r.Header.Get(
			"Authorization",
		) + r.Header.Get(
			"X-Key",
		) + body.Get(
			"password",
		) + body.Get(
			"refresh_token",
		); h != "" {
			t.Errorf("%s %s got %q", r.Method, r.URL, h)
		}
	}
	// An error does not tell the signature of a link.
	storage.Close()
	_, err := pullOnce(t, certs, ref, &Auth{Username: "me", Password: "secret"})
	if !errors.Is(err, ErrUnavailable) ||
		strings.Contains(err.Error(), "hush") {
		t.Errorf("storage down: %v", err)
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	return b
}
