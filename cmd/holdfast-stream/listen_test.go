package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// writePair writes a certificate with a number, and its key, as of a time.
func writePair(t *testing.T, dir string, number int64, modified time.Time) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must.Succeed(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(number),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	certDER, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	must.Succeed(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	must.Succeed(t, err)
	cert, key = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	write(t, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certDER}), modified)
	write(t, key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), modified)
	return cert, key
}

func write(t *testing.T, path string, b []byte, modified time.Time) {
	t.Helper()
	must.Succeed(t, os.WriteFile(path, b, 0o600))
	must.Succeed(t, os.Chtimes(path, modified, modified))
}

// A certificate that is renewed is served at once, half of one is not.
func TestCertificate(t *testing.T) {
	dir, start := t.TempDir(), time.Now().Add(-time.Hour)
	cert, key := writePair(t, dir, 1, start)
	config, err := tlsConfig(cert, key)
	must.Succeed(t, err)
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	must.Succeed(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.(*tls.Conn).Handshake()
			c.Close()
		}
	}()
	served := func(max uint16) int64 {
		c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true, MaxVersion: max})
		if err != nil {
			return 0
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	if n := served(tls.VersionTLS13); n != 1 {
		t.Errorf("certificate %d is served, want 1", n)
	}
	writePair(t, dir, 2, start.Add(time.Minute))
	if n := served(tls.VersionTLS12); n != 2 {
		t.Errorf("renewed: certificate %d is served, want 2", n)
	}
	write(t, key, []byte("half"), start.Add(2*time.Minute))
	if n := served(tls.VersionTLS13); n != 2 {
		t.Errorf("damaged: certificate %d is served, want 2", n)
	}
	if n := served(tls.VersionTLS11); n != 0 {
		t.Error("TLS 1.1 is spoken")
	}
	for _, bad := range [][2]string{{cert, ""}, {"", key}, {dir, dir}, {cert, dir + "/none"}} {
		if _, err := tlsConfig(bad[0], bad[1]); err == nil {
			t.Errorf("%q is a certificate with its key", bad)
		}
	}
}

func TestListen(t *testing.T) {
	first, err := listen("127.0.0.1:0", "")
	must.Succeed(t, err)
	_, port, _ := net.SplitHostPort(first.Addr().String())
	other, err := listen("127.0.0.1:0", port)
	if err != nil || other.Addr().String() == first.Addr().String() {
		t.Fatalf("a port that is taken: %v, %v", other.Addr(), err)
	}
	if os.Geteuid() == 0 &&
		(!reserved(first.Addr().(*net.TCPAddr).Port) || !reserved(other.Addr().(*net.TCPAddr).Port)) {
		t.Errorf("any user may listen on the ports of %s and %s", first.Addr(), other.Addr())
	}
	other.Close()
	first.Close()
	again, err := listen("127.0.0.1:0", port)
	if err != nil || again.Addr().String() != first.Addr().String() {
		t.Errorf("the last port: %v, %v", again.Addr(), err)
	}
	defer again.Close()
	if _, err := listen(again.Addr().String(), ""); err == nil {
		t.Error("a port that was asked for and is taken is replaced")
	}
	for from, want := range map[string]string{
		"0.0.0.0:1":   "127.0.0.1:1",
		"[::]:2":      "[::1]:2",
		"127.0.0.1:3": "127.0.0.1:3",
		"[fd00::1]:4": "[fd00::1]:4",
	} {
		a, err := net.ResolveTCPAddr("tcp", from)
		must.Succeed(t, err)
		if got := reachable(a); got != want {
			t.Errorf("%s is reached at %s, want %s", from, got, want)
		}
	}
}
