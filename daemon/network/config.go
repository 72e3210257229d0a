package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
)

// conf is one network as it will be handed to plugins.
type conf struct {
	source string // file it came from
	list   *libcni.NetworkConfigList
}

// Ready returns nil if pods can be given a network now, and else the reason; it
// wraps ErrNoNetwork. It reads the config directory each time, so a CNI that
// arrives later, or a plugin that is put in place, is seen by the next call. The
// plugins are asked as well (STATUS), where the config is of CNI 1.1 or later.
func (n *Network) Ready(ctx context.Context) error {
	c, err := n.current()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	if err := n.cni(&run{net: n}).GetStatusNetworkList(ctx, c.list); err != nil {
		return fmt.Errorf("%w: network %q is not ready: %w", ErrNoNetwork, c.list.Name, err)
	}
	return nil
}

// statusTimeout bounds how long plugins may take to say whether they are ready.
const statusTimeout = 5 * time.Second

// Config returns the config list in force, as JSON that needs no other file.
// It is for the caller to record before Add: Del then works from the record,
// whatever becomes of the config directory. Errors wrap ErrNoNetwork.
func (n *Network) Config() ([]byte, error) {
	c, err := n.current()
	if err != nil {
		return nil, err
	}
	return c.list.Bytes, nil
}

func (n *Network) current() (conf, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c, err := n.loadLocked()
	if err != nil {
		return conf{}, err
	}
	return c, n.checkPlugins(c)
}

// checkPlugins looks each time: an installer may copy them after the config.
func (n *Network) checkPlugins(c conf) error {
	for _, p := range c.list.Plugins {
		for _, name := range []string{p.Network.Type, p.Network.IPAM.Type} {
			if name == "" {
				continue // an IPAM is not a must
			}
			if _, err := findPlugin(name, n.opts.BinDirs); err != nil {
				return fmt.Errorf("%w: network %q of %s: %w", ErrNoNetwork, c.list.Name, c.source, err)
			}
		}
	}
	return nil
}

func findPlugin(name string, dirs []string) (string, error) {
	path, err := invoke.FindInPath(name, dirs)
	if err != nil {
		return "", fmt.Errorf("cannot find CNI plugin %q in %s", name, strings.Join(dirs, ", "))
	}
	return path, nil
}

// confFile is a config file, or a plugin's config in a directory beside it.
type confFile struct {
	path string
	data []byte
	err  error
}

// loadLocked returns the first config that parses. n.mu is held. Files are compared
// by content, which for some kilobytes costs no more than asking for times and
// cannot miss a quick second write.
func (n *Network) loadLocked() (conf, error) {
	files, err := readConfDir(n.opts.ConfDir)
	if err != nil {
		return conf{}, fmt.Errorf("%w: cannot read CNI configs: %w", ErrNoNetwork, err)
	}
	seen := n.snapshotLocked(files)
	if seen == n.confSeen {
		return n.conf, n.confErr
	}
	had := n.confSeen != "" && n.confErr == nil
	n.confSeen = seen
	n.conf, n.confErr = n.chooseLocked(files)
	if n.confErr == nil {
		n.log.Info("pod network config loaded", "network", n.conf.list.Name, "source", n.conf.source)
	} else if had {
		n.log.Warn("pod network config gone", "error", n.confErr)
	}
	return n.conf, n.confErr
}

func (n *Network) snapshotLocked(files []confFile) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v\n", n.subnets)
	for _, f := range files {
		fmt.Fprintf(&b, "%q %q %v\n", f.path, f.data, f.err)
	}
	return b.String()
}

func (n *Network) chooseLocked(files []confFile) (conf, error) {
	tried := 0
	for _, f := range files {
		if filepath.Dir(f.path) != filepath.Clean(n.opts.ConfDir) {
			continue // belongs to a list in the directory above
		}
		tried++
		list, err := parseConf(f, files)
		if err == nil {
			delete(n.skipped, f.path)
			return conf{source: f.path, list: list}, nil
		}
		if n.skipped[f.path] != err.Error() {
			n.skipped[f.path] = err.Error()
			n.log.Warn("CNI config skipped", "file", f.path, "error", err)
		}
	}
	if tried > 0 {
		return conf{}, fmt.Errorf("%w: none of the %d CNI configs in %s can be used, see the log",
			ErrNoNetwork, tried, n.opts.ConfDir)
	}
	if n.opts.DefaultNetwork {
		return n.builtinLocked()
	}
	return conf{}, fmt.Errorf("%w: no CNI config in %s; install a network plugin, or set cni.default_network",
		ErrNoNetwork, n.opts.ConfDir)
}

// maxConf bounds a config file, in bytes.
const maxConf = 1 << 20

// readConfDir returns what matters in dir, ordered by name: files that may be
// configs, and the *.conf files one level below, which a list may refer to. A
// missing directory is an empty one.
func readConfDir(dir string) ([]confFile, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var files []confFile
	add := func(path string) {
		data, err := beneath.HostFile(path, maxConf)
		files = append(files, confFile{path: path, data: data, err: err})
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if st, err := os.Stat(path); err == nil && st.IsDir() {
			below, _ := filepath.Glob(filepath.Join(escapeGlob(path), "*.conf"))
			for _, p := range below {
				add(p)
			}
		} else if slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(path)) {
			add(path)
		}
	}
	return files, nil
}

func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// parseConf reads a list, or makes one of a single plugin's config. What tells
// them apart is the content: only a plugin's config has a type. all are those of the
// directory, and the plugins' configs beside them.
func parseConf(f confFile, all []confFile) (*libcni.NetworkConfigList, error) {
	if f.err != nil {
		return nil, f.err
	}
	var head struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(f.data, &head); err != nil {
		return nil, err
	}
	data := f.data
	if head.Type != "" {
		var err error
		if data, err = listOfOne(f.data); err != nil {
			return nil, err
		}
	}
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	if !list.LoadOnlyInlinedPlugins {
		more, err := pluginsBeside(f, list.Name, all)
		if err != nil {
			return nil, err
		}
		if len(more) > 0 {
			if list, err = inline(list, more); err != nil {
				return nil, err
			}
		}
	}
	if len(list.Plugins) == 0 {
		return nil, errors.New("no plugins in it")
	}
	return list, nil
}

// pluginsBeside gives the plugins' configs in the directory that has a list's name.
func pluginsBeside(list confFile, name string, all []confFile) ([]*libcni.PluginConfig, error) {
	var plugins []*libcni.PluginConfig
	for _, f := range all {
		if filepath.Dir(f.path) != filepath.Join(filepath.Dir(list.path), name) {
			continue
		}
		if f.err != nil {
			return nil, f.err
		}
		p, err := libcni.NetworkPluginConfFromBytes(f.data)
		if err != nil {
			return nil, fmt.Errorf("cannot use %s: %w", f.path, err)
		}
		plugins = append(plugins, p)
	}
	return plugins, nil
}

// listOfOne wraps a single plugin's config, the form before CNI 0.3.0.
func listOfOne(plugin []byte) ([]byte, error) {
	var head struct {
		Name       string `json:"name"`
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(plugin, &head); err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{
		"name":       head.Name,
		"cniVersion": head.CNIVersion,
		"plugins":    []json.RawMessage{plugin},
	})
}

// inline returns list with more plugins in it, so that its JSON stands alone.
func inline(list *libcni.NetworkConfigList, more []*libcni.PluginConfig) (*libcni.NetworkConfigList, error) {
	var raw map[string]any
	if err := json.Unmarshal(list.Bytes, &raw); err != nil {
		return nil, err
	}
	var plugins []json.RawMessage
	for _, p := range slices.Concat(list.Plugins, more) {
		plugins = append(plugins, p.Bytes)
	}
	raw["plugins"] = plugins
	raw["loadOnlyInlinedPlugins"] = true
	data, err := json.Marshal(raw)
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(data)
}
