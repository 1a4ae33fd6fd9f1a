package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// Where artifactA has what, for it is stored without compression: behind the header of its frame and
// block come metadata.json, manifest.json and data.bin, each a header and its content.
const (
	inFrameHeader = 3
	inMetadata    = 9 + 512 + 50
	inManifest    = 9 + 512 + 512 + 512 + 50
	inFile        = 9 + 4*512 + 512 + 1000
	lastByte      = 5641 - 1
	allBytes      = 5641
)

// TestAbortedUploadHTTP1 cuts uploads over HTTP/1.1 at every byte where something could take what is
// there for the whole.
func TestAbortedUploadHTTP1(t *testing.T) {
	type cut struct {
		name string
		sent string // of the body as it stands on the wire
		took int64  // bytes of it that the server must have seen before the cut
	}
	var declared, undeclared []cut
	for _, c := range []struct {
		name string
		n    int
	}{
		{"behind the request header", 0},
		{"behind the first byte", 1},
		{"in the frame header", inFrameHeader},
		{"in metadata.json", inMetadata},
		{"in manifest.json", inManifest},
		{"in a file", inFile},
		{"before the last byte", lastByte},
	} {
		declared = append(declared, cut{c.name, string(artifactA[:c.n]), int64(c.n)})
	}
	body := chunked(artifactA, 1000) // 3e8 CRLF 1000 bytes CRLF, five times, and 281 CRLF 641 bytes CRLF
	last := len(body) - len("0\r\n\r\n")
	for _, c := range []struct {
		name string
		n    int
	}{
		{"behind the request header", 0},
		{"in the first chunk's header", 2},
		{"behind the first chunk's header", 5},
		{"in the first chunk", 5 + inMetadata},
		{"behind the first chunk's data", 5 + 1000},
		{"behind the first chunk", 5 + 1000 + 2},
		{"in the second chunk's header", 5 + 1000 + 2 + 2},
		{"before the last byte", last - 3},
		{"behind all data", last - 2},
		{"before the last chunk", last},
		{"in the last chunk", last + 1},
		{"behind the last chunk", last + 3},
		{"before the last byte of the end", last + 4},
	} {
		undeclared = append(undeclared, cut{c.name, body[:c.n], 0}) // net/http hands on more or less
	}

	ends := []struct {
		name string
		end  func(w *wire)
	}{
		{"closed", func(w *wire) { w.Close() }},
		{"reset", func(w *wire) {
			w.tcp.SetLinger(0)
			w.Close()
		}},
		{"half closed", func(w *wire) {
			w.Conn.(interface{ CloseWrite() error }).CloseWrite()
			w.want("PUT", 400, `{"error":"The upload ended before the artifact did"}`)
			w.wantEnd()
		}},
	}
	s := startServer(t, setup{})
	for _, kind := range []struct {
		name, header string
		cuts         []cut
	}{
		{"with a length", "Content-Length: 5641", declared},
		{"in chunks", "Transfer-Encoding: chunked", undeclared},
	} {
		for _, c := range kind.cuts {
			for _, e := range ends {
				t.Run(kind.name+"/"+c.name+"/"+e.name, func(t *testing.T) {
					checkAbortedUpload(t, s, c.took, func(t *testing.T) func() {
						conn := dial(t, s)
						conn.send("PUT /v1/artifacts/"+keyA+" HTTP/1.1\r\nHost: x\r\n"+kind.header+"\r\n\r\n", c.sent)
						return func() { e.end(conn) }
					})
				})
			}
		}
	}
}

// TestAbortedUploadHTTP2 cuts uploads over HTTP/2: the stream, or the connection under it.
func TestAbortedUploadHTTP2(t *testing.T) {
	s := startServer(t, setup{})
	for _, c := range []struct {
		name     string
		n        int
		declared bool
	}{
		{"behind the request header", 0, true},
		{"behind the request header, of an undeclared size", 0, false},
		{"in metadata.json", inMetadata, true},
		{"in a file", inFile, false},
		{"before the last byte", lastByte, true},
		{"before the end of the stream", allBytes, false},
	} {
		for _, end := range []string{"stream", "connection"} {
			t.Run(c.name+"/"+end, func(t *testing.T) {
				checkAbortedUpload(t, s, int64(c.n), func(t *testing.T) func() {
					transport, cut := newTransportToCut(t)
					ctx, cancel := context.WithCancel(t.Context())
					body, send := io.Pipe()
					request := put(keyA, []byte{}).to(t, s).WithContext(ctx)
					request.Body, request.ContentLength = body, -1
					if c.declared {
						request.ContentLength = allBytes
					}
					ended := make(chan error, 1)
					go func() {
						response, err := transport.RoundTrip(request)
						if err == nil {
							response.Body.Close()
							err = errors.New(response.Status)
						}
						ended <- err
					}()
					if c.n > 0 {
						if _, err := send.Write(artifactA[:c.n]); err != nil {
							t.Fatal(err)
						}
					}
					return func() {
						if end == "connection" {
							cut()
						}
						cancel()
						if err := <-ended; strings.HasPrefix(err.Error(), "201") {
							t.Errorf("the request ended with %v", err)
						}
					}
				})
			})
		}
	}
}

// newTransportToCut returns a transport for HTTP/2, and what cuts its connection, which the test does in
// the end.
func newTransportToCut(t *testing.T) (transport *http.Transport, cut func()) {
	transport = newTransport(t, 2)
	made := make(chan net.Conn, 1)
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil {
			made <- conn
		}
		return conn, err
	}
	cut = func() {
		select {
		case conn := <-made:
			conn.Close()
		default: // cut before
		}
	}
	// A connection of which a stream was just reset does not count as idle, so that the transport keeps
	// it for a while.
	t.Cleanup(cut)
	return transport, cut
}

// TestAbortedUploadGRPC cuts uploads over gRPC.
func TestAbortedUploadGRPC(t *testing.T) {
	s := startServer(t, setup{})
	for _, c := range []struct {
		name   string
		header bool
		n      int
	}{
		{"before the header", false, 0},
		{"behind the header", true, 0},
		{"in metadata.json", true, inMetadata},
		{"in a file", true, inFile},
		{"before the last byte", true, lastByte},
		{"before the end of the stream", true, allBytes},
	} {
		for _, end := range []string{"stream", "connection"} {
			for _, shared := range []bool{false, true} {
				name := c.name + "/" + end
				if shared {
					name += " that is shared"
				}
				t.Run(name, func(t *testing.T) {
					took := int64(c.n)
					if !c.header {
						took = noUpload
					}
					checkAbortedUpload(t, s, took, func(t *testing.T) func() {
						conn, cut := dialGRPC(t, s, shared)
						ctx, cancel := context.WithCancel(t.Context())
						stream, err := cachev1.NewArtifactServiceClient(conn).PutArtifact(ctx)
						if err != nil {
							t.Fatal(err)
						}
						if c.header {
							if err := stream.Send(header(keyA)); err != nil {
								t.Fatal(err)
							}
						}
						for _, chunk := range chunks(artifactA[:c.n], 2000) {
							if err := stream.Send(chunk); err != nil {
								t.Fatal(err)
							}
						}
						return func() {
							if end == "connection" {
								cut()
							}
							cancel()
							if err := stream.RecvMsg(&cachev1.PutArtifactResponse{}); err == nil {
								t.Error("the call succeeded")
							}
						}
					})
				})
			}
		}
	}
}

// dialGRPC returns a gRPC connection, or one that can carry REST requests too, and what cuts it.
func dialGRPC(t *testing.T, s *testServer, shared bool) (conn grpc.ClientConnInterface, cut func()) {
	t.Helper()
	if shared {
		transport, cut := newTransportToCut(t)
		return &sharedConn{transport: transport, url: s.url}, cut
	}
	made := make(chan net.Conn, 16)
	own, err := grpc.NewClient(s.address, security(s.url),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
			if err == nil {
				made <- conn
			}
			return conn, err
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	return own, func() { (<-made).Close() }
}

// noUpload says that an upload is cut before the server knows its key.
const noUpload = -1

// checkAbortedUpload begins an upload of artifactA, waits until the server has taken what was sent of
// it, ends the upload, and checks that this left no trace: no artifact, no temporary file, no line in
// the log above debug, no goroutine, and a key that can be uploaded.
func checkAbortedUpload(t *testing.T, s *testServer, took int64, begin func(t *testing.T) (end func())) {
	t.Helper()
	a := cachetest.Key("a")
	goroutines := runtime.NumGoroutine()
	s.log.clear()
	t.Run("upload", func(t *testing.T) { // so that its connections are closed behind it
		end := begin(t)
		waitUntil(t, "the server has the request", func() bool { return s.Requests() == 1 })
		if took != noUpload {
			waitUntil(t, fmt.Sprintf("the server has taken %d bytes", took), func() bool { return uploaded(s) >= took })
		}
		end()
	})
	waitUntil(t, "no upload is in progress", func() bool { return s.uploadsInProgress() == 0 })
	if took != noUpload {
		waitUntil(t, "the upload's end is logged", func() bool { return len(s.log.find(slog.LevelDebug, "request failed")) > 0 })
	}
	waitUntil(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= goroutines })
	if lines := s.log.find(slog.LevelDebug, ""); len(lines) > 1 || len(lines) == 1 && lines[0].level > slog.LevelDebug {
		t.Errorf("logged %v; want one line at debug level", lines)
	}
	if _, err := s.cache.Stat(t.Context(), a); err != cache.ErrNotFound {
		t.Errorf("an artifact is stored: Stat returned %v", err)
	}
	s.put(t, a, artifactA)
	if err := errors.Join(os.Remove(s.path(a)), os.Remove(strings.TrimSuffix(s.path(a), "zst")+"json")); err != nil {
		t.Fatal(err) // the next upload must find the key free
	}
}

// uploaded returns the size of the one temporary file, -1 if there is none.
func uploaded(s *testServer) int64 {
	entries, err := os.ReadDir(filepath.Join(s.dir, "tmp"))
	if err != nil || len(entries) != 1 {
		return -1
	}
	info, err := entries[0].Info()
	if err != nil {
		return -1
	}
	return info.Size()
}

// TestAbortedDownload leaves downloads midway, and checks that the server keeps no file, no goroutine
// and no word about it.
func TestAbortedDownload(t *testing.T) {
	a := cachetest.Key("a")
	s := startServer(t, setup{})
	// More than sockets buffer, so that the server is in the middle of it.
	content := cachetest.Random(a, 24<<20)
	s.put(t, a, content)

	overHTTP1 := func(end func(*wire)) func(*testing.T, int) {
		return func(t *testing.T, n int) {
			conn := dial(t, s)
			conn.tcp.SetReadBuffer(64 << 10)
			conn.send("GET /v1/artifacts/" + keyA + " HTTP/1.1\r\nHost: x\r\n\r\n")
			if _, err := io.CopyN(io.Discard, conn.in, int64(n)); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, "the server sends", func() bool { return openArtifacts(t, s) > 0 })
			end(conn)
		}
	}
	overHTTP2 := func(end string) func(*testing.T, int) {
		return func(t *testing.T, n int) {
			transport, cut := newTransportToCut(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			response, err := transport.RoundTrip(get(keyA).to(t, s).WithContext(ctx))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.CopyN(io.Discard, response.Body, int64(n)); err != nil {
				t.Fatal(err)
			}
			switch end {
			case "stream":
				cancel()
			case "body":
				response.Body.Close()
			case "connection":
				cut()
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
		}
	}
	overGRPC := func(shared bool, end string) func(*testing.T, int) {
		return func(t *testing.T, n int) {
			conn, cut := dialGRPC(t, s, shared)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			stream, err := cachev1.NewArtifactServiceClient(conn).GetArtifact(ctx, &cachev1.GetArtifactRequest{CacheKey: keyA})
			if err != nil {
				t.Fatal(err)
			}
			for got := 0; got <= n; {
				response, err := stream.Recv()
				if err != nil {
					t.Fatal(err)
				}
				got += 1 + len(response.GetChunk())
			}
			if end == "connection" {
				cut()
			}
			cancel()
			for err == nil {
				_, err = stream.Recv()
			}
			if err == io.EOF {
				t.Error("the call succeeded")
			}
		}
	}
	for _, m := range []struct {
		name  string
		leave func(t *testing.T, n int)
	}{
		{"HTTP1 closed", overHTTP1(func(w *wire) { w.Close() })},
		{"HTTP1 reset", overHTTP1(func(w *wire) {
			w.tcp.SetLinger(0)
			w.Close()
		})},
		{"HTTP2 stream", overHTTP2("stream")},
		{"HTTP2 body", overHTTP2("body")},
		{"HTTP2 connection", overHTTP2("connection")},
		{"gRPC stream", overGRPC(false, "stream")},
		{"gRPC connection", overGRPC(false, "connection")},
		{"gRPC stream on a shared connection", overGRPC(true, "stream")},
		{"gRPC on a shared connection", overGRPC(true, "connection")},
	} {
		for _, n := range []int{0, 1, 1 << 20} {
			t.Run(fmt.Sprintf("%s/behind %d bytes", m.name, n), func(t *testing.T) {
				goroutines := runtime.NumGoroutine()
				s.log.clear()
				t.Run("download", func(t *testing.T) { m.leave(t, n) })
				waitUntil(t, "no file is open", func() bool { return openArtifacts(t, s) == 0 })
				waitUntil(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= goroutines })
				if lines := s.log.find(slog.LevelDebug+1, ""); len(lines) > 0 {
					t.Errorf("logged above debug: %v", lines)
				}
			})
		}
	}
}

// openArtifacts returns how many of this process's open files are artifacts of the server's store.
func openArtifacts(t *testing.T, s *testServer) int {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("this system does not tell which files are open")
	}
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, entry := range entries {
		// What was closed since is of no interest.
		if path, err := os.Readlink(filepath.Join(dir, entry.Name())); err == nil && strings.HasPrefix(path, s.dir) && strings.HasSuffix(path, ".zst") {
			n++
		}
	}
	return n
}

// TestResetCalls has calls that the client resets while they are answered. gRPC may drop such an answer
// without a word, and the call is over all the same.
func TestResetCalls(t *testing.T) {
	s := startServer(t, setup{})
	havingA(t, s)
	request, err := proto.Marshal(&cachev1.GetArtifactRequest{CacheKey: keyA})
	if err != nil {
		t.Fatal(err)
	}
	message := append([]byte{0, 0, 0, 0, byte(len(request))}, request...)
	var clients sync.WaitGroup
	for late := range uint32(8) { // how many calls come before the reset
		conn := dialNative(t, s)
		clients.Go(func() {
			conn.write(func() error { return conn.framer.WriteWindowUpdate(0, 1<<30) }) // so that the rest are answered
			for n := range uint32(5_000) {
				id, err := conn.open(false, "POST", cachev1.ArtifactService_GetArtifact_FullMethodName, callHeader...)
				if err != nil {
					t.Error(err)
					return
				}
				conn.send(id, message, len(message), true)
				if n >= late {
					conn.reset(id - 2*late)
				}
			}
		})
	}
	clients.Wait()
	waitUntil(t, "no call is in flight", func() bool { return s.Requests() == 0 })
}
