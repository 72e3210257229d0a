package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/image"
)

// Here the image store, which knows references and blobs, and the layer store,
// which knows directories, meet. A layer stays as long as an image, a container
// or a call under way wants it.

// PullImage makes an image present, unpacked, and gives its id. auth may be nil,
// and so may the pod that needs it.
func (d *Daemon) PullImage(ctx context.Context, ref string, auth *runtimeapi.AuthConfig, pod *runtimeapi.PodSandboxConfig) (string, error) {
	var credentials *image.Auth
	if auth != nil {
		credentials = &image.Auth{Username: auth.GetUsername(), Password: auth.GetPassword(), Auth: auth.GetAuth(),
			ServerAddress: auth.GetServerAddress(), IdentityToken: auth.GetIdentityToken(), RegistryToken: auth.GetRegistryToken()}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.pulls, cancel)()
	img, err := d.images.Pull(ctx, image.PullRequest{
		Ref:  ref,
		Auth: credentials,
		Pod:  readablePod(pod),
		// What a running pull unpacks is wanted by the image store (Wants)
		// until its reference is written, so nothing collects it.
		Layers: d.layers,
	})
	if err != nil {
		d.collect(nil) // layers of a failed pull
		if d.pulls.Err() != nil && errors.Is(err, context.Canceled) {
			return "", errorf(ErrClosing, "cannot pull %s: the daemon is shutting down", ref)
		}
		return "", imageError("image.image", err)
	}
	return img.ID, nil
}

// readablePod is NAMESPACE/NAME, "" for no pod.
func readablePod(pod *runtimeapi.PodSandboxConfig) string {
	if m := pod.GetMetadata(); m.GetName() != "" {
		return m.GetNamespace() + "/" + m.GetName()
	}
	return ""
}

// ensureLayers unpacks again what a power cut, or a person, took away. An image
// that is not whole and cannot be made whole here is forgotten: while it is
// listed, the kubelet would not pull it with credentials that may help.
func (d *Daemon) ensureLayers(ctx context.Context, img image.Image) error {
	for _, l := range img.DiffIDs {
		if d.layers.Has(l) {
			continue
		}
		err := d.images.Unpack(ctx, image.PullRequest{Ref: img.ID, Layers: d.layers})
		if errors.Is(err, image.ErrNotFound) {
			d.log.Error("image forgotten, it has to be pulled again", "id", img.ID, "tags", img.RepoTags, "error", err)
			err = errors.Join(err, d.RemoveImage(img.ID))
		}
		return imageError("config.image.image", err)
	}
	return nil
}

// ListImages lists all images, or the one of that name, digest or id.
func (d *Daemon) ListImages(ref string) []*runtimeapi.Image {
	if ref != "" {
		if img, ok := d.images.Get(ref); ok {
			return []*runtimeapi.Image{criImage(img)}
		}
		return nil
	}
	var list []*runtimeapi.Image
	for _, img := range d.images.List() {
		list = append(list, criImage(img))
	}
	return list
}

// ImageStatus tells about one image, nil if it is not here; with verbose also
// its config.
func (d *Daemon) ImageStatus(ref string, verbose bool) (*runtimeapi.ImageStatusResponse, error) {
	img, ok := d.images.Get(ref)
	if !ok {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	resp := &runtimeapi.ImageStatusResponse{Image: criImage(img)}
	if !verbose {
		return resp, nil
	}
	spec, err := d.images.Spec(img)
	if err != nil { // it is damaged, or was just removed: what is known will do
		spec = image.Spec{Image: ocispec.Image{Created: &img.Created, Platform: img.Platform, Config: img.Config, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: img.DiffIDs}}}
	}
	// By the names that tools know them by.
	resp.Info, err = infoJSON(map[string]any{"chainID": identity.ChainID(img.DiffIDs), "imageSpec": spec})
	return resp, err
}

// ImageUsage is what images take: blobs, and unpacked layers.
func (d *Daemon) ImageUsage() (bytes, inodes uint64) {
	blobs, layers := d.images.Usage(), d.layers.Usage()
	return blobs.Bytes + layers.Bytes, blobs.Inodes + layers.Inodes
}

// RemoveImage removes an image with all its references. Layers that containers
// use stay until those are gone.
func (d *Daemon) RemoveImage(ref string) error {
	freed, err := d.images.Remove(ref)
	if err != nil {
		return imageError("image.image", err)
	}
	d.collect(freed)
	return nil
}

// collect removes layers that nothing wants any more, of these or, with nil, of
// all. What the disk refuses is tried again, less and less often.
func (d *Daemon) collect(layers []digest.Digest) {
	if layers == nil {
		layers = d.layers.List()
	}
	failed := d.removeUnwanted(layers)
	if len(failed) == 0 {
		return
	}
	d.background(func(ctx context.Context) {
		const first, longest = time.Second, 10 * time.Minute
		for wait := first; len(failed) > 0; wait = min(2*wait, longest) {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return // the next start does it
			}
			failed = d.removeUnwanted(failed)
		}
	})
}

func (d *Daemon) removeUnwanted(layers []digest.Digest) (failed []digest.Digest) {
	layers = slices.DeleteFunc(slices.Clone(layers), d.images.Wants)
	if len(layers) == 0 {
		return nil // the usual case: the image is still here
	}
	// The lock keeps a creation from pinning a layer between the question and
	// the removal, which is a rename; the tree goes in the background.
	d.mu.Lock()
	defer d.mu.Unlock()
	wanted := map[digest.Digest]bool{}
	for l := range d.pins {
		wanted[l] = true
	}
	for _, c := range d.containers {
		for _, l := range c.rec.Load().allLayers() {
			wanted[l] = true
		}
	}
	for _, l := range layers {
		if wanted[l] {
			continue
		}
		// A pull that finds the layer here has said before that it wants it.
		if err := d.images.IfUnwanted(l, func() error { return d.layers.Remove(l) }); err != nil {
			d.log.Warn("cannot remove a layer, trying again", "layer", l, "error", err)
			failed = append(failed, l)
		}
	}
	return failed
}

// pin keeps layers until unpin.
func (d *Daemon) pin(layers []digest.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range layers {
		d.pins[l]++
	}
}

func (d *Daemon) unpin(layers []digest.Digest) {
	d.mu.Lock()
	for _, l := range layers {
		if d.pins[l]--; d.pins[l] == 0 {
			delete(d.pins, l)
		}
	}
	d.mu.Unlock()
	if len(layers) > 0 {
		d.collect(layers) // the image may be gone, and the creation have failed
	}
}

// criImage turns an image into the CRI's message.
func criImage(img image.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{Id: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests, Size: img.Size, Pinned: img.Pinned,
		Spec: &runtimeapi.ImageSpec{Image: img.ID}}
	// USER is "user[:group]", either by name or by number.
	user, _, _ := strings.Cut(img.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &runtimeapi.Int64Value{Value: uid}
	} else {
		out.Username = user
	}
	return out
}

// imageRef is what a container's status calls its image: the digest reference of
// the name it was asked for by, or else the id.
func imageRef(img image.Image, asked string) string {
	name := asked
	if i := strings.LastIndexAny(name, ":@"); i > strings.LastIndex(name, "/") {
		name = name[:i]
	}
	for _, d := range img.RepoDigests {
		if strings.HasPrefix(d, name+"@") {
			return d
		}
	}
	if len(img.RepoDigests) > 0 {
		return img.RepoDigests[0]
	}
	return img.ID
}

// imageError gives the errors of package image their kind.
func imageError(field string, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", field, err)
	for _, k := range []struct{ from, to error }{
		{image.ErrInvalidReference, ErrInvalid},
		{image.ErrRejected, ErrRejected},
		{image.ErrNotFound, ErrNotFound},
		{image.ErrUnauthorized, ErrUnauthorized},
		{image.ErrUnsupported, ErrUnsupported},
		{image.ErrUnavailable, ErrUnavailable},
	} {
		if errors.Is(err, k.from) {
			return as(k.to, err)
		}
	}
	return err
}
