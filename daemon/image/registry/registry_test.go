package registry

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"

	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestCredentialsAsPeopleWriteThem(t *testing.T) {
	b64 := base64.StdEncoding.EncodeToString
	for _, c := range []struct {
		in   Auth
		want credentials
	}{
		{Auth{Auth: b64([]byte("me:a:b"))}, credentials{user: "me", secret: "a:b"}},
		{Auth{Auth: b64([]byte("me:secret\n"))}, credentials{user: "me", secret: "secret"}},
		{Auth{Auth: b64([]byte("me:secret\x00\x00"))}, credentials{user: "me", secret: "secret"}},
		{Auth{Auth: b64([]byte("me:secret")) + "\n"}, credentials{user: "me", secret: "secret"}},
		{
			Auth{Auth: base64.RawStdEncoding.EncodeToString([]byte("me:secret1"))},
			credentials{user: "me", secret: "secret1"},
		},
		{
			Auth{Auth: base64.URLEncoding.EncodeToString([]byte("me:\xff\xfe?>"))},
			credentials{user: "me", secret: "\xff\xfe?>"},
		},
		{Auth{Username: "<token>", Password: "t"}, credentials{secret: "t"}},
		{Auth{Username: "me", Password: "p\n"}, credentials{user: "me", secret: "p\n"}},
		{Auth{ServerAddress: "https://registry.example/v1/"}, credentials{host: "registry.example"}},
		{Auth{}, credentials{}},
	} {
		got, err := c.in.credentials()
		if err != nil || got != c.want {
			t.Errorf("%+v: %+v, %v", c.in, got, err)
		}
	}
	for _, a := range []Auth{
		{Auth: "%"},
		{Auth: b64([]byte("nocolon"))},
		{ServerAddress: "http://"},
		{ServerAddress: "://"},
	} {
		if _, err := a.credentials(); err == nil || strings.Contains(err.Error(), "nocolon") {
			t.Errorf("%+v: %v", a, err)
		}
	}
	for _, c := range []struct {
		server, host string
		ok           bool
	}{
		{"https://index.docker.io/v1/", "registry-1.docker.io", true},
		{"index.docker.io", "registry-1.docker.io", true},
		{"docker.io", "registry-1.docker.io", true},
		{"https://registry-1.docker.io", "registry-1.docker.io", true},
		{"https://auth.docker.io", "registry-1.docker.io", false},
		{"REG.example", "reg.example", true},
		{"reg.example:443", "reg.example", true},
		{"https://reg.example", "reg.example:443", true},
		{"reg.example", "reg.example:5000", false},
		{"[::1]:5000", "[::1]:5000", true},
		{"http://[::1]", "[::1]:5000", false},
		{"example", "reg.example", false},
		{"https://me@reg.example", "reg.example", true},
	} {
		a := Auth{Username: "u", Password: "p", ServerAddress: c.server}
		if got, err := a.credentials(); err != nil || got.match(c.host) != c.ok {
			t.Errorf("%s for %s: %v, %v", c.server, c.host, !c.ok, err)
		}
	}
}

// A mirror that takes connections and says nothing is given up once, not for
// each of the layers.
func TestSilentMirror(t *testing.T) {
	h := hostNamed("mirror")
	r := &Repository{}
	r.hosts = append(r.hosts, h, hostNamed("registry"))
	if _, ok := r.again(h, fmt.Errorf("%w: %w", ErrUnavailable, context.DeadlineExceeded), 1); ok {
		t.Error("it is asked again")
	}
	if _, down := r.down.Load(addressOf(h)); !down {
		t.Error("it is asked for the next blob")
	}
	busy := &statusError{kind: ErrUnavailable, status: 503, retryAfter: time.Minute}
	if _, ok := r.again(h, busy, 1); ok {
		t.Error("a busy mirror is waited for")
	}
	if _, ok := r.again(hostNamed("registry"), fmt.Errorf("%w: %w", ErrUnavailable, context.DeadlineExceeded), 1); !ok {
		t.Error("the registry itself is not asked again")
	}
}

func TestRetryAfterDate(t *testing.T) {
	e := newStatusError(
		ErrUnavailable,
		429,
		"",
		nil,
		time.Now().Add(10*time.Second).UTC().Format(http.TimeFormat),
	).(*statusError)
	if e.retryAfter < 5*time.Second || e.retryAfter > 10*time.Second {
		t.Errorf("waits %v", e.retryAfter)
	}
	for _, s := range []string{"", "x", "-1", "Mon, 02 Jan 2006 15:04:05 GMT", "99999999999999999999"} {
		if e := newStatusError(ErrUnavailable, 429, "", nil, s).(*statusError); e.retryAfter != 0 {
			t.Errorf("%q: waits %v", s, e.retryAfter)
		}
	}
	if e := newStatusError(ErrUnavailable, 429, "", nil, "9000000000000").(*statusError); e.retryAfter != time.Hour {
		t.Errorf("waits %v", e.retryAfter)
	}
}

func TestChallengesApart(t *testing.T) {
	const one, two = `Bearer realm="a",service="b, c",scope="d:pull,push"`, `Basic realm="x" , charset="UTF-8"`
	for in, want := range map[string][]string{
		"":                            nil,
		",":                           nil,
		`"`:                           {`"`},
		"Negotiate":                   {"Negotiate"},
		one:                           {one},
		`Negotiate, Basic realm="x"`:  {"Negotiate", `Basic realm="x"`},
		two + ` , Bearer realm = "y"`: {`Basic realm="x",charset="UTF-8"`, `Bearer realm = "y"`},
	} {
		if got := apart(http.Header{"Www-Authenticate": {in}})["Www-Authenticate"]; !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

// Credentials for one host are not those of another one, whatever the address
// looks like.
func FuzzCredentials(f *testing.F) {
	f.Add("https://registry.example/v2/", "dXNlcjpwYXNz", "user")
	f.Add("registry.example:443", "dXNlcjpwYXNz", "")
	f.Add("https://other.example@registry.example", "eDp5\n", "<token>")
	f.Fuzz(func(t *testing.T, address, secret, user string) {
		c, err := (&Auth{ServerAddress: address, Auth: secret, Username: user}).credentials()
		if err != nil {
			if !errors.Is(err, ErrUnauthorized) {
				t.Fatal(err)
			}
			return
		}
		const host = "somewhere.example"
		if address != "" && c.match(host) && !strings.Contains(strings.ToLower(address), host) &&
			!strings.Contains(address, "%") {
			t.Fatalf("credentials for %q would go to %s: %+v", address, host, c)
		}
	})
}

// Whatever a registry asks for through TLS, a password never goes in the clear.
func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a:pull"`)
	f.Add(`Basic realm="x", Bearer realm="http://auth.example/token"`)
	f.Add(`bearer realm=/token,error="insufficient_scope"`)
	name, err := reference.ParseDockerRef("registry.example/a")
	must.Succeed(f, err)
	f.Fuzz(func(t *testing.T, header string) {
		h := host{Host: "registry.example", Scheme: "https", Path: "/v2"}
		r := &Repository{name: name, hosts: []host{h}, creds: credentials{user: "me", secret: "secret"}}
		u, err := url.Parse("https://registry.example/v2/a/manifests/1")
		must.Succeed(t, err)
		resp := &http.Response{
			StatusCode: http.StatusUnauthorized,
			Header:     http.Header{"Www-Authenticate": {header}},
			TLS:        &tls.ConnectionState{},
			Request:    &http.Request{URL: u},
		}
		if r.challenged(t.Context(), h, resp, "", false) != nil {
			return
		}
		l, err := r.login(t.Context(), h)
		must.Succeed(t, err)
		defer l.release()
		if l.token == nil {
			return
		}
		realm, err := url.Parse(l.token.Realm)
		if err != nil || l.token.Secret != "" && realm.Scheme != "https" {
			t.Fatalf("%q: the secret would go to %q: %v", header, l.token.Realm, err)
		}
	})
}

// The order of hosts is that of the file, and the Hub has an address of its own.
func TestHosts(t *testing.T) {
	dir := t.TempDir()
	write := func(host, text string) {
		err := os.Mkdir(filepath.Join(dir, host), 0o755)
		if err = errors.Join(
			err,
			os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o644),
		); err != nil {
			t.Fatal(err)
		}
	}
	hosts := func(ref string) []host {
		t.Helper()
		name, err := reference.ParseDockerRef(ref)
		must.Succeed(t, err)
		r, err := Config{Dir: dir, Log: slog.New(slog.DiscardHandler)}.Open(t.Context(), name, nil)
		must.Succeed(t, err)
		defer r.Close()
		return r.hosts
	}
	var l []string
	for i := range 8 {
		l = append(l, fmt.Sprintf("[host.\"http://h%d.example\"]\ncapabilities = [\"pull\"]\n", (i*5+3)%8))
	}
	write("order.example", strings.Join(l, ""))
	got := hosts("order.example/app")
	for i, h := range got[:8] {
		if want := fmt.Sprintf("h%d.example", (i*5+3)%8); h.Host != want {
			t.Errorf("%d: %s, want %s", i, h.Host, want)
		}
	}
	if last := got[8].Host; last != "order.example" {
		t.Errorf("last %s", last)
	}
	// A mirror of Docker Hub is told what it mirrors, the Hub itself is not.
	write("docker.io", "server = \"https://docker.io\"\n")
	if got := hosts("busybox"); got[0].Host != "registry-1.docker.io" {
		t.Errorf("the Hub: %v", got)
	}
}

// Retry-After is obeyed, within limits.
func TestRetryAfter(t *testing.T) {
	r := &Repository{}
	r.hosts = append(r.hosts, hostNamed("x"))
	busy := &statusError{kind: ErrUnavailable, retryAfter: 7 * time.Second}
	if wait, ok := r.again(hostNamed("x"), busy, 1); !ok || wait < 7*time.Second {
		t.Errorf("waits %v", wait)
	}
	busy.retryAfter = time.Hour
	if wait, _ := r.again(hostNamed("x"), busy, 1); wait > 2*maxBackoff {
		t.Errorf("waits %v", wait)
	}
}

func hostNamed(name string) host { return host{Host: name} }
