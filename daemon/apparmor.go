package daemon

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/spec"
)

// defaultProfile is the AppArmor profile that containers have unless they say otherwise. It
// is loaded once per boot: a change of its text needs another name.
const defaultProfile = "holdfast-default"

//go:embed apparmor.profile
var defaultProfileText []byte

// parserTimeout bounds the compiling of the profile.
const parserTimeout = 30 * time.Second

// loadAppArmor makes sure that the default profile is loaded, and gives its name; empty:
// there is no AppArmor, or no parser for its profiles. Then containers have none, and those
// that ask for the default are refused.
func (d *Daemon) loadAppArmor(host spec.Host) string {
	if !host.AppArmorEnabled {
		return ""
	}
	if loaded, err := spec.AppArmorLoaded(defaultProfile); loaded || err != nil {
		if err != nil {
			d.log.Warn("containers have no AppArmor profile unless they name one", "error", err)
			return ""
		}
		return defaultProfile
	}
	if err := compileProfile(defaultProfileText); err != nil {
		d.log.Warn("containers have no AppArmor profile unless they name one", "error", err)
		return ""
	}
	return defaultProfile
}

// compileProfile has the tools of AppArmor load profiles: the kernel takes them compiled.
func compileProfile(text []byte) error {
	parser, err := findParser()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), parserTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, parser, "--replace", "--skip-cache")
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot load the AppArmor profile %s with %s: %w: %.1000s", defaultProfile, parser, err,
			bytes.TrimSpace(out))
	}
	return nil
}

func findParser() (string, error) {
	const name = "apparmor_parser"
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if _, serr := os.Stat(filepath.Join(dir, name)); err != nil && serr == nil {
			return filepath.Join(dir, name), nil
		}
	}
	if err != nil {
		return "", fmt.Errorf("cannot load an AppArmor profile: %w (it is in the package apparmor)", err)
	}
	return path, nil
}
