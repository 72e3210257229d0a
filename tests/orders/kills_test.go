package orders

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killAtRandom kills processes of the node until stop is closed, and leaves the daemon running. One step at a
// time takes longer than it would, so that others, and the kills, come between that and the next one.
func (w *world) killAtRandom(stop chan struct{}) {
	w.kills = map[string]int{}
	chance := rand.New(rand.NewPCG(seed, 1<<63))
	var steps []string
	for _, at := range cuts {
		for _, s := range at {
			if s != "" && !slices.Contains(steps, string(s)) {
				steps = append(steps, string(s))
			}
		}
	}
	slices.Sort(steps)
	defer w.n.Arm()
	for {
		w.n.Arm(fmt.Sprintf("%s %dms", steps[chance.IntN(len(steps))], 50+chance.IntN(1000)))
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(chance.Int64N(int64(400 * time.Millisecond)))):
		}
		victim, killed := "", false
		switch n := chance.IntN(100); {
		case n < 40:
			victim, killed = "daemon", true
			w.restarted.Store(time.Now().UnixNano())
			if err := w.n.Bounce(); err != nil {
				w.t.Errorf("cannot restart the daemon: %v", err)
				w.broken.Store(true)
				return
			}
		case n < 55:
			victim, killed = "shim", w.killShim(chance)
		case n < 85:
			victim, killed = "runc", w.killProgram(stop, w.isRuntime)
		default:
			victim, killed = "plugin", w.killProgram(stop, w.isPlugin)
		}
		if killed {
			w.kills[victim]++
			w.tally.Kill()
		}
	}
}

// killShim kills one of the shims.
func (w *world) killShim(chance *rand.Rand) bool {
	shims := w.n.ShimPIDs()
	if len(shims) == 0 {
		return false
	}
	ids := slices.Sorted(maps.Keys(shims))
	id := ids[chance.IntN(len(ids))]
	w.died.Store(id, true)
	return unix.Kill(shims[id], unix.SIGKILL) == nil
}

// killProgram waits a while for a process that lives for a moment, and kills it.
func (w *world) killProgram(stop chan struct{}, is func(args [][]byte, pid string) bool) bool {
	for range 40 {
		dirs, _ := os.ReadDir("/proc")
		for _, d := range slices.Backward(dirs) {
			pid, err := strconv.Atoi(d.Name())
			if err != nil {
				continue
			}
			cmdline, _ := os.ReadFile("/proc/" + d.Name() + "/cmdline") // gone: none
			if is(bytes.Split(cmdline, []byte{0}), d.Name()) {
				return unix.Kill(pid, unix.SIGKILL) == nil
			}
		}
		select {
		case <-stop:
			return false
		case <-time.After(4 * time.Millisecond):
		}
	}
	return false
}

// isRuntime says whether it is the OCI runtime of this node. The init of a container, which it becomes,
// does not have the node's path.
func (w *world) isRuntime(args [][]byte, _ string) bool {
	return filepath.Base(string(args[0])) == "runc" && bytes.Contains(bytes.Join(args, []byte{' '}), []byte(w.n.State))
}

// isPlugin says whether it is a CNI plugin that works for this node.
func (w *world) isPlugin(args [][]byte, pid string) bool {
	if filepath.Dir(string(args[0])) != filepath.Join(w.n.Bin, "cni") {
		return false
	}
	env, _ := os.ReadFile("/proc/" + pid + "/environ")
	return bytes.Contains(env, []byte("K8S_POD_NAME=traffic-"))
}
