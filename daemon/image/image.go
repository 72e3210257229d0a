// Package image keeps images: it pulls them from registries, stores their blobs
// and remembers which reference names which image.
//
// Under its root lies an OCI image layout, so crane, skopeo and oras read it:
//
//	oci-layout, index.json   the layout; index.json is derived, never read
//	blobs/ALGORITHM/HEX      verified and on the disk before anything names them
//	refs/HASH.json           one record per reference: the truth
//	ingest/                  partial downloads, resumed by the next pull
//	pending/HASH.json        pulls that were interrupted: their blobs are kept
//	removing.json            the image that is being removed
//	quarantine/              records that could not be used
//
// A Store knows nothing of unpacked layers: a pull hands each layer's uncompressed
// stream to a Layers. A Library joins a Store and its Layers.
package image

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/daemon/image/registry"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// The errors of this package wrap one of these where it applies. Each but
// ErrCorrupt has a kind.
var (
	// ErrInvalidReference: the name of the image cannot be parsed.
	ErrInvalidReference = kind.Errorf(kind.Invalid, "invalid image reference")
	// ErrRejected: a verifier does not let the image in.
	ErrRejected = kind.Errorf(kind.Rejected, "image rejected")

	// Those of the registry; ErrNotFound also says that the store has no such
	// image, ErrUnsupported that it is of a kind that cannot be run here.
	ErrNotFound     = registry.ErrNotFound
	ErrUnauthorized = registry.ErrUnauthorized
	ErrUnavailable  = registry.ErrUnavailable
	ErrUnsupported  = registry.ErrUnsupported
	ErrCorrupt      = registry.ErrCorrupt
)

// Image is one image, known by its config's digest. It is a value that the
// store shares between callers: nobody changes what its fields point to.
type Image struct {
	// ID is the digest of the config, "sha256:..."; CRI: Image.id.
	ID string
	// RepoTags and RepoDigests are full names, sorted. An image whose tag has
	// moved on has no tag, but still its digest.
	RepoTags    []string
	RepoDigests []string
	// Size in bytes: the compressed layers and the config, as pulled.
	Size uint64
	// Config is the part that says how to run it.
	Config ocispec.ImageConfig
	// Platform and Created are informational.
	Platform ocispec.Platform
	Created  time.Time
	// DiffIDs are the digests of the uncompressed layers, the lowest first.
	DiffIDs []digest.Digest
	// Annotations are those of the manifest. They are not to be changed.
	Annotations map[string]string
	// Pinned images are not to be collected by the kubelet.
	Pinned bool
}

// Spec is all of an image's config.
type Spec struct {
	ocispec.Image
	// History is for people to read. As a slice it may take 20 times its text.
	History json.RawMessage `json:"history,omitempty"`
}

// Auth is what a caller shows a registry.
type Auth = registry.Auth

// Layers keeps unpacked layers by their diff ids. It is safe for concurrent use.
type Layers interface {
	// Has says whether a layer is unpacked here.
	Has(diffID digest.Digest) bool
	// Apply unpacks the tar stream of a layer, reads it to its end and verifies
	// it against the diff id. It is called concurrently, for several layers and
	// (by concurrent pulls) for the same one.
	Apply(ctx context.Context, diffID digest.Digest, uncompressed io.Reader) error
	// Remove removes a layer. One that is not there is no error.
	Remove(diffID digest.Digest) error
	// List gives all layers that are unpacked.
	List() []digest.Digest
}

// PullRequest says what to pull and where its layers go.
type PullRequest struct {
	// Ref is a name as users write it: "busybox", "quay.io/a/b:c@sha256:...".
	Ref  string
	Auth *Auth  // nil: anonymous
	Pod  string // that needs it, NAMESPACE/NAME; for people to read
	// Layers is where the layers are unpacked that are not there yet; nil: nothing
	// is unpacked. A Library has its own.
	Layers Layers
}

// Options configure a Store. Zero values mean the stated defaults.
type Options struct {
	Root string // made if missing
	// RegistryConfigDir has a directory per registry host, or _default, with a
	// hosts.toml as containerd's users have it. Empty: none.
	RegistryConfigDir string
	Log               *slog.Logger
	// Pinned images, by names as users write them.
	Pinned []string
	// Platform to choose from an index; the machine's own.
	Platform *ocispec.Platform
	// Downloads at a time from each registry, over all pulls; 6.
	Downloads int
	// ProgressTimeout ends an attempt when no byte came for so long; 5 minutes.
	ProgressTimeout time.Duration
	// MinRate, in bytes per second over one ProgressTimeout, ends a trickle; 1024.
	MinRate int64
	// PullTimeout ends a pull that makes progress and does not come to its end; 12 hours.
	// The next one goes on from there.
	PullTimeout time.Duration
	// ProgressDir gets a record per running pull, see records.Pull. It is emptied
	// by Open. Empty: none.
	ProgressDir string
	// ProgressEvery is how often the record is replaced, and a tenth of how often
	// the log tells about it; 1 second.
	ProgressEvery time.Duration
	// Pulled is called after each pull that went well, with its time. May be nil.
	Pulled func(took time.Duration)
	// DropLayers removes the blobs of layers once they are unpacked. It saves
	// their size, and costs a layout that other tools can copy images from, and
	// a download where an unpacked layer was lost.
	DropLayers bool
	// VerifierDir has the programs that decide which images may be pulled.
	// Empty: all may.
	VerifierDir string
	// VerifierTimeout is for each of them; 10 seconds.
	VerifierTimeout time.Duration
	// StaleIngest is the age at which what an interrupted pull left is removed;
	// 24 hours.
	StaleIngest time.Duration
}

// Usage is what the store takes on its file system.
type Usage struct{ Bytes, Inodes uint64 }
