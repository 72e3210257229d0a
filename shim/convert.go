package shim

import pb "github.com/holdfast-cri/holdfast/proto"

// The conversions of package proto that the shim needs, by their short names.
var (
	timestamp  = pb.TimeOf
	process    = pb.ProcessOf
	exit       = pb.ExitOf
	stopIntent = pb.StopOf
)
