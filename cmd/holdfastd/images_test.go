package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestImagesConfig(t *testing.T) {
	dir := t.TempDir()
	read := func(text string) file {
		t.Helper()
		name := filepath.Join(dir, "config.toml")
		check(t, os.WriteFile(name, []byte(text), 0o600))
		f, err := readConfig(name)
		check(t, err)
		return f
	}
	c, _ := read("").resolve("info") // the binaries may be missing here
	if c.DropLayerBlobs || c.ImageVerifierDir != "" || c.ImageVerifierTimeout != 10*time.Second {
		t.Errorf("defaults: %+v", c)
	}
	c, _ = read("[images]\nkeep_blobs = false\nverifier_dir = \"" + dir +
		"\"\nverifier_timeout = \"1m\"\n").resolve("info")
	if !c.DropLayerBlobs || c.ImageVerifierDir != dir || c.ImageVerifierTimeout != time.Minute {
		t.Errorf("%+v", c)
	}
	for text, want := range map[string]string{
		"verifier_dir = \"" + dir + "/none\"": "images.verifier_dir",
		"verifier_dir = \"relative\"":         "images.verifier_dir",
		"verifier_timeout = \"soon\"":         "images.verifier_timeout",
		"verifier_timeout = \"-1s\"":          "images.verifier_timeout",
		"pinned = [\"no name\"]":              "images.pinned",
	} {
		if _, err := read("[images]\n" + text + "\n").resolve("info"); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
