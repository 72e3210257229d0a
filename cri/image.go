package cri

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxRef is more than any registry takes as a name, tag and digest.
const maxRef = 4096

func checkRef(field, ref string) error {
	switch {
	case ref == "":
		return invalid(field, "is empty")
	case len(ref) > maxRef:
		return invalid(field, "is longer than 4096 bytes")
	}
	return nil
}

// PullImage makes an image present and gives its id.
func (s *Server) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	ref := r.GetImage().GetImage()
	if err := checkRef("image.image", ref); err != nil {
		return nil, err
	}
	id, err := s.d.PullImage(ctx, ref, r.GetAuth(), r.GetSandboxConfig())
	if err != nil {
		return nil, pullStatus(err)
	}
	return &runtimeapi.PullImageResponse{ImageRef: id}, nil
}

// ListImages lists images.
func (s *Server) ListImages(_ context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	return &runtimeapi.ListImagesResponse{Images: s.d.ListImages(r.GetFilter().GetImage().GetImage())}, nil
}

// ImageStatus tells about one image; one that is not here is no error.
func (s *Server) ImageStatus(_ context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	if err := checkRef("image.image", r.GetImage().GetImage()); err != nil {
		return nil, err
	}
	resp, err := s.d.ImageStatus(r.GetImage().GetImage(), r.GetVerbose())
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

// RemoveImage removes an image with all its names.
func (s *Server) RemoveImage(_ context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	if err := checkRef("image.image", r.GetImage().GetImage()); err != nil {
		return nil, err
	}
	if err := s.d.RemoveImage(r.GetImage().GetImage()); err != nil {
		return nil, toStatus(err)
	}
	return &runtimeapi.RemoveImageResponse{}, nil
}

// ImageFsInfo tells what images take on disk.
func (s *Server) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	bytes, inodes := s.d.ImageUsage()
	fs := &runtimeapi.FilesystemUsage{Timestamp: time.Now().UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: s.d.Config().Root},
		UsedBytes: &runtimeapi.UInt64Value{Value: bytes}, InodesUsed: &runtimeapi.UInt64Value{Value: inodes}}
	// Writable layers of containers lie on the same file system.
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{fs}, ContainerFilesystems: []*runtimeapi.FilesystemUsage{fs}}, nil
}
