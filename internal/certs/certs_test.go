package certs_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/certs"
)

// logged is a log that a test can look into.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// take returns the lines with a level, and forgets all.
func (l *logged) take(level string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var lines []string
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, "level="+level) {
			lines = append(lines, line)
		}
	}
	l.text.Reset()
	return lines
}

func (l *logged) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// site is a directory with certificates, and a server that uses them.
type site struct {
	t       *testing.T
	dir     string
	files   certs.Files
	log     *logged
	certs   *certs.Certs
	address string
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write writes files, as names and contents.
func (s *site) write(pairs ...any) {
	s.t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		check(s.t, os.WriteFile(filepath.Join(s.dir, pairs[i].(string)), pairs[i+1].([]byte), 0o600))
	}
}

// serve starts a server that answers with the name of the client's certificate.
func (s *site) serve() {
	s.t.Helper()
	var err error
	s.certs, err = certs.Load(s.files, s.log.logger())
	check(s.t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(s.t, err)
	s.address = listener.Addr().String()
	var serving sync.WaitGroup
	s.t.Cleanup(serving.Wait)
	s.t.Cleanup(func() { listener.Close() })
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				conn := tls.Server(conn, s.certs.Config())
				defer conn.Close()
				if conn.Handshake() != nil {
					return
				}
				name := "nobody"
				if chains := conn.ConnectionState().VerifiedChains; len(chains) > 0 {
					name = chains[0][0].Subject.CommonName
				}
				io.WriteString(conn, name)
			})
		}
	})
}

// newSite returns a site with a certificate for "first", which is not served yet. No file looks as if it
// had been written just now.
func newSite(t *testing.T, authority *cachetest.Authority) *site {
	s := &site{t: t, dir: t.TempDir(), log: &logged{}}
	s.files = certs.Files{Cert: filepath.Join(s.dir, "cert.pem"), Key: filepath.Join(s.dir, "key.pem")}
	authority.Write(t, s.dir, "first")
	s.settle()
	return s
}

func (s *site) settle() { settle(s.t, s.dir) }

// settle makes all files in a directory a minute old.
func settle(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	check(t, err)
	old := time.Now().Add(-time.Minute)
	for _, entry := range entries {
		check(t, os.Chtimes(filepath.Join(dir, entry.Name()), old, old))
	}
}

// dial makes a handshake, and returns whose certificate the server has and whom the server sees.
func (s *site) dial(config *tls.Config) (server, client string, err error) {
	conn, err := tls.Dial("tcp", s.address, config)
	if err != nil {
		return "", "", err
	}
	defer conn.Close()
	text, err := io.ReadAll(conn)
	return conn.ConnectionState().PeerCertificates[0].Subject.CommonName, string(text), err
}

// serves checks whose certificate the server has now.
func (s *site) serves(authority *cachetest.Authority, want string) {
	s.t.Helper()
	if server, _, err := s.dial(&tls.Config{RootCAs: authority.Pool()}); server != want || err != nil {
		s.t.Errorf("the handshake is made with the certificate of %q, %v; want %q", server, err, want)
	}
}

// TestReload replaces certificates in all the ways in which they are, and looks at the next handshake.
func TestReload(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	second, secondKey := authority.Issue("other", nil)
	for name, replace := range map[string]func(s *site){
		"written over": func(s *site) { s.write("cert.pem", second, "key.pem", secondKey) },
		"renamed": func(s *site) {
			s.write("new-cert.pem", second, "new-key.pem", secondKey)
			s.settle() // older than what they replace
			check(s.t, os.Rename(filepath.Join(s.dir, "new-cert.pem"), s.files.Cert))
			check(s.t, os.Rename(filepath.Join(s.dir, "new-key.pem"), s.files.Key))
		},
		"gone in between": func(s *site) {
			check(s.t, os.Remove(s.files.Cert))
			s.serves(authority, "first")
			check(s.t, os.Remove(s.files.Key))
			s.serves(authority, "first")
			s.write("cert.pem", second, "key.pem", secondKey)
		},
		"written with another's time": func(s *site) {
			stat, err := os.Stat(s.files.Cert)
			check(s.t, err)
			s.write("cert.pem", append(second, '\n'), "key.pem", append(secondKey, '\n'))
			check(s.t, os.Chtimes(s.files.Cert, stat.ModTime(), stat.ModTime()))
			check(s.t, os.Chtimes(s.files.Key, stat.ModTime(), stat.ModTime()))
		},
		"of the same size and time": func(s *site) {
			for file, text := range map[string][]byte{"cert.pem": second, "key.pem": secondKey} {
				path := filepath.Join(s.dir, file)
				stat, err := os.Stat(path)
				check(s.t, err)
				check(s.t, os.WriteFile(path+".new", append(bytes.Clone(text), bytes.Repeat([]byte("\n"), int(stat.Size())-len(text))...), 0o600))
				check(s.t, os.Chtimes(path+".new", stat.ModTime(), stat.ModTime()))
				check(s.t, os.Rename(path+".new", path))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, authority)
			for _, file := range []string{"cert.pem", "key.pem"} { // with room for a larger one
				text, err := os.ReadFile(filepath.Join(s.dir, file))
				check(t, err)
				s.write(file, append(bytes.Clone(text), bytes.Repeat([]byte("\n"), 100)...))
			}
			s.settle()
			s.serve()
			s.serves(authority, "first")
			s.log.take("")
			replace(s)
			for range 3 {
				s.serves(authority, "other")
			}
			if lines := s.log.take("INFO"); len(lines) != 1 || !strings.Contains(lines[0], "loaded the certificate") {
				t.Errorf("logged %q; want one line", lines)
			}
		})
	}

	// As Kubernetes does it: the files are links through ..data, which is a link to a directory of a version.
	t.Run("a link to the directory", func(t *testing.T) {
		s := newSite(t, authority)
		for version, name := range map[string]string{"..v1": "first", "..v2": "other"} {
			check(t, os.Mkdir(filepath.Join(s.dir, version), 0o700))
			authority.Write(t, filepath.Join(s.dir, version), name)
			settle(t, filepath.Join(s.dir, version))
		}
		check(t, os.Symlink("..v1", filepath.Join(s.dir, "..data")))
		for _, file := range []string{"cert.pem", "key.pem"} {
			check(t, os.Remove(filepath.Join(s.dir, file)))
			check(t, os.Symlink(filepath.Join("..data", file), filepath.Join(s.dir, file)))
		}
		s.serve()
		s.serves(authority, "first")
		check(t, os.Symlink("..v2", filepath.Join(s.dir, "..data_tmp")))
		check(t, os.Rename(filepath.Join(s.dir, "..data_tmp"), filepath.Join(s.dir, "..data")))
		check(t, os.RemoveAll(filepath.Join(s.dir, "..v1")))
		s.serves(authority, "other")
		if lines := s.log.take("ERROR"); len(lines) > 0 {
			t.Errorf("logged %q", lines)
		}
	})

	// As certbot does it: each file is a link into a directory with all versions.
	t.Run("links to the files", func(t *testing.T) {
		s := newSite(t, authority)
		archive := t.TempDir()
		for version, name := range map[string]string{"1": "first", "2": "other"} {
			check(t, os.Mkdir(filepath.Join(archive, version), 0o700))
			authority.Write(t, filepath.Join(archive, version), name)
			settle(t, filepath.Join(archive, version))
		}
		link := func(version string) {
			for _, file := range []string{"cert.pem", "key.pem"} {
				check(t, os.Remove(filepath.Join(s.dir, file)))
				check(t, os.Symlink(filepath.Join(archive, version, file), filepath.Join(s.dir, file)))
			}
		}
		link("1")
		s.serve()
		s.serves(authority, "first")
		link("2")
		s.serves(authority, "other")
	})

	// Written over twice within a step in which the file system counts time.
	t.Run("at once", func(t *testing.T) {
		s := newSite(t, authority)
		step := time.Now().Add(time.Hour) // so that it has not passed, however slow this machine is
		for i := range 10 {
			name := fmt.Sprintf("name%02d", i)
			cert, key := authority.Issue(name, nil)
			for file, text := range map[string][]byte{"cert.pem": cert, "key.pem": key} {
				s.write(file, append(text, bytes.Repeat([]byte("\n"), 2000-len(text))...))
				check(t, os.Chtimes(filepath.Join(s.dir, file), step, step))
			}
			if i == 0 {
				s.serve()
			}
			s.serves(authority, name)
		}
	})
}

// TestWrongFiles has files that are wrong: at start that is an error, later what was loaded before stays and
// one error is logged, until they are right again.
func TestWrongFiles(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	cert, key := authority.Issue("other", nil)
	_, otherKey := authority.Issue("third", nil)
	garbled := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("no certificate")})
	const notPair = "DIR/cert.pem and DIR/key.pem are not a certificate and its private key in PEM: tls: "
	for _, test := range []struct {
		name      string
		cert, key []byte // nil means none
		ca        []byte
		want      string
	}{
		{"another's key", cert, otherKey, authority.PEM(), notPair + "private key does not match public key"},
		{"no certificate", nil, key, authority.PEM(), "open DIR/cert.pem: no such file or directory"},
		{"no key", cert, nil, authority.PEM(), "open DIR/key.pem: no such file or directory"},
		{"an empty certificate", []byte{}, key, authority.PEM(), notPair + "failed to find any PEM data in certificate input"},
		{"an empty key", cert, []byte{}, authority.PEM(), notPair + "failed to find any PEM data in key input"},
		{"both the other way round", key, cert, authority.PEM(), notPair + "failed to find certificate PEM data in certificate input, but did find a private key; PEM inputs may have been switched"},
		{"half a certificate", cert[:len(cert)/2], key, authority.PEM(), "DIR/cert.pem is cut short or garbled: something in it begins with -----BEGIN and does not end as it must"},
		{"half a key", cert, key[:len(key)/2], authority.PEM(), "DIR/key.pem is cut short or garbled: something in it begins with -----BEGIN and does not end as it must"},
		{"half a chain", append(bytes.Clone(cert), authority.PEM()[:100]...), key, authority.PEM(), "DIR/cert.pem is cut short or garbled: something in it begins with -----BEGIN and does not end as it must"},
		{"a garbled chain", append(bytes.Clone(cert), garbled...), key, authority.PEM(), "a certificate in DIR/cert.pem can't be understood: x509: malformed certificate"},
		{"a large file", make([]byte, 4<<20+1), key, authority.PEM(), "DIR/cert.pem is larger than 4194304 bytes: is it the right file?"},
		{"no authority", cert, key, nil, "open DIR/ca.pem: no such file or directory"},
		{"an empty authority", cert, key, []byte{}, "DIR/ca.pem has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----"},
		{"a key for an authority", cert, key, key, "DIR/ca.pem has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----"},
		{"half of the authorities", cert, key, append(authority.PEM(), authority.PEM()[:100]...), "DIR/ca.pem is cut short or garbled: something in it begins with -----BEGIN and does not end as it must"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newSite(t, authority)
			s.files.ClientCA = filepath.Join(s.dir, "ca.pem")
			s.serve()
			s.log.take("")
			want := strings.ReplaceAll(test.want, "DIR", s.dir)
			for file, text := range map[string][]byte{"cert.pem": test.cert, "key.pem": test.key, "ca.pem": test.ca} {
				check(t, os.Remove(filepath.Join(s.dir, file)))
				if text != nil {
					s.write(file, text)
				}
			}
			if _, err := certs.Load(s.files, slog.Default()); err == nil || err.Error() != want {
				t.Errorf("at start the error is %v; want %s", err, want)
			}
			for range 3 {
				s.serves(authority, "first")
			}
			for range 3 { // when nobody expects more changes
				if test.cert != nil && test.key != nil && test.ca != nil {
					s.settle()
				}
				s.serves(authority, "first")
			}
			if lines := s.log.take("ERROR"); len(lines) != 1 || !strings.Contains(lines[0], strings.ReplaceAll(want, `"`, `\"`)) || !strings.Contains(lines[0], "correct the files") {
				t.Errorf("logged %q; want one line with %s", lines, want)
			}
			s.certs.Reload()
			if lines := s.log.take("ERROR"); len(lines) != 1 {
				t.Errorf("who asks for it is told %q; want one line", lines)
			}
			s.write("cert.pem", cert, "key.pem", key, "ca.pem", authority.PEM())
			s.serves(authority, "other")
			if lines := s.log.take("INFO"); len(lines) != 1 {
				t.Errorf("logged %q; want one line", lines)
			}
		})
	}
}

// TestReloadOnDemand proves that who asks for a reload is told what came of it.
func TestReloadOnDemand(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	s := newSite(t, authority)
	s.serve()
	s.log.take("")
	s.certs.Reload()
	if lines := s.log.take("INFO"); len(lines) != 1 || !strings.Contains(lines[0], "have not changed") {
		t.Errorf("logged %q", lines)
	}
	authority.Write(t, s.dir, "second")
	s.certs.Reload()
	if lines := s.log.take("INFO"); len(lines) != 1 || !strings.Contains(lines[0], `names="[localhost 127.0.0.1]"`) {
		t.Errorf("logged %q", lines)
	}
	s.serves(authority, "second")
}

// TestExpired proves that a certificate which has expired is warned of.
func TestExpired(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	s := newSite(t, authority)
	cert, key := authority.Issue("old", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })
	s.write("cert.pem", cert, "key.pem", key)
	s.serve()
	if lines := s.log.take("WARN"); len(lines) != 1 || !strings.Contains(lines[0], "has expired, so clients refuse it: renew it") {
		t.Errorf("logged %q", lines)
	}
}

// TestClientCertificates proves that clients may have a certificate, but none that is not valid, and that
// it must be valid by what is in the file now, even where the client goes on with an earlier session.
func TestClientCertificates(t *testing.T) {
	authority, other := cachetest.NewAuthority("authority"), cachetest.NewAuthority("other")
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) }
	forServers := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			s := newSite(t, authority)
			s.files.ClientCA = filepath.Join(s.dir, "ca.pem")
			s.serve()
			config := func(pairs ...tls.Certificate) *tls.Config {
				return &tls.Config{
					RootCAs: authority.Pool(), Certificates: pairs, MaxVersion: version,
					GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { // whatever the server asks for
						if len(pairs) > 0 {
							return &pairs[0], nil
						}
						return &tls.Certificate{}, nil
					},
					ClientSessionCache: tls.NewLRUClientSessionCache(10),
				}
			}
			alice := config(authority.Pair("alice", nil))
			for _, test := range []struct {
				name   string
				config *tls.Config
				want   string // "" means that the handshake fails
			}{
				{"none", config(), "nobody"},
				{"a valid one", alice, "alice"},
				{"once more", alice, "alice"},
				{"of another authority", config(other.Pair("mallory", nil)), ""},
				{"one that expired", config(authority.Pair("old", expired)), ""},
				{"one for servers", config(authority.Pair("server", forServers)), ""},
			} {
				if _, client, err := s.dial(test.config); client != test.want || (err != nil) != (test.want == "") {
					t.Errorf("%s: the server sees %q, %v; want %q", test.name, client, err, test.want)
				}
			}
			s.write("ca.pem", other.PEM())
			if _, client, err := s.dial(alice); err == nil {
				t.Errorf("the authority is not trusted any more, and the server sees %q", client)
			}
			if _, client, err := s.dial(config(other.Pair("bob", nil))); client != "bob" || err != nil {
				t.Errorf("the server sees %q, %v; want bob", client, err)
			}
		})
	}
}

// TestVersions proves that nothing older than TLS 1.2 is spoken, and which protocols there are.
func TestVersions(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	s := newSite(t, authority)
	s.serve()
	for version, want := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		if _, _, err := s.dial(&tls.Config{RootCAs: authority.Pool(), MinVersion: version, MaxVersion: version}); (err == nil) != want {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
	}
	for _, protocol := range []string{"h2", "http/1.1"} {
		conn, err := (&tls.Dialer{Config: &tls.Config{RootCAs: authority.Pool(), NextProtos: []string{protocol}}}).DialContext(context.Background(), "tcp", s.address)
		check(t, err)
		defer conn.Close()
		if got := conn.(*tls.Conn).ConnectionState().NegotiatedProtocol; got != protocol {
			t.Errorf("the protocol is %q; want %q", got, protocol)
		}
	}
}
