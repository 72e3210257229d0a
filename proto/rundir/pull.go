package rundir

import "time"

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
	Trouble string  `json:"trouble,omitempty"`
	Daemon  Process `json:"daemon"` // the pull ends with it
}
