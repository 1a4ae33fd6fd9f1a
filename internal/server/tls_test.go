package server_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/certs"
	"github.com/polykit/polykit-cache/internal/server"
)

const notTLS = `{"error":"This is a server for TLS: use https:// in its URL"}`

// seeingStore is a store that sees whom a request or call comes from.
type seeingStore struct {
	cache.Store
	mu   sync.Mutex
	seen []string
}

func (s *seeingStore) see(ctx context.Context) {
	name := "nobody"
	if cert := server.ClientCertificate(ctx); cert != nil {
		name = cert.Subject.CommonName
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, name)
}

// take returns whom it saw, once each, and forgets them.
func (s *seeingStore) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := strings.Join(slices.Compact(s.seen), ", ")
	s.seen = nil
	return seen
}

func (s *seeingStore) Stat(ctx context.Context, key artifact.Key) (artifact.Info, error) {
	s.see(ctx)
	return s.Store.Stat(ctx, key)
}

func (s *seeingStore) Create(ctx context.Context, key artifact.Key, size int64) (cache.Upload, error) {
	s.see(ctx)
	return s.Store.Create(ctx, key, size)
}

// TestClientCertificate proves that whoever handles a request or call learns of the client's certificate if
// it was verified, whichever way it came, and of none else.
func TestClientCertificate(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	pairs := map[string]tls.Certificate{"alice": authority.Pair("alice", nil), "bob": authority.Pair("bob", nil), "nobody": {}}
	clients := map[string]func(t *testing.T, s *testServer, config *tls.Config) map[string]func(ctx context.Context) error{
		"HTTP1": func(t *testing.T, s *testServer, config *tls.Config) map[string]func(ctx context.Context) error {
			return askREST(t, s, newTransport(t, 1), config)
		},
		"HTTP2": func(t *testing.T, s *testServer, config *tls.Config) map[string]func(ctx context.Context) error {
			return askREST(t, s, newTransport(t, 2), config)
		},
		"gRPC": func(t *testing.T, s *testServer, config *tls.Config) map[string]func(ctx context.Context) error {
			conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			return askGRPC(conn)
		},
		"gRPC behind net/http": func(t *testing.T, s *testServer, config *tls.Config) map[string]func(ctx context.Context) error {
			transport := newTransport(t, 2)
			transport.TLSClientConfig = config
			return askGRPC(&sharedConn{transport: transport, url: s.url})
		},
	}
	for way, client := range clients {
		t.Run(way, func(t *testing.T) {
			store := &seeingStore{Store: &cachetest.Memory{}}
			s := startServer(t, setup{store: store, tls: true, change: func(c *server.Config) {
				c.TLS.ClientAuth, c.TLS.ClientCAs = tls.VerifyClientCertIfGiven, authority.Pool()
			}})
			for name, pair := range pairs { // on connections of their own
				config := clientTLS()
				config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
				for what, ask := range client(t, s, config) {
					for range 2 {
						if err := ask(t.Context()); err != nil {
							t.Fatalf("%s as %s: %v", what, name, err)
						}
						if seen := store.take(); seen != name {
							t.Errorf("%s as %s: the server sees %s", what, name, seen)
						}
					}
				}
			}
		})
	}

	t.Run("clear text", func(t *testing.T) {
		if cert := server.ClientCertificate(t.Context()); cert != nil {
			t.Errorf("the server sees %v", cert.Subject)
		}
	})
	t.Run("not verified", func(t *testing.T) {
		store := &seeingStore{Store: &cachetest.Memory{}}
		s := startServer(t, setup{store: store, tls: true, change: func(c *server.Config) { c.TLS.ClientAuth = tls.RequireAnyClientCert }})
		config := clientTLS()
		config.Certificates = []tls.Certificate{pairs["alice"]}
		for what, ask := range clients["HTTP1"](t, s, config) {
			if err := ask(t.Context()); err != nil {
				t.Fatal(err)
			}
			if seen := store.take(); seen != "nobody" {
				t.Errorf("%s: the server sees %s", what, seen)
			}
		}
	})
}

// askREST returns requests that ask the store.
func askREST(t *testing.T, s *testServer, transport *http.Transport, config *tls.Config) map[string]func(ctx context.Context) error {
	transport.TLSClientConfig = config
	ask := func(method, suffix string, want int) func(ctx context.Context) error {
		return func(ctx context.Context) error {
			request, err := http.NewRequestWithContext(ctx, method, s.url+"/v1/artifacts/"+keyA+suffix, strings.NewReader(""))
			if err != nil {
				return err
			}
			response, err := transport.RoundTrip(request)
			if err != nil {
				return err
			}
			defer response.Body.Close()
			if response.StatusCode != want {
				return errors.New(response.Status)
			}
			return nil
		}
	}
	return map[string]func(ctx context.Context) error{
		"HEAD":     ask(http.MethodHead, "", 404),
		"metadata": ask(http.MethodGet, "/metadata", 404),
		"PUT":      ask(http.MethodPut, "", 422),
	}
}

// askGRPC does the same over gRPC.
func askGRPC(conn grpc.ClientConnInterface) map[string]func(ctx context.Context) error {
	client := cachev1.NewArtifactServiceClient(conn)
	ask := func(call grpcCall, want codes.Code) func(ctx context.Context) error {
		return func(ctx context.Context) error {
			if _, err := call(ctx, client); status.Code(err) != want {
				return fmt.Errorf("the call ended with %w", err)
			}
			return nil
		}
	}
	return map[string]func(ctx context.Context) error{
		"StatArtifact": ask(stat(keyA), codes.NotFound),
		"PutArtifact":  ask(uploadAll(keyA, nil), codes.InvalidArgument),
	}
}

// TestClearTextToTLS has clients that speak clear text to a server for TLS. Those that speak HTTP read what
// they should do, in the middle of an upload too, and none keeps its place.
func TestClearTextToTLS(t *testing.T) {
	s := startServer(t, setup{tls: true, change: func(c *server.Config) { c.MaxConnections = 1 }})
	raw := func(t *testing.T) *wire {
		conn, err := net.Dial("tcp", s.address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(patience))
		return &wire{t, conn, bufio.NewReader(conn), conn.(*net.TCPConn)}
	}
	room := func() bool { // for one more
		conn := dial(t, s)
		defer conn.Close()
		conn.send("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		answer, _ := io.ReadAll(conn.in)
		return strings.HasPrefix(string(answer), "HTTP/1.1 200 ")
	}
	for name, sent := range map[string]string{
		"GET":       "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
		"DELETE":    "DELETE /v1/artifacts/" + keyA + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"HTTP2":     "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"100 bytes": "PUT /v1/artifacts/" + keyA + " HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			waitUntil(t, "there is room", room)
			conn := raw(t)
			conn.send(sent)
			conn.want("GET", 400, notTLS)
			conn.wantEnd()
		})
	}
	t.Run("64 MiB", func(t *testing.T) {
		waitUntil(t, "there is room", room)
		request, err := http.NewRequest(http.MethodPut, "http://"+s.address+"/v1/artifacts/"+keyA, bytes.NewReader(make([]byte, refusalBody)))
		if err != nil {
			t.Fatal(err)
		}
		response, err := newTransport(t, 1).RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if body, err := io.ReadAll(response.Body); response.StatusCode != 400 || string(body) != notTLS || err != nil {
			t.Errorf("got %s %s, %v", response.Status, body, err)
		}
	})
	t.Run("garbage", func(t *testing.T) {
		waitUntil(t, "there is room", room)
		conn := raw(t)
		conn.send("\x00\x01\x02\x03\x04\x05\x06\x07")
		conn.wantEnd()
	})
	waitUntil(t, "there is room", room)
	if lines := s.log.find(slog.LevelInfo, ""); len(lines) > 0 {
		t.Errorf("logged above debug: %v", lines)
	}
}

// clientHello is what a client for TLS sends first.
func clientHello(t *testing.T) string {
	t.Helper()
	client, peer := net.Pipe()
	defer peer.Close()
	go tls.Client(client, &tls.Config{ServerName: "x"}).Handshake()
	hello := make([]byte, 16<<10)
	n, err := peer.Read(hello)
	if err != nil {
		t.Fatal(err)
	}
	return string(hello[:n])
}

// silentTLS are connections that stop before or behind the handshake.
func silentTLS(t *testing.T, s *testServer) map[string]net.Conn {
	t.Helper()
	hello := clientHello(t)
	conns := map[string]net.Conn{}
	for name, sent := range map[string]string{"silence": "", "a part of a record": hello[:3], "half of a hello": hello[:len(hello)/2], "a hello": hello} {
		conn, err := net.Dial("tcp", s.address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, sent); err != nil {
			t.Fatal(err)
		}
		conns[name] = conn
	}
	over := dial(t, s)
	if err := over.Conn.(*tls.Conn).Handshake(); err != nil {
		t.Fatal(err)
	}
	conns["a handshake"] = over.Conn
	return conns
}

// TestSlowHandshake proves that clients which do not go on with the handshake, or behind it, are let go in
// the time for a header, and that they count as connections until then.
func TestSlowHandshake(t *testing.T) {
	s := startServer(t, setup{tls: true, change: func(c *server.Config) {
		c.HeaderTimeout = stall
		c.IdleTimeout = time.Hour
		c.MaxConnections = 5
	}})
	began := time.Now()
	for name, conn := range silentTLS(t, s) {
		conn.SetDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) || time.Since(began) < stall {
			t.Errorf("%s: the connection ended with %v after %v", name, err, time.Since(began))
		} else if netErr, ok := errors.AsType[net.Error](err); ok && netErr.Timeout() {
			t.Errorf("%s: the connection is not closed", name)
		}
	}
	waitUntil(t, "there is room", func() bool {
		transport := newTransport(t, 1)
		defer transport.CloseIdleConnections()
		response, _ := get(keyA).do(t, s, transport)
		return response.StatusCode == 404
	})
}

// TestShutdownOfSilentTLS proves that such clients do not keep the server from shutting down.
func TestShutdownOfSilentTLS(t *testing.T) {
	s := startServer(t, setup{tls: true, change: func(c *server.Config) {
		c.HeaderTimeout, c.ShutdownTimeout = time.Hour, time.Hour
	}})
	silentTLS(t, s)
	waitUntil(t, "all are accepted", func() bool { return s.conns.Load() == 5 })
	s.stop()
	if err := s.end(); err != nil {
		t.Error(err)
	}
}

// TestTooManyTLSConnections proves that clients over the limit are told so over TLS too, those of gRPC as far
// as they are told anything.
func TestTooManyTLSConnections(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	dir := t.TempDir()
	authority.Write(t, dir, "server")
	loaded, err := certs.Load(certs.Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*server.Config){
		"one configuration":     func(*server.Config) {},
		"one of each handshake": func(c *server.Config) { c.TLS = loaded.Config() },
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, setup{tls: true, change: func(c *server.Config) {
				change(c)
				c.MaxConnections = 1
			}})
			config := clientTLS()
			if name != "one configuration" {
				config.RootCAs = authority.Pool()
			}
			first, err := tls.Dial("tcp", s.address, config)
			if err != nil {
				t.Fatal(err)
			}
			defer first.Close()
			for _, protocols := range [][]string{nil, {"http/1.1"}, {"h2", "http/1.1"}} {
				config := config.Clone()
				config.NextProtos = protocols
				conn, err := tls.Dial("tcp", s.address, config)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if protocol := conn.ConnectionState().NegotiatedProtocol; protocol == "h2" {
					t.Error("the server says that it speaks HTTP/2")
				}
				io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
				response, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(response.Body)
				if response.StatusCode != 503 || response.Header.Get("Retry-After") != "1" || !strings.HasPrefix(string(body), `{"error":"`) || err != nil {
					t.Errorf("%v: got %s %v %s, %v", protocols, response.Status, response.Header, body, err)
				}
			}
			conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := stat(keyA)(t.Context(), cachev1.NewArtifactServiceClient(conn)); status.Code(err) != codes.Unavailable {
				t.Errorf("a call got %v", err)
			}
		})
	}
}

// TestReloadUnderLoad replaces the certificate again and again while clients are served, on connections that
// they keep and on new ones: none of their requests fails, and new ones see the new certificate.
func TestReloadUnderLoad(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	dir := t.TempDir()
	authority.Write(t, dir, "server")
	loaded, err := certs.Load(certs.Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s := startServer(t, setup{tls: true, change: func(c *server.Config) { c.TLS = loaded.Config() }})
	havingA(t, s)
	config := &tls.Config{RootCAs: authority.Pool()}
	restClient := func(version int, keep bool) func(ctx context.Context) error {
		transport := newTransport(t, version)
		transport.TLSClientConfig = config.Clone()
		transport.DisableKeepAlives = !keep
		return func(ctx context.Context) error {
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/v1/artifacts/"+keyA, nil)
			if err != nil {
				return err
			}
			response, err := transport.RoundTrip(request)
			if err != nil {
				return err
			}
			defer response.Body.Close()
			if body, err := io.ReadAll(response.Body); response.StatusCode != 200 || !bytes.Equal(body, artifactA) {
				return fmt.Errorf("got %s with %d bytes, %w", response.Status, len(body), err)
			}
			return nil
		}
	}
	grpcClient := func(keep bool) func(ctx context.Context) error {
		dial := func() (*grpc.ClientConn, error) {
			return grpc.NewClient(s.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
		}
		kept, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { kept.Close() })
		return func(ctx context.Context) error {
			conn := kept
			if !keep {
				var err error
				if conn, err = dial(); err != nil {
					return err
				}
				defer conn.Close()
			}
			_, err := download(keyA, 0, 0)(ctx, cachev1.NewArtifactServiceClient(conn))
			return err
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	var working sync.WaitGroup
	asked := map[string]chan struct{}{}
	for name, ask := range map[string]func(ctx context.Context) error{
		"HTTP1": restClient(1, true), "new HTTP1": restClient(1, false), "HTTP2": restClient(2, true), "new HTTP2": restClient(2, false),
		"gRPC": grpcClient(true), "new gRPC": grpcClient(false),
	} {
		done := make(chan struct{}, 1)
		asked[name] = done
		working.Go(func() {
			for ctx.Err() == nil {
				if err := ask(context.WithoutCancel(ctx)); err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				select {
				case done <- struct{}{}:
				default:
				}
			}
		})
	}
	for i := range 20 {
		name := fmt.Sprint("server ", i)
		authority.Write(t, dir, name) // one file after the other
		conn, err := tls.Dial("tcp", s.address, config)
		if err != nil {
			t.Fatal(err)
		}
		if got := conn.ConnectionState().PeerCertificates[0].Subject.CommonName; got != name {
			t.Errorf("the certificate is that of %s; want %s", got, name)
		}
		conn.Close()
		for _, done := range asked { // two, so that one began behind the reload
			for range 2 {
				select {
				case <-done:
				case <-time.After(patience):
					t.Fatal("a client does not get on")
				}
			}
		}
	}
	stop()
	working.Wait()
}

// TestWrongClientCertificates proves that a client with a certificate that is not valid learns so, in the
// middle of an upload too, and that this is nothing to be told of in the log.
func TestWrongClientCertificates(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	s := startServer(t, setup{tls: true, change: func(c *server.Config) {
		c.TLS.ClientAuth, c.TLS.ClientCAs = tls.VerifyClientCertIfGiven, authority.Pool()
	}})
	for name, test := range map[string]struct {
		pair tls.Certificate
		want string
	}{
		"another authority": {cachetest.NewAuthority("other").Pair("mallory", nil), "unknown certificate authority"},
		"expired":           {authority.Pair("old", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) }), "expired certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			config := clientTLS()
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &test.pair, nil }
			transport := newTransport(t, 1)
			transport.TLSClientConfig = config.Clone()
			request, err := http.NewRequest(http.MethodGet, s.url+"/v1/artifacts/"+keyA, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := transport.RoundTrip(request); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("a request got %v; want %s", err, test.want)
			}
			// Not every client looks for an answer before it has sent all; one that does finds it.
			conn, err := tls.Dial("tcp", s.address, config)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			var sending sync.WaitGroup
			defer sending.Wait()
			defer conn.NetConn().Close()
			sending.Go(func() {
				fmt.Fprintf(conn, "PUT /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", keyA, refusalBody)
				conn.Write(make([]byte, refusalBody))
			})
			if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("an upload got %v; want %s", err, test.want)
			}
			native, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
			if err != nil {
				t.Fatal(err)
			}
			defer native.Close()
			if _, err := stat(keyA)(t.Context(), cachev1.NewArtifactServiceClient(native)); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), test.want) {
				t.Errorf("a call got %v; want %s", err, test.want)
			}
		})
	}
	if lines := s.log.find(slog.LevelInfo, ""); len(lines) > 0 {
		t.Errorf("logged above debug: %v", lines)
	}
}
