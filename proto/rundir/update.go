package rundir

import (
	"encoding/json"
	"time"
)

// UpdateName is the record of the last update of a container's resources. None: they are
// as in create.json and config.json.
const UpdateName = "update.json"

// Update is update.json: how the resources of a container were changed last. The shim
// writes it once the kernel has all of it, so it is the truth wherever another record
// says something else.
type Update struct {
	// Resources and Undo are linux.resources of an OCI spec: all that is set, after the
	// update and before it.
	Resources json.RawMessage `json:"resources,omitempty"`
	Undo      json.RawMessage `json:"undo,omitempty"`
	// OOMScoreAdj is that of the container's processes, before and after.
	OOMScoreAdj [2]int `json:"oomScoreAdj"`
	// Record is how the daemon calls the resources. The shim keeps it.
	Record Opaque `json:"record"`
	// AskedAt orders the calls, on CLOCK_BOOTTIME: one that was asked for before another
	// that the shim has answered comes too late, and is refused.
	AskedAt time.Duration `json:"askedAt"`
}

// ReadUpdate and WriteUpdate are for update.json what ReadStatus and WriteStatus are for
// state.json.
func (d Dir) ReadUpdate() (u Update, err error) { err = d.read(UpdateName, &u); return }

// WriteUpdate replaces update.json.
func (d Dir) WriteUpdate(u Update) error { return d.write(UpdateName, u) }
