package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// pull is `holdfastd pull --address SOCKET`: it hands the PullImageRequest that
// it reads from stdin, as JSON, to a running daemon and prints the image's id.
// It serves holdfastctl, which would be twice as large with gRPC in it; stdin,
// because arguments can be read by everybody and credentials may not.
func pull(args []string) error {
	flags := flag.NewFlagSet("holdfastd pull", flag.ContinueOnError)
	address := flags.String("address", defaults().Address, "`socket` of the CRI")
	if err := flags.Parse(args); err != nil {
		return err
	}
	b, err := io.ReadAll(io.LimitReader(os.Stdin, 1<<20))
	if err != nil {
		return fmt.Errorf("cannot read the request: %w", err)
	}
	var req runtimeapi.PullImageRequest
	if err := protojson.Unmarshal(b, &req); err != nil {
		return fmt.Errorf("cannot read the request: %w", err)
	}
	if err := probe(*address); err != nil {
		return fmt.Errorf("cannot pull %s: %w", req.GetImage().GetImage(), err)
	}
	// The daemon ends the pull when this process goes.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	conn, err := grpc.NewClient("unix://"+*address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("cannot reach the daemon at %s: %w", *address, err)
	}
	defer conn.Close()
	resp, err := runtimeapi.NewImageServiceClient(conn).PullImage(ctx, &req)
	if err != nil {
		return pullError(req.GetImage().GetImage(), err)
	}
	_, err = fmt.Println(resp.ImageRef)
	return err
}

// probe says in a person's words why the daemon cannot be reached.
func probe(address string) error {
	c, err := net.Dial("unix", address)
	switch {
	case err == nil:
		return c.Close()
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("this needs root: %w", err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("the daemon does not run, or listens elsewhere: %w", err)
	}
	return err
}

// pullError is what the daemon answered, without what is for the kubelet. A
// registry that is not available is told apart from a daemon that has gone.
func pullError(image string, err error) error {
	s := status.Convert(err)
	text, registry := strings.CutPrefix(s.Message(), crierrors.ErrRegistryUnavailable.Error()+": ")
	if s.Code() == codes.Unavailable && !registry {
		return fmt.Errorf("cannot pull %s: the daemon has ended meanwhile; pull again once it is back, what has come so far is kept: %s", image, text)
	}
	text = strings.TrimPrefix(text, crierrors.ErrSignatureValidationFailed.Error()+": ")
	text = strings.TrimPrefix(text, "image.image: ") // the field of the request
	if !strings.HasPrefix(text, "cannot pull ") {
		text = fmt.Sprintf("cannot pull %s: %s", image, text)
	}
	if s.Code() == codes.Unknown { // it says nothing
		return errors.New(text)
	}
	return fmt.Errorf("%s (%s)", text, s.Code())
}
