package nri

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// socketFree says whether plugins may connect: there is a socket in the config, and no
// other process listens there, as another runtime of this node may.
func (n *Plugins[P, C]) socketFree() bool {
	if n.o.Socket == "" {
		return false
	}
	c, err := net.Dial("unix", n.o.Socket) // does not block
	switch {
	case err == nil:
		c.Close()
	case !errors.Is(err, unix.EAGAIN): // which is that the other process takes none now: it may be stopped
		return true
	}
	n.o.Log.Warn("another process serves NRI plugins: none can connect here; set socket_path in [nri] to another path",
		"socket", n.o.Socket)
	n.o.Socket = ""
	return false
}

// makeSocketDir makes the directory of the socket. The library removes what is in the
// place of the socket: it has to be one.
func (n *Plugins[P, C]) makeSocketDir() error {
	if n.o.Socket == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(n.o.Socket), 0o700); err != nil {
		return fmt.Errorf("cannot make the directory of the socket of NRI plugins: %w", err)
	}
	st, err := os.Lstat(n.o.Socket)
	if err == nil && st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("cannot listen for NRI plugins: %s is no socket; remove it, or set socket_path in [nri]",
			n.o.Socket)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot listen for NRI plugins: %w", err)
	}
	return nil
}

// closeSocket leaves the socket to root. Nobody else could connect before: that takes
// the right to write.
func (n *Plugins[P, C]) closeSocket() error {
	if n.o.Socket == "" {
		return nil
	}
	if err := os.Chmod(n.o.Socket, 0o600); err != nil {
		return fmt.Errorf("cannot close the socket of NRI plugins to others: %w", err)
	}
	return nil
}
