package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
)

const (
	defaultConfig = "/etc/holdfast/config.toml"
	defaultState  = "/run/holdfast"
)

// addressFrom gives the socket of the daemon: what its config says, or else the
// usual name in its state directory.
func addressFrom(path, state string) (string, error) {
	var config struct {
		Address string `toml:"address"`
	}
	if path != "" {
		b, err := os.ReadFile(path)
		if err == nil {
			err = toml.Unmarshal(b, &config)
		}
		if err != nil {
			return "", fmt.Errorf("cannot read the daemon's address: %w; name it with --address", err)
		}
	}
	return cmp.Or(config.Address, filepath.Join(state, "holdfast.sock")), nil
}

// stateFrom reads the state directory from a config file of the daemon; from the
// default one, if there is one, for an empty path. Other keys don't matter here,
// so that a mistake in one of them does not keep anybody from looking.
func stateFrom(path string) (string, error) {
	explicit := path != ""
	if !explicit {
		path = defaultConfig
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !explicit {
		return defaultState, nil
	}
	if err != nil {
		return "", fmt.Errorf("cannot read the config: %w", err)
	}
	config := struct {
		State string `toml:"state"`
	}{defaultState}
	if err := toml.Unmarshal(b, &config); err != nil {
		return "", fmt.Errorf("cannot read the state directory from %s: %w; name it with --state", path, err)
	}
	return config.State, nil
}
