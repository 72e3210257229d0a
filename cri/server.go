// Package cri answers the kubelet: it calls the daemon's parts with the messages of
// the CRI. One interceptor checks what every request must have, turns errors into
// gRPC codes, and counts. Whatever is not answered yet says Unimplemented and names
// itself.
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
	g := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(answer(log, d.Config().Metrics)))
	runtimeapi.RegisterRuntimeServiceServer(g, s)
	runtimeapi.RegisterImageServiceServer(g, s)
	return g
}

// answer is what all calls go through: a request is checked, its handler called,
// an error given its code, and the call counted. What failed is written down; what
// works and changes something is logged where it happens.
func answer(log *slog.Logger, m *metrics.Metrics) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		start := time.Now()
		err := check(req)
		var resp any
		if err == nil {
			resp, err = handle(ctx, req)
		}
		err = toStatus(info.FullMethod, err)
		took := time.Since(start)
		m.Called(path.Base(info.FullMethod), status.Code(err).String(), took)
		if err == nil {
			log.Debug("answered", "method", info.FullMethod, "took", took.Round(time.Microsecond))
			return resp, nil
		}
		log.Log(ctx, level(info.FullMethod, status.Code(err)), "call failed",
			"method", info.FullMethod,
			"took", took.Round(time.Microsecond),
			"error", err)
		return nil, err
	}
}

// level says how much an operator wants to know of a call that failed.
func level(method string, code codes.Code) slog.Level {
	switch {
	case code == codes.NotFound, code == codes.Unimplemented, code == codes.Canceled,
		// The image store tells about a pull that failed, once its name is one.
		method == pullImage && code != codes.InvalidArgument:
		return slog.LevelDebug
	}
	return slog.LevelWarn
}
