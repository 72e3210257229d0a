package records

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// PullsName is the directory below the daemon's state directory with one record
// per running pull, ID.json. A record is replaced about once a second and goes
// with the end of the pull; what a killed daemon left goes with the next start.
const PullsName = "pulls"

// PullPhase is what a pull is at.
type PullPhase string

// The phases of a pull. The last three are told by what its layers are at, and
// may alternate.
const (
	PullResolving   PullPhase = "resolving"   // the registry is asked what the name stands for
	PullVerifying   PullPhase = "verifying"   // the image verifiers decide
	PullWaiting     PullPhase = "waiting"     // for the downloads of other pulls
	PullDownloading PullPhase = "downloading" // and unpacking meanwhile
	PullUnpacking   PullPhase = "unpacking"   // all bytes are here
)

// Pull says how far a pull is.
type Pull struct {
	Ref   string    `json:"ref"`           // the full name
	Asked string    `json:"asked"`         // the name as the caller gave it
	Pod   string    `json:"pod,omitempty"` // that needs it, NAMESPACE/NAME, as far as the caller said so
	Since time.Time `json:"since"`
	Phase PullPhase `json:"phase"`
	// Bytes of TotalBytes are here, compressed. Of them PresentBytes are no work
	// of this pull: layers that were here before, what an interrupted pull had
	// brought, and what another pull had when this one joined it. The total is 0
	// while it is not known.
	Bytes        int64 `json:"bytes"`
	PresentBytes int64 `json:"presentBytes"`
	TotalBytes   int64 `json:"totalBytes"`
	// Layers of TotalLayers are here and unpacked.
	Layers      int   `json:"layers"`
	TotalLayers int   `json:"totalLayers"`
	Rate        int64 `json:"rate"` // bytes per second, of late
	// Trouble is what a registry did last that is being tried again; empty while
	// bytes come.
	Trouble string         `json:"trouble,omitempty"`
	Daemon  rundir.Process `json:"daemon"` // the pull ends with it
}

// Pulls reads the records of all pulls, the oldest first. A killed daemon leaves
// those of its pulls until the next start.
func Pulls(stateDir string) ([]Pull, error) {
	dir := filepath.Join(stateDir, PullsName)
	files, err := os.ReadDir(dir)
	var list []Pull
	for _, f := range files {
		var p Pull
		// One that does not read has just gone, or is of no use; it is also not
		// worth an error.
		if strings.HasSuffix(f.Name(), ".json") && record.Read(filepath.Join(dir, f.Name()), &p) == nil {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(x, y Pull) int { return x.Since.Compare(y.Since) })
	return list, err
}

// ReadPull reads the record of one pull. Errors are those of record.Read.
func ReadPull(path string) (p Pull, err error) {
	err = record.Read(path, &p)
	return p, err
}

// FindPull finds the record of the youngest pull that lives and was asked for by
// that name. Several that are asked for the same wait for the same bytes.
func FindPull(stateDir, asked string) (found Pull, ok bool) {
	list, _ := Pulls(stateDir) // none: no pull runs
	for _, p := range list {
		if p.Asked == asked && p.Daemon.Alive() {
			found, ok = p, true
		}
	}
	return found, ok
}

// Percent is how much of the bytes is here, rounded down: 100 is the end.
func (p *Pull) Percent() int64 {
	if p.TotalBytes <= 0 {
		return 0
	}
	return int64(min(100, 100*float64(p.Bytes)/float64(p.TotalBytes)))
}

// Text says how far the pull is, in one line, what matters most first. What a
// registry sent is in it as it came.
func (p *Pull) Text() string {
	trouble := ""
	if p.Trouble != "" {
		trouble = "; trying again: " + p.Trouble
	}
	if p.TotalLayers == 0 {
		return fmt.Sprintf("%s, since %s%s", p.Phase.text(), Age(time.Since(p.Since)), trouble)
	}
	text := fmt.Sprintf("%s of %s", Size(p.Bytes), Size(p.TotalBytes))
	if p.TotalBytes > 0 {
		text += fmt.Sprintf(" (%d%%)", p.Percent())
	}
	switch {
	case p.Trouble != "": // that says more
	case p.Phase == PullDownloading:
		text += fmt.Sprintf(", %s/s", Size(p.Rate))
		if p.Rate > 0 {
			text += ", " + left(float64(p.TotalBytes-p.Bytes)/float64(p.Rate))
		}
	default:
		text += ", " + p.Phase.text()
	}
	text += fmt.Sprintf(", %d of %d layers", p.Layers, p.TotalLayers)
	if p.PresentBytes > 0 {
		text += fmt.Sprintf(", %s were here", Size(p.PresentBytes))
	}
	return text + trouble
}

func (p PullPhase) text() string {
	switch p {
	case PullResolving:
		return "asking the registry"
	case PullVerifying:
		return "asking the image verifiers"
	case PullWaiting:
		return "waiting for other downloads"
	}
	return string(p)
}

func left(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	if d > 48*time.Hour {
		return "days left"
	}
	return Age(d) + " left"
}

// Age is a duration in its largest unit that gives two or more, as a table has
// room for.
func Age(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", max(d, 0)/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// Size says a number of bytes with three digits.
func Size(n int64) string {
	f, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for f >= 1000 && len(units) > 1 {
		f, units = f/1024, units[1:]
	}
	if units[0] == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.3g %s", f, units[0])
}

// ImageStats are what the store of images has, and what it did since its start.
type ImageStats struct {
	Pulls     map[string]uint64 // that ended, by result; all results are there
	Running   []Pull            // the oldest first; without a Rate
	Downloads int               // of layers that run or wait for their turn

	Bytes        uint64 // of layers that came from registries
	ResumedBytes uint64 // of layers that an interrupted download had brought
	Retries      uint64 // requests for layers that had to be repeated
	Shared       uint64 // layers that a pull took from the download of another
	Unpacked     uint64 // layers

	Images     int
	Blobs      uint64
	BlobBytes  uint64
	Collected  uint64
	FreedBytes uint64 // of the blobs that were collected
}
