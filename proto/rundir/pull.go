package rundir

import "time"

// PullsName is the directory below the daemon's state directory with one record
// per running pull, ID.json. A record is replaced about once a second and goes
// with the end of the pull; what a killed daemon left goes with the next start.
const PullsName = "pulls"

// Pull says how far a pull is.
type Pull struct {
	Ref   string    `json:"ref"`   // the full name
	Asked string    `json:"asked"` // the name as the caller gave it
	Since time.Time `json:"since"`
	// Bytes of TotalBytes are here, compressed; what was here before counts.
	Bytes      int64 `json:"bytes"`
	TotalBytes int64 `json:"totalBytes"`
	// Layers of TotalLayers are here and unpacked.
	Layers      int   `json:"layers"`
	TotalLayers int   `json:"totalLayers"`
	Rate        int64 `json:"rate"` // bytes per second, of late
}
