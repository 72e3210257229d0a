package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	clog "github.com/containerd/log"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
)

// maxHeader bounds the header of an answer, in bytes.
const maxHeader = 1 << 20

// quiet keeps the libraries from writing to stderr by themselves.
var quiet = newQuiet()

func newQuiet(hooks ...logrus.Hook) *clog.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	for _, h := range hooks {
		l.AddHook(h)
	}
	return logrus.NewEntry(l)
}

// hosts are those to ask for the images of a registry. A mirror that is named
// there is trusted with the credentials, as its users expect.
func (c Config) hosts(ctx context.Context, domain string) ([]host, error) {
	var dir string
	var broken decodeErrors
	plain := map[*http.Client]*http.Transport{} // as they were before any fallback
	o := config.HostOptions{
		HostDir: func(string) (d string, err error) {
			if dir, err = hostDir(c.Dir, domain); err == nil && dir != "" {
				if _, err = present(filepath.Join(dir, "hosts.toml")); err == nil { // without one, certificates alone
					err = checkFiles(dir)
				}
			}
			return dir, err
		},
		UpdateClient: func(client *http.Client) error {
			client.CheckRedirect = checkRedirect(nil)
			if t, ok := client.Transport.(*http.Transport); ok {
				t.MaxResponseHeaderBytes = maxHeader
				plain[client] = t
			}
			return nil
		},
	}
	hosts, err := config.ConfigureHosts(clog.WithLogger(ctx, newQuiet(&broken)), o)(domain)
	if err == nil {
		err = broken.err
	}
	for _, h := range hosts {
		if t := plain[h.Client]; t != nil && h.Client.Transport != http.RoundTripper(t) {
			h.Client.Transport = &fallback{Transport: t, host: h.Host, own: h.Client.Transport}
		}
	}
	if dir == "" {
		return hosts, err
	}
	file := filepath.Join(dir, "hosts.toml")
	if e, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, column := e.Position()
		if key := strings.Join(e.Key(), "."); key != "" {
			err = fmt.Errorf("key %s: %w", key, err)
		}
		return nil, fmt.Errorf("%s:%d:%d: %w", file, line, column, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	warnUnknown(c.Log, file)
	return hosts, nil
}

// fallback confines what the library does for a registry that may speak plain
// HTTP after all to that registry. Of a token server, or a storage, that is named
// by https an answer in the clear is an error, and no reason to send it a secret
// that way.
type fallback struct {
	*http.Transport // whose idle connections can be closed
	host            string
	own             http.RoundTripper
}

func (f *fallback) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Host == f.host {
		return f.own.RoundTrip(r)
	}
	return f.Transport.RoundTrip(r)
}

// hostDir finds the directory of a registry host, or else _default, in a list
// of directories as in PATH. It is empty if there is none.
func hostDir(list, domain string) (string, error) {
	names := []string{domain, "_default"}
	if i := strings.LastIndex(domain, ":"); i > 0 { // a colon is not for every file system
		names = append([]string{domain[:i] + "_" + domain[i+1:] + "_"}, names...)
	}
	for _, root := range filepath.SplitList(list) {
		for _, name := range names {
			dir := filepath.Join(root, name)
			if there, err := present(dir); there || err != nil {
				return dir, err
			}
		}
	}
	return "", nil
}

// present says whether there is a file. A link to nothing is an error: it was
// meant to say something, and hosts that it would exclude must not be asked.
func present(path string) (bool, error) {
	_, err := os.Stat(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return err == nil, err
	}
	if to, err := os.Readlink(path); err == nil {
		return false, fmt.Errorf("%s is a link to %s, which is not there", path, to)
	}
	return false, nil
}

// maxHostFile bounds hosts.toml and each certificate beside it, in bytes.
const maxHostFile = 1 << 20

// checkFiles looks at what the library will read whole, whatever it is: to open a
// FIFO blocks.
func checkFiles(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var names []string
	for _, e := range entries {
		if !e.IsDir() && slices.Contains([]string{".toml", ".crt", ".cert", ".key"}, filepath.Ext(e.Name())) {
			names = append(names, e.Name())
		}
	}
	if err := checkEach(dir, names); err != nil {
		return err
	}
	text, err := beneath.HostFile(filepath.Join(dir, "hosts.toml"), maxHostFile)
	var f hostsFile
	if err != nil || toml.Unmarshal(text, &f) != nil {
		return nil // there is none, or the library says where it is wrong, and opens nothing that it names
	}
	named := f.files()
	for _, h := range f.Host {
		named = append(named, h.files()...)
	}
	return checkEach(dir, named)
}

// checkEach checks files by their names in a directory, or absolute ones. What is
// missing is left to the library, which knows whether it needs it.
func checkEach(dir string, names []string) error {
	for _, path := range names {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		f, err := beneath.Open("/", path, beneath.File, maxHostFile)
		switch {
		case err == nil:
			f.Close()
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	return nil
}

// decodeErrors catches what the library only writes to its log, to go on as if
// there was no hosts.toml: a node would ask hosts that its owner has excluded.
type decodeErrors struct{ err error }

func (d *decodeErrors) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }
func (d *decodeErrors) Fire(e *logrus.Entry) error {
	if err, ok := e.Data[logrus.ErrorKey].(error); ok && d.err == nil {
		d.err = err
	}
	return nil
}

// hostsFile has the keys that are known in hosts.toml.
type hostsFile struct {
	hostKeys
	Server string              `toml:"server"`
	Host   map[string]hostKeys `toml:"host"`
}

type hostKeys struct {
	Capabilities any            `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   any            `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath any            `toml:"override_path"`
	DialTimeout  any            `toml:"dial_timeout"`
}

// files are the names of the certificates and keys that these keys name.
func (k hostKeys) files() []string { return append(texts(k.CA), texts(k.Client)...) }

// texts are the strings in a value, and in the lists in it, but for empty ones.
func texts(v any) (all []string) {
	switch v := v.(type) {
	case string:
		if v != "" {
			all = []string{v}
		}
	case []any:
		for _, e := range v {
			all = append(all, texts(e)...)
		}
	}
	return all
}

var warned sync.Map // by file and keys: each warning is given once

// warnUnknown says which keys of hosts.toml do nothing. They are no error, as
// other programs read the file too.
func warnUnknown(log *slog.Logger, file string) {
	text, err := beneath.HostFile(file, maxHostFile)
	if err == nil { // certificates alone, as Docker has it, are no error
		err = toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&hostsFile{})
	}
	if e, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var keys []string
		for _, k := range e.Errors {
			keys = append(keys, strings.Join(k.Key(), "."))
		}
		if _, said := warned.LoadOrStore(file+strings.Join(keys, " "), true); !said {
			log.Warn("hosts.toml has keys that are not known, they do nothing", "file", file, "keys", keys)
		}
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
		// The address that led here may have the user's name in its query, or a
		// signature.
		for _, k := range []string{"Authorization", "Cookie", "Proxy-Authorization", "Referer"} {
			req.Header.Del(k)
		}
		for k := range secret {
			req.Header.Del(k)
		}
		return nil
	}
}
