package checkpoint

import (
	"encoding/binary"
	"errors"
	"io"
	"path"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// CRIU writes the names of a host and the objects of System V IPC that it has saved into the
// namespaces that a container joins, and those are the pod's. So the name is made the pod's
// own before, and of several containers of a pod only one has the objects.

const (
	maxNames   = 4096 // bytes of an image with the names of a host
	magicSize  = 8    // of all images
	nodeField  = 1    // the number of nodename in utsns_entry
	utsPrefix  = "utsns-"
	ipcShared  = "ipcns-shm-"
	ipcQueues  = "ipcns-msg-"
	ipcCounter = "ipcns-sem-"
)

// isIPC says whether a file that CRIU has saved is of objects of System V IPC.
func isIPC(name string) bool {
	base := path.Base(name)
	return strings.HasPrefix(base, ipcShared) || strings.HasPrefix(base, ipcQueues) ||
		strings.HasPrefix(base, ipcCounter)
}

// putNames is put for the names of a host.
func (s *Source) putNames(to, hostname string, size int64, r io.Reader) error {
	if size > maxNames {
		return s.bad("%.200q is larger than %d bytes", path.Base(to), maxNames)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return s.bad("%w", err)
	}
	if b, err = withHostname(b, hostname); err != nil {
		return s.bad("%.200q: %w", path.Base(to), err)
	}
	f, err := s.create(to)
	if err == nil {
		_, err = f.Write(b)
		err = errors.Join(err, f.Close())
	}
	return err
}

// withHostname replaces the name in an image of CRIU: magic numbers, the length of a message
// (utsns_entry), the message.
func withHostname(b []byte, hostname string) ([]byte, error) {
	if len(b) < magicSize+4 || int64(binary.LittleEndian.Uint32(b[magicSize:])) != int64(len(b)-magicSize-4) {
		return nil, io.ErrUnexpectedEOF
	}
	message := protowire.AppendTag(nil, nodeField, protowire.BytesType)
	message = protowire.AppendString(message, hostname)
	for rest := b[magicSize+4:]; len(rest) > 0; {
		number, _, n := protowire.ConsumeField(rest)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		if number != nodeField {
			message = append(message, rest[:n]...)
		}
		rest = rest[n:]
	}
	out := append([]byte{}, b[:magicSize]...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(message)))
	return append(out, message...), nil
}
