package proto

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// A message of ttrpc holds 4 MiB. A request that may be larger, because a user's
// environment or command is in it, goes through a memory file of the caller instead,
// and the message names that.
const (
	maxMessage = 2 << 20
	maxPayload = 64 << 20
)

// Pack puts a request that is too large for a message into a memory file, which the
// caller closes after the call. It is nil for any other request.
func Pack(req proto.Message) (*os.File, error) {
	if proto.Size(req) <= maxMessage {
		return nil, nil
	}
	b, err := proto.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("cannot encode %T: %w", req, err)
	}
	if len(b) > maxPayload {
		return nil, fmt.Errorf("cannot send %T: it has %d bytes, more than %d", req, len(b), maxPayload)
	}
	fd, err := unix.MemfdCreate("request", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make a file for %T: %w", req, err)
	}
	f := os.NewFile(uintptr(fd), "request")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot write %T to a file: %w", req, err)
	}
	return f, nil
}

// Unpack reads into a request what Pack has put into the file that the request names. It does
// nothing to one that names none.
func Unpack(req any) error {
	m, ok := req.(interface {
		proto.Message
		GetPayloadPath() string
	})
	if !ok || m.GetPayloadPath() == "" {
		return nil
	}
	path := m.GetPayloadPath()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("cannot open payload_path: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Size() > maxPayload) {
		err = fmt.Errorf("it is no file of at most %d bytes", maxPayload)
	}
	var b []byte
	if err == nil {
		b, err = io.ReadAll(io.NewSectionReader(f, 0, st.Size()))
	}
	if err == nil && int64(len(b)) != st.Size() {
		err = errors.New("it was cut while it was read")
	}
	if err == nil {
		err = proto.Unmarshal(b, m)
	}
	if err != nil {
		return fmt.Errorf("cannot read payload_path %s: %w", path, err)
	}
	return nil
}
