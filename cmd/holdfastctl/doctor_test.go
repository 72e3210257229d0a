package main

import (
	"bufio"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/daemon/audit"
)

// Only a clear answer is one; without any, nothing is taken away.
func TestAsk(t *testing.T) {
	for said, want := range map[string]string{
		"y\n": "y", "N\n": "n", " q \n": "q", "\nyes\nwhat\ny\n": "y", "": "", "y": "", "yes\n": "",
	} {
		var b strings.Builder
		d := doctor{app: &app{stderr: &b}, in: bufio.NewReader(strings.NewReader(said))}
		got, err := d.ask(audit.Thing{Kind: audit.File, Name: "a\x1bb", Remedy: "remove it"})
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v", said, got, err)
		}
		if strings.Contains(b.String(), "\x1b") || !strings.Contains(b.String(), "remove it? [y/n/q]") {
			t.Errorf("it asks %q", b.String())
		}
	}
}
