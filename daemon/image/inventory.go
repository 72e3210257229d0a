package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Inventory is what the records of a store say that it needs, read without the store: a
// daemon may have it open.
type Inventory struct {
	Refs    map[string]string        // by path of the record
	Pending map[string]string        // likewise, of pulls that run or were interrupted
	Blobs   map[digest.Digest]string // what needs a blob
	Layers  map[digest.Digest]string // what needs an unpacked layer
	// Damaged is what does not read. What is needed cannot be told then.
	Damaged []error
}

// TakeInventory reads the records of the store at root. A record that goes meanwhile is
// left out.
func TakeInventory(root string) (inv Inventory, err error) {
	inv = Inventory{
		Refs:    map[string]string{},
		Pending: map[string]string{},
		Blobs:   map[digest.Digest]string{},
		Layers:  map[digest.Digest]string{},
	}
	s := &Store{o: Options{Root: root, Log: slog.New(slog.DiscardHandler)}}
	files, err := os.ReadDir(filepath.Join(root, refsName))
	if errors.Is(err, fs.ErrNotExist) {
		return inv, nil // no daemon has made it yet
	}
	if err != nil {
		return inv, fmt.Errorf("cannot list the images: %w", err)
	}
	for _, f := range files {
		path := filepath.Join(root, refsName, f.Name())
		if strings.HasPrefix(f.Name(), ".") {
			continue // it is being written
		}
		l, err := s.loadRecord(path)
		if _, serr := os.Lstat(path); errors.Is(serr, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			inv.Damaged = append(inv.Damaged, fmt.Errorf("cannot use %s: %w", path, err))
			continue
		}
		inv.addImage(path, l)
	}
	err = s.eachPending(func(path string, p pending, err error) error {
		if err == nil {
			inv.addPending(s, path, p)
		}
		return nil
	})
	return inv, err
}

func (inv *Inventory) addImage(path string, l *loaded) {
	owner := "image " + l.Ref
	inv.Refs[path] = owner
	for _, d := range l.blobs {
		inv.Blobs[d] = owner
	}
	for _, d := range l.config.RootFS.DiffIDs {
		inv.Layers[d] = owner
	}
}

// addPending notes what a pull needs. Its layers are in the config, once that is here.
func (inv *Inventory) addPending(s *Store, path string, p pending) {
	owner := "the pull of " + p.Ref
	inv.Pending[path] = owner
	for _, d := range p.Blobs {
		if inv.Blobs[d] == "" {
			inv.Blobs[d] = owner
		}
		st, err := os.Lstat(s.blobPath(d))
		if err != nil || st.Size() > maxConfig {
			continue
		}
		var c ocispec.Image
		b, err := s.readBlob(ocispec.Descriptor{Digest: d, Size: st.Size()}, maxConfig)
		if err != nil || json.Unmarshal(b, &c) != nil {
			continue
		}
		for _, layer := range c.RootFS.DiffIDs {
			if inv.Layers[layer] == "" {
				inv.Layers[layer] = owner
			}
		}
	}
}

// BlobOfDownload is the blob that a file among the downloads is a part of; false: it is
// written at one go.
func BlobOfDownload(name string) (digest.Digest, bool) {
	return blobOfPart(name), !strings.HasPrefix(name, smallPrefix)
}
