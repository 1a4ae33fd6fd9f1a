package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/server"
)

// newServer returns a server that takes artifacts of up to 1 MiB, with the default settings changed
// by change if it is not nil, and its storage directory.
func newServer(t *testing.T, change func(*server.Config)) (s *server.Server, dir string) {
	t.Helper()
	verifier := artifact.NewVerifier(artifact.DefaultLimits)
	log := slog.New(slog.NewTextHandler(noPanics{t}, nil))
	dir = t.TempDir()
	store, err := disk.Open(disk.Config{Dir: dir, Verifier: verifier, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	config := server.DefaultConfig
	if change != nil {
		change(&config)
	}
	return server.New(cache.New(store, verifier, cache.Config{MaxSize: 1 << 20}), config, log), dir
}

// noPanics is a log in which no panic may be reported, as net/http does of its own too.
type noPanics struct{ t *testing.T }

func (n noPanics) Write(line []byte) (int, error) {
	if strings.Contains(string(line), "panic") {
		n.t.Errorf("logged %s", line)
	}
	return len(line), nil
}

// halfUpload is an upload of which half is sent.
type halfUpload struct {
	finish func() error // sends the rest and reads the answer
}

// halfUploads begin an upload over each protocol.
var halfUploads = map[string]func(t *testing.T, url string, key artifact.Key, body []byte) halfUpload{
	"HTTP1": func(t *testing.T, url string, key artifact.Key, body []byte) halfUpload {
		return halfHTTP(t, newTransport(t, 1), url, key, body)
	},
	"HTTP2": func(t *testing.T, url string, key artifact.Key, body []byte) halfUpload {
		return halfHTTP(t, newTransport(t, 2), url, key, body)
	},
	"gRPC": func(t *testing.T, url string, key artifact.Key, body []byte) halfUpload {
		_, address, _ := strings.Cut(url, "://")
		conn, err := grpc.NewClient(address, security(url))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return halfGRPC(t, conn, key, body)
	},
}

func halfHTTP(t *testing.T, transport http.RoundTripper, url string, key artifact.Key, body []byte) halfUpload {
	t.Helper()
	read, write := io.Pipe()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, url+"/v1/artifacts/"+key.String(), read)
	if err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	go func() {
		response, err := transport.RoundTrip(request)
		if err == nil {
			response.Body.Close()
			if response.StatusCode != http.StatusCreated {
				err = errors.New(response.Status)
			}
		}
		answer <- err
	}()
	if _, err := write.Write(body[:len(body)/2]); err != nil {
		t.Fatal(err)
	}
	return halfUpload{func() error {
		_, err := write.Write(body[len(body)/2:])
		write.Close()
		return errors.Join(err, <-answer)
	}}
}

func halfGRPC(t *testing.T, conn grpc.ClientConnInterface, key artifact.Key, body []byte) halfUpload {
	t.Helper()
	stream, err := cachev1.NewArtifactServiceClient(conn).PutArtifact(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(stream.Send(header(key.String())), stream.Send(chunk(body[:len(body)/2]))); err != nil {
		t.Fatal(err)
	}
	return halfUpload{func() error {
		err := stream.Send(chunk(body[len(body)/2:]))
		_, answer := stream.CloseAndRecv()
		return errors.Join(err, answer)
	}}
}

// serveUntil serves on a port of its own until stop is called, and then tells how Serve ended.
func serveUntil(t *testing.T, s *server.Server) (address string, stop context.CancelFunc, served chan error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(stop)
	served = make(chan error, 1)
	go func() { served <- s.Serve(ctx, listener) }()
	return listener.Addr().String(), stop, served
}

// waitForUpload waits until an upload has begun in a storage directory.
func waitForUpload(t *testing.T, dir string) {
	t.Helper()
	waitUntil(t, "an upload begins", func() bool {
		entries, err := os.ReadDir(filepath.Join(dir, "tmp"))
		return err == nil && len(entries) > 0
	})
}

// TestShutdownFinishes proves that uploads in flight finish after the server stopped listening.
func TestShutdownFinishes(t *testing.T) {
	for protocol, begin := range halfUploads {
		t.Run(protocol, func(t *testing.T) {
			s, dir := newServer(t, nil)
			address, stop, served := serveUntil(t, s)
			key := cachetest.Key("a")
			upload := begin(t, "http://"+address, key, cachetest.Random(key, 500_000))
			waitForUpload(t, dir)
			stop()
			waitUntil(t, "the server refuses connections", func() bool {
				conn, err := net.Dial("tcp", address)
				if err == nil {
					conn.Close()
				}
				return err != nil
			})
			if err := s.Ready(t.Context()); err == nil {
				t.Error("the server says that it is ready while it drains")
			}
			if err := upload.finish(); err != nil {
				t.Errorf("the upload in flight failed: %v", err)
			}
			if err := <-served; err != nil {
				t.Errorf("Serve returned %v", err)
			}
		})
	}
}

// TestShutdownCuts proves that what does not finish in time is cut, and that this is no error.
func TestShutdownCuts(t *testing.T) {
	for protocol, begin := range halfUploads {
		t.Run(protocol, func(t *testing.T) {
			s, dir := newServer(t, func(c *server.Config) { c.ShutdownTimeout = 50 * time.Millisecond })
			address, stop, served := serveUntil(t, s)
			key := cachetest.Key("a")
			upload := begin(t, "http://"+address, key, cachetest.Random(key, 500_000))
			waitForUpload(t, dir)
			stop()
			if err := <-served; err != nil {
				t.Errorf("Serve returned %v", err)
			}
			if upload.finish() == nil {
				t.Error("an upload that did not finish in time succeeded")
			}
		})
	}
}

// TestShutdownRefuses proves that requests which come on open connections while an upload finishes
// are refused with a status that says so, over both protocols, and that readiness flips.
func TestShutdownRefuses(t *testing.T) {
	s, dir := newServer(t, nil)
	address, stop, served := serveUntil(t, s)
	artifactPath := "/v1/artifacts/" + cachetest.Key("b").String()
	cases := map[string]string{
		artifactPath:               `{"error":"The server is shutting down: try again"}`,
		artifactPath + "/metadata": `{"error":"The server is shutting down: try again"}`,
		"/readyz":                  `{"error":"The server is shutting down"}`,
	}
	open := map[string]net.Conn{}
	for path := range cases {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		open[path] = conn
		if response, _ := getOver(t, conn, "/readyz"); response.StatusCode != 200 {
			t.Fatalf("/readyz is %s before the shutdown", response.Status)
		}
	}
	grpcConn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer grpcConn.Close()
	checkHealth := func() (healthpb.HealthCheckResponse_ServingStatus, error) {
		response, err := healthpb.NewHealthClient(grpcConn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return response.GetStatus(), err
	}
	if got, err := checkHealth(); got != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("health is %v, %v before the shutdown", got, err)
	}

	key := cachetest.Key("a")
	upload := halfUploads["HTTP1"](t, "http://"+address, key, cachetest.Random(key, 500_000))
	waitForUpload(t, dir)
	stop()
	waitUntil(t, "the server drains", func() bool { return s.Ready(t.Context()) != nil })
	for path, want := range cases {
		response, body := getOver(t, open[path], path)
		if response.StatusCode != 503 || body != want || response.Header.Get("Retry-After") == "" || !response.Close {
			t.Errorf("GET %s: got %+v %s; want 503 %s", path, response, body, want)
		}
	}
	if got, err := checkHealth(); got != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health is %v, %v during the shutdown; want NOT_SERVING", got, err)
	}
	if err := upload.finish(); err != nil {
		t.Errorf("the upload in flight failed: %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve returned %v", err)
	}
}

// TestShutdownEndsWatch proves that somebody who watches the server's health is told that it shuts
// down, and does not keep it from doing so.
func TestShutdownEndsWatch(t *testing.T) {
	s, _ := newServer(t, nil)
	address, stop, served := serveUntil(t, s)
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if response, err := stream.Recv(); response.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("health is %v, %v before the shutdown", response, err)
	}
	stop()
	response, err := stream.Recv()
	for err == nil && response.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		response, err = stream.Recv()
	}
	if err != nil {
		t.Errorf("the watch ended with %v before it said NOT_SERVING", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve returned %v", err)
	}
}

// getOver sends a GET over an open HTTP/1.1 connection.
func getOver(t *testing.T, conn net.Conn, path string) (*http.Response, string) {
	t.Helper()
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

// waitUntil polls for what has no signal of its own.
func waitUntil(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestShutdownOfSilentConnections proves that connections on which no request came do not keep the server
// from shutting down, whatever they began with, and that one whose call is over does not either if its
// client does not answer any more.
func TestShutdownOfSilentConnections(t *testing.T) {
	s := startServer(t, setup{change: func(c *server.Config) { c.ShutdownTimeout = 4 * time.Second }}) // net/http waits for 5
	havingA(t, s)
	for _, sent := range []string{"", "PRI", http2.ClientPreface, http2.ClientPreface + greetingFrames(func(f *http2.Framer) { f.WriteSettings() })} {
		dial(t, s).send(sent)
	}
	conn := dialNative(t, s)
	id := conn.mustOpen(false, "POST", healthpb.Health_Check_FullMethodName, callHeader...)
	conn.send(id, make([]byte, 5), 5, true)
	conn.wantStatus(id, codes.OK, "", "")
	waitUntil(t, "all are accepted", func() bool { return s.conns.Load() == 5 })
	s.stop()
	if err := s.end(); err != nil {
		t.Errorf("Serve returned %v", err)
	}
}

// TestShutdownSendsAll has a client that takes the end of a download only when the server shuts down, and
// longer than that waits for clients which have nothing to wait for. gRPC counts it as sent.
func TestShutdownSendsAll(t *testing.T) {
	s := startServer(t, setup{sendBuffer: 16 << 10, change: func(c *server.Config) { c.ShutdownTimeout = time.Hour }})
	a := cachetest.Key("a")
	s.put(t, a, cachetest.Random(a, 170<<10)) // more than sockets buffer, but not than they and gRPC do
	conn := dial(t, s)
	g := conn.getCall(a, conn)
	g.until("the beginning of the download", func() bool { return g.last == "200" })
	waitUntil(t, "the download counts as sent", func() bool { return s.Requests() == 0 })
	s.stop()
	ended := make(chan struct{})
	go func() {
		s.end()
		close(ended)
	}()
	select {
	case <-ended:
		t.Error("the server ended before the client had taken all")
	case <-time.After(2500 * time.Millisecond): // it looks each second
	}
	g.until("the end of the download", func() bool { return g.ended[1] })
	if g.status != "0" {
		t.Errorf("the download ended with %q", g.status)
	}
	// The client does not answer to what says that the server goes away.
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("the server waits for a client that has taken all")
		conn.Close()
	}
}
