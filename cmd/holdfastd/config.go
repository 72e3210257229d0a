package main

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/pelletier/go-toml/v2"

	"github.com/holdfast-cri/holdfast/daemon"
	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/daemon/metrics"
	"github.com/holdfast-cri/holdfast/daemon/nri"
	"github.com/holdfast-cri/holdfast/daemon/streams"
)

const (
	defaultConfigFile = "/etc/holdfast/config.toml"
	maxConfig         = 1 << 20 // bytes
)

// file is the config file. Keys are a contract: they are added, not renamed.
type file struct {
	Root           string `toml:"root"`
	State          string `toml:"state"`
	Address        string `toml:"address"`
	DefaultRuntime string `toml:"default_runtime"`
	CNI            struct {
		ConfDir        string   `toml:"conf_dir"`
		BinDirs        []string `toml:"bin_dirs"`
		ConfTemplate   string   `toml:"conf_template"`
		DefaultNetwork bool     `toml:"default_network"`
		Subnet         string   `toml:"subnet"`
		GC             bool     `toml:"gc"`
	} `toml:"cni"`
	Registry struct {
		ConfigDir string `toml:"config_dir"`
	} `toml:"registry"`
	Images struct {
		Pinned          []string `toml:"pinned"`
		KeepBlobs       bool     `toml:"keep_blobs"`
		VerifierDir     string   `toml:"verifier_dir"`
		VerifierTimeout string   `toml:"verifier_timeout"`
	} `toml:"images"`
	Cgroup struct {
		Driver string `toml:"driver"`
	} `toml:"cgroup"`
	Sandbox struct {
		Mode              string `toml:"mode"`
		UnprivilegedPorts bool   `toml:"enable_unprivileged_ports"`
		UnprivilegedICMP  bool   `toml:"enable_unprivileged_icmp"`
	} `toml:"sandbox"`
	Containers struct {
		AbsentMountSource string `toml:"absent_mount_source"`
	} `toml:"containers"`
	Checkpoint struct {
		RestoreImages bool `toml:"restore_images"`
	} `toml:"checkpoint"`
	CDI struct {
		Enabled  bool     `toml:"enabled"`
		SpecDirs []string `toml:"spec_dirs"`
	} `toml:"cdi"`
	Streaming struct {
		Address         string `toml:"address"`
		TLSCertFile     string `toml:"tls_cert_file"`
		TLSKeyFile      string `toml:"tls_key_file"`
		IdleTimeout     string `toml:"idle_timeout"`
		CreationTimeout string `toml:"creation_timeout"`
		Insecure        bool   `toml:"insecure"`
	} `toml:"streaming"`
	Metrics struct {
		Address string `toml:"address"`
	} `toml:"metrics"`
	NRI struct { // the keys are those of containerd
		Disable             bool          `toml:"disable"`
		DisableConnections  bool          `toml:"disable_connections"`
		Socket              string        `toml:"socket_path"`
		PluginDir           string        `toml:"plugin_path"`
		ConfigDir           string        `toml:"plugin_config_path"`
		RegistrationTimeout string        `toml:"plugin_registration_timeout"`
		RequestTimeout      string        `toml:"plugin_request_timeout"`
		Validator           nri.Validator `toml:"default_validator"`
	} `toml:"nri"`
	Runtimes map[string]runtimeConfig `toml:"runtimes"`
}

type runtimeConfig struct {
	Path string `toml:"path"`
}

func defaults() file {
	var f file
	f.Root, f.State, f.Address = "/var/lib/holdfast", "/run/holdfast", "/run/holdfast/holdfast.sock"
	f.DefaultRuntime = "runc"
	f.CNI.ConfDir, f.CNI.BinDirs = "/etc/cni/net.d", []string{"/opt/cni/bin", "/usr/lib/cni"}
	f.CNI.Subnet = "10.244.0.0/16"
	f.Registry.ConfigDir = "/etc/holdfast/certs.d"
	f.Images.KeepBlobs, f.Images.VerifierTimeout = true, "10s"
	f.Cgroup.Driver = "auto"
	f.Sandbox.Mode = "namespaces"
	f.Sandbox.UnprivilegedPorts, f.Sandbox.UnprivilegedICMP = true, true
	f.Containers.AbsentMountSource = "create"
	f.CDI.Enabled, f.CDI.SpecDirs = true, []string{"/etc/cdi", "/var/run/cdi"}
	f.Streaming.Address = "127.0.0.1:0"
	f.Streaming.IdleTimeout, f.Streaming.CreationTimeout = "4h", "30s"
	f.NRI.Socket, f.NRI.PluginDir, f.NRI.ConfigDir = nri.DefaultSocket, nri.DefaultPluginDir, nri.DefaultConfigDir
	f.NRI.RegistrationTimeout = nri.DefaultRegistrationTimeout.String()
	f.NRI.RequestTimeout = nri.DefaultRequestTimeout.String()
	return f
}

// readConfig reads a config file over the defaults. Without a name it reads the
// default file, which may be missing. An unknown key is an error that names it.
func readConfig(name string) (file, error) {
	f := defaults()
	b, err := beneath.HostFile(cmp.Or(name, defaultConfigFile), maxConfig)
	if name == "" && errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, fmt.Errorf("cannot read the config: %w", err)
	}
	name = cmp.Or(name, defaultConfigFile)
	err = toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&f)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		return f, fmt.Errorf("cannot use the config %s: unknown key\n%s", name, strict.String())
	}
	if e, ok := errors.AsType[*toml.DecodeError](err); ok {
		return f, fmt.Errorf("cannot use the config %w", decodeError(name, e))
	}
	if err != nil {
		return f, fmt.Errorf("cannot use the config %s: %w", name, err)
	}
	return f, nil
}

// decodeError says where a file is wrong, and of a value of the wrong type its
// key: the library's text has the fields of our structs instead.
func decodeError(name string, e *toml.DecodeError) error {
	line, column := e.Position()
	where := fmt.Sprintf("%s:%d:%d", name, line, column)
	text := strings.TrimPrefix(e.Error(), "toml: ")
	key := strings.Join(e.Key(), ".")
	if key == "" {
		return fmt.Errorf("%s: %s", where, text)
	}
	if what, ok := strings.CutPrefix(text, "cannot decode TOML "); ok {
		is, _, _ := strings.Cut(what, " into ")
		kinds := map[string]string{"bool": "true or false", "string": "a string", "[]string": "a list of strings"}
		text = fmt.Sprintf("is a TOML %s, and has to be %s", is, cmp.Or(kinds[what[strings.LastIndex(what, " ")+1:]],
			"a table"))
	}
	return fmt.Errorf("%s: %s: %s", where, key, text)
}

// warn tells about what is no mistake now and may be one: without hosts.toml
// files, every pull goes to the registry itself.
func (f file) warn(log *slog.Logger) {
	for _, dir := range filepath.SplitList(f.Registry.ConfigDir) {
		if _, err := os.Stat(dir); err != nil && f.Registry.ConfigDir != defaults().Registry.ConfigDir {
			log.Warn("a directory of registry.config_dir cannot be read; it counts once it is there", "path", dir,
				"error", err)
		}
	}
	if s := f.Streaming; s.TLSCertFile != "" {
		// It may be made later: it is read when somebody wants a session.
		if _, err := tls.LoadX509KeyPair(s.TLSCertFile, s.TLSKeyFile); err != nil {
			log.Warn("the certificate of [streaming] cannot be used; exec, attach and port-forward need it", "error",
				err)
		}
	}
}

// resolve checks the values and finds the binaries.
func (f file) resolve(logLevel string) (daemon.Config, error) {
	c := daemon.Config{
		Root:              f.Root,
		State:             f.State,
		DefaultRuntime:    f.DefaultRuntime,
		Runtimes:          map[string]string{},
		LogLevel:          logLevel,
		CNIConfDir:        f.CNI.ConfDir,
		CNIBinDirs:        f.CNI.BinDirs,
		DefaultNetwork:    f.CNI.DefaultNetwork,
		Subnet:            f.CNI.Subnet,
		CNIConfTemplate:   f.CNI.ConfTemplate,
		CNIGC:             f.CNI.GC,
		RegistryConfigDir: f.Registry.ConfigDir,
		PinnedImages:      f.Images.Pinned,
		DropLayerBlobs:    !f.Images.KeepBlobs,
		ImageVerifierDir:  f.Images.VerifierDir,
		CgroupDriver:      f.Cgroup.Driver,
		UnprivilegedPorts: f.Sandbox.UnprivilegedPorts,
		UnprivilegedICMP:  f.Sandbox.UnprivilegedICMP,
	}
	if t := f.CNI.ConfTemplate; t != "" && (!filepath.IsAbs(t) || f.CNI.DefaultNetwork) {
		return c, fmt.Errorf("config: cni.conf_template = %q: it has to be an absolute path, without default_network",
			t)
	}
	for _, step := range []func(*daemon.Config) error{
		f.resolvePaths, f.resolveImages, f.resolveModes, f.resolveCDI, f.resolveStreaming, f.resolveNRI,
		f.resolveRuntimes,
	} {
		if err := step(&c); err != nil {
			return c, err
		}
	}
	return c, nil
}

// resolveImages checks what is said of images and registries.
func (f file) resolveImages(c *daemon.Config) error {
	for _, dir := range filepath.SplitList(f.Registry.ConfigDir) {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("config: registry.config_dir = %q: %q is not an absolute path", f.Registry.ConfigDir, dir)
		}
	}
	for _, ref := range f.Images.Pinned {
		if _, err := reference.ParseDockerRef(ref); err != nil {
			return fmt.Errorf("config: images.pinned: %q is not the name of an image: %w", ref, err)
		}
	}
	if dir := f.Images.VerifierDir; dir != "" {
		// A verifier that is not there would let everything in.
		if st, err := os.Stat(dir); err != nil || !filepath.IsAbs(dir) || !st.IsDir() {
			return fmt.Errorf("config: images.verifier_dir = %q is not the absolute path of a directory", dir)
		}
	}
	return parseTime("images.verifier_timeout", f.Images.VerifierTimeout, "10s", &c.ImageVerifierTimeout)
}

// resolveModes checks what is one of a few words, and the paths that exclude others.
func (f file) resolveModes(c *daemon.Config) error {
	if c.Root == c.State {
		return fmt.Errorf("config: root and state are both %q: each needs a folder of its own", c.Root)
	}
	if strings.Contains(c.State, ",") { // where the namespaces of pods are pinned
		return fmt.Errorf("config: state = %q has a comma, which the OCI runtime does not take in paths of namespaces",
			c.State)
	}
	switch f.Sandbox.Mode {
	case "namespaces":
	case "pause":
		c.PauseMode = true
	default:
		return fmt.Errorf("config: sandbox.mode = %q is neither namespaces nor pause", f.Sandbox.Mode)
	}
	c.RestoreImages = f.Checkpoint.RestoreImages
	switch f.Containers.AbsentMountSource {
	case "create":
	case "reject":
		c.RejectAbsentMounts = true
	default:
		return fmt.Errorf("config: containers.absent_mount_source = %q is neither create nor reject",
			f.Containers.AbsentMountSource)
	}
	if address := f.Metrics.Address; address != "" {
		if _, err := checkHostPort(address); err != nil {
			return fmt.Errorf("config: metrics.address = %q is not host:port: %w", address, err)
		}
		c.Metrics = metrics.New(version)
	}
	return nil
}

// resolveCDI checks where devices are described.
func (f file) resolveCDI(c *daemon.Config) error {
	for _, dir := range f.CDI.SpecDirs {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("config: cdi.spec_dirs: %q is not an absolute path", dir)
		}
	}
	if f.CDI.Enabled {
		c.CDIDirs = f.CDI.SpecDirs
	}
	return nil
}

// resolveStreaming checks how sessions are served. Whoever has an address of a session
// is root in a container: it goes over a network only where nobody can read it.
func (f file) resolveStreaming(c *daemon.Config) error {
	s := f.Streaming
	host, err := checkHostPort(s.Address)
	if err != nil {
		return fmt.Errorf("config: streaming.address = %q is not host:port: %w", s.Address, err)
	}
	if (s.TLSCertFile == "") != (s.TLSKeyFile == "") {
		return errors.New("config: streaming.tls_cert_file and streaming.tls_key_file: one is set without the other")
	}
	if s.TLSCertFile == "" && !s.Insecure && !loopback(host) {
		return fmt.Errorf("config: streaming.address = %q is not the loopback, and without TLS everybody on the "+
			"network can read what is done in containers, and take a session over: set tls_cert_file and "+
			"tls_key_file, or listen on 127.0.0.1, or set insecure = true", s.Address)
	}
	c.Streaming = streams.Settings{Address: s.Address, TLSCert: s.TLSCertFile, TLSKey: s.TLSKeyFile}
	for _, file := range []struct{ key, path string }{
		{"tls_cert_file", s.TLSCertFile},
		{"tls_key_file", s.TLSKeyFile},
	} {
		if file.path != "" && !filepath.IsAbs(file.path) {
			return fmt.Errorf("config: streaming.%s = %q is not an absolute path", file.key, file.path)
		}
	}
	return cmp.Or(
		parseTime("streaming.idle_timeout", s.IdleTimeout, "4h", &c.Streaming.IdleTimeout),
		parseTime("streaming.creation_timeout", s.CreationTimeout, "30s", &c.Streaming.CreationTimeout),
	)
}

// resolveNRI checks what is said of NRI plugins.
func (f file) resolveNRI(c *daemon.Config) error {
	n := f.NRI
	c.NRI = nri.Config{
		Disable:   n.Disable,
		Socket:    n.Socket,
		PluginDir: n.PluginDir,
		ConfigDir: n.ConfigDir,
		Validator: n.Validator,
		Version:   version,
	}
	for _, p := range []struct{ key, path string }{
		{"socket_path", n.Socket},
		{"plugin_path", n.PluginDir},
		{"plugin_config_path", n.ConfigDir},
	} {
		if !filepath.IsAbs(p.path) {
			return fmt.Errorf("config: nri.%s = %q is not an absolute path", p.key, p.path)
		}
	}
	var err error
	if n.DisableConnections {
		c.NRI.Socket = ""
	} else if !n.Disable {
		c.NRI.Socket, err = withoutLinks(filepath.Clean(n.Socket))
	}
	if err != nil {
		return fmt.Errorf("config: nri.socket_path: %w", err)
	}
	return cmp.Or(
		parseTime("nri.plugin_registration_timeout", n.RegistrationTimeout, "5s", &c.NRI.RegistrationTimeout),
		parseTime("nri.plugin_request_timeout", n.RequestTimeout, "2s", &c.NRI.RequestTimeout),
	)
}

func parseTime(key, text, example string, to *time.Duration) (err error) {
	if *to, err = time.ParseDuration(text); err != nil || *to <= 0 {
		return fmt.Errorf("config: %s = %q is not a time such as %s", key, text, example)
	}
	return nil
}

// loopback says whether only this machine reaches a host. A name that is not known
// without asking may be anything.
func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// resolveRuntimes finds the programs. runc need not be named.
func (f file) resolveRuntimes(c *daemon.Config) (err error) {
	if _, ok := f.Runtimes["runc"]; !ok && f.DefaultRuntime == "runc" {
		f.Runtimes = maps.Clone(f.Runtimes)
		if f.Runtimes == nil {
			f.Runtimes = map[string]runtimeConfig{}
		}
		f.Runtimes["runc"] = runtimeConfig{}
	}
	for name, r := range f.Runtimes {
		path, err := findBinary(cmp.Or(r.Path, name))
		if err != nil {
			return fmt.Errorf("config: runtimes.%s.path: %w", name, err)
		}
		c.Runtimes[name] = path
	}
	if c.Shim, err = findBinary("holdfast-shim"); err != nil {
		return err
	}
	if c.Stream, err = findBinary("holdfast-stream"); err != nil {
		return err
	}
	c.Pause, err = findBinary("holdfast-pause")
	return err
}

// resolvePaths gives root, state and address without links: mounts, and other
// processes, are found by these paths, and the OCI runtime takes no links.
func (f file) resolvePaths(c *daemon.Config) (err error) {
	for _, p := range []struct {
		key, path string
		to        *string
	}{
		{"root", f.Root, &c.Root},
		{"state", f.State, &c.State},
		{"address", f.Address, &c.Address},
	} {
		if !filepath.IsAbs(p.path) || filepath.Clean(p.path) == "/" {
			return fmt.Errorf("config: %s = %q is not an absolute path", p.key, p.path)
		}
		dir, name := filepath.Clean(p.path), ""
		if p.key == "address" {
			dir, name = filepath.Split(dir) // what the socket itself is, listen looks at
		}
		if dir, err = withoutLinks(filepath.Clean(dir)); err != nil {
			return fmt.Errorf("config: %s = %q: %w", p.key, p.path, err)
		}
		if p.key != "address" && slices.Contains(systemDirs, dir) {
			return fmt.Errorf("config: %s = %q: it has to be a folder of its own, as other users are kept out of it",
				p.key, p.path)
		}
		*p.to = filepath.Join(dir, name)
	}
	return nil
}

// systemDirs are folders that others need.
var systemDirs = []string{
	"/dev", "/dev/shm", "/etc", "/home", "/media", "/mnt", "/opt", "/proc", "/root", "/run", "/run/lock",
	"/srv", "/sys", "/tmp", "/usr", "/usr/local", "/usr/local/lib",
	"/var", "/var/cache", "/var/lib", "/var/local", "/var/log", "/var/tmp",
}

// withoutLinks resolves the links in a path, whose end may not exist yet.
func withoutLinks(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return real, err
	}
	if to, err := os.Readlink(path); err == nil {
		return "", fmt.Errorf("%s is a link to %s, which does not exist: mount its disk, or remove the link", path, to)
	}
	dir, err := withoutLinks(filepath.Dir(path))
	return filepath.Join(dir, filepath.Base(path)), err
}

// findBinary finds a program beside this one, then on the PATH.
func findBinary(name string) (string, error) {
	if filepath.IsAbs(name) {
		if _, err := os.Stat(name); err != nil {
			return "", fmt.Errorf("cannot find a program: %w", err)
		}
		return name, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("cannot find this program's folder: %w", err)
	}
	beside := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("cannot find %s beside %s or on the PATH: run make build, or install it", name, self)
	}
	return filepath.Abs(path)
}
