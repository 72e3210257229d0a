package audit

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// fixed are the names of docs/files.md that belong to no object, with the directories in
// which what lies has rules of its own.
var fixed = map[string]string{
	"ROOT/journal":              "what has happened to pods and containers",
	"ROOT/journal/now":          "the journal",
	"ROOT/journal/before":       "the journal, its older half",
	"ROOT/layers/tmp":           "what is being unpacked or deleted",
	"ROOT/layers/empty":         "the root of an image without layers",
	"ROOT/images/blobs":         "manifests, configs, layers as they were downloaded",
	"ROOT/images/refs":          "a record for each name of an image",
	"ROOT/images/ingest":        "what is being downloaded",
	"ROOT/images/pending":       "a record for each pull that is not done",
	"ROOT/images/quarantine":    "what was damaged",
	"ROOT/images/index.json":    "for tools that read image layouts",
	"ROOT/images/oci-layout":    "for tools that read image layouts",
	"ROOT/images/removing.json": "the removal of an image that is under way, or was cut short",
	"ROOT/lost+found":           "the file system's own",
	"ROOT/pods":                 "a directory for each pod",
	"ROOT/containers":           "a directory for each container",
	"ROOT/images":               "the store of images",
	"ROOT/layers":               "the store of layers",
	"ROOT/cni":                  "what CNI plugins need",
	"ROOT/cni/results":          "results of CNI plugins",
	"ROOT/cni/running":          "locks of CNI plugins at work",
	"ROOT/cni/running/.gc":      "lock of CNI plugins that collect garbage",
	"ROOT/cni/networks":         "addresses of the built-in network",
	"ROOT/cni/pod-cidr":         "what the kubelet has sent for the built-in network",
	"ROOT/quarantine":           "what was damaged",
	"STATE/pods":                "a directory for each pod",
	"STATE/containers":          "a run directory for each container",
	"STATE/runc":                "what the OCI runtime keeps",
	"STATE/pulls":               "a record for each pull",
	"STATE/daemon.json":         "how the daemon was started",
	"STATE/stream":              "sessions",
	"STATE/stream/tokens":       "sessions that were asked for",
	"STATE/stream/address":      "where sessions are served",
	"STATE/stream/stream.log":   "the log of who serves sessions",
	"STATE/stream/stream.lock":  "the lock of who serves sessions",
}

// judgeTrees judges the files and directories of both trees.
func (l *look) judgeTrees() {
	for _, e := range l.trees {
		short := l.short(e.path)
		if why, ok := fixed[short]; ok {
			l.add(kindOf(e), e.path, e.same(), verdict{owner: "holdfastd", why: why}, nil)
			continue
		}
		l.judgeEntry(e, strings.Split(short, "/"))
	}
	l.judgeAddress()
}

// algorithms are those of digests.
var algorithms = []string{string(digest.SHA256), string(digest.SHA384), string(digest.SHA512)}

// short is a path with the names of the trees in place of these.
func (l *look) short(path string) string {
	for tree, name := range map[string]string{l.Root: "ROOT", l.State: "STATE", l.State + userWaysSuffix: "WAYS"} {
		if rest, ok := strings.CutPrefix(path, tree+"/"); ok {
			return name + "/" + rest
		}
	}
	return path
}

func kindOf(e entry) Kind {
	switch {
	case e.mode.IsDir():
		return Directory
	case e.mode&fs.ModeSocket != 0:
		return Socket
	case e.mode&fs.ModeNamedPipe != 0:
		return FIFO
	}
	return File
}

// judgeEntry judges a file or directory by the parts of its short path.
func (l *look) judgeEntry(e entry, parts []string) {
	base := parts[len(parts)-1]
	if k, v, f, ok := l.judgeStored(e, parts); ok {
		l.addFile(k, e, v, f)
		return
	}
	k, v, f := kindOf(e), none("nothing has this name in this version"), removePath(e, false)
	switch dir := strings.Join(parts[:len(parts)-1], "/"); {
	case len(parts) < 2:
	case k == Directory && (dir == "ROOT/images/blobs" || dir == "ROOT/layers") && slices.Contains(algorithms, base):
		v = verdict{owner: "holdfastd", why: "by the kind of digest"}
	case dir == "ROOT/pods":
		v, f = l.ofDir(base, l.ofPodRecord), removePath(e, true)
	case dir == "STATE/pods":
		v, f = l.ofDir(base, func(id string) verdict { return l.ofPod(id, records.DebtFiles) }), removePath(e, true)
	case dir == "ROOT/containers" || dir == "STATE/containers":
		v, f = l.ofDir(base, l.ofContainer), removePath(e, true)
	case strings.HasPrefix(dir, "STATE/containers/"):
		if k != Socket && k != FIFO { // a file is not worth a line: it goes with its directory
			return
		}
		if v, f = l.ofContainer(parts[2]), nil; v.owner == "" {
			return // likewise
		}
	case dir == "WAYS":
		v, f = l.ofContainer(base), removePath(e, true)
	case dir == "STATE/runc":
		v, f = l.ofContainer(base), removePath(e, true)
	case strings.HasPrefix(dir, "STATE/runc/"):
		if k != FIFO {
			return
		}
		if v, f = l.ofContainer(parts[2]), nil; v.owner == "" {
			return
		}
	case dir == "STATE/stream/tokens":
		k, v, f = Token, l.ofToken(base), sweepTokens(l)
	case dir == "STATE/pulls":
		k, v, f = Record, l.ofPull(e.path), removePath(e, true)
	case dir == "ROOT/quarantine":
		k, v, f = Quarantine, verdict{owner: "you", why: "it was damaged and is kept to be looked at; remove it at will"}, nil
	case dir == "ROOT/cni/results":
		v = l.ofPod(podOfResult(base), records.DebtNetwork)
	case dir == "ROOT/cni/running":
		v = l.ofPod(base, records.DebtNetwork)
	case strings.HasPrefix(dir, "ROOT/cni/networks"):
		return // leases have rules of their own
	case e.path == l.Address || e.path == l.Address+".lock":
		return // see judgeAddress
	}
	l.addFile(k, e, v, f)
}

// addFile notes a file, which may be one that is being written.
func (l *look) addFile(k Kind, e entry, v verdict, f *fix) {
	if v.owner == "" && unfinished(filepath.Base(e.path)) && recent(e) {
		v = verdict{owner: "whoever writes it", why: "a record that is being written"}
	}
	l.add(k, e.path, e.same(), v, f)
}

// unfinished says whether a file is called as one that is being written.
func unfinished(base string) bool {
	return strings.HasPrefix(base, ".") && strings.Count(base, ".") > 1
}

// recent says whether something was changed just now.
func recent(e entry) bool { return time.Since(time.Unix(e.at.Unix())) < time.Minute }

// ofDir is the verdict on the directory of an object, by its name.
func (l *look) ofDir(base string, of func(id string) verdict) verdict {
	if strings.HasPrefix(base, ".del-") {
		if l.daemonRuns {
			return verdict{owner: "holdfastd", why: "it is being removed, or the next start goes on with it"}
		}
		return verdict{owner: "holdfastd", why: "a removal was cut short; the next start goes on with it"}
	}
	return of(base)
}

func (l *look) ofPodRecord(id string) verdict {
	if p := l.pods[id]; p != nil {
		return verdict{owner: l.podName(id), why: podState(p)}
	}
	return l.ofPod(id, records.DebtFiles)
}

func (l *look) ofToken(name string) verdict {
	since, ok := stream.Expired(name)
	switch {
	case !ok:
		return none("it is no token")
	case since <= stream.Lifetime: // whoever serves sessions, and each new one, sweeps

		return verdict{owner: "sessions", why: "somebody has asked for a session and may come for it, or it has just expired"}
	case !l.daemonRuns:
		return verdict{owner: "sessions", why: "it has expired; the next one that looks removes it"}
	}
	return none("it has expired")
}

// sweepTokens has all tokens removed that have expired, as the daemon does it.
func sweepTokens(l *look) *fix {
	dir := stream.Dir(filepath.Join(l.State, stream.DirName))
	return &fix{text: "remove it", do: dir.Sweep}
}

func (l *look) ofPull(path string) verdict {
	p, err := records.ReadPull(path)
	switch {
	case err != nil && l.daemonRuns:
		return verdict{owner: "holdfastd", why: "it is being written"}
	case err == nil && p.Daemon.Alive():
		return verdict{owner: "the pull of " + p.Ref, why: "the pull is under way"}
	case !l.daemonRuns:
		return verdict{owner: "holdfastd", why: "its next start removes it"}
	}
	return none("the daemon that pulled is gone")
}

// podOfResult takes the id of the pod out of the name that libcni gives a result.
func podOfResult(base string) string {
	for part := range strings.SplitSeq(base, "-") {
		if idForm.MatchString(part) {
			return part
		}
	}
	return base
}

// judgeAddress judges the socket of the CRI and its lock, wherever they are.
func (l *look) judgeAddress() {
	for path, why := range map[string]string{
		l.Address:           "the socket of the CRI",
		l.Address + ".lock": "the lock of the socket of the CRI",
		l.NRISocket:         "the socket for NRI plugins",
	} {
		st, err := os.Lstat(path)
		if path == "" || err != nil {
			continue
		}
		if !l.daemonRuns {
			why += "; the next start of the daemon takes it over"
		}
		l.add(kindOf(entry{mode: st.Mode()}), path, sameFile(st), verdict{owner: "holdfastd", why: why}, nil)
	}
	for id, c := range l.containers {
		if c.LogPath == "" {
			continue
		}
		if st, err := os.Lstat(c.LogPath); err == nil {
			v := verdict{owner: l.containerName(id), why: "its output; the kubelet removes it"}
			l.add(Log, c.LogPath, sameFile(st), v, nil)
		}
	}
}
