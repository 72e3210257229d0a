// Package cri answers the kubelet: it calls the daemon's parts with the messages of
// the CRI. One interceptor checks what every request must have, turns errors into
// gRPC codes, and counts.
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

// maxMessage is the largest message that the kubelet sends. What is sent to it has no
// bound but the client's own: a list is as long as it is, and a client that takes in
// more than the usual gets it. Others have the streaming lists.
const maxMessage = 16 << 20

// Server is both services of the CRI.
type Server struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	d       *daemon.Daemon
	version string
}

// handshakeTimeout is what a client may take from its connection to the beginning of
// HTTP/2. A shutdown waits for that, whatever else it gives up.
const handshakeTimeout = 5 * time.Second

// NewServer makes a gRPC server that answers from d.
func NewServer(d *daemon.Daemon, version string, log *slog.Logger) *grpc.Server {
	s := &Server{d: d, version: version}
	g := grpc.NewServer(
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.ForceServerCodecV2(newCodec(d.Containers.Room)),
		grpc.UnaryInterceptor(answer(log, d.Config().Metrics)),
		grpc.StreamInterceptor(stream(log, d.Config().Metrics)))
	runtimeapi.RegisterRuntimeServiceServer(g, s)
	runtimeapi.RegisterImageServiceServer(g, s)
	return g
}

// answer is what all unary calls go through: a request is checked, its handler
// called, an error given its code, and the call counted. What failed is written down;
// what works and changes something is logged where it happens.
func answer(log *slog.Logger, m *metrics.Metrics) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		start := time.Now()
		err := check(req)
		var resp any
		if err == nil {
			resp, err = handle(ctx, req)
		}
		if err = answered(ctx, log, m, info.FullMethod, start, err); err != nil {
			return nil, err
		}
		return resp, nil
	}
}

// stream is the same for calls that are answered in parts. Nothing in their requests
// has to be checked.
func stream(log *slog.Logger, m *metrics.Metrics) grpc.StreamServerInterceptor {
	return func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
		start := time.Now()
		return answered(s.Context(), log, m, info.FullMethod, start, handle(srv, s))
	}
}

// answered counts a call, writes down what failed, and gives the error its code.
func answered(ctx context.Context, log *slog.Logger, m *metrics.Metrics, method string, start time.Time,
	err error) error {
	err = toStatus(method, err)
	took := time.Since(start)
	m.Called(path.Base(method), status.Code(err).String(), took)
	if err == nil {
		log.Debug("answered", "method", method, "took", took.Round(time.Microsecond))
		return nil
	}
	log.Log(ctx, level(method, status.Code(err)), "call failed",
		"method", method,
		"took", took.Round(time.Microsecond),
		"error", err)
	return err
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
