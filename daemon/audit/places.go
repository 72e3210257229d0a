package audit

import (
	"cmp"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/daemon/image"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/proto/stream"
)

// userWaysSuffix ends the name of the directory with the ways of pods with user namespaces.
const userWaysSuffix = "-userns"

// removal says when a file without an owner may be removed.
type removal int

const (
	byPerson removal = iota // who knows what it is
	offline                 // when no daemon runs
	anytime
)

// row is a kind of place in the trees: what lies there, whose it is, and when it may be removed without an owner.
type row struct {
	// places are patterns of paths. In these ID stands for an id, DEL for the name of what is being removed, ALGORITHM
	// for one of digests, * for all names; one that ends with / is that of a directory.
	places string
	kind   Kind // empty: what is there
	why    string
	of     judge // nil: it is the daemon's
	remove removal
}

// judge gives the verdict on a file or directory. names are what stands for the parts of the pattern that are not
// given.
type judge func(l *look, e entry, names []string) verdict

// rows are those of docs/files.md. Of what is in none of them, nobody knows what it is.
var rows = []row{
	{places: "ROOT/pods/ ROOT/containers/ STATE/pods/ STATE/containers/", why: "a directory for each"},
	{places: "ROOT/journal/ ROOT/journal/now ROOT/journal/before", why: "what has happened to pods and containers"},
	{places: "ROOT/images/ ROOT/images/index.json ROOT/images/oci-layout", why: "the images"},
	{places: "ROOT/images/blobs/ ROOT/images/blobs/ALGORITHM/",
		why: "manifests, configs, layers as they were downloaded"},
	{places: "ROOT/images/refs/", why: "a record for each name of an image"},
	{places: "ROOT/images/removing.json", why: "the removal of an image that is under way, or was cut short"},
	{places: "ROOT/images/ingest/ ROOT/images/pending/ STATE/pulls/", why: "pulls, and what is being downloaded"},
	{places: "ROOT/layers/ ROOT/layers/ALGORITHM/ ROOT/layers/tmp/ ROOT/layers/empty/", why: "unpacked layers"},
	{places: "ROOT/cni/ ROOT/cni/results/", why: "what CNI plugins need"},
	{places: "ROOT/cni/running/ ROOT/cni/running/.gc", why: "locks of CNI plugins at work"},
	{places: "ROOT/cni/networks/ ROOT/cni/networks/*/ ROOT/cni/pod-cidr", why: "addresses of the built-in network"},
	{places: "ROOT/quarantine/ ROOT/images/quarantine/", why: "what was damaged"},
	{places: "ROOT/lost+found/", why: "the file system's own"},
	{places: "STATE/runc/", why: "what the OCI runtime keeps"},
	{places: "STATE/daemon.json", why: "how the daemon was started"},
	{places: "STATE/stream/ STATE/stream/tokens/ STATE/stream/address STATE/stream/stream.log STATE/stream/stream.lock",
		why: "sessions, who serves them, and where"},

	{places: "ROOT/pods/ID/", of: (*look).ofPodDir, remove: offline},
	{places: "STATE/pods/ID/", of: holds(records.DebtFiles), remove: offline},
	{places: "ROOT/containers/ID/ STATE/containers/ID/ STATE/runc/ID/ WAYS/ID/", remove: offline,
		of: (*look).ofContainerDir},
	{places: "ROOT/pods/DEL/ STATE/pods/DEL/ ROOT/containers/DEL/ STATE/containers/DEL/",
		why: "a removal is under way, or was cut short: the next start goes on with it"},
	{places: "ROOT/quarantine/* ROOT/images/quarantine/*", kind: Quarantine, of: (*look).ofDamaged},
	{places: "ROOT/images/refs/*", kind: Record, remove: offline,
		of: needed("it names an image", func(s *stores, path string, _ digest.Digest) string { return s.Refs[path] })},
	{places: "ROOT/images/pending/*", kind: Record, remove: offline,
		of: needed("the pull runs, or was interrupted and goes on there",
			func(s *stores, path string, _ digest.Digest) string { return s.Pending[path] })},
	{places: "ROOT/images/blobs/ALGORITHM/*", kind: Blob, remove: offline,
		of: needed("it is a part of it", func(s *stores, _ string, d digest.Digest) string { return s.Blobs[d] })},
	{places: "ROOT/images/ingest/*", kind: Download, remove: offline,
		of: needed("it is being downloaded, or the next pull goes on with it", (*stores).ofDownload)},
	{places: "ROOT/layers/tmp/*", kind: Layer,
		why: "it is being unpacked or deleted; what is left, the next start removes"},
	{places: "ROOT/layers/ALGORITHM/*", kind: Layer, remove: offline,
		of: needed("its root is made of it", (*stores).ofLayer)},
	{places: "ROOT/cni/results/*", of: (*look).ofResult, remove: anytime},
	{places: "ROOT/cni/running/ID", of: holds(records.DebtNetwork), remove: anytime},
	{places: "STATE/stream/tokens/*", kind: Token, of: (*look).ofToken, remove: anytime},
	{places: "STATE/pulls/*", kind: Record, of: (*look).ofPull, remove: offline},
}

// holds has the pod of an ID decide, by what it owes.
func holds(d records.Debt) judge {
	return func(l *look, _ entry, names []string) verdict { return l.ofPod(names[0], d) }
}

// find gives the row of a short path, with its pattern, and what stands for the parts that are not given; nil: none has
// it.
func find(parts []string) (r *row, pattern string, names []string) {
	for i := range rows {
		for pattern := range strings.FieldsSeq(rows[i].places) {
			if names, ok := fits(strings.Split(strings.TrimSuffix(pattern, "/"), "/"), parts); ok {
				return &rows[i], pattern, names
			}
		}
	}
	return nil, "", nil
}

func fits(pattern, parts []string) (names []string, ok bool) {
	for i, want := range pattern {
		switch {
		case len(pattern) != len(parts):
			return nil, false
		case want == parts[i]:
		case want == "*",
			want == "ID" && idForm.MatchString(parts[i]),
			want == "DEL" && strings.HasPrefix(parts[i], ".del-"),
			want == "ALGORITHM" && digest.Algorithm(parts[i]).Available():
			names = append(names, parts[i])
		default:
			return nil, false
		}
	}
	return names, true
}

// short is a path with the names of the trees in place of these; empty: it is in none of them.
func (l *look) short(path string) string {
	for tree, name := range map[string]string{l.Root: "ROOT/", l.State: "STATE/", l.State + userWaysSuffix: "WAYS/"} {
		if rest, ok := strings.CutPrefix(path, tree+"/"); ok {
			return name + rest
		}
	}
	return ""
}

// judgeTrees judges the files and directories of both trees.
func (l *look) judgeTrees() {
	for _, e := range l.trees {
		l.judgeEntry(e, strings.Split(l.short(e.path), "/"))
	}
	for path, why := range map[string]string{
		l.Address:           "the socket of the CRI",
		l.Address + ".lock": "the lock of the socket of the CRI",
		l.NRISocket:         "the socket for NRI plugins",
	} {
		if !l.daemonRuns {
			why += "; the next start of the daemon takes it over"
		}
		l.addIfThere("", path, of("holdfastd", why))
	}
	for id, c := range l.containers {
		l.addIfThere(Log, c.LogPath, of(l.containerName(id), "its output; the kubelet removes it"))
	}
}

func (l *look) addIfThere(k Kind, path string, v verdict) {
	if st, err := os.Lstat(path); path != "" && err == nil {
		e := newEntry(path, st)
		l.add(cmp.Or(k, kindOf(e)), path, e.same(), v, nil)
	}
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
	k, v, remove := kindOf(e), none("nothing has this name in this version"), byPerson
	if parts[0] == "STATE" && k != Directory { // nothing there outlives a boot
		remove = anytime
	}
	r, pattern, names := find(parts)
	switch {
	case e.path == l.Address || e.path == l.Address+".lock" || e.path == l.NRISocket:
		return // see judgeTrees
	case len(parts) > 3 && (parts[1] == "containers" || parts[1] == "runc"):
		// What belongs to a container goes with its directory. Only sockets and FIFOs are worth a line.
		if v = l.ofContainer(parts[2]); v.owner == "" || k != Socket && k != FIFO {
			return
		}
	case r == nil:
	case strings.HasSuffix(pattern, "/") && k != Directory,
		!strings.HasSuffix(pattern, "/") && r.of == nil && r.kind == "" && !e.mode.IsRegular():
		v, remove = none("something else has to be there"), byPerson
	default:
		v, remove, k = of("holdfastd", r.why), r.remove, cmp.Or(r.kind, k)
		if r.of != nil {
			v = r.of(l, e, names)
		}
	}
	base := filepath.Base(e.path)
	if v.none() && strings.HasPrefix(base, ".") && strings.Count(base, ".") > 1 &&
		time.Since(time.Unix(e.at.Unix())) < time.Minute {
		v = of("whoever writes it", "a record that is being written")
	}
	f := removePath(e.path, remove == offline)
	if remove == byPerson {
		f = byHand("find out what it is")
	}
	l.add(k, e.path, e.same(), v, f)
}

func (l *look) ofContainerDir(_ entry, names []string) verdict { return l.ofContainer(names[0]) }

func (l *look) ofDamaged(entry, []string) verdict {
	return of("you", "it was damaged and is kept to be looked at; remove it at will")
}

func (l *look) ofPodDir(_ entry, names []string) verdict {
	if p := l.pods[names[0]]; p != nil {
		return of(l.podName(names[0]), podState(p))
	}
	return l.ofPod(names[0], records.DebtFiles)
}

// ofResult takes the id of the pod out of the name that libcni gives a result.
func (l *look) ofResult(_ entry, names []string) verdict {
	for part := range strings.SplitSeq(names[0], "-") {
		if idForm.MatchString(part) {
			return l.ofPod(part, records.DebtNetwork)
		}
	}
	return doubtful("its name tells of no pod")
}

func (l *look) ofToken(_ entry, names []string) verdict {
	since, ok := stream.Expired(names[0])
	switch {
	case !ok:
		return none("it is no token")
	case since <= stream.Lifetime: // whoever serves sessions, and each new one, sweeps
		return of("sessions", "somebody has asked for a session and may come for it, or it has just expired")
	case !l.daemonRuns:
		return of("sessions", "it has expired; the next one that looks removes it")
	}
	return none("it has expired")
}

func (l *look) ofPull(e entry, _ []string) verdict {
	p, err := records.ReadPull(e.path)
	switch {
	case err != nil && l.daemonRuns:
		return of("holdfastd", "it is being written")
	case err == nil && p.Daemon.Alive():
		return of("the pull of "+p.Ref, "the pull is under way")
	case !l.daemonRuns:
		return of("holdfastd", "its next start removes it")
	}
	return none("the daemon that pulled is gone")
}

// stores is what needs blobs and layers.
type stores struct {
	image.Inventory
	containers map[digest.Digest]string // the container that needs a layer
	mounted    map[digest.Digest]bool
	// pull is the oldest pull that a daemon runs, or ran when it was killed. What has come since may be its: a pull
	// writes down what it needs once it knows.
	pull      string
	pullSince time.Time
}

func (l *look) readStores() (s stores) {
	var err error
	if s.Inventory, err = image.TakeInventory(filepath.Join(l.Root, "images")); err != nil {
		l.fail("cannot read what images there are: %w", err)
		s.Damaged = append(s.Damaged, err)
	} else {
		for _, d := range s.Damaged {
			l.fail("an image cannot be used; a restart of the daemon takes it out of the way: %w", d)
		}
	}
	s.containers, s.mounted = map[digest.Digest]string{}, map[digest.Digest]bool{}
	for id, c := range l.owners.containers {
		for _, layer := range c.AllLayers() {
			s.containers[layer] = l.containerName(id)
		}
	}
	for _, m := range l.mounts {
		layers, _ := rootfs.LayersIn(m.FSOptions)
		for _, layer := range layers {
			s.mounted[layer] = m.Kind == "overlay"
		}
	}
	if pulls, _ := records.Pulls(l.State); len(pulls) > 0 { // none: no pull runs
		s.pull, s.pullSince = pulls[0].Ref, pulls[0].Since
	}
	return s
}

// needed has the verdict on a file of the stores depend on who needs it: a path, or a blob or layer. What a pull has
// brought just now may be its.
func needed(why string, by func(s *stores, path string, d digest.Digest) string) judge {
	return func(l *look, e entry, names []string) verdict {
		var d digest.Digest
		if len(names) == 2 {
			d = digest.NewDigestFromEncoded(digest.Algorithm(names[0]), names[1])
		}
		s := &l.stores
		switch owner := by(s, e.path, d); {
		case owner != "":
			return of(owner, why)
		case len(s.Damaged) > 0:
			return doubtful("not all images can be read")
		case !s.pullSince.IsZero() && !time.Unix(e.at.Unix()).Before(s.pullSince.Add(-time.Second)):
			return of("the pull of "+s.pull, "it came while the pull ran")
		}
		return none("no image and no pull needs it")
	}
}

func (s *stores) ofDownload(path string, _ digest.Digest) string {
	d, partial := image.BlobOfDownload(filepath.Base(path))
	if !partial {
		return ""
	}
	return s.Blobs[d]
}

func (s *stores) ofLayer(_ string, d digest.Digest) string {
	owner := cmp.Or(s.containers[d], s.Layers[d])
	if owner == "" && s.mounted[d] {
		owner = "a container without a record"
	}
	return owner
}

// judgeMounts judges what is mounted below the trees.
func (l *look) judgeMounts() {
	for _, m := range slices.Backward(l.mounts) { // the last one has to go first
		parts := strings.Split(l.short(m.Point), "/")
		if len(parts) < 2 {
			continue
		}
		k, f := Mount, unmount(m)
		if m.Kind == "nsfs" {
			k, f = Namespace, unpin(m.Point)
		}
		v, ours := l.ofMount(parts)
		if !ours {
			f = byHand("find out whose it is")
		}
		l.add(k, m.Point, m.ID, v, f)
	}
}

// ofMount is the verdict on a mount. not ours: no daemon mounts anything there.
func (l *look) ofMount(parts []string) (v verdict, ours bool) {
	if r, _, _ := find(parts); r != nil && r.of == nil {
		return of("you", "this part of the tree is on a file system of its own"), false
	}
	if len(parts) < 3 || !idForm.MatchString(parts[2]) && parts[0] != "WAYS" {
		return none("nothing is mounted there by this version"), false
	}
	id, rest := parts[1], strings.Join(parts[2:], "/")
	if parts[0] != "WAYS" {
		id, rest = parts[2], strings.Join(parts[3:], "/")
	}
	c := l.containers[id]
	switch tree := parts[0] + "/" + parts[1]; {
	case tree == "STATE/pods" && slices.Contains([]string{"ns/ipc", "ns/uts", "ns/user"}, rest):
		return l.ofPod(id, records.DebtNamespaces), true
	case tree == "STATE/pods" && slices.Contains([]string{"shm", "etc", "pid"}, rest):
		return l.ofPod(id, records.DebtMounts), true
	case (parts[0] == "WAYS" || tree == "STATE/containers" && strings.HasSuffix(rest, ".layers")) && c != nil &&
		c.Phase == records.ContainerCreated:
		return none("it is needed only while %s is created", l.containerName(id)), true
	case parts[0] == "WAYS", tree == "STATE/containers" && rest != "", tree == "ROOT/containers" && rest == "upper":
		return l.ofContainer(id), true
	}
	return none("nothing is mounted there by this version"), false
}
