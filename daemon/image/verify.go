package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-cri/holdfast/reaper/group"
)

// maxVerdict bounds what is kept of a verifier's output, in bytes.
const maxVerdict = 32 << 10

// verify asks every program of Options.VerifierDir whether the image may come
// in, in the way that containerd's image verifiers are called:
//
//	PROGRAM -name NAME -digest DIGEST -stdin-media-type application/vnd.oci.descriptor.v1+json
//
// with the descriptor of what the name stands for on stdin. Exit code 0 lets it
// in, another one does not, and stdout says why, or else stderr. A program that
// cannot be run, or takes too long, does not let it in either. With no program in
// the directory, all images may come in; without the directory, none.
func (s *Store) verify(ctx context.Context, name string, target ocispec.Descriptor) error {
	if s.o.VerifierDir == "" {
		return nil
	}
	programs, err := os.ReadDir(s.o.VerifierDir)
	if err != nil {
		return fmt.Errorf("%w: cannot find the image verifiers: %w", ErrRejected, err)
	}
	stdin, err := json.Marshal(target)
	if err != nil {
		return err
	}
	for _, p := range programs {
		said, err := s.runVerifier(ctx, filepath.Join(s.o.VerifierDir, p.Name()), name, target.Digest, stdin)
		if err != nil {
			return err
		}
		s.o.Log.Info("image verified", "image", name, "digest", target.Digest, "verifier", p.Name(), "said", said)
	}
	return nil
}

// runVerifier gives what the program said if it lets the image in.
func (s *Store) runVerifier(ctx context.Context, program, name string, d digest.Digest, stdin []byte) (string, error) {
	limit, cancel := context.WithTimeout(ctx, s.o.VerifierTimeout)
	defer cancel()
	cmd := exec.Command(program, "-name", name, "-digest", d.String(), "-stdin-media-type", ocispec.MediaTypeDescriptor)
	stdout, stderr := group.Head{Max: maxVerdict}, group.Head{Max: maxVerdict}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	cmd.WaitDelay = time.Second // for what has left its group and keeps its pipes
	err := group.Run(limit, cmd, nil, group.Kill)
	said, reasons := strings.TrimSpace(string(stdout.Bytes())), strings.TrimSpace(string(stderr.Bytes()))
	if reasons != "" {
		s.o.Log.Debug("image verifier", "verifier", program, "image", name, "stderr", reasons)
	}
	if said == "" && err != nil {
		said = reasons
	}
	exit, exited := errors.AsType[*exec.ExitError](err)
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case limit.Err() != nil:
		return "", fmt.Errorf("%w: verifier %s gave no answer in %s", ErrRejected, program, s.o.VerifierTimeout)
	case exited && exit.Exited():
		return "", fmt.Errorf("%w: by verifier %s (exit code %d): %s", ErrRejected, program, exit.ExitCode(), said)
	case err != nil && !errors.Is(err, exec.ErrWaitDelay): // it ended well, something it left behind did not
		return "", fmt.Errorf("%w: cannot run verifier %s: %w", ErrRejected, program, err)
	}
	return said, nil
}
