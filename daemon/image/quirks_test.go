package image

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/platforms"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/image/registry"
)

// The tests of this file pull from registries that are right in substance and
// odd in form, and from some that mean harm.

const quirkRepo = "team/app"

// quirk is a registry with one image, quirkRepo:1, behind f.
type quirk struct {
	*httptest.Server
	ref  string
	id   string
	back http.Handler
}

func newQuirk(t testing.TB, f func(q *quirk, w http.ResponseWriter, r *http.Request)) *quirk {
	t.Helper()
	h := newHub(t)
	img := imageOf(t, "x", layerOf(t, "a", 100_000, 1, types.OCILayer), layerOf(t, "b", 3000, 2, types.OCILayer))
	h.push(t, quirkRepo+":1", img)
	q := &quirk{back: h.Config.Handler, id: idOf(t, img)}
	q.Server = httptest.NewUnstartedServer(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { f(q, w, r) }),
	)
	q.Config.ErrorLog = log.New(io.Discard, "", 0)
	q.Start()
	t.Cleanup(q.Close)
	q.ref = strings.TrimPrefix(q.URL, "http://") + "/" + quirkRepo + ":1"
	return q
}

// answer is what the registry says, to be changed.
func (q *quirk) answer(r *http.Request) (http.Header, int, []byte) {
	w := httptest.NewRecorder()
	q.back.ServeHTTP(w, r)
	return w.Header(), w.Code, w.Body.Bytes()
}

func (q *quirk) pull(t testing.TB, a *Auth) error {
	t.Helper()
	img, err := pullOnce(t, "", q.ref, a)
	if err == nil && img.ID != q.id {
		t.Errorf("pulled %s, want %s", img.ID, q.id)
	}
	return err
}

func send(w http.ResponseWriter, header http.Header, code int, body []byte) {
	maps.Copy(w.Header(), header)
	w.WriteHeader(code)
	w.Write(body)
}

func isBlob(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/") }

// Answers that say less, or something else, than the specification asks for.
func TestOddAnswers(t *testing.T) {
	t.Parallel()
	zip := func(b []byte) []byte {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		w.Write(b)
		w.Close()
		return z.Bytes()
	}
	typed := func(typ string) func(*quirk, http.ResponseWriter, *http.Request) {
		return func(q *quirk, w http.ResponseWriter, r *http.Request) {
			h, c, b := q.answer(r)
			h.Set("Content-Type", typ)
			h.Del("Docker-Content-Digest")
			send(w, h, c, b)
		}
	}
	redirect := func(code int, to func(r *http.Request) string) func(*quirk, http.ResponseWriter, *http.Request) {
		return func(q *quirk, w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("hop") == "" {
				w.Header().Set("Location", to(r))
				w.WriteHeader(code)
				return
			}
			q.back.ServeHTTP(w, r)
		}
	}
	for name, f := range map[string]func(q *quirk, w http.ResponseWriter, r *http.Request){
		"json":       typed("application/json"),
		"text":       typed("text/plain; charset=utf-8"),
		"charset":    typed("application/vnd.oci.image.manifest.v1+json; charset=ISO-8859-1"),
		"broken":     typed(";;;"),
		"wrong type": typed("application/vnd.oci.image.index.v1+json"),
		"chunked": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			h, c, b := q.answer(r)
			h.Del("Content-Length")
			send(w, h, c, b[:len(b)/2])
			http.NewResponseController(w).Flush()
			w.Write(b[len(b)/2:])
		},
		"gzip on all": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			h, c, b := q.answer(r)
			b = zip(b)
			h.Set("Content-Encoding", "gzip")
			h.Set("Content-Length", strconv.Itoa(len(b)))
			send(w, h, c, b)
		},
		"gzip on all, chunked": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			h, c, b := q.answer(r)
			h.Set("Content-Encoding", "gzip")
			h.Del("Content-Length")
			send(w, h, c, zip(b))
		},
		"blobs called gzip": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			h, c, b := q.answer(r)
			if isBlob(r) && bytes.HasPrefix(b, magicGzip) {
				h.Set("Content-Encoding", "x-gzip")
			}
			send(w, h, c, b)
		},
		"301, absolute path": redirect(
			http.StatusMovedPermanently,
			func(r *http.Request) string { return r.URL.Path + "?hop=1" },
		),
		"302, relative": redirect(
			http.StatusFound,
			func(r *http.Request) string { return "./" + filepath.Base(r.URL.Path) + "?hop=1" },
		),
		"303": redirect(
			http.StatusSeeOther,
			func(r *http.Request) string { return "http://" + r.Host + r.URL.Path + "?hop=1" },
		),
		"308, no scheme": redirect(
			http.StatusPermanentRedirect,
			func(r *http.Request) string { return "//" + r.Host + r.URL.Path + "?hop=1" },
		),
		"a chain": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			if n, _ := strconv.Atoi(r.URL.Query().Get("n")); n < 8 {
				http.Redirect(w, r, fmt.Sprintf("%s?n=%d", r.URL.Path, n+1), http.StatusTemporaryRedirect)
				return
			}
			q.back.ServeHTTP(w, r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if err := newQuirk(t, f).pull(t, nil); err != nil {
				t.Error(err)
			}
		})
	}
}

// A second pull asks with HEAD, which some registries refuse to those who may
// GET, for one those that lead to storage with signed links.
func TestHeadRefused(t *testing.T) {
	t.Parallel()
	for _, code := range []int{400, 401, 403, 404, 405, 501} {
		t.Run(strconv.Itoa(code), func(t *testing.T) {
			t.Parallel()
			q := newQuirk(t, func(q *quirk, w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodHead {
					w.WriteHeader(code)
					return
				}
				q.back.ServeHTTP(w, r)
			})
			s := openAt(t, t.TempDir())
			var k sink
			mustPull(t, s, k.request(q.ref))
			mustPull(t, s, k.request(q.ref))
		})
	}
}

// lock is a quirk's login with a token; what differs is told by its fields.
type lock struct {
	challenge []string // WWW-Authenticate; the token server is $T
	refuse    int      // to strangers; 401
	atRoot    bool     // the challenge is at /v2/ alone
	expires   bool     // the first token, when the first blob is asked for
	serve     func(w http.ResponseWriter, r *http.Request, token string)
}

// asJSON answers with a token under these names to who has the password, or the
// identity.
func asJSON(w http.ResponseWriter, token string, names ...string) {
	m := map[string]any{}
	for _, n := range names {
		m[n] = token
	}
	json.NewEncoder(w).Encode(m)
}

func knows(r *http.Request) bool {
	r.ParseForm()
	user, password, _ := r.BasicAuth()
	return user == "me" && password == "secret" ||
		r.PostForm.Get("username") == "me" && r.PostForm.Get("password") == "secret" ||
		r.PostForm.Get("refresh_token") == "identity"
}

func (l lock) quirk(t testing.TB) *quirk {
	var number, gone atomic.Int64
	return newQuirk(t, func(q *quirk, w http.ResponseWriter, r *http.Request) {
		token := func() string { return fmt.Sprintf("token-%d", number.Load()) }
		if strings.HasPrefix(r.URL.Path, "/token") {
			if !knows(r) {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			number.Add(1)
			l.serve(w, r, token())
			return
		}
		if l.expires && isBlob(r) {
			gone.CompareAndSwap(0, number.Load())
		}
		user, password, _ := r.BasicAuth()
		ok := l.serve == nil && user == "me" && password == "secret" ||
			l.serve != nil && r.Header.Get("Authorization") == "Bearer "+token() && number.Load() != gone.Load()
		if ok && r.URL.Path != "/v2/" {
			q.back.ServeHTTP(w, r)
			return
		}
		root := r.URL.Path == "/v2/"
		if !l.atRoot || root {
			for _, c := range l.challenge {
				w.Header().Add("WWW-Authenticate", strings.ReplaceAll(c, "$T", q.URL+"/token"))
			}
		}
		if l.refuse == 0 || root {
			w.WriteHeader(http.StatusUnauthorized)
		} else {
			w.WriteHeader(l.refuse)
		}
	})
}

// Ways to ask for a login, and ways to give out tokens.
func TestOddLogins(t *testing.T) {
	t.Parallel()
	bearer := []string{`Bearer realm="$T",service="x",scope="repository:team/app:pull"`}
	both := func(w http.ResponseWriter, r *http.Request, token string) { asJSON(w, token, "token", "access_token") }
	get := func(code int) func(http.ResponseWriter, *http.Request, string) {
		return func(w http.ResponseWriter, r *http.Request, token string) {
			if r.Method != http.MethodGet {
				w.WriteHeader(code)
				return
			}
			asJSON(w, token, "token")
		}
	}
	var busy atomic.Bool
	for name, l := range map[string]lock{
		"both":                     {challenge: bearer, serve: both},
		"POST is not found":        {challenge: bearer, serve: get(404)},
		"POST is not allowed":      {challenge: bearer, serve: get(405)},
		"POST is bad":              {challenge: bearer, serve: get(400)},
		"POST is forbidden":        {challenge: bearer, serve: get(403)},
		"POST cannot be processed": {challenge: bearer, serve: get(422)},
		"POST is not implemented":  {challenge: bearer, serve: get(501)},
		"POST is answered like a GET": {challenge: bearer, serve: func(
			w http.ResponseWriter,
			r *http.Request,
			token string,
		) {
			asJSON(w, token, "token")
		}},
		"POST is answered with a page": {challenge: bearer, serve: get(200)},
		"POST only": {challenge: bearer, serve: func(
			w http.ResponseWriter,
			r *http.Request,
			token string,
		) {
			asJSON(w, token, "access_token")
		}},
		"Negotiate, then Basic": {challenge: []string{"Negotiate", "NTLM", `Basic realm="x"`}},
		"all in one line": {challenge: []string{
			`Negotiate, Basic realm="a, b=c", Bearer realm="$T",service="x", scope="repository:team/app:pull,push"`,
		}, serve: both},
		"Basic in one line": {challenge: []string{
			`Negotiate YII=, NTLM, Basic realm="x", charset="UTF-8"`,
		}},
		"Basic, then Bearer": {challenge: append([]string{`Basic realm="x"`}, bearer...), serve: both},
		"spaces and small letters": {challenge: []string{
			`bearer  realm="$T" , service="a b" , scope="repository:team/app:pull,push registry:catalog:*"`,
		}, serve: both},
		"no scope, no service":    {challenge: []string{`Bearer realm="$T"`}, serve: both},
		"a realm with a query":    {challenge: []string{`Bearer realm="$T?account=1"`}, serve: both},
		"a relative realm":        {challenge: []string{`Bearer realm="/token"`}, serve: both},
		"forbidden to strangers":  {challenge: bearer, refuse: 403, atRoot: true, serve: both},
		"not found for strangers": {challenge: bearer, refuse: 404, atRoot: true, serve: both},
		"not found, Basic":        {challenge: []string{`Basic realm="x"`}, refuse: 404, atRoot: true},
		"an expired token":        {challenge: bearer, expires: true, serve: both},
		"an expired token, and it says": {challenge: []string{
			`Bearer realm="$T",error="invalid_token"`,
		}, expires: true, serve: both},
		"the token server is busy once": {challenge: bearer, serve: func(
			w http.ResponseWriter,
			r *http.Request,
			token string,
		) {
			if busy.CompareAndSwap(false, true) {
				w.Header().Set("Retry-After", "1")
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			both(w, r, token)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if err := l.quirk(t).pull(t, &Auth{Username: "me", Password: "secret"}); err != nil {
				t.Error(err)
			}
			for _, c := range []*Auth{nil, {Username: "me", Password: "guess"}} {
				if err := l.quirk(t).
					pull(t, c); !errors.Is(err, ErrUnauthorized) &&
					(l.refuse != 404 || !errors.Is(err, ErrNotFound)) {
					t.Errorf("%+v: %v", c, err)
				}
			}
		})
	}
}

// An identity token is for token servers. A registry that wants a password gets
// that, where there is one as well.
func TestIdentityTokenBesidePassword(t *testing.T) {
	t.Parallel()
	basic := lock{challenge: []string{`Basic realm="x"`}}
	bearer := lock{
		challenge: []string{`Bearer realm="$T"`},
		serve: func(w http.ResponseWriter, r *http.Request, token string) {
			if r.PostForm.Get("refresh_token") != "identity" {
				token = "no"
			}
			asJSON(w, token, "access_token")
		},
	}
	b64 := base64.StdEncoding.EncodeToString
	for _, a := range []Auth{{Username: "me", Password: "secret"}, {Auth: b64([]byte("me:secret"))}} {
		a.IdentityToken = "identity"
		for _, l := range []lock{basic, bearer} {
			if err := l.quirk(t).pull(t, &a); err != nil {
				t.Errorf("%s: %v", l.challenge, err)
			}
		}
		a.ServerAddress = "https://other.example"
		if err := basic.quirk(t).pull(t, &a); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("for another host: %v", err)
		}
	}
	for _, a := range []Auth{{Auth: "%"}, {Auth: b64([]byte("<token>:"))}, {Username: "<token>"}} {
		a.IdentityToken = "identity"
		if err := bearer.quirk(t).pull(t, &a); err != nil {
			t.Error(err)
		}
		if err := basic.quirk(t).pull(t, &a); !errors.Is(err, ErrUnauthorized) {
			t.Error(err)
		}
	}
}

// One pull asks for one token, and a stranger asks three times at most.
func TestTokenIsShared(t *testing.T) {
	t.Parallel()
	var asked, tokens atomic.Int64
	q := newQuirk(t, func(q *quirk, w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			tokens.Add(1)
			asJSON(w, "t", "token", "access_token")
		case r.Header.Get("Authorization") == "Bearer t" && r.Header.Get("X-No") == "":
			q.back.ServeHTTP(w, r)
		default:
			asked.Add(1)
			w.Header().Set("WWW-Authenticate", `Bearer realm="/token"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	if err := q.pull(t, nil); err != nil || tokens.Load() != 1 || asked.Load() != 1 {
		t.Errorf("%d tokens, %d challenges: %v", tokens.Load(), asked.Load(), err)
	}
	never := newQuirk(t, func(q *quirk, w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			asJSON(w, "t", "token", "access_token")
			return
		}
		asked.Add(1)
		w.Header().Set("WWW-Authenticate", `Bearer realm="/token"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	asked.Store(0)
	if err := never.pull(t, nil); !errors.Is(err, ErrUnauthorized) || asked.Load() > 3 {
		t.Errorf("asked %d times: %v", asked.Load(), err)
	}
}

// What is wrong in hosts.toml is said, with the file and the key: a pull that
// went elsewhere instead would surprise its owner.
func TestBrokenHostsToml(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.push(t, "team/app:1", someImage(t))
	certs := t.TempDir()
	file := filepath.Join(certs, "registry.example", "hosts.toml")
	for text, want := range map[string]string{
		"this is not toml": "hosts.toml:1:",
		"server = \"" + h.URL + "\"\n[host.\"http://x\"]\n[host.\"http://x\"]\n": "http://x",
		"server = \"" + h.URL + "\"\nskip_verify = \"yes\"\n":                    "skip_verify",
		"server = \"" + h.URL + "\"\ncapabilities = [\"fly\"]\n":                 "fly",
		"server = \"" + h.URL + "\"\nca = 5\n":                                   "ca",
		"server = \"" + h.URL + "\"\nca = \"/none.pem\"\n":                       "/none.pem",
		"server = \"" + h.URL + "\"\nclient = [[\"/a\", \"/b\", \"/c\"]]\n":      "client",
		"server = \"" + h.URL + "\"\n[header]\nx = 5\n":                          "header",
		"server = \"" + h.URL + "\"\ndial_timeout = \"soon\"\n":                  "soon",
		"server = \"http://[::1\"\n":                                             "http://[::1",
	} {
		hostsToml(t, certs, "registry.example", text)
		_, err := pullOnce(t, certs, "registry.example/team/app:1", nil)
		if err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	// So is a link to nothing: neither the next directory nor the registry itself
	// is asked instead.
	for _, link := range []string{file, filepath.Dir(file)} {
		check(t, errors.Join(os.RemoveAll(link), os.Symlink("/none", link)))
		_, err := pullOnce(t, certs, "registry.example/team/app:1", nil)
		if err == nil ||
			!strings.Contains(err.Error(), link+" is a link to /none") {
			t.Errorf("%s: %v", link, err)
		}
	}
	os.Remove(filepath.Dir(file))
	// It is read anew by each pull, and what is not known is only said.
	var logged bytes.Buffer
	hostsToml(
		t,
		certs,
		"registry.example",
		"server = \""+h.URL+"\"\nfuture = 1\n[host.\""+h.URL+"\"]\nskip_verfy = true\n",
	)
	s := openAt(t, t.TempDir(), func(o *Options) {
		o.RegistryConfigDir, o.Log = certs, slog.New(slog.NewTextHandler(&logged, nil))
	})
	var k sink
	mustPull(t, s, k.request("registry.example/team/app:1"))
	mustPull(t, s, k.request("registry.example/team/app:1"))
	s.Close()
	if l := logged.String(); strings.Count(l, "future") != 1 || !strings.Contains(l, "skip_verfy") ||
		!strings.Contains(l, file) {
		t.Errorf("logged: %s", l)
	}
}

// Nothing is waited for that has the name of a file and is none, also where hosts.toml
// names it.
func TestHostFilesThatBlock(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.push(t, "team/app:1", someImage(t))
	certs := t.TempDir()
	dir := filepath.Join(certs, "registry.example")
	for name, key := range map[string]string{
		"hosts.toml":  "",
		"ca.crt":      "",
		"client.cert": "",
		"client.key":  "",
		"a":           `ca = "a"`,
		"b":           `ca = ["` + dir + `/b"]`,
		"c":           `client = "c"`,
		"d":           `client = [["hosts.toml", "d"]]`,
		"e":           "[host.\"" + h.URL + "\"]\nca = \"e\"",
	} {
		hostsToml(t, certs, "registry.example", "server = \""+h.URL+"\"\n"+key+"\n")
		fifo := filepath.Join(dir, name)
		check(t, errors.Join(os.RemoveAll(fifo), syscall.Mkfifo(fifo, 0o600)))
		_, err := pullOnce(t, certs, "registry.example/team/app:1", nil)
		if err == nil || !strings.Contains(err.Error(), fifo) {
			t.Errorf("%s: %v", fifo, err)
		}
		os.RemoveAll(dir)
	}
}

// The layouts of the directory that users of containerd and of Docker have.
func TestHostDirectories(t *testing.T) {
	t.Parallel()
	a, d := newAuthority(t), newDepot(t)
	d.push("team/app:1", someImage(t))
	s := a.serve(d.app(nil))
	port := s.host[strings.LastIndex(s.host, ":")+1:]
	first, second := t.TempDir(), t.TempDir()
	for name, c := range map[string]struct{ root, dir, domain string }{
		"host:port":         {first, "127.0.0.2:" + port, "127.0.0.2:" + port},
		"host_port_":        {first, "127.0.0.3_" + port + "_", "127.0.0.3:" + port},
		"the second of two": {second, "registry.example", "registry.example"},
		"IPv6":              {first, "[::1]:" + port, "[::1]:" + port},
	} {
		dir := filepath.Join(c.root, c.dir)
		if err := errors.Join(
			os.MkdirAll(dir, 0o755),
			os.WriteFile(filepath.Join(dir, "my ca.pem"), read(t, a.file), 0o600),
			os.WriteFile(
				filepath.Join(dir, "hosts.toml"),
				fmt.Appendf(nil, "[host.%q]\nca = [\"my ca.pem\"]\n", s.URL),
				0o644,
			),
		); err != nil {
			t.Fatal(err)
		}
		if _, err := pullOnce(t, first+":"+second, c.domain+"/team/app:1", nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Docker's: certificates alone.
	dir := filepath.Join(first, s.host)
	if err := errors.Join(
		os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "ca.crt"), read(t, a.file), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	if _, err := pullOnce(t, first, s.host+"/team/app:1", nil); err != nil {
		t.Errorf("ca.crt: %v", err)
	}
}

// A mirror that speaks no TLS, or wants a certificate that there is none of, is
// given up at once, and its address without TLS is another mirror.
func TestMirrorOfTheWrongScheme(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.push(t, "team/app:1", someImage(t))
	var asked [2]atomic.Int64 // connections
	mirror := func(i int) *httptest.Server {
		s := httptest.NewUnstartedServer(h.Config.Handler)
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.Config.ConnState = func(_ net.Conn, st http.ConnState) {
			if st == http.StateNew {
				asked[i].Add(1)
			}
		}
		t.Cleanup(s.Close)
		return s
	}
	plain, locked := mirror(0), mirror(1)
	plain.Start()
	locked.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	locked.StartTLS()
	certs := t.TempDir()
	hostsToml(
		t,
		certs,
		"registry.example",
		fmt.Sprintf("server = \"http://127.0.0.1:1\"\n[host.%q]\n[host.%q]\nskip_verify = true\n[host.%q]\n",
			strings.Replace(plain.URL, "http:", "https:", 1), locked.URL, h.URL),
	)
	if _, err := pullOnce(t, certs, "registry.example/team/app:1", nil); err != nil {
		t.Fatal(err)
	}
	if p, l := asked[0].Load(), asked[1].Load(); p != 1 || l != 1 {
		t.Errorf("the one without TLS was asked %d times, the one that wants a certificate %d times", p, l)
	}
}

// A mirror whose server is out of order is asked twice and no more: the registry
// has what is wanted.
func TestMirrorOutOfOrder(t *testing.T) {
	t.Parallel()
	mirror, origin := newHub(t), newHub(t)
	origin.push(t, "team/app:1", imageOf(t, "x", layerOf(t, "a", 1000, 1, types.OCILayer)))
	mirror.set(func(w http.ResponseWriter, r *http.Request) bool {
		w.WriteHeader(http.StatusBadGateway)
		return false
	})
	certs := t.TempDir()
	hostsToml(t, certs, "registry.example", fmt.Sprintf("server = %q\n[host.%q]\n", origin.URL, mirror.URL))
	if _, err := pullOnce(t, certs, "registry.example/team/app:1", nil); err != nil {
		t.Fatal(err)
	}
	hits, _ := mirror.reset()
	for what, n := range hits {
		if n > 2 {
			t.Errorf("%s: asked %d times", what, n)
		}
	}
	if len(hits) != 3 {
		t.Errorf("asked for %v", hits)
	}
}

// Names and digests that are allowed and rare.
func TestRareReferences(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	img := someImage(t)
	tag := "T_" + strings.Repeat("x", 126)
	ref := h.push(t, quirkRepo+":"+tag, img)
	s := openAt(t, t.TempDir())
	var k sink
	got := mustPull(t, s, k.request(ref))
	raw, _ := img.RawManifest()
	hash, _ := img.Digest()
	mustPull(t, s, k.request(ref+"@"+hash.String()))
	for _, name := range []string{
		ref,
		ref + "@" + hash.String(),
		h.host + "/" + quirkRepo + "@" + hash.String(),
		got.ID,
		strings.TrimPrefix(got.ID, "sha256:"),
		got.ID[:20],
	} {
		if i, ok := s.Get(name); !ok || i.ID != got.ID {
			t.Errorf("%s is not known", name)
		}
	}
	// Another algorithm: its digest is the name, and is verified.
	sum := digest.SHA512.FromBytes(raw)
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, sum.String()) {
			w.Write(raw)
			return false
		}
		if strings.Contains(r.URL.Path, "sha512:") {
			w.Write([]byte(`{"schemaVersion":2}`))
			return false
		}
		return true
	})
	root := t.TempDir()
	s = openAt(t, root)
	if got = mustPull(
		t,
		s,
		k.request(h.host+"/"+quirkRepo+"@"+sum.String()),
	); !strings.HasSuffix(
		got.RepoDigests[0],
		sum.String(),
	) {
		t.Errorf("%v", got.RepoDigests)
	}
	_, err := s.Pull(t.Context(), k.request(h.host+"/"+quirkRepo+"@"+digest.SHA512.FromString("x").String()))
	if !errors.Is(err, ErrCorrupt) {
		t.Errorf("wrong content: %v", err)
	}
	verify(t, s)
	s.Close()
	if s = openAt(t, root); len(s.List()) != 1 {
		t.Error("gone after a restart")
	}
}

// indexOf pushes an index of these descriptors, each with an image of its own
// whose command is its number.
func indexOf(t testing.TB, h *hub, ref string, platforms ...*v1.Platform) string {
	t.Helper()
	x := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	x.SchemaVersion = 2
	for i, p := range platforms {
		img := imageOf(t, strconv.Itoa(i), layerOf(t, "f", 100, uint64(i), types.OCILayer))
		h.push(t, fmt.Sprintf("%s-%d", ref, i), img)
		raw, _ := img.RawManifest()
		d := ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest,
			Digest:    digest.FromBytes(raw),
			Size:      int64(len(raw)),
		}
		if p != nil {
			d.Platform = &ocispec.Platform{
				OS:           p.OS,
				Architecture: p.Architecture,
				Variant:      p.Variant,
				OSFeatures:   p.OSFeatures,
				OSVersion:    p.OSVersion,
			}
		}
		x.Manifests = append(x.Manifests, d)
	}
	b, err := json.Marshal(x)
	check(t, err)
	req, _ := http.NewRequest(
		http.MethodPut,
		h.URL+"/v2/"+strings.Replace(ref, ":", "/manifests/", 1),
		bytes.NewReader(b),
	)
	req.Header.Set("Content-Type", x.MediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode >= 300 {
		t.Fatal(err, resp)
	}
	resp.Body.Close()
	return h.host + "/" + ref
}

func TestPlatformsOfAnIndex(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	amd := func(variant string, features ...string) *v1.Platform {
		return &v1.Platform{OS: "linux", Architecture: "amd64", Variant: variant, OSFeatures: features}
	}
	none := &v1.Platform{OS: "unknown", Architecture: "unknown"}
	arm := &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	v3 := ocispec.Platform{OS: "linux", Architecture: "amd64", Variant: "v3"}
	for name, c := range map[string]struct {
		on   ocispec.Platform
		has  []*v1.Platform
		want int // -1: none
	}{
		"the best variant":          {v3, []*v1.Platform{amd(""), amd("v2"), amd("v4"), amd("v3")}, 3},
		"the next best":             {v3, []*v1.Platform{amd(""), amd("v4"), amd("v2")}, 2},
		"no variant":                {v3, []*v1.Platform{amd("v4"), none, amd("")}, 2},
		"only what is too new":      {v3, []*v1.Platform{amd("v4"), arm}, -1},
		"features of a snapshotter": {v3, []*v1.Platform{amd("", "nydus.remoteimage.v1"), amd("")}, 1},
		"no platform at all":        {v3, []*v1.Platform{nil, none}, 0},
		"no platform and wrong": {ocispec.Platform{
			OS:           "linux",
			Architecture: "arm64",
			Variant:      "v8",
		}, []*v1.Platform{nil}, -1}, // the images are for amd64
		"no platform and another": {v3, []*v1.Platform{arm, none, nil}, 2},
		"arm64 for arm64/v8": {ocispec.Platform{
			OS:           "linux",
			Architecture: "arm64",
		}, []*v1.Platform{amd(""), arm}, 1},
		"nothing": {v3, nil, -1},
	} {
		t.Run(name, func(t *testing.T) {
			ref := indexOf(t, h, strings.ReplaceAll(strings.ToLower(name), " ", "-")+":1", c.has...)
			s := openAt(t, t.TempDir(), func(o *Options) { o.Platform = &c.on })
			var k sink
			img, err := s.Pull(t.Context(), k.request(ref))
			if c.want < 0 {
				if !errors.Is(err, ErrUnsupported) ||
					!strings.Contains(err.Error(), "no image for "+platforms.Format(c.on)) {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil || img.Config.Cmd[0] != strconv.Itoa(c.want) {
				t.Errorf("%v %v, want %d", img.Config.Cmd, err, c.want)
			}
		})
	}
}

func TestMachine(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("of amd64")
	}
	v2 := "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3"
	v3 := v2 + " avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
	for flags, want := range map[string]string{
		"":               "",
		"sse4_1":         "",
		v2:               "v2",
		v2 + " avx avx2": "v2",
		v3:               "v3",
		v3 + " avx512f avx512bw avx512cd avx512dq avx512vl": "v4",
	} {
		p := machine("processor\t: 0\nflags\t\t: fpu " + flags + "\nbugs\t\t: none\n")
		if p.Variant != want ||
			p.OS != "linux" {
			t.Errorf("%s: %v, want %s", flags, p, want)
		}
	}
}

// A registry, or a token server, has a say in the text of an error, and none in
// what a terminal does with it, how long it is, or what was secret in it.
func TestErrorsAreFitToPrint(t *testing.T) {
	t.Parallel()
	evil := "\x1b]0;owned\x07\n2026-01-01 level=INFO msg=\"image pulled\"\u202e" + strings.Repeat("x", 3000)
	said, _ := json.Marshal(
		map[string]any{"errors": []any{map[string]string{"code": "DENIED", "message": evil}}, "details": evil},
	)
	manifest, _ := json.Marshal(
		map[string]any{
			"schemaVersion": 2,
			"manifests": []any{map[string]any{"mediaType": evil, "digest": digest.FromString("x"), "size": 1,
				"platform": map[string]string{"os": evil, "architecture": evil}}},
		},
	)
	for name, f := range map[string]func(q *quirk, w http.ResponseWriter, r *http.Request){
		"body": func(q *quirk, w http.ResponseWriter, r *http.Request) { send(w, nil, 403, said) },
		"token": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="/token?sig=hush"`)
			send(w, nil, 401, said)
		},
		"realm": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://127.0.0.1:1/?sig=hush`+"\u202e"+`"`)
			w.WriteHeader(401)
		},
		"redirect": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/?sig=hush", http.StatusFound)
		},
		"broken redirect": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "http://h%zz/?sig=hush")
			w.WriteHeader(302)
		},
		"platforms": func(q *quirk, w http.ResponseWriter, r *http.Request) { send(w, nil, 200, manifest) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := newQuirk(t, f)
			var logged lines
			s := openAt(t, t.TempDir(), func(o *Options) { o.Log = logged.logger() })
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			_, err := s.Pull(ctx, PullRequest{Ref: q.ref, Auth: &Auth{Username: "me", Password: "hush"}})
			s.Close() // its collector logs too
			text := fmt.Sprint(err)
			if err == nil || strings.ContainsAny(text, "\x1b\n\r\x07\u202e") || len(text) > 10_000 ||
				strings.Contains(text+logged.String(), "hush") {
				t.Errorf("%q", text)
			}
		})
	}
}

// What a registry sends without an end takes neither the memory nor the time of
// this process.
func TestEndlessAnswers(t *testing.T) { // not parallel: it measures
	flood := func(w http.ResponseWriter, begin string) {
		b := bytes.Repeat([]byte("x"), 64<<10)
		for _, err := io.WriteString(w, begin); err == nil; {
			_, err = w.Write(b)
		}
	}
	gzipped := func(w http.ResponseWriter, begin string) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		b := bytes.Repeat([]byte("x"), 1<<20)
		for _, err := io.WriteString(z, begin); err == nil; {
			_, err = z.Write(b)
		}
	}
	token := func(
		flood func(http.ResponseWriter, string),
		begin string,
	) func(*quirk, http.ResponseWriter, *http.Request) {
		return func(q *quirk, w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				flood(w, begin)
				return
			}
			w.Header().Set("WWW-Authenticate", `Bearer realm="/token"`)
			w.WriteHeader(401)
		}
	}
	for name, f := range map[string]func(q *quirk, w http.ResponseWriter, r *http.Request){
		"manifest":            func(q *quirk, w http.ResponseWriter, r *http.Request) { flood(w, `{"x":"`) },
		"compressed manifest": func(q *quirk, w http.ResponseWriter, r *http.Request) { gzipped(w, `{"x":"`) },
		"error": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(404)
			flood(w, `{"errors":"`)
		},
		"token":            token(flood, `{"token":"`),
		"compressed token": token(gzipped, `{"token":"`),
		"header": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			c, b, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return
			}
			defer c.Close()
			b.WriteString("HTTP/1.1 200 OK\r\n")
			for i := 0; ; i++ {
				if _, err := fmt.Fprintf(b, "X-%d: %01000d\r\n", i, i); err != nil {
					return
				}
			}
		},
		"redirects": func(q *quirk, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path+"x", http.StatusFound)
		},
	} {
		t.Run(name, func(t *testing.T) {
			q := newQuirk(t, f)
			s := openAt(t, t.TempDir())
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			_, err := s.Pull(ctx, PullRequest{Ref: q.ref})
			runtime.ReadMemStats(&after)
			if err == nil || ctx.Err() != nil {
				t.Errorf("got %v", err)
			}
			if n := after.TotalAlloc - before.TotalAlloc; n > 1<<30 {
				t.Errorf("took %d MiB", n>>20)
			}
		})
	}
}

// 50 callers want a private image at once, half of them may have it.
func TestCrowd(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	seen := map[string]int{}
	login := basicAuth("me", "secret")
	q := newQuirk(t, func(q *quirk, w http.ResponseWriter, r *http.Request) {
		if !login(w, r) {
			return
		}
		mu.Lock()
		seen[r.Method+" "+what(r.URL.Path)]++
		mu.Unlock()
		q.back.ServeHTTP(w, r)
	})
	s := openAt(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			var k sink
			r := k.request(q.ref)
			r.Auth = &Auth{Username: "me", Password: []string{"secret", "guess"}[i%2]}
			ctx := t.Context()
			if i%10 == 4 { // some lose patience
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Duration(i)*time.Millisecond)
				defer cancel()
			}
			_, err := s.Pull(ctx, r)
			switch {
			case i%2 == 1 && !errors.Is(err, ErrUnauthorized):
				t.Errorf("a stranger: %v", err)
			case i%2 == 0 && err != nil && ctx.Err() == nil:
				t.Errorf("one who may: %v", err)
			}
		})
	}
	wg.Wait()
	mu.Lock() // a handler that nobody waits for may still come
	defer mu.Unlock()
	for what, n := range seen {
		if layer := strings.HasPrefix(what, "GET blobs") && !strings.HasSuffix(what, configOf(t, s)); layer && n > 5 {
			t.Errorf("%s was fetched %d times", what, n)
		}
	}
	verify(t, s)
}

// configOf is the digest of the config, which each pull fetches by itself.
func configOf(t testing.TB, s *Store) string {
	t.Helper()
	l := s.List()
	if len(l) != 1 {
		t.Fatalf("%d images", len(l))
	}
	return l[0].ID
}

// layerFrom is a layer whose blob was packed in a way of its own.
func layerFrom(t testing.TB, seed uint64, typ types.MediaType, pack func(raw []byte) []byte) v1.Layer {
	t.Helper()
	l := layerOf(t, "f", 50_000, seed, typ).(*testLayer)
	return &testLayer{raw: l.raw, packed: pack(l.raw), typ: typ}
}

// What builders make of gzip and zstd: several members, tables of contents in
// frames to skip or members of their own, no compression in spite of the type.
func TestOddCompression(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	half := func(typ types.MediaType, between, after []byte) func([]byte) []byte {
		return func(b []byte) []byte {
			return bytes.Join([][]byte{pack(t, b[:20_000], typ), between, pack(t, b[20_000:], typ), after}, nil)
		}
	}
	skip := []byte{0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'a', 'b', 'c'}
	twice := layerOf(t, "twice", 9000, 9, types.OCILayer).(*testLayer)
	img := imageOf(
		t,
		"x",
		layerFrom(
			t,
			1,
			types.OCILayer,
			half(types.OCILayer, pack(t, nil, types.OCILayer), pack(t, nil, types.OCILayer)),
		),
		layerFrom(t, 2, types.OCILayerZStd, half(types.OCILayerZStd, skip, skip)),
		layerFrom(t, 3, types.OCILayer, func(b []byte) []byte { return pack(t, b, types.OCILayerZStd) }),
		layerFrom(t, 4, types.DockerLayer, bytes.Clone),
		layerFrom(t, 5, types.OCIUncompressedLayer, func(b []byte) []byte { return pack(t, b, types.OCILayer) }),
		layerFrom(
			t,
			6,
			types.OCILayerZStd,
			func(b []byte) []byte { return append(bytes.Clone(skip), pack(t, b, types.OCILayerZStd)...) },
		),
		twice,
		&testLayer{raw: twice.raw, packed: pack(t, twice.raw, types.OCILayerZStd), typ: types.OCILayerZStd},
		twice,
	)
	s := openAt(t, t.TempDir())
	var k sink
	if got := mustPull(t, s, k.request(h.push(t, "odd:1", img))); len(got.DiffIDs) != 9 || len(k.layers) != 7 {
		t.Errorf("%d layers, %d unpacked", len(got.DiffIDs), len(k.layers))
	}
	verify(t, s)
	if got := mustPull(t, s, k.request(h.push(t, "none:1", imageOf(t, "x")))); len(got.DiffIDs) != 0 {
		t.Errorf("%d layers of none", len(got.DiffIDs))
	}
}

// Manifests that lead out of the store, or say what cannot be; and fields that
// mean nothing here.
func TestOddManifests(t *testing.T) {
	t.Parallel()
	layer := layerOf(t, "f", 1000, 1, types.OCILayer).(*testLayer)
	img := imageOf(t, "x", layer)
	raw, _ := img.RawManifest()
	type object = map[string]any
	change := func(f func(m, config, layer object)) []byte {
		var m map[string]any
		check(t, json.Unmarshal(raw, &m))
		f(m, m["config"].(map[string]any), m["layers"].([]any)[0].(map[string]any))
		b, _ := json.Marshal(m)
		return b
	}
	index := func(d map[string]any) []byte {
		b, _ := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{d}})
		return b
	}
	for name, c := range map[string]struct {
		manifest []byte
		want     error // nil: it is an image
	}{
		"more fields": {change(func(m, c, l object) {
			m["subject"] = map[string]any{"mediaType": "x", "digest": digest.FromString("x"), "size": 1}
			m["artifactType"], m["annotations"], m["future"] = "a/b", map[string]string{"a": "b"}, []int{1}
			l["urls"], l["annotations"] = []string{"http://127.0.0.1:1/"}, map[string]string{"a": "b"}
			c["data"], l["data"] = "bm90IGl0", "bm90IGl0"
		}), nil},
		"no media type": {change(func(m, c, l object) { delete(m, "mediaType") }), nil},
		"octets":        {change(func(m, c, l object) { c["mediaType"] = "application/octet-stream" }), nil},
		"path in a layer": {change(func(m, c, l object) {
			l["digest"] = "sha256:../../../../etc/passwd"
		}), ErrCorrupt},
		"path in the config": {change(func(m, c, l object) {
			c["digest"] = "../x:" + strings.Repeat("0", 64)
		}), ErrCorrupt},
		"unknown algorithm": {change(func(m, c, l object) {
			l["digest"] = "md5:" + strings.Repeat("0", 32)
		}), ErrCorrupt},
		"no digest":          {change(func(m, c, l object) { delete(l, "digest") }), ErrCorrupt},
		"negative size":      {change(func(m, c, l object) { l["size"] = -1 }), ErrCorrupt},
		"wrong size":         {change(func(m, c, l object) { l["size"] = 1 << 62 }), ErrCorrupt},
		"size of the config": {change(func(m, c, l object) { c["size"] = 1 << 40 }), ErrUnsupported},
		"size as a string":   {change(func(m, c, l object) { l["size"] = "1" }), ErrCorrupt},
		"layers missing":     {change(func(m, c, l object) { m["layers"] = []any{} }), ErrCorrupt},
		"many layers": {change(func(m, c, l object) {
			for i := range maxLayers {
				more := maps.Clone(l)
				more["digest"] = digest.FromString(fmt.Sprint(i))
				m["layers"] = append(m["layers"].([]any), more)
			}
		}), ErrUnsupported},
		"helm": {change(func(m, c, l object) {
			c["mediaType"] = "application/vnd.cncf.helm.config.v1+json"
		}), ErrUnsupported},
		"foreign": {change(func(m, c, l object) {
			l["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
		}), ErrUnsupported},
		"encrypted": {change(func(m, c, l object) {
			l["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
		}), ErrUnsupported},
		"path in an index":   {index(map[string]any{"digest": "sha256:../x", "size": 1}), ErrCorrupt},
		"an index of itself": {index(map[string]any{"digest": digest.FromString("x"), "size": 1}), ErrNotFound},
		"of a page":          {[]byte("<html>sign in</html>"), ErrCorrupt},
		"nothing":            {nil, ErrCorrupt},
		"null":               {[]byte("null"), ErrUnsupported},
		"deep":               {bytes.Repeat([]byte("["), 1<<20), ErrCorrupt},
		"too large":          {bytes.Repeat([]byte(" "), registry.MaxManifest+1), ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHub(t)
			h.push(t, quirkRepo+":1", img)
			h.set(func(w http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, "/manifests/odd") {
					w.Write(c.manifest)
					return false
				}
				return true
			})
			_, err := pullOnce(t, "", h.host+"/"+quirkRepo+":odd", nil)
			if !errors.Is(err, c.want) || err == nil && c.want != nil {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// A user of which one image would fill all lists of images.
func TestLongUser(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]error{maxUser: nil, maxUser + 1: ErrUnsupported} {
		b, err := json.Marshal(map[string]any{"config": map[string]any{"User": strings.Repeat("u", n)}})
		check(t, err)
		if _, err := parseConfig(b, &ocispec.Manifest{}); !errors.Is(err, want) || err == nil && want != nil {
			t.Errorf("%d bytes: %v, want %v", n, err, want)
		}
	}
}

// Mirrors that have the repository below a path: the token is for the name that
// they know, and nothing else.
func TestScopeOfAMirror(t *testing.T) {
	t.Parallel()
	for name, challenge := range map[string]string{
		"it says":     `Bearer realm="/token",scope="repository:proxy/hub/team/app:pull"`,
		"it does not": `Bearer realm="/token"`,
		"hidden":      "",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := newQuirk(t, func(q *quirk, w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/token" {
					if r.ParseForm(); strings.Join(r.Form["scope"], " ") != "repository:proxy/hub/team/app:pull" {
						w.WriteHeader(http.StatusForbidden)
						io.WriteString(w, `{"details":"scopes `+strings.Join(r.Form["scope"], " ")+`"}`)
						return
					}
					asJSON(w, "t", "token", "access_token")
					return
				}
				if r.Header.Get("Authorization") != "Bearer t" {
					switch {
					case r.URL.Path == "/v2/":
						w.Header().Set("WWW-Authenticate", `Bearer realm="/token",scope="repository:user/image:pull"`)
					case challenge == "":
						w.WriteHeader(http.StatusNotFound)
						return
					}
					w.Header().Add("WWW-Authenticate", challenge)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				r.URL.Path = strings.Replace(r.URL.Path, "/v2/proxy/hub/", "/v2/", 1)
				q.back.ServeHTTP(w, r)
			})
			certs := t.TempDir()
			hostsToml(
				t,
				certs,
				"registry.example",
				fmt.Sprintf(
					"server = \"http://127.0.0.1:1\"\n[host.\"%s/v2/proxy/hub\"]\noverride_path = true\n",
					q.URL,
				),
			)
			if _, err := pullOnce(
				t,
				certs,
				"registry.example/team/app:1",
				&Auth{Username: "me", Password: "secret"},
			); err != nil {
				t.Error(err)
			}
		})
	}
}

// Storage whose links expire between the redirect and the request, and a mirror
// that shows a page to all who come.
func TestExpiredLinkAndPortal(t *testing.T) {
	t.Parallel()
	var late atomic.Int64
	var storage *httptest.Server
	q := newQuirk(t, func(q *quirk, w http.ResponseWriter, r *http.Request) {
		switch {
		case !isBlob(r):
			q.back.ServeHTTP(w, r)
		case r.URL.Query().Get("link") == "":
			http.Redirect(w, r, storage.URL+r.URL.Path+"?link=1", http.StatusTemporaryRedirect)
		case late.Add(1)%2 == 1:
			w.WriteHeader([]int{http.StatusBadRequest, http.StatusForbidden}[late.Load()/2%2])
		default:
			q.back.ServeHTTP(w, r)
		}
	})
	storage = httptest.NewServer(q.Config.Handler)
	defer storage.Close()
	if err := q.pull(t, nil); err != nil {
		t.Errorf("expired links: %v", err)
	}
	portal := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, "<html>sign in</html>")
	}))
	defer portal.Close()
	certs := t.TempDir()
	hostsToml(t, certs, "registry.example", fmt.Sprintf("server = %q\n[host.%q]\n", q.URL, portal.URL))
	if _, err := pullOnce(t, certs, "registry.example/team/app:1", nil); err != nil {
		t.Errorf("portal: %v", err)
	}
}
