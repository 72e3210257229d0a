package cri

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PullImage makes an image present and gives its id.
func (s *Server) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	if err := s.d.Runtimes.Check("image", r.GetImage()); err != nil {
		return nil, err
	}
	id, err := s.d.Images.Pull(ctx, r.GetImage().GetImage(), r.GetAuth(), r.GetSandboxConfig())
	return &runtimeapi.PullImageResponse{ImageRef: id}, err
}

// ListImages lists images.
func (s *Server) ListImages(_ context.Context, r *runtimeapi.ListImagesRequest,
) (*runtimeapi.ListImagesResponse, error) {
	if err := s.d.Runtimes.Check("filter.image", r.GetFilter().GetImage()); err != nil {
		return nil, err
	}
	return &runtimeapi.ListImagesResponse{Images: s.d.Images.List(r.GetFilter().GetImage().GetImage())}, nil
}

// ImageStatus tells about one image; one that is not here is no error.
func (s *Server) ImageStatus(_ context.Context, r *runtimeapi.ImageStatusRequest,
) (*runtimeapi.ImageStatusResponse, error) {
	if err := s.d.Runtimes.Check("image", r.GetImage()); err != nil {
		return nil, err
	}
	return s.d.Images.Status(r.GetImage().GetImage(), r.GetVerbose())
}

// RemoveImage removes an image with all its names.
func (s *Server) RemoveImage(_ context.Context, r *runtimeapi.RemoveImageRequest,
) (*runtimeapi.RemoveImageResponse, error) {
	if err := s.d.Runtimes.Check("image", r.GetImage()); err != nil {
		return nil, err
	}
	return &runtimeapi.RemoveImageResponse{}, s.d.Images.Remove(r.GetImage().GetImage())
}

// ImageFsInfo tells what images take on disk.
func (s *Server) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	bytes, inodes := s.d.Images.Usage()
	usage := []*runtimeapi.FilesystemUsage{{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.d.Config().Root},
		UsedBytes:  &runtimeapi.UInt64Value{Value: bytes},
		InodesUsed: &runtimeapi.UInt64Value{Value: inodes},
	}}
	// Writable layers of containers lie on the same file system.
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: usage, ContainerFilesystems: usage}, nil
}
