package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
)

// maxAnswer is of an error's text, in bytes.
const maxAnswer = 4 << 10

const userAgent = "holdfast"

// do sends one request to one host, authorizing it as the host asks. The caller
// closes the body. An answer of 300 and above is an error.
func (r *Repository) do(ctx context.Context, h host, method string, header http.Header, what ...string) (
	*http.Response, error) {
	u := url.URL{Scheme: h.Scheme, Host: h.Host}
	u.Path = path.Join(append([]string{"/", h.Path, reference.Path(r.name)}, what...)...)
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
			return nil, err // credentials are not for the host that a redirect leads to
		}
		hidden := resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusNotFound
		switch {
		case resp.StatusCode == http.StatusUnauthorized:
		case hidden && sent == "" && !pinged && r.creds.given() && r.creds.match(h.Host):
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
func (r *Repository) send(ctx context.Context, h host, method string, header http.Header, u url.URL) (
	resp *http.Response, sent string, err error) {
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
func rootOf(h host) string {
	before, _, _ := strings.Cut(h.Path+"/", "/v2/")
	return before + "/v2/"
}

// ping asks the root of a host how to log in; nil: it does not say.
func (r *Repository) ping(ctx context.Context, h host) *http.Response {
	u := url.URL{Scheme: h.Scheme, Host: h.Host, Path: rootOf(h)}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
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
	elsewhere := before != nil && before.Request.URL.Host != resp.Request.URL.Host
	switch c := resp.StatusCode; {
	case elsewhere && (c == http.StatusBadRequest || c == http.StatusForbidden):
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
	var answer struct {
		Errors  []struct{ Code, Message string } `json:"errors"`
		Details string                           `json:"details"`
	}
	var texts []string
	if json.Unmarshal(body, &answer) == nil {
		for _, m := range answer.Errors {
			texts = append(texts, strings.TrimSpace(m.Code+" "+m.Message))
		}
		if answer.Details != "" {
			texts = append(texts, answer.Details)
		}
	}
	if len(texts) > 0 {
		e.text += ": " + strings.Join(texts, ", ")
	}
	if kind != nil {
		e.text = kind.Error() + ": " + e.text
	}
	return e
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

// small fetches an answer of limit bytes at the most, and its media type.
func (r *Repository) small(ctx context.Context, h host, limit int64, header http.Header, what ...string) (
	[]byte, string, error) {
	ctx, cancel := context.WithTimeout(ctx, smallTimeout)
	defer cancel()
	resp, err := r.do(ctx, h, http.MethodGet, header, what...)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, "", fmt.Errorf("%w: cannot read %s from %s: %w",
			ErrUnavailable, strings.Join(what, "/"), h.Host, err)
	}
	if int64(len(b)) > limit {
		return nil, "", fmt.Errorf("%w: %s from %s is larger than %d bytes",
			ErrUnsupported, strings.Join(what, "/"), h.Host, limit)
	}
	typ, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		typ = ""
	}
	return b, typ, nil
}
