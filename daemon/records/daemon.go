package records

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-cri/holdfast/proto/record"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// daemonName is the record in the state directory of how a daemon was started last.
const daemonName = "daemon.json"

// Daemon says which process uses a state directory, or did, and where else it has what
// belongs to it: whoever looks at the machine need not be told the same settings.
type Daemon struct {
	Process    rundir.Process `json:"process"`
	BootID     string         `json:"bootId"`
	Root       string         `json:"root"`
	Address    string         `json:"address"`    // of the CRI
	CNIConfDir string         `json:"cniConfDir"` // of the networks of pods
	NRISocket  string         `json:"nriSocket,omitempty"`
}

// ReadDaemon reads the record in a state directory. Errors are those of record.Read.
func ReadDaemon(stateDir string) (d Daemon, err error) {
	err = record.Read(filepath.Join(stateDir, daemonName), &d)
	return d, err
}

// WriteDaemon replaces it, and removes what a killed one has left of another attempt. Only
// the daemon that has the lock of the directory may.
func WriteDaemon(stateDir string, d Daemon) error {
	entries, _ := os.ReadDir(stateDir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "."+daemonName+".") {
			os.Remove(filepath.Join(stateDir, e.Name()))
		}
	}
	return record.Write(filepath.Join(stateDir, daemonName), d, false)
}
