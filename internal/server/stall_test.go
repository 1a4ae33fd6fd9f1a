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

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/server"
)

const (
	stall       = 300 * time.Millisecond
	tooSlowText = "Upload aborted: the client is too slow: it must send something within 300ms, and 8192 bytes a second over time"
)

func impatient(config *server.Config) {
	config.StallTimeout = stall
	config.MinDownloadRate = 1 << 30 // a stalled download may take as long as the part that is being sent
}

// released waits until the server holds nothing of any request.
func released(t *testing.T, s *testServer) {
	t.Helper()
	waitUntil(t, "no request is in flight", func() bool { return s.Requests() == 0 })
	waitUntil(t, "no upload is in progress", func() bool { return s.uploadsInProgress() == 0 })
	waitUntil(t, "no artifact is open", func() bool { return openArtifacts(t, s) == 0 })
	if lines := s.log.find(slog.LevelInfo, "request failed"); len(lines) > 0 {
		t.Errorf("logged above debug: %v", lines)
	}
}

// TestStalledUpload has clients that begin an upload and then say nothing more, without leaving. They
// are told, and what they had is free again.
func TestStalledUpload(t *testing.T) {
	a := cachetest.Key("a")
	t.Run("HTTP1", func(t *testing.T) {
		for name, sent := range map[string]string{
			"with a length":                  "Content-Length: 5641\r\n\r\n" + string(artifactA[:inFile]),
			"with a length and nothing else": "Content-Length: 5641\r\n\r\n",
			"in chunks":                      "Transfer-Encoding: chunked\r\n\r\n" + chunked(artifactA, 1000)[:4000],
			"in the middle of a chunk size":  "Transfer-Encoding: chunked\r\n\r\n3",
		} {
			t.Run(name, func(t *testing.T) {
				s := startServer(t, setup{change: impatient})
				conn := dial(t, s)
				conn.send("PUT /v1/artifacts/" + keyA + " HTTP/1.1\r\nHost: x\r\n" + sent)
				conn.want("PUT", 408, `{"error":"`+tooSlowText+`"}`)
				conn.wantEnd()
				released(t, s)
				s.put(t, a, artifactA)
			})
		}
	})
	t.Run("HTTP2", func(t *testing.T) {
		s := startServer(t, setup{change: impatient})
		body, send := io.Pipe()
		defer send.Close()
		go send.Write(artifactA[:inFile])
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, s.url+"/v1/artifacts/"+keyA, body)
		if err != nil {
			t.Fatal(err)
		}
		response, err := newTransport(t, 2).RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if response.StatusCode != 408 || string(text) != `{"error":"`+tooSlowText+`"}` || err != nil {
			t.Errorf("got %s %s, %v", response.Status, text, err)
		}
		released(t, s)
		s.put(t, a, artifactA)
	})
	for _, m := range grpcMouths() {
		t.Run(m.name, func(t *testing.T) {
			for _, sent := range []int{0, 1, inFile} {
				s := startServer(t, setup{change: impatient})
				stream, err := cachev1.NewArtifactServiceClient(m.grpc(t, s)).PutArtifact(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if err := stream.Send(header(keyA)); err != nil {
					t.Fatal(err)
				}
				for _, chunk := range chunks(artifactA[:sent], 2000) {
					if err := stream.Send(chunk); err != nil {
						t.Fatal(err)
					}
				}
				err = stream.RecvMsg(&cachev1.PutArtifactResponse{})
				if st := status.Convert(err); st.Code() != codes.DeadlineExceeded || st.Message() != tooSlowText {
					t.Errorf("behind %d bytes: got %v", sent, err)
				}
				released(t, s)
				s.put(t, a, artifactA)
			}
		})
	}
	t.Run("gRPC without a message", func(t *testing.T) {
		s := startServer(t, setup{change: impatient})
		conn, _ := dialGRPC(t, s, false)
		client := cachev1.NewArtifactServiceClient(conn)
		stream, err := client.PutArtifact(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = stream.RecvMsg(&cachev1.PutArtifactResponse{})
		if st := status.Convert(err); st.Code() != codes.DeadlineExceeded || st.Message() != strings.Replace(tooSlowText, "Upload aborted: the", "The", 1) {
			t.Errorf("got %v", err)
		}
		released(t, s)
	})
}

// TestDripOfBytes has a client that sends a byte at a time, often enough not to be silent.
func TestDripOfBytes(t *testing.T) {
	s := startServer(t, setup{change: impatient})
	conn := dial(t, s)
	conn.send("PUT /v1/artifacts/" + keyA + " HTTP/1.1\r\nHost: x\r\nContent-Length: 5641\r\n\r\n")
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		conn.want("PUT", 408, `{"error":"`+tooSlowText+`"}`)
	}()
	drip := time.NewTicker(stall / 20)
	defer drip.Stop()
	for n := 0; ; n++ {
		select {
		case <-drip.C:
			if n < len(artifactA)-1 {
				conn.Write(artifactA[n : n+1]) // may fail once the answer is on its way
			}
			continue
		case <-answered:
		}
		break
	}
	released(t, s)
}

// TestStalledBodyOfNoUpload has clients that declare a body where none is read, and do not send it.
// net/http reads it before it answers.
func TestStalledBodyOfNoUpload(t *testing.T) {
	for _, request := range []string{"GET /v1/artifacts/" + keyA, "GET /healthz", "POST /v1/artifacts/" + keyA, "PUT /v1/artifacts/none", "DELETE /nowhere"} {
		t.Run(request, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, setup{change: impatient})
			conn := dial(t, s)
			conn.send(request + " HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
			if _, err := io.Copy(io.Discard, conn.in); err != nil { // to the end that the server makes
				t.Error(err)
			}
			released(t, s)
		})
	}
}

// TestStalledDownload has clients that ask for an artifact and do not take it, without leaving.
func TestStalledDownload(t *testing.T) {
	a := cachetest.Key("a")
	content := cachetest.Random(a, 24<<20) // more than sockets buffer
	start := func(t *testing.T) *testServer {
		s := startServer(t, setup{change: impatient})
		s.put(t, a, content)
		return s
	}
	t.Run("HTTP1", func(t *testing.T) {
		s := start(t)
		conn := dial(t, s)
		conn.tcp.SetReadBuffer(64 << 10)
		conn.send("GET /v1/artifacts/" + keyA + " HTTP/1.1\r\nHost: x\r\n\r\n")
		if _, err := conn.in.Peek(1); err != nil {
			t.Fatal(err)
		}
		released(t, s)
		if n, err := io.Copy(io.Discard, conn.in); n >= int64(len(content)) {
			t.Errorf("got %d bytes, %v: the whole artifact", n, err)
		}
	})
	// The second one is sent when its handler has returned, and of the third one nothing is sent before.
	for _, request := range []string{"GET /openapi.json", "GET /healthz", "HEAD /v1/artifacts/" + keyA} {
		t.Run("many answers over HTTP1 of "+request, func(t *testing.T) {
			s := startServer(t, setup{change: impatient, sendBuffer: 64 << 10})
			s.put(t, a, artifactA)
			conn := dial(t, s)
			conn.sendUntilCut(strings.Repeat(request+" HTTP/1.1\r\nHost: x\r\n\r\n", 100))
			released(t, s)
		})
	}
	t.Run("HTTP2", func(t *testing.T) {
		s := start(t)
		response, err := newTransport(t, 2).RoundTrip(get(keyA).to(t, s))
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		released(t, s)
		if n, err := io.Copy(io.Discard, response.Body); err == nil {
			t.Errorf("got %d bytes and no error", n)
		}
	})
	for _, m := range grpcMouths() {
		t.Run(m.name, func(t *testing.T) {
			s := start(t)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			stream, err := cachev1.NewArtifactServiceClient(m.grpc(t, s)).GetArtifact(ctx, &cachev1.GetArtifactRequest{CacheKey: keyA})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); err != nil {
				t.Fatal(err)
			}
			released(t, s)
			for err == nil {
				_, err = stream.Recv()
			}
			if err == io.EOF || ctx.Err() != nil {
				t.Errorf("the call ended with %v", err)
			}
		})
	}
}

// slowStore takes longer for each write than a client may.
type slowStore struct{ cache.Store }

type slowUpload struct{ cache.Upload }

func (s slowStore) Create(ctx context.Context, key artifact.Key, size int64) (cache.Upload, error) {
	upload, err := s.Store.Create(ctx, key, size)
	return slowUpload{upload}, err
}

func (u slowUpload) Write(p []byte) (int, error) {
	time.Sleep(2 * stall)
	return u.Upload.Write(p)
}

func (u slowUpload) Commit(ctx context.Context, info artifact.Info) (artifact.Info, error) {
	time.Sleep(2 * stall)
	if err := ctx.Err(); err != nil {
		return artifact.Info{}, fmt.Errorf("the client was taken for gone: %w", err)
	}
	return u.Upload.Commit(ctx, info)
}

// TestServerIsSlow proves that a client does not pay for the time that the server takes.
func TestServerIsSlow(t *testing.T) {
	for _, m := range mouths {
		if m.name == "REST amid gRPC" {
			continue // where a call is silent for longer than it may be
		}
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, setup{store: slowStore{new(cachetest.Memory)}, change: impatient})
			if m.rest != nil {
				request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, s.url+"/v1/artifacts/"+keyA, strings.NewReader(string(artifactA)))
				if err != nil {
					t.Fatal(err)
				}
				response, err := m.rest(t, s).RoundTrip(request)
				if err != nil {
					t.Fatal(err)
				}
				response.Body.Close()
				if response.StatusCode != 201 {
					t.Errorf("got %s", response.Status)
				}
				return
			}
			stream, err := cachev1.NewArtifactServiceClient(m.grpc(t, s)).PutArtifact(t.Context())
			if err == nil {
				err = stream.Send(header(keyA))
			}
			for _, chunk := range chunks(artifactA, 2000) {
				if err == nil {
					err = stream.Send(chunk)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.CloseAndRecv(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestConnectionLimit has more connections than there may be. Each one too many is told, and there is
// room again when one is closed.
func TestConnectionLimit(t *testing.T) {
	const most = 5
	s := startServer(t, setup{change: func(c *server.Config) { c.MaxConnections = most }})
	var open []*wire
	for range most {
		conn := dial(t, s)
		conn.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		conn.want("GET", 200, `{"status":"ok"}`)
		open = append(open, conn)
	}
	for _, request := range []string{"", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} {
		conn := dial(t, s)
		conn.send(request)
		conn.want("GET", 503, `{"error":"The server has too many connections: try again in a bit"}`)
		conn.wantEnd()
	}
	conn, _ := dialGRPC(t, s, false)
	_, err := cachev1.NewArtifactServiceClient(conn).StatArtifact(t.Context(), &cachev1.StatArtifactRequest{CacheKey: keyA})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a gRPC call got %v, want %v", err, codes.Unavailable)
	}
	for _, conn := range open {
		conn.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		conn.want("GET", 200, `{"status":"ok"}`)
		conn.Close()
	}
	waitUntil(t, "there is room again", func() bool {
		conn := dial(t, s)
		defer conn.Close()
		conn.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		response, err := http.ReadResponse(conn.in, nil)
		return err == nil && response.StatusCode == 200
	})
}

// TestHeaderLimits has headers that are too large, and some that do not end.
func TestHeaderLimits(t *testing.T) {
	s := startServer(t, setup{change: func(c *server.Config) {
		c.MaxHeaderSize = 10 << 10
		c.HeaderTimeout = stall
		c.IdleTimeout = stall
	}})
	get := "GET /healthz HTTP/1.1\r\nHost: x\r\n"
	conn := dial(t, s)
	conn.send(get + "X: " + strings.Repeat("x", 9<<10) + "\r\n\r\n")
	conn.want("GET", 200, `{"status":"ok"}`)
	conn.wantEnd() // for it is idle
	conn = dial(t, s)
	conn.send(get + "X: " + strings.Repeat("x", 15<<10) + "\r\n\r\n")
	conn.want("GET", 431, "431 Request Header Fields Too Large")
	for _, sent := range []string{"", "G", get, get + "X: y"} {
		conn = dial(t, s)
		conn.send(sent)
		if _, err := io.Copy(io.Discard, conn.in); err != nil { // to the end that the server makes
			t.Errorf("behind %q: %v", sent, err)
		}
	}
}

// TestIdleConnections has connections that are kept without a request, each after one was answered, or
// none was made.
func TestIdleConnections(t *testing.T) {
	s := startServer(t, setup{change: func(c *server.Config) { c.IdleTimeout = stall }})
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" // and empty settings
	const ping = "\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678"
	for name, sent := range map[string]string{
		"HTTP1":                        "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
		"HTTP1 and a part of the next": "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGE",
		"HTTP2":                        preface,
		"HTTP2 with a ping":            preface + ping,
		"HTTP2 and a part of a frame":  preface + ping[:12],
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := dial(t, s)
			conn.send(sent)
			n, err := io.Copy(io.Discard, conn.in) // to the end that the server makes
			if n == 0 || err != nil {
				t.Errorf("got %d bytes, %v", n, err)
			}
		})
	}
	t.Run("HTTP2 behind a request", func(t *testing.T) {
		t.Parallel()
		transport := newTransport(t, 2)
		for range 3 {
			response, err := transport.RoundTrip(get(keyA).to(t, s))
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
		}
		conn, cut := dialGRPC(t, s, true)
		defer cut()
		stream, err := cachev1.NewArtifactServiceClient(conn).PutArtifact(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * stall) // in which the connection is not idle, for a call is in flight
		if err := stream.Send(header(keyA)); err != nil {
			t.Error(err)
		}
		for _, chunk := range chunks(artifactA, 2000) {
			if err := stream.Send(chunk); err != nil {
				t.Error(err)
			}
		}
		if _, err := stream.CloseAndRecv(); err != nil {
			t.Errorf("a call that took longer than a connection may be idle: %v", err)
		}
	})
}

// pipeListener first accepts a connection that buffers nothing: what is written on it waits for the reader.
type pipeListener struct {
	net.Listener
	pipe chan net.Conn
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.pipe:
		return conn, nil
	default:
		return l.Listener.Accept()
	}
}

// TestUntakenInterimAnswers has clients that do not take what net/http writes before a handler runs, or
// without one, on a connection that was used before.
func TestUntakenInterimAnswers(t *testing.T) {
	for name, request := range map[string][]string{
		"100 Continue":    {"PUT /v1/artifacts/" + keyA + " HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5641\r\n\r\n"},
		"400 Bad Request": {"GET /healthz HTTP/1.1\r\n", "Host: x\r\nHost: y\r\n\r\n"}, // or the connection would count as idle
	} {
		t.Run(name, func(t *testing.T) {
			s, dir := newServer(t, impatient)
			inner, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			end, conn := net.Pipe()
			listener := &pipeListener{inner, make(chan net.Conn, 1)}
			listener.pipe <- end
			ctx, stop := context.WithCancel(context.Background())
			served := make(chan error, 1)
			go func() { served <- s.Serve(ctx, listener) }()
			client := &wire{t, conn, bufio.NewReader(conn), nil}
			client.SetDeadline(time.Now().Add(patience))
			client.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
			client.want("GET", 200, `{"status":"ok"}`)
			client.send(request...)
			// The server does not read while it writes, so this waits until it gives up one of the two.
			if _, err := io.WriteString(client, strings.Repeat("x", 10<<10)); !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("the server does not close the connection: %v", err)
			}
			waitUntil(t, "no request is in flight", func() bool { return s.Requests() == 0 })
			if entries, err := os.ReadDir(filepath.Join(dir, "tmp")); len(entries) > 0 || err != nil {
				t.Errorf("uploads in progress: %v, %v", entries, err)
			}
			conn.Close()
			stop()
			if err := <-served; err != nil {
				t.Errorf("Serve returned %v", err)
			}
		})
	}
}
