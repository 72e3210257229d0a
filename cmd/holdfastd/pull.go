package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
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
		return fmt.Errorf("%s (%s)", status.Convert(err).Message(), status.Code(err))
	}
	_, err = fmt.Println(resp.ImageRef)
	return err
}
