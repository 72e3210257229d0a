package daemon

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/checkpoint"
	"github.com/holdfast-cri/holdfast/daemon/containers"
	"github.com/holdfast-cri/holdfast/daemon/image"
	"github.com/holdfast-cri/holdfast/daemon/rootfs"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Images is the images in the messages of the CRI.
type Images struct {
	*image.Library
	layers *rootfs.Store
}

var _ containers.Images = (*Images)(nil)

// Pull makes an image present, unpacked, and gives its id. auth may be nil, and so
// may the pod that needs it.
func (i *Images) Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig,
	pod *runtimeapi.PodSandboxConfig) (string, error) {
	r := image.PullRequest{Ref: ref}
	if auth != nil {
		r.Auth = &image.Auth{
			Username:      auth.GetUsername(),
			Password:      auth.GetPassword(),
			Auth:          auth.GetAuth(),
			ServerAddress: auth.GetServerAddress(),
			IdentityToken: auth.GetIdentityToken(),
			RegistryToken: auth.GetRegistryToken(),
		}
	}
	if m := pod.GetMetadata(); m.GetName() != "" {
		r.Pod = m.GetNamespace() + "/" + m.GetName()
	}
	img, err := i.Library.Pull(ctx, r)
	if err != nil {
		return "", field("image.image", err)
	}
	return img.ID, nil
}

// field says which field of a request an error is about.
func field(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

// Hold finds an image for a container, see containers.Images.
func (i *Images) Hold(ctx context.Context, name, ref, named string) (containers.Image, func(), error) {
	img, ok := i.Get(ref)
	if !ok {
		return containers.Image{}, nil, kind.Errorf(kind.NotFound, "%s: %q is not here: pull it first", name, ref)
	}
	release := i.Library.Hold(img.DiffIDs)
	if err := i.Ensure(ctx, img); err != nil {
		release()
		return containers.Image{}, nil, field(name, err)
	}
	return containers.Image{
		ID:     img.ID,
		Ref:    digestReference(img, cmp.Or(named, ref)),
		Config: img.Config,
		Layers: img.DiffIDs,

		Checkpoint: img.Annotations[checkpoint.Annotation],
	}, release, nil
}

// Unwanted says that a container has gone that used these layers.
func (i *Images) Unwanted(layers []digest.Digest) {
	if len(layers) > 0 {
		i.Collect(layers)
	}
}

// digestReference is what a container's status calls its image: the digest reference in the
// repository that the user named, or else any, or else the id.
func digestReference(img image.Image, named string) string {
	if repository := image.Repository(named); repository != "" {
		for _, d := range img.RepoDigests {
			if strings.HasPrefix(d, repository+"@") {
				return d
			}
		}
	}
	if len(img.RepoDigests) > 0 {
		return img.RepoDigests[0]
	}
	return img.ID
}

// List lists all images, or the one of that name, digest or id.
func (i *Images) List(ref string) []*runtimeapi.Image {
	if ref != "" {
		if img, ok := i.Get(ref); ok {
			return []*runtimeapi.Image{criImage(img)}
		}
		return nil
	}
	var list []*runtimeapi.Image
	for _, img := range i.Library.List() {
		list = append(list, criImage(img))
	}
	return list
}

// Status tells about one image, nil if it is not here; with verbose also its
// config, under the names that tools know it by.
func (i *Images) Status(ref string, verbose bool) (*runtimeapi.ImageStatusResponse, error) {
	img, ok := i.Get(ref)
	if !ok {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	resp := &runtimeapi.ImageStatusResponse{Image: criImage(img)}
	if !verbose {
		return resp, nil
	}
	spec, err := i.Spec(img)
	if err != nil { // it is damaged, or was just removed: what is known will do
		spec = image.Spec{Image: ocispec.Image{
			Created:  &img.Created,
			Platform: img.Platform,
			Config:   img.Config,
			RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: img.DiffIDs},
		}}
	}
	resp.Info, err = containers.InfoJSON(map[string]any{"chainID": identity.ChainID(img.DiffIDs), "imageSpec": spec})
	return resp, err
}

// Remove removes an image with all its references. Layers that containers use stay
// until those are gone.
func (i *Images) Remove(ref string) error { return field("image.image", i.Library.Remove(ref)) }

// Usage is what images take: blobs, and unpacked layers.
func (i *Images) Usage() (bytes, inodes uint64) {
	blobs, layers := i.Library.Usage(), i.layers.Usage()
	return blobs.Bytes + layers.Bytes, blobs.Inodes + layers.Inodes
}

// criImage turns an image into the message of the CRI.
func criImage(img image.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id:          img.ID,
		RepoTags:    img.RepoTags,
		RepoDigests: img.RepoDigests,
		Size:        img.Size,
		Pinned:      img.Pinned,
		Spec:        &runtimeapi.ImageSpec{Image: img.ID},
	}
	// USER is "user[:group]", either by name or by number.
	user, _, _ := strings.Cut(img.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &runtimeapi.Int64Value{Value: uid}
	} else {
		out.Username = user
	}
	return out
}
