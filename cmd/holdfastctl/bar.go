package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/records"
)

// bar draws how far a pull is: over itself on a terminal, else a line every ten
// seconds.
type bar struct {
	w     io.Writer
	width func() int // of the terminal, now; nil: it is none
	drawn bool
	known bool // the last line knew what there is to do
	last  time.Time
}

// barWidth is the most of it; below the least there is none. The text comes
// first, so that the bar does not change with it.
const (
	barWidth  = 30
	barLeast  = 8
	textWidth = 66
)

func newBar(w io.Writer) *bar {
	b := &bar{w: w}
	f, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return b
	}
	if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
		b.width = func() int {
			size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
			if err != nil || size.Col == 0 { // it does not tell
				return 80
			}
			return int(size.Col)
		}
	}
	return b
}

func (b *bar) show(p records.Pull) {
	if b.width != nil {
		fmt.Fprintf(b.w, "\r\x1b[K%s", barText(p, b.width()))
		b.drawn = true
	} else if known := p.TotalLayers > 0; time.Since(b.last) >= 10*time.Second || known && !b.known {
		fmt.Fprintln(b.w, printable(p.Text()))
		b.known, b.last = known, time.Now()
	}
}

func (b *bar) clear() {
	if b.drawn {
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}

// barText fits into a line: what is longer would wrap, and could not be drawn
// over. The last column stays free, as some terminals wrap there.
func barText(p records.Pull, width int) string {
	text := printable(p.Text())
	if n := min(barWidth, width-textWidth); p.TotalBytes > 0 && n >= barLeast {
		full := min(n, int(float64(n)*float64(p.Bytes)/float64(p.TotalBytes)))
		text = fmt.Sprintf("[%s%s] %s", strings.Repeat("#", full), strings.Repeat(".", n-full), text)
	}
	runes := []rune(text)
	return string(runes[:max(0, min(len(runes), width-1))])
}

// findPull finds the record of the youngest pull under that name. It may be
// somebody else's until ours is there; both wait for the same bytes.
func findPull(state, image string) (found records.Pull, ok bool) {
	list, _ := records.Pulls(state) // none: no pull runs
	for _, p := range list {
		if p.Asked == image && p.Daemon.Alive() {
			found, ok = p, true
		}
	}
	return found, ok
}

func setupPulls(a *app, _ *flag.FlagSet) runFunc {
	return func(context.Context, []string) error {
		list, err := records.Pulls(a.state)
		if errors.Is(err, fs.ErrNotExist) {
			err = a.missing("pulls") // nil: a daemon that has not come that far
		}
		if err != nil {
			return err
		}
		// For scripts: fields are added, not renamed.
		type view struct {
			records.Pull
			Alive bool `json:"alive"` // the daemon that pulls
		}
		views := []view{}
		for _, p := range list {
			views = append(views, view{p, p.Daemon.Alive()})
		}
		if a.json {
			return a.printJSON(views)
		}
		w := a.table()
		row(w, "IMAGE", "POD", "PHASE", "DONE", "OF", "RATE", "LAYERS", "AGE", "NOTE")
		for _, v := range views {
			phase, note := string(v.Phase), printable(v.Trouble)
			if !v.Alive {
				phase, note = "("+phase+")", "the daemon that pulled it has died; the next pull goes on from here"
			}
			var done, of, rate, layers string
			if v.TotalLayers > 0 {
				done, of = fmt.Sprintf("%d%%", v.Percent()), records.Size(v.TotalBytes)
				rate, layers = records.Size(v.Rate)+"/s", fmt.Sprintf("%d/%d", v.Layers, v.TotalLayers)
			}
			row(w, v.Ref, v.Pod, phase, done, of, rate, layers, age(v.Since), note)
		}
		return w.Flush()
	}
}
