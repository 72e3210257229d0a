package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/daemon"
	"github.com/holdfast-cri/holdfast/daemon/nri"
)

// Whoever wrote the file is told where it is wrong, in its own words.
func TestConfigMistakes(t *testing.T) {
	name := filepath.Join(t.TempDir(), "config.toml")
	for text, want := range map[string]string{
		"[images]\nkeep_blobs = \"yes\"":   name + ":2:14: images.keep_blobs: is a TOML string, and has to be true or false",
		"[images]\npinned = \"a\"":         name + ":2:10: images.pinned: is a TOML string, and has to be a list of strings",
		"[images]\npinned = [1]":           name + ":2:11: images.pinned: is a TOML integer, and has to be a string",
		"[registry]\nconfig_dir = [\"a\"]": name + ":2:14: registry.config_dir: is a TOML array, and has to be a string",
		"[runtimes]\nrunc = \"x\"":         name + ":2:8: runtimes.runc: is a TOML string, and has to be a table",
		"images = 1":                       name + ":1:10: images: is a TOML integer, and has to be a table",
		"x = [":                            name + ":1:6: array is incomplete",
		"[images]\nkeep_blob = true":       "keep_blob",
	} {
		check(t, os.WriteFile(name, []byte(text+"\n"), 0o600))
		if _, err := readConfig(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	for want, put := range map[string]func() error{
		"not a regular file": func() error { return syscall.Mkfifo(name, 0o600) },
		"larger than":        func() error { return os.WriteFile(name, make([]byte, maxConfig+1), 0o600) },
	} {
		check(t, errors.Join(os.Remove(name), put()))
		if _, err := readConfig(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	for want, change := range map[string]func(f *file){
		`registry.config_dir = "/etc/certs.d:certs.d": "certs.d" is not`: func(f *file) {
			f.Registry.ConfigDir = "/etc/certs.d:certs.d"
		},
		`state = "/run/a,b" has a comma`:                    func(f *file) { f.State = "/run/a,b" },
		`root = "data" is not an absolute path`:             func(f *file) { f.Root = "data" },
		`cni.conf_template = "t": it has to be an absolute`: func(f *file) { f.CNI.ConfTemplate = "t" },
	} {
		f := defaults()
		change(&f)
		if _, err := f.resolve("info"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// An address that others reach needs TLS, or somebody who insists.
func TestStreamingConfig(t *testing.T) {
	for text, want := range map[string]string{
		``:                                 "",
		`address = "127.0.0.2:80"`:         "",
		`address = "[::1]:0"`:              "",
		`address = "localhost:10010"`:      "",
		`address = "[::ffff:127.0.0.1]:1"`: "",
		`address = "0.0.0.0:10010"`: `streaming.address = "0.0.0.0:10010" is not the loopback, ` +
			"and without TLS",
		`address = ":10010"`:                        "is not the loopback",
		`address = "[::]:10010"`:                    "is not the loopback",
		`address = "10.0.0.1:1"`:                    "set tls_cert_file and tls_key_file",
		`address = "node.example:1"`:                "is not the loopback",
		`address = "127.0.0.1.example:1"`:           "is not the loopback",
		"address = \"10.0.0.1:1\"\ninsecure = true": "",
		"address = \"10.0.0.1:1\"\ntls_cert_file = \"/c\"\ntls_key_file = \"/k\"": "",
		`tls_cert_file = "/c"`:                         "one is set without the other",
		`tls_key_file = "/k"`:                          "one is set without the other",
		"tls_cert_file = \"c\"\ntls_key_file = \"/k\"": `streaming.tls_cert_file = "c" is not an absolute path`,
		`address = "127.0.0.1"`:                        "is not host:port",
		`address = ""`:                                 "is not host:port",
		`address = "127.0.0.1:http:1"`:                 "is not host:port",
		`idle_timeout = "4"`:                           `streaming.idle_timeout = "4" is not a time`,
		`creation_timeout = "0s"`:                      `streaming.creation_timeout = "0s" is not a time`,
		`creation_timeout = "-1s"`:                     "is not a time",
		`idle_timeout = ""`:                            "is not a time",
	} {
		name := filepath.Join(t.TempDir(), "config.toml")
		check(t, os.WriteFile(name, []byte("[streaming]\n"+text+"\n"), 0o600))
		f, err := readConfig(name)
		var c daemon.Config
		if err == nil {
			err = f.resolveStreaming(&c)
		}
		if want == "" && (err != nil || c.Streaming.IdleTimeout != 4*time.Hour || c.Streaming.Address == "") {
			t.Errorf("%s: %+v, %v", text, c.Streaming, err)
		}
		if want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// The keys of [nri], and what they are without a file, are containerd's.
func TestNRIConfig(t *testing.T) {
	usual := nri.Config{
		Socket:              "/run/nri/nri.sock", // to which /var/run leads
		PluginDir:           "/opt/nri/plugins",
		ConfigDir:           "/etc/nri/conf.d",
		RegistrationTimeout: 5 * time.Second,
		RequestTimeout:      2 * time.Second,
		Version:             version,
	}
	changed := func(change func(*nri.Config)) nri.Config {
		c := usual
		change(&c)
		return c
	}
	for _, c := range []struct {
		text string
		want nri.Config
		err  string
	}{
		{text: "", want: usual},
		{text: `disable = true`, want: changed(func(c *nri.Config) {
			c.Disable, c.Socket = true, nri.DefaultSocket
		})},
		{text: `disable_connections = true`, want: changed(func(c *nri.Config) { c.Socket = "" })},
		{text: `plugin_request_timeout = "1m"`, want: changed(func(c *nri.Config) { c.RequestTimeout = time.Minute })},
		{
			text: "default_validator = { enable = true, required_plugins = [\"a\"] }",
			want: changed(func(c *nri.Config) {
				c.Validator.Enable, c.Validator.RequiredPlugins = true, []string{"a"}
			}),
		},
		{text: `socket_path = "nri.sock"`, err: `nri.socket_path = "nri.sock" is not an absolute path`},
		{text: `plugin_path = ""`, err: `nri.plugin_path = "" is not an absolute path`},
		{text: `plugin_registration_timeout = "0s"`, err: "nri.plugin_registration_timeout = \"0s\" is not a time"},
		{text: `default_validator = { enabled = true }`, err: "unknown key"},
	} {
		name := filepath.Join(t.TempDir(), "config.toml")
		check(t, os.WriteFile(name, []byte("[nri]\n"+c.text+"\n"), 0o600))
		f, err := readConfig(name)
		var got daemon.Config
		if err == nil {
			err = f.resolveNRI(&got)
		}
		switch {
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%s: %v, want %q", c.text, err, c.err)
		case c.err == "" && (err != nil || !reflect.DeepEqual(got.NRI, c.want)):
			t.Errorf("%s: %+v, %v; want %+v", c.text, got.NRI, err, c.want)
		}
	}
}

// Links in paths are followed once, at the start.
func TestConfigLinks(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	check(t, err)
	for link, to := range map[string]string{"link": ".", "dangling": "nowhere"} {
		check(t, os.Symlink(to, filepath.Join(dir, link)))
	}
	check(t, os.Symlink("cri", filepath.Join(dir, "socket")))
	f := defaults()
	f.Root, f.State, f.Address = dir+"/link/link/new/root/", dir+"/link/state", dir+"/link/socket"
	c, _ := f.resolve("info") // the binaries may be missing here
	if c.Root != dir+"/new/root" || c.State != dir+"/state" || c.Address != dir+"/socket" {
		t.Errorf("%s, %s, %s", c.Root, c.State, c.Address)
	}
	for want, change := range map[string]func(f *file){
		`dangling is a link to nowhere, which does not exist`: func(f *file) { f.Root = dir + "/dangling" },
		`which does not exist: mount its disk`:                func(f *file) { f.Address = dir + "/dangling/cri.sock" },
		"root and state are both":                             func(f *file) { f.State = dir + "/new/root" },
		`state = "/run": it has to be a folder of its own`:    func(f *file) { f.State = "/run" },
		`root = "/var/lib/": it has to be`:                    func(f *file) { f.Root = "/var/lib/" },
	} {
		f := f
		change(&f)
		if _, err := f.resolve("info"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
