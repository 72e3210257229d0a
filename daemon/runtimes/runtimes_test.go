package runtimes

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// A handler can do what both the OCI runtime and the kernel can. runc says of any kernel that
// it knows what Linux 5.12 has.
func TestFeatures(t *testing.T) {
	const all = `{"mountOptions": ["ro", "rro"], "linux": {"namespaces": ["mount", "user"],
		"seccomp": {"enabled": true}, "mountExtensions": {"idmap": {"enabled": true}}}}`
	for _, c := range []struct {
		name     string
		features string
		kernel   bool
		want     Handler
	}{
		{"all of it", all, true, Handler{RecursiveReadOnly: true, Userns: true}},
		{"an old kernel", all, false, Handler{}},
		{"no idmapped mounts", `{"mountOptions": ["rro"], "linux": {"namespaces": ["user"]}}`, true,
			Handler{RecursiveReadOnly: true}},
		{"no user namespaces", `{"linux": {"mountExtensions": {"idmap": {"enabled": true}}}}`, true, Handler{}},
		{"no seccomp", `{"linux": {"seccomp": {"enabled": false}}}`, true, Handler{NoSeccomp: true}},
		{"no features", "what?", true, Handler{}},
	} {
		was := mountSetattr
		mountSetattr = func() bool { return c.kernel }
		path := filepath.Join(t.TempDir(), "runtime")
		must.Succeed(t, os.WriteFile(path, []byte("#!/bin/sh\ncat <<'END'\n"+c.features+"\nEND\n"), 0o755))
		s, err := Probe(map[string]string{"mine": path}, "mine", t.TempDir(), false, slog.New(slog.DiscardHandler))
		mountSetattr = was
		must.Succeed(t, err)
		c.want.Name, c.want.Path = "mine", path
		if got, err := s.For(""); err != nil || got != c.want {
			t.Errorf("%s: got %+v, %v, want %+v", c.name, got, err, c.want)
		}
		for _, userns := range []bool{false, true} {
			for i, h := range s.List(userns) {
				f := h.GetFeatures()
				if h.GetName() != []string{"", "mine"}[i] || f.GetRecursiveReadOnlyMounts() != c.want.RecursiveReadOnly ||
					f.GetUserNamespaces() != (userns && c.want.Userns) {
					t.Errorf("%s, user namespaces %v: the kubelet is told %v", c.name, userns, h)
				}
			}
		}
	}
}
