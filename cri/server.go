// Package cri answers the kubelet: it checks what a request must have, calls
// package daemon and turns errors into gRPC codes. Whatever it does not answer
// yet says Unimplemented and names itself.
package cri

import (
	"context"
	"log/slog"
	"path"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon"
	"github.com/holdfast-cri/holdfast/daemon/metrics"
)

// maxMessage is the largest message that the kubelet sends or takes in.
const maxMessage = 16 << 20

// Server is both services of the CRI.
type Server struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	d       *daemon.Daemon
	version string
}

// NewServer makes a gRPC server that answers from d.
func NewServer(d *daemon.Daemon, version string, log *slog.Logger) *grpc.Server {
	s := &Server{d: d, version: version}
	g := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.UnaryInterceptor(observed(log, d.Config().Metrics)))
	runtimeapi.RegisterRuntimeServiceServer(g, s)
	runtimeapi.RegisterImageServiceServer(g, s)
	return g
}

// observed counts calls, and writes down what failed. What works and changes
// something is logged where it happens.
func observed(log *slog.Logger, m *metrics.Metrics) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		start := time.Now()
		resp, err := handle(ctx, req)
		m.Called(path.Base(info.FullMethod), status.Code(err).String(), time.Since(start))
		if err == nil {
			log.Debug("answered", "method", info.FullMethod, "took", time.Since(start).Round(time.Microsecond))
			return resp, nil
		}
		level := slog.LevelWarn
		switch code := status.Code(err); {
		case code == codes.NotFound, code == codes.Unimplemented, code == codes.Canceled,
			// The image store tells about a pull that failed, once its name is one.
			info.FullMethod == runtimeapi.ImageService_PullImage_FullMethodName && code != codes.InvalidArgument:
			level = slog.LevelDebug
		}
		log.Log(ctx, level, "call failed", "method", info.FullMethod, "took", time.Since(start).Round(time.Microsecond), "error", err)
		return nil, err
	}
}
