package certs

import (
	"crypto/tls"
	"fmt"
)

// ClientFiles are the paths of what a client needs to speak TLS beside what the system has. Each may be empty.
type ClientFiles struct {
	// CA has the certificates of the authorities that servers are trusted for, in PEM, in place of those that
	// the system trusts.
	CA string
	// Cert has the client's certificate and those between it and an authority, in this order, in PEM.
	Cert string
	// Key has the private key of the certificate, in PEM.
	Key string
}

// Config loads the files.
func (f ClientFiles) Config() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.CA != "" {
		pool, err := readPool(f.CA)
		if err != nil {
			return nil, err
		}
		config.RootCAs = pool
	}
	if f.Cert != "" {
		pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			return nil, notPair(f.Cert, f.Key, err)
		}
		// Among Certificates crypto/tls looks for one whose authority the server says it knows, and shows
		// none if there is none, and nobody learns why the server does not know the client.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return config, nil
}

func notPair(cert, key string, err error) error {
	return fmt.Errorf("%s and %s are not a certificate and its private key in PEM: %w", cert, key, err)
}
