package records

import (
	"testing"
	"time"
)

func TestPullText(t *testing.T) {
	const mib = 1 << 20
	half := Pull{
		Phase:       PullDownloading,
		Bytes:       50 * mib,
		TotalBytes:  200 * mib,
		Layers:      1,
		TotalLayers: 3,
		Rate:        1234567,
	}
	for want, change := range map[string]func(*Pull){
		"50 MiB of 200 MiB (25%), 1.18 MiB/s, 2m left, 1 of 3 layers": func(*Pull) {},
		"50 MiB of 200 MiB (25%), 0 B/s, 1 of 3 layers":               func(p *Pull) { p.Rate = 0 },
		"50 MiB of 200 MiB (25%), 1 B/s, days left, 1 of 3 layers":    func(p *Pull) { p.Rate = 1 },
		"50 MiB of 200 MiB (25%), waiting for other downloads, 1 of 3 layers, 7 MiB were here": func(p *Pull) {
			p.Phase, p.PresentBytes = PullWaiting, 7*mib
		},
		"200 MiB of 200 MiB (100%), unpacking, 2 of 3 layers": func(p *Pull) {
			p.Phase, p.Bytes, p.Layers = PullUnpacking, p.TotalBytes, 2
		},
		"50 MiB of 200 MiB (25%), 1 of 3 layers; trying again: 503 \x1b[31mred": func(p *Pull) {
			p.Trouble = "503 \x1b[31mred"
		},
		"asking the registry, since 5m": func(p *Pull) { // in seconds it would depend on the machine
			*p = Pull{Phase: PullResolving, Since: time.Now().Add(-5 * time.Minute)}
		},
	} {
		p := half
		change(&p)
		if got := p.Text(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1 << 20: "1 MiB",
		1023 << 20: "0.999 GiB", 5 << 50: "5.12e+03 TiB"} {
		if got := Size(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
}

func TestAge(t *testing.T) {
	for _, c := range []struct {
		d    time.Duration
		want string
	}{
		{-time.Second, "0s"}, {119 * time.Second, "119s"}, {2 * time.Minute, "2m"}, {119 * time.Minute, "119m"},
		{47 * time.Hour, "47h"}, {48 * time.Hour, "2d"},
	} {
		if got := Age(c.d); got != c.want {
			t.Errorf("Age(%v) = %q, want %q", c.d, got, c.want)
		}
	}
}
