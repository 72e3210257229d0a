package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/rundir"
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
	if f, ok := w.(*os.File); ok && os.Getenv("TERM") != "dumb" {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			b.width = func() int { return columns(f) }
		}
	}
	return b
}

// columns is the width of a terminal; one that does not tell has the usual one.
func columns(f *os.File) int {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 80
	}
	return cmp.Or(int(size.Col), 80)
}

func (b *bar) show(p rundir.Pull) {
	if b.width != nil {
		fmt.Fprintf(b.w, "\r\x1b[K%s", barText(p, b.width()))
		b.drawn = true
	} else if known := p.TotalLayers > 0; time.Since(b.last) >= 10*time.Second || known && !b.known {
		fmt.Fprintln(b.w, pullText(p))
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
func barText(p rundir.Pull, width int) string {
	text := pullText(p)
	if n := min(barWidth, width-textWidth); p.TotalBytes > 0 && n >= barLeast {
		full := min(n, int(float64(n)*float64(p.Bytes)/float64(p.TotalBytes)))
		text = fmt.Sprintf("[%s%s] %s", strings.Repeat("#", full), strings.Repeat(".", n-full), text)
	}
	runes := []rune(text)
	return string(runes[:max(0, min(len(runes), width-1))])
}

// pullText says how far a pull is, in one line, what matters most first.
func pullText(p rundir.Pull) string {
	if p.TotalLayers == 0 {
		return withTrouble(p, fmt.Sprintf("%s, since %s", phaseText(p.Phase), ageText(time.Since(p.Since))))
	}
	text := fmt.Sprintf("%s of %s", sizeText(p.Bytes), sizeText(p.TotalBytes))
	if p.TotalBytes > 0 {
		text += fmt.Sprintf(" (%d%%)", percent(p))
	}
	switch {
	case p.Trouble != "": // that says more
	case p.Phase == rundir.PullDownloading:
		text += fmt.Sprintf(", %s/s", sizeText(p.Rate))
		if p.Rate > 0 {
			text += ", " + leftText(time.Duration(float64(p.TotalBytes-p.Bytes)/float64(p.Rate)*float64(time.Second)))
		}
	default:
		text += ", " + phaseText(p.Phase)
	}
	text += fmt.Sprintf(", %d of %d layers", p.Layers, p.TotalLayers)
	if p.PresentBytes > 0 {
		text += fmt.Sprintf(", %s were here", sizeText(p.PresentBytes))
	}
	return withTrouble(p, text)
}

func withTrouble(p rundir.Pull, text string) string {
	if p.Trouble != "" {
		text += "; trying again: " + printable(p.Trouble)
	}
	return text
}

func phaseText(p rundir.PullPhase) string {
	switch p {
	case rundir.PullResolving:
		return "asking the registry"
	case rundir.PullVerifying:
		return "asking the image verifiers"
	case rundir.PullWaiting:
		return "waiting for other downloads"
	}
	return string(p)
}

// percent rounds down: 100 is the end.
func percent(p rundir.Pull) int64 {
	if p.TotalBytes <= 0 {
		return 0
	}
	return int64(min(100, 100*float64(p.Bytes)/float64(p.TotalBytes)))
}

func leftText(d time.Duration) string {
	if d > 48*time.Hour {
		return "days left"
	}
	return ageText(d) + " left"
}

// sizeText says a number of bytes with three digits.
func sizeText(n int64) string {
	f, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for f >= 1000 && len(units) > 1 {
		f, units = f/1024, units[1:]
	}
	if units[0] == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.3g %s", f, units[0])
}
