package audit

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-cri/holdfast/daemon/image"
	"github.com/holdfast-cri/holdfast/daemon/mounts"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/daemon/state"
)

// stores is what needs blobs and layers.
type stores struct {
	image.Inventory
	containers map[digest.Digest]string // the container that needs a layer
	mounted    map[digest.Digest]bool
	// pull is the oldest pull that a daemon runs, or ran when it was killed. What has come
	// since may be its: a pull writes down what it needs once it knows.
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
		if m.Kind != "overlay" {
			continue
		}
		layers, _ := rootfs.LayersIn(m.FSOptions)
		for _, layer := range layers {
			s.mounted[layer] = true
		}
	}
	pulls, _ := records.Pulls(l.State) // none: no pull runs
	if len(pulls) > 0 {
		s.pull, s.pullSince = pulls[0].Ref, pulls[0].Since
	}
	return s
}

// judgeStored judges a file or directory of the stores by the parts of its short path. not
// ok: it is none.
func (l *look) judgeStored(e entry, parts []string) (k Kind, v verdict, f *fix, ok bool) {
	base, dir := parts[len(parts)-1], strings.Join(parts[:len(parts)-1], "/")
	s := &l.stores
	f = removePath(e, true)
	switch {
	case dir == "ROOT/images/refs":
		return Record, l.ofFile(e, s.Refs[e.path], "it names an image"), f, true
	case dir == "ROOT/images/pending":
		return Record, l.ofFile(e, s.Pending[e.path], "the pull runs, or was interrupted and goes on there"), f, true
	case dir == "ROOT/images/quarantine":
		v = verdict{owner: "you", why: "it was damaged and is kept to be looked at; remove it at will"}
		return Quarantine, v, nil, true
	case strings.HasPrefix(dir, "ROOT/images/blobs/") && len(parts) == 5:
		d := digest.NewDigestFromEncoded(digest.Algorithm(parts[3]), base)
		return Blob, l.ofFile(e, s.Blobs[d], "it is a part of it"), f, true
	case dir == "ROOT/images/ingest":
		return Download, l.ofDownload(e, base), f, true
	case dir == "ROOT/layers/tmp":
		v = verdict{owner: "holdfastd", why: "it is being unpacked or deleted; what is left, the next start removes"}
		return Layer, v, nil, true
	case strings.HasPrefix(dir, "ROOT/layers/") && len(parts) == 4:
		d := digest.NewDigestFromEncoded(digest.Algorithm(parts[2]), base)
		return Layer, l.ofLayer(e, d), removeLayer(l, e, d), true
	}
	return "", v, nil, false
}

// ofFile is the verdict on a file that something needs, or that a pull has brought just now.
func (l *look) ofFile(e entry, owner, why string) verdict {
	switch {
	case owner != "":
		return verdict{owner: owner, why: why}
	case len(l.stores.Damaged) > 0:
		return verdict{why: "not all images can be read", doubt: true}
	case !l.stores.pullSince.IsZero() && !time.Unix(e.at.Unix()).Before(l.stores.pullSince.Add(-time.Second)):
		return verdict{owner: "the pull of " + l.stores.pull, why: "it came while the pull ran"}
	}
	return none("no image and no pull needs it")
}

func (l *look) ofDownload(e entry, base string) verdict {
	d, partial := image.BlobOfDownload(base)
	if !partial {
		return l.ofFile(e, "", "")
	}
	return l.ofFile(e, l.stores.Blobs[d], "it is being downloaded, or the next pull goes on with it")
}

func (l *look) ofLayer(e entry, d digest.Digest) verdict {
	if owner := l.stores.containers[d]; owner != "" {
		return verdict{owner: owner, why: "its root is made of it"}
	}
	v := l.ofFile(e, l.stores.Layers[d], "it is unpacked for it")
	if v.owner == "" && l.stores.mounted[d] {
		v = verdict{owner: "a container without a record", why: "it is a part of a root that is mounted"}
	}
	return v
}

// removeLayer removes a layer that no overlay uses, in whatever mount namespace.
func removeLayer(l *look, e entry, d digest.Digest) *fix {
	f := removePath(e, true)
	f.offline = true
	f.do = func(context.Context) error {
		links, err := filepath.Glob("/proc/[0-9]*/mountinfo")
		for _, path := range links {
			table, merr := mounts.Read(path)
			if merr != nil {
				continue // it has ended
			}
			for _, m := range table {
				layers, all := rootfs.LayersIn(m.FSOptions)
				for _, used := range layers {
					all = all && used != d
				}
				if m.Kind == "overlay" && !all {
					return fmt.Errorf("cannot remove %s: a root may be made of it (%s)", e.path, path)
				}
			}
		}
		if err != nil {
			return err
		}
		return state.RemoveTree(e.path)
	}
	return f
}
