package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

// frontProxy is who the API server is towards servers that serve a part of the API.
const frontProxy = "front-proxy"

// makeKeys writes the keys and certificates of a cluster: NAME.key and NAME.crt.
func makeKeys(dir string) error {
	ca := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "ca"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	caKey, err := makeKey(dir, ca, ca, nil)
	if err != nil {
		return err
	}
	for _, cert := range []*x509.Certificate{
		{
			Subject:     pkix.Name{CommonName: "apiserver"},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			DNSNames:    []string{"localhost", "kubernetes.default.svc"},
			IPAddresses: []net.IP{net.ParseIP("127.0.0.1"), net.ParseIP(machine.NodeIP)},
		},
		{Subject: pkix.Name{CommonName: frontProxy}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}},
		{Subject: pkix.Name{CommonName: "accounts"}}, // signs the tokens of service accounts
	} {
		if _, err := makeKey(dir, cert, ca, caKey); err != nil {
			return err
		}
	}
	return nil
}

// makeKey makes a key and its certificate, signed by the parent, or by itself if that
// has no key.
func makeKey(dir string, cert, parent *x509.Certificate, signer crypto.Signer) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if signer == nil {
		signer = key
	}
	if cert.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		return nil, err
	}
	cert.NotBefore, cert.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	signed, err := x509.CreateCertificate(rand.Reader, cert, parent, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	encoded, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, cert.Subject.CommonName)
	for end, block := range map[string]*pem.Block{
		".crt": {Type: "CERTIFICATE", Bytes: signed},
		".key": {Type: "EC PRIVATE KEY", Bytes: encoded},
	} {
		if err := os.WriteFile(path+end, pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
	}
	return key, nil
}
