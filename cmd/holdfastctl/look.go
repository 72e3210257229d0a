package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// view is what is known about a container. Its JSON is for scripts: fields are
// added, not renamed.
type view struct {
	client.View
	Name      string `json:"name,omitempty"`
	Attempt   uint32 `json:"attempt"`
	PodID     string `json:"podId,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Namespace string `json:"namespace,omitempty"`
}

// dirs lists the run directories.
func (a *app) dirs() ([]rundir.Dir, error) {
	containers := filepath.Join(a.state, "containers")
	entries, err := os.ReadDir(containers)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, a.missing("containers") // nil: a daemon that never had one
	}
	if err != nil {
		return nil, fmt.Errorf("cannot find containers: %w", err)
	}
	var dirs []rundir.Dir
	for _, e := range entries {
		// A name with a dot is on its way in or out.
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			dirs = append(dirs, rundir.Dir(filepath.Join(containers, e.Name())))
		}
	}
	return dirs, nil
}

// missing is the error about things that are not there, if that is because the
// state directory is not there either.
func (a *app) missing(things string) error {
	if _, err := os.Stat(a.state); err != nil {
		return fmt.Errorf("cannot find %s: %w; is --state right?", things, err)
	}
	return nil
}

// dir finds the container whose id begins with prefix.
func (a *app) dir(prefix string) (rundir.Dir, error) {
	dirs, err := a.dirs()
	if err != nil {
		return "", err
	}
	var found []rundir.Dir
	var ids []string
	for _, d := range dirs {
		if d.ID() == prefix {
			return d, nil
		}
		if strings.HasPrefix(d.ID(), prefix) && prefix != "" {
			found, ids = append(found, d), append(ids, d.ID())
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("no container matches %q in %s; is --state right? (holdfastctl shims lists them)", prefix, a.state)
	case 1:
		return found[0], nil
	}
	some := strings.Join(ids[:min(len(ids), 5)], ", ")
	return "", fmt.Errorf("%d containers match %q: %s; give more of the id", len(ids), prefix, some)
}

// atOnce calls f for many containers at the same time, so that a few silent shims
// cost the time of one.
func atOnce(dirs []rundir.Dir, f func(i int, dir rundir.Dir)) {
	slots := make(chan struct{}, 32)
	var wg sync.WaitGroup
	for i, d := range dirs {
		slots <- struct{}{}
		wg.Go(func() {
			f(i, d)
			<-slots
		})
	}
	wg.Wait()
}

// look is what can be seen of a container, with the names out of the records that
// the shim keeps for the daemon. What does not read there, because another version
// wrote it, stays empty.
func look(ctx context.Context, dir rundir.Dir) view {
	c := client.New(dir)
	defer c.Close()
	v := view{View: c.Look(ctx)}
	var container records.Container
	if json.Unmarshal(v.Launch.Container.Value, &container) == nil {
		m := container.Config.M.GetMetadata()
		v.Name, v.Attempt, v.PodID = m.GetName(), m.GetAttempt(), container.PodID
	}
	var pod records.Pod
	if json.Unmarshal(v.Launch.Sandbox.Value, &pod) == nil {
		m := pod.Config.M.GetMetadata()
		v.PodID, v.Pod, v.Namespace = cmp.Or(v.PodID, pod.ID), m.GetName(), m.GetNamespace()
	}
	return v
}
