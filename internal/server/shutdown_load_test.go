package server_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/server"
)

// How much is in flight over each of HTTP/1.1, HTTP/2 and gRPC.
const (
	loadUploads   = 8
	loadDownloads = 3
	// loadSize is more than sockets and flow control take of a download that nobody reads.
	loadSize = 8 << 20
)

// load is uploads and downloads in flight over all protocols, each in the middle.
type load struct {
	finish map[string]func() error // by name
	// busy are the connections that they are on, those of HTTP/1.1 apart, and idle are others.
	busy, idle conns
}

// conns are connections to a server.
type conns struct {
	http1, http2 *http.Transport
	grpc         grpc.ClientConnInterface
}

func openConns(t *testing.T, s *testServer) conns {
	c := conns{newTransport(t, 1), newTransport(t, 2), newGRPC(t, s)}
	c.http1.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil {
			conn.(*net.TCPConn).SetReadBuffer(64 << 10)
		}
		return conn, err
	}
	return c
}

// startLoad returns when all is in flight. keyA is stored with content.
func startLoad(t *testing.T, s *testServer, content []byte) *load {
	t.Helper()
	l := &load{finish: map[string]func() error{}, busy: openConns(t, s), idle: openConns(t, s)}
	for _, transport := range []http.RoundTripper{l.idle.http1, l.idle.http2} {
		if response, body := head(keyA).do(t, s, transport); response.StatusCode != 200 {
			t.Fatalf("before the shutdown HEAD got %s %s", response.Status, body)
		}
	}
	if _, err := stat(keyA)(t.Context(), cachev1.NewArtifactServiceClient(l.idle.grpc)); err != nil {
		t.Fatal(err)
	}
	for i := range loadUploads {
		for protocol, begin := range map[string]func(artifact.Key, []byte) halfUpload{
			"HTTP1": func(key artifact.Key, body []byte) halfUpload { return halfHTTP(t, l.busy.http1, s.url, key, body) },
			"HTTP2": func(key artifact.Key, body []byte) halfUpload { return halfHTTP(t, l.busy.http2, s.url, key, body) },
			"gRPC":  func(key artifact.Key, body []byte) halfUpload { return halfGRPC(t, l.busy.grpc, key, body) },
		} {
			name := fmt.Sprintf("upload %d over %s", i, protocol)
			l.finish[name] = begin(cachetest.Key(name), cachetest.Random(cachetest.Key(name), 300_000)).finish
		}
	}
	for i := range loadDownloads {
		l.finish[fmt.Sprintf("download %d over HTTP1", i)] = halfDownload(t, s, l.busy.http1, content)
		l.finish[fmt.Sprintf("download %d over HTTP2", i)] = halfDownload(t, s, l.busy.http2, content)
		l.finish[fmt.Sprintf("download %d over gRPC", i)] = halfDownloadGRPC(t, l.busy.grpc, content)
	}
	waitUntil(t, "all uploads have begun", func() bool { return s.uploadsInProgress() == 3*loadUploads })
	if n := s.Requests(); n != len(l.finish) {
		t.Fatalf("%d requests are in flight; want %d", n, len(l.finish))
	}
	return l
}

// halfDownload begins a download, and returns what reads the rest of it.
func halfDownload(t *testing.T, s *testServer, transport http.RoundTripper, content []byte) func() error {
	t.Helper()
	response, err := transport.RoundTrip(get(keyA).to(t, s))
	if err != nil {
		t.Fatal(err)
	}
	return func() error {
		defer response.Body.Close()
		got := make([]byte, len(content))
		_, err := io.ReadFull(response.Body, got)
		if n, end := response.Body.Read(make([]byte, 1)); err == nil && (n != 0 || end != io.EOF || !bytes.Equal(got, content)) {
			err = fmt.Errorf("got %s, other bytes or %d more, %v", response.Status, n, end)
		}
		return err
	}
}

func halfDownloadGRPC(t *testing.T, conn grpc.ClientConnInterface, content []byte) func() error {
	t.Helper()
	stream, err := cachev1.NewArtifactServiceClient(conn).GetArtifact(t.Context(), &cachev1.GetArtifactRequest{CacheKey: keyA})
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() error {
		got := make([]byte, 0, len(content))
		for {
			response, err := stream.Recv()
			if err == io.EOF && !bytes.Equal(got, content) {
				return fmt.Errorf("got %d bytes", len(got))
			}
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			got = append(got, response.GetChunk()...)
		}
	}
}

// ends lets all that is in flight go on at once, and returns how each of it ended.
func (l *load) ends() map[string]error {
	ended := map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for name, finish := range l.finish {
		wg.Go(func() {
			err := finish()
			mu.Lock()
			defer mu.Unlock()
			ended[name] = err
		})
	}
	wg.Wait()
	return ended
}

// TestShutdownUnderLoad shuts down a server while uploads and downloads are in flight over all
// protocols, in clear text and over TLS. New requests are refused, on connections that are idle and on
// those that are in use, and all that was in flight finishes.
func TestShutdownUnderLoad(t *testing.T) {
	content := cachetest.Random(cachetest.Key("a"), loadSize)
	for name, overTLS := range map[string]bool{"clear text": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, setup{tls: overTLS, change: func(c *server.Config) { c.ShutdownTimeout = time.Hour }})
			s.put(t, cachetest.Key("a"), content)
			l := startLoad(t, s, content)
			s.stop()
			waitUntil(t, "the server refuses connections", func() bool {
				conn, err := net.Dial("tcp", s.address)
				if err == nil {
					conn.Close()
				}
				return err != nil
			})

			const sentence = "The server is shutting down: try again"
			for on, c := range map[string]conns{"an idle connection": l.idle, "a connection in use": l.busy} {
				if on == "an idle connection" { // there is none of HTTP/1.1 in use that could be asked
					checkRefused(t, s, c.http1, sentence)
				}
				checkRefused(t, s, c.http2, sentence)
				_, err := stat(keyA)(t.Context(), cachev1.NewArtifactServiceClient(c.grpc))
				if st := status.Convert(err); st.Code() != codes.Unavailable || st.Message() != sentence {
					t.Errorf("a call on %s got %v; want UNAVAILABLE %s", on, err, sentence)
				}
			}
			for what, err := range l.ends() {
				if err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
			if err := s.end(); err != nil {
				t.Errorf("Serve returned %v", err)
			}
			for what := range l.finish {
				key := cachetest.Key(what)
				if info, err := s.cache.Stat(t.Context(), key); what[:2] == "up" && (err != nil || info.Hash.String() != hashOf(cachetest.Random(key, 300_000))) {
					t.Errorf("%s is stored as %v, %v", what, info, err)
				}
			}
			if n, tmp := s.Requests(), s.uploadsInProgress(); n != 0 || tmp != 0 {
				t.Errorf("%d requests and %d uploads are left", n, tmp)
			}
			if lines := s.log.find(slog.LevelError, ""); len(lines) > 0 {
				t.Errorf("logged %v", lines)
			}
		})
	}
}

// checkRefused makes a request that must be refused since the server shuts down.
func checkRefused(t *testing.T, s *testServer, transport http.RoundTripper, sentence string) {
	t.Helper()
	response, body := put(cachetest.Key("refused").String(), artifactA).do(t, s, transport)
	if response.StatusCode != 503 || response.Header.Get("Retry-After") == "" {
		t.Errorf("an upload over %s got %s %v; want 503", response.Proto, response.Status, response.Header)
	}
	checkErrorBody(t, "PUT", response, body, sentence)
}

// TestShutdownCutsLoad lets the time for all that is in flight run out. It fails, leaves nothing behind,
// and the server ends as it should.
func TestShutdownCutsLoad(t *testing.T) {
	content := cachetest.Random(cachetest.Key("a"), loadSize)
	for name, overTLS := range map[string]bool{"clear text": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, setup{tls: overTLS, change: func(c *server.Config) { c.ShutdownTimeout = time.Millisecond }})
			s.put(t, cachetest.Key("a"), content)
			l := startLoad(t, s, content)
			s.stop()
			if err := s.end(); err != nil {
				t.Errorf("Serve returned %v", err)
			}
			for what, err := range l.ends() {
				if err == nil {
					t.Errorf("%s succeeded", what)
				}
			}
			waitUntil(t, "no request is in flight", func() bool { return s.Requests() == 0 })
			if n := s.uploadsInProgress(); n != 0 {
				t.Errorf("%d uploads are left", n)
			}
			for what := range l.finish {
				if _, err := s.cache.Stat(t.Context(), cachetest.Key(what)); err == nil {
					t.Errorf("%s is stored", what)
				}
			}
			if lines := s.log.find(slog.LevelWarn, "did not finish in time and were cut requests=33"); len(lines) != 1 {
				t.Errorf("logged %v", s.log.find(slog.LevelWarn, ""))
			}
			s.log.clear() // startServer's own check is for other tests
		})
	}
}
