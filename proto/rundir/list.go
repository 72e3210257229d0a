package rundir

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ContainersName is the directory below the state directory that has the run
// directories in it.
const ContainersName = "containers"

// List gives the run directories of a state directory. fs.ErrNotExist: there
// never was one.
func List(stateDir string) ([]Dir, error) {
	containers := filepath.Join(stateDir, ContainersName)
	entries, err := os.ReadDir(containers)
	if err != nil {
		return nil, fmt.Errorf("cannot find containers: %w", err)
	}
	var dirs []Dir
	for _, e := range entries {
		// A name with a dot is on its way in or out.
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			dirs = append(dirs, Dir(filepath.Join(containers, e.Name())))
		}
	}
	return dirs, nil
}

// Match gives those of some directories whose id begins with a prefix, and only
// the one whose id it is.
func Match(dirs []Dir, prefix string) []Dir {
	var found []Dir
	for _, d := range dirs {
		if d.ID() == prefix {
			return []Dir{d}
		}
		if prefix != "" && strings.HasPrefix(d.ID(), prefix) {
			found = append(found, d)
		}
	}
	return found
}
