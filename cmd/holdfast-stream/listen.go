package main

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"time"
)

// Ports that are assigned to nobody and that only root may listen on, first and last.
// Whoever takes the port of a holdfast-stream that was killed is sent tokens which have not
// been used yet.
const firstPort, lastPort = 954, 988

// reserved says whether only root may listen on a port.
func reserved(port int) bool {
	first := 1024
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil {
		fmt.Sscan(string(b), &first)
	}
	return port < first
}

// listen listens at an address. Where it leaves the port open, it is the last one that
// was used, if that is free: addresses that were given out stay valid. Else it is one
// that is reserved for root, or any, if none of these is free.
func listen(address, last string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("--address: %w", err)
	}
	if port == "0" && last != "" {
		if l, err := net.Listen("tcp", net.JoinHostPort(host, last)); err == nil {
			return l, nil
		}
	}
	for _, i := range rand.Perm(lastPort - firstPort + 1) {
		if port != "0" || !reserved(firstPort+i) {
			break
		}
		if l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(firstPort+i))); err == nil {
			return l, nil
		}
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("cannot listen for sessions: %w", err)
	}
	return l, nil
}

// reachable is an address at which a client of this node reaches one at which a server
// listens.
func reachable(a net.Addr) string {
	tcp := *a.(*net.TCPAddr)
	switch {
	case !tcp.IP.IsUnspecified():
	case tcp.IP.To4() != nil:
		tcp.IP = net.IPv4(127, 0, 0, 1)
	default:
		tcp.IP = net.IPv6loopback
	}
	return tcp.String()
}

// keyPair is a certificate with its key. Whoever renews it replaces two files, one
// after the other.
type keyPair struct {
	cert, key string

	mu       sync.Mutex
	loaded   *tls.Certificate
	modified [2]time.Time // of the files it was loaded from
}

// tlsConfig serves a certificate from files, always as they are now.
func tlsConfig(cert, key string) (*tls.Config, error) {
	if cert == "" || key == "" {
		return nil, fmt.Errorf("--tls-cert %q and --tls-key %q: TLS needs both", cert, key)
	}
	p := &keyPair{cert: cert, key: key}
	if err := p.loadLocked(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.current(), nil },
	}, nil
}

// current gives the certificate. While the files are not a pair it stays as it was.
func (p *keyPair) current() *tls.Certificate {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.loadLocked(); err != nil {
		slog.Warn("the certificate stays as it was", "error", err)
	}
	return p.loaded
}

// loadLocked loads the files if they have changed. The lock is not needed before there
// is a server.
func (p *keyPair) loadLocked() error {
	var modified [2]time.Time
	for i, path := range []string{p.cert, p.key} {
		st, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("cannot look at a file for TLS: %w", err)
		}
		if !st.Mode().IsRegular() {
			return fmt.Errorf("%s is not a file", path)
		}
		modified[i] = st.ModTime()
	}
	if modified == p.modified {
		return nil
	}
	loaded, err := tls.LoadX509KeyPair(p.cert, p.key)
	if err != nil {
		return fmt.Errorf("cannot load the certificate %s with the key %s: %w", p.cert, p.key, err)
	}
	p.loaded, p.modified = &loaded, modified
	return nil
}
