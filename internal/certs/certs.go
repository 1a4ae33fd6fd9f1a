// Package certs holds the certificates of a server that speaks TLS. It loads them from files, and again when
// the files change.
//
// Whether they changed is asked with each handshake, of stat(2), which follows symbolic links. So the next
// handshake has what is in the files, whichever way it came there: written over, renamed, or behind a link
// that was replaced, as Kubernetes, cert-manager and certbot do; and nothing has to watch directories, some
// of which tell nobody, or to come back from time to time. It takes some microseconds of a handshake's
// hundreds.
//
// Files are seldom replaced together, and may be read while they are written. What is wrong is never used:
// what was loaded before stays, and is replaced when the files have changed once more.
package certs

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	// maxFileSize is the most bytes of a file. Those of all authorities that a system trusts have some 250 KiB.
	maxFileSize = 4 << 20
	// settleTime is how old a change of a file must be until it is believed that the next one would have
	// another time. File systems count it in steps of up to two seconds.
	settleTime = 2 * time.Second
	// maxTries is how often the files are read if they change meanwhile.
	maxTries = 3
)

// Files are the paths of what a server needs to speak TLS.
type Files struct {
	// Cert has the server's certificate and those between it and an authority that clients trust, in this
	// order, in PEM.
	Cert string
	// Key has the private key of the certificate, in PEM. It may be the same file.
	Key string
	// ClientCA has the certificates of the authorities that issue those of clients, in PEM. If it is empty,
	// clients are not asked for certificates. Else they are asked for one but need not have one, and one that
	// is not valid fails the handshake.
	ClientCA string
}

// names returns the paths, in the order of what is read from them.
func (f Files) names() []string {
	if f.ClientCA == "" {
		return []string{f.Cert, f.Key}
	}
	return []string{f.Cert, f.Key, f.ClientCA}
}

// Certs are certificates that were loaded.
type Certs struct {
	files Files
	log   *slog.Logger

	mu      sync.Mutex
	seen    []stamp     // of the files when they were looked at last
	content [][]byte    // of the files when they were loaded
	config  *tls.Config // of that
	failed  string      // why they could not be loaded later, which was logged
}

// Load loads the certificates.
func Load(files Files, log *slog.Logger) (*Certs, error) {
	c := &Certs{files: files, log: log}
	if err := c.load(); err != nil {
		return nil, err
	}
	return c, nil
}

// Config returns how the server speaks TLS: version 1.2 and up, HTTP/2 and HTTP/1.1, with the certificates
// that are in the files at each handshake.
func (c *Certs) Config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: nextProtos,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.mayHaveChanged() {
				c.reload()
			}
			return c.config, nil
		},
	}
}

var nextProtos = []string{"h2", "http/1.1"}

// Reload looks into the files whether or not they look as if they had changed, and logs what comes of it.
func (c *Certs) Reload() {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.config
	c.failed = "" // to be told of it once more
	if c.reload() && c.config == before {
		c.log.Info("the certificate files have not changed", "cert", c.files.Cert)
	}
}

// reload loads the files, and says once if that fails.
func (c *Certs) reload() bool {
	err := c.load()
	if err == nil {
		c.failed = ""
		return true
	}
	if text := err.Error(); text != c.failed {
		c.failed = text
		c.log.Error("could not load the certificates again, so those that were loaded before stay in use: correct the files", "error", err)
	}
	return false
}

// load reads the files, and takes what is in them if it is sound. Where some of them were replaced before others
// were read, it begins anew.
func (c *Certs) load() error {
	err := c.loadOnce()
	for tries := 1; err != nil && tries < maxTries && c.changed(); tries++ {
		err = c.loadOnce()
	}
	return err
}

func (c *Certs) loadOnce() error {
	names := c.files.names()
	c.seen = make([]stamp, len(names))
	content := make([][]byte, len(names))
	var failed error // of the first
	for i, name := range names {
		c.seen[i] = stampOf(name) // before it is read, or a change meanwhile would not be noticed
		var err error
		if content[i], err = read(name); failed == nil {
			failed = err
		}
	}
	if failed != nil {
		return failed
	}
	if c.config != nil && slices.EqualFunc(content, c.content, bytes.Equal) {
		return nil
	}
	config, err := c.files.parse(content)
	if err != nil {
		return err
	}
	c.content, c.config = content, config
	leaf := config.Certificates[0].Leaf
	c.log.Info("loaded the certificate", "cert", c.files.Cert, "names", namesOf(leaf), "expires", leaf.NotAfter)
	if time.Now().After(leaf.NotAfter) {
		c.log.Warn("the certificate has expired, so clients refuse it: renew it", "cert", c.files.Cert, "expired", leaf.NotAfter)
	}
	return nil
}

// parse returns what is in the files as a server needs it.
func (f Files) parse(content [][]byte) (*tls.Config, error) {
	if err := checkPEM(f.Cert, content[0]); err != nil {
		return nil, err
	}
	if err := checkPEM(f.Key, content[1]); err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(content[0], content[1])
	if err != nil {
		return nil, notPair(f.Cert, f.Key, err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: nextProtos, Certificates: []tls.Certificate{pair}}
	if f.ClientCA == "" {
		return config, nil
	}
	config.ClientAuth = tls.VerifyClientCertIfGiven
	if config.ClientCAs, err = parsePool(f.ClientCA, content[2]); err != nil {
		return nil, err
	}
	return config, nil
}

// readPool reads the certificates of authorities from a file in PEM.
func readPool(name string) (*x509.CertPool, error) {
	text, err := read(name)
	if err != nil {
		return nil, err
	}
	return parsePool(name, text)
}

func parsePool(name string, text []byte) (*x509.CertPool, error) {
	if err := checkPEM(name, text); err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----", name)
	}
	return pool, nil
}

// checkPEM finds what a file that is not yet written to its end may have, and of which others make nothing: a
// part of a block, or a certificate that can't be understood.
func checkPEM(name string, text []byte) error {
	begun := bytes.Count(text, []byte("-----BEGIN "))
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		begun--
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return fmt.Errorf("a certificate in %s can't be understood: %w", name, err)
		}
	}
	if begun > 0 {
		return fmt.Errorf("%s is cut short or garbled: something in it begins with -----BEGIN and does not end as it must", name)
	}
	return nil
}

// read reads a file.
func read(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxFileSize+1))
	if err == nil && len(text) > maxFileSize {
		err = fmt.Errorf("%s is larger than %d bytes: is it the right file?", name, maxFileSize)
	}
	return text, err
}

// stamp is what tells a file from what it was before.
type stamp struct {
	info    os.FileInfo // nil if there was none
	settled bool        // another change would be seen
}

func stampOf(name string) stamp {
	info, err := os.Stat(name)
	if err != nil {
		return stamp{settled: true}
	}
	return stamp{info, time.Since(info.ModTime()) > settleTime}
}

// mayHaveChanged says whether the files may not be what they were when they were looked at last.
func (c *Certs) mayHaveChanged() bool {
	return slices.ContainsFunc(c.seen, func(s stamp) bool { return !s.settled }) || c.changed()
}

// changed says whether the files do not look as they did when they were looked at last.
func (c *Certs) changed() bool {
	for i, name := range c.files.names() {
		before, now := c.seen[i].info, stampOf(name).info
		if (before == nil) != (now == nil) {
			return true
		}
		if now != nil && (!os.SameFile(before, now) || !before.ModTime().Equal(now.ModTime()) || before.Size() != now.Size()) {
			return true
		}
	}
	return false
}

// namesOf returns the names that a certificate is for.
func namesOf(leaf *x509.Certificate) []string {
	names := append([]string{}, leaf.DNSNames...)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	return names
}
