package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// Dial connects to addr from inside the namespace at path; "" is the node's.
// The host in addr is an IP address, or "localhost" for 127.0.0.1 and then ::1;
// other names are refused, because a resolver would not run inside. The
// connection belongs to the caller and may be used from any goroutine.
func Dial(ctx context.Context, path, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("cannot dial in a pod: %w", err)
	}
	hosts := []string{host}
	if host == "localhost" {
		hosts = []string{"127.0.0.1", "::1"}
	} else if _, err := netip.ParseAddr(host); err != nil {
		return nil, fmt.Errorf("cannot dial %s in a pod: not an IP address", addr)
	}

	var conn net.Conn
	err = OnThread(func() error {
		if err := Enter(path); err != nil {
			return err
		}
		var errs []error
		for _, h := range hosts {
			// For a literal address the socket is made by this goroutine, and
			// so on this thread.
			c, err := new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(h, port))
			if err == nil {
				conn = c
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot dial %s in %s: %w", addr, path, err)
	}
	return conn, nil
}
