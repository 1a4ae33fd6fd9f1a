package server_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/server"
)

// wire is a connection on which a test writes what it likes.
type wire struct {
	t *testing.T
	net.Conn
	in  *bufio.Reader
	tcp *net.TCPConn // below Conn, or the same
}

func dial(t *testing.T, s *testServer) *wire {
	t.Helper()
	conn, err := net.Dial("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	tcp := conn.(*net.TCPConn)
	if strings.HasPrefix(s.url, "https:") {
		config := clientTLS()
		config.ServerName = "127.0.0.1"
		conn = tls.Client(conn, config)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return &wire{t, conn, bufio.NewReader(conn), tcp}
}

// sendUntilCut sends the same part again and again without reading, until the server cuts the connection.
func (w *wire) sendUntilCut(part string) {
	w.t.Helper()
	for range 64 << 20 / len(part) { // more than all buffers on the way
		w.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(w, part); err != nil {
			if netErr, ok := errors.AsType[net.Error](err); ok && netErr.Timeout() {
				w.t.Error("the server does not cut the connection")
			}
			return
		}
	}
	w.t.Error("the server takes all, though nobody reads what it answers")
}

// send sends the parts.
func (w *wire) send(parts ...string) {
	w.t.Helper()
	for _, part := range parts {
		if _, err := io.WriteString(w, part); err != nil {
			w.t.Fatal(err)
		}
	}
}

// want reads a response to a request of a method.
func (w *wire) want(method string, status int, body string) {
	w.t.Helper()
	response, err := http.ReadResponse(w.in, &http.Request{Method: method})
	if err != nil {
		w.t.Fatalf("read the response: %v", err)
	}
	got, err := io.ReadAll(response.Body)
	if response.StatusCode != status || err != nil || string(got) != body {
		w.t.Errorf("got %s with %d bytes %.200q, %v; want %d with %d bytes %.200q", response.Status, len(got), got, err, status, len(body), body)
	}
}

// wantEnd waits until the server closes the connection.
func (w *wire) wantEnd() {
	w.t.Helper()
	if n, err := w.in.Read(make([]byte, 1)); err != io.EOF {
		w.t.Errorf("got %d bytes, %v; want the connection closed", n, err)
	}
}

// chunked is content as a chunked body, in chunks of at most size bytes.
func chunked(content []byte, size int) string {
	var b strings.Builder
	for len(content) > 0 {
		n := min(len(content), size)
		fmt.Fprintf(&b, "%x\r\n%s\r\n", n, content[:n])
		content = content[n:]
	}
	return b.String() + "0\r\n\r\n"
}

// TestBareRequests proves that no header is required but those without which there is no request.
func TestBareRequests(t *testing.T) {
	target := "/v1/artifacts/" + keyA
	content := string(artifactA)
	for _, test := range []struct {
		name, put, body string
	}{
		{"a length", "HTTP/1.1\r\nHost: x\r\nContent-Length: 5641\r\n\r\n", content},
		{"chunks", "HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", chunked(artifactA, 1000)},
		{"one chunk", "HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", chunked(artifactA, len(artifactA))},
		{"chunks of a byte", "HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", chunked(artifactA, 1)},
		{"a chunk with an extension and a trailer", "HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n",
			"1609;name=value\r\n" + content + "\r\n0\r\nX-Sum: 1\r\n\r\n"},
		{"an empty host", "HTTP/1.1\r\nHost:\r\nContent-Length: 5641\r\n\r\n", content},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, setup{})
			conn := dial(t, s)
			conn.send("PUT "+target+" ", test.put, test.body)
			conn.want("PUT", 201, "")
			conn.send("GET " + target + " HTTP/1.1\r\nHost: x\r\n\r\n")
			conn.want("GET", 200, content)
			conn.send("HEAD " + target + " HTTP/1.1\r\nHost: x\r\n\r\n")
			conn.want("HEAD", 200, "")
			stores(keyA, artifactA)(t, s)
		})
	}
	t.Run("HTTP1.0", func(t *testing.T) {
		t.Parallel()
		s := startServer(t, setup{})
		conn := dial(t, s)
		conn.send("PUT "+target+" HTTP/1.0\r\nContent-Length: 5641\r\n\r\n", content)
		conn.want("PUT", 201, "")
		conn.wantEnd()
		conn = dial(t, s)
		conn.send("GET " + target + " HTTP/1.0\r\n\r\n")
		conn.want("GET", 200, content)
		conn.wantEnd()
	})
}

// TestAsterisk proves that a request for the server as a whole is one for a path that there is not.
func TestAsterisk(t *testing.T) {
	s := startServer(t, setup{})
	conn := dial(t, s)
	conn.send("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
	conn.want("OPTIONS", 404, `{"error":"There is nothing at this path: artifacts are at /v1/artifacts/{cache_key}, and /openapi.json describes the API"}`)
}

// refusals are those of uploads that are known before a byte of the body is there.
var refusals = []struct {
	name     string
	key      string
	size     int
	status   int
	code     codes.Code
	reason   string
	sentence string
}{
	{"a bad key", "none", 5641, 400, codes.InvalidArgument, "INVALID_CACHE_KEY", "Invalid cache key: it has 4 characters; a key has 32 to 128 hexadecimal digits"},
	{"a key that is stored", keyA, 5641, 409, codes.AlreadyExists, "ARTIFACT_EXISTS", "Artifact already exists"},
	{"a size over the limit", strings.Repeat("b", 64), 1<<20 + 1, 413, codes.ResourceExhausted, "ARTIFACT_TOO_LARGE", "Artifact too large: the limit is 1.0 MiB (1048576 bytes)"},
}

// TestRefusalBeforeBody proves that what is known to be refused is refused before the body is sent.
func TestRefusalBeforeBody(t *testing.T) {
	for _, r := range refusals {
		t.Run(r.name, func(t *testing.T) {
			s := startServer(t, setup{maxSize: 1 << 20})
			havingA(t, s)
			t.Run("REST over HTTP1", func(t *testing.T) {
				conn := dial(t, s)
				conn.send(fmt.Sprintf("PUT /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", r.key, r.size))
				conn.want("PUT", r.status, `{"error":"`+r.sentence+`"}`)
			})
			t.Run("REST over HTTP2", func(t *testing.T) {
				body, send := io.Pipe()
				defer send.Close()
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				request := put(r.key, []byte{}).to(t, s).WithContext(ctx)
				request.Body, request.ContentLength = body, int64(r.size)
				response, err := newTransport(t, 2).RoundTrip(request)
				if err != nil {
					t.Fatal(err)
				}
				defer response.Body.Close()
				got, err := io.ReadAll(response.Body)
				if err != nil || response.StatusCode != r.status {
					t.Errorf("got %s %s, %v; want %d", response.Status, got, err, r.status)
				}
				checkErrorBody(t, "PUT", response, got, r.sentence)
			})
			for _, m := range grpcMouths() {
				if m.name == "gRPC amid REST" {
					s = startServer(t, setup{maxSize: 1 << 20}) // it counts the connections
					havingA(t, s)
				}
				t.Run(m.name, func(t *testing.T) {
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					stream, err := cachev1.NewArtifactServiceClient(m.grpc(t, s)).PutArtifact(ctx)
					if err != nil {
						t.Fatal(err)
					}
					if err := stream.Send(headerWithSize(r.key, r.size)); err != nil {
						t.Fatal(err)
					}
					checkStatus(t, stream.RecvMsg(&cachev1.PutArtifactResponse{}), r.code, r.reason, r.sentence)
				})
			}
		})
	}
}

// TestRefusedConnection proves that a connection can be used again after a refusal, once the client has
// sent the body that nobody wanted.
func TestRefusedConnection(t *testing.T) {
	for _, r := range refusals {
		t.Run(r.name, func(t *testing.T) {
			s := startServer(t, setup{maxSize: 1 << 20})
			havingA(t, s)
			conn := dial(t, s)
			conn.send(fmt.Sprintf("PUT /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", r.key, r.size))
			conn.send(strings.Repeat("x", r.size))
			conn.want("PUT", r.status, `{"error":"`+r.sentence+`"}`)
			conn.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
			conn.want("GET", 200, `{"status":"ok"}`)
		})
	}
}

// TestDrainBounds proves that a client which was refused and does not stop sending, or does not begin,
// is let go after the time and the bytes that the settings say.
func TestDrainBounds(t *testing.T) {
	const request = "PUT /v1/artifacts/none HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
	const answer = `{"error":"Invalid cache key: it has 4 characters; a key has 32 to 128 hexadecimal digits"}`
	t.Run("silent", func(t *testing.T) {
		s := startServer(t, setup{change: func(c *server.Config) { c.DrainTimeout = 50 * time.Millisecond }})
		conn := dial(t, s)
		conn.send(request)
		conn.want("PUT", 400, answer)
		conn.wantEnd()
	})
	t.Run("slow", func(t *testing.T) {
		s := startServer(t, setup{change: func(c *server.Config) { c.DrainTimeout = 50 * time.Millisecond }})
		conn := dial(t, s)
		conn.send(request)
		conn.want("PUT", 400, answer)
		waitUntil(t, "the connection is closed though something comes all the time", func() bool {
			_, err := conn.Write([]byte("x"))
			return err != nil
		})
	})
	t.Run("endless", func(t *testing.T) {
		s := startServer(t, setup{change: func(c *server.Config) { c.DrainSize = 1 << 20 }})
		conn := dial(t, s)
		conn.send(request)
		sent, block := 0, bytes.Repeat([]byte("x"), 64<<10)
		for {
			n, err := conn.Write(block)
			sent += n
			if err != nil {
				break
			}
		}
		// What is in the sockets' buffers when the server stops reading was sent too.
		if sent < 1<<20 || sent > 100<<20 {
			t.Errorf("the server took %d bytes; want about 1 MiB", sent)
		}
	})
}

// TestCutMessage proves that an upload over gRPC whose stream ends within a message is not stored, also
// where the artifact was whole before.
func TestCutMessage(t *testing.T) {
	frame := func(request *cachev1.PutArtifactRequest) []byte {
		data, err := proto.Marshal(request)
		if err != nil {
			t.Fatal(err)
		}
		return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(data))), data...)
	}
	whole := slices.Concat(frame(header(keyA)), frame(chunk(artifactA)))
	for _, test := range []struct {
		name string
		body []byte
	}{
		{"in the header's length", whole[:3]},
		{"in the header", whole[:20]},
		{"in a chunk's length", whole[:len(frame(header(keyA)))+3]},
		{"in a chunk", whole[:len(whole)-1]},
		{"in a length behind all chunks", append(slices.Clip(whole), 0, 0)},
		{"in a message behind all chunks", append(slices.Clip(whole), 0, 0, 0, 0, 5, 1)},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := startServer(t, setup{})
			conn := &sharedConn{transport: newTransport(t, 2), url: s.url}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, cachev1.ArtifactService_PutArtifact_FullMethodName)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.(*sharedStream).send.Write(test.body); err != nil {
				t.Fatal(err)
			}
			stream.CloseSend()
			if err := stream.RecvMsg(&cachev1.PutArtifactResponse{}); status.Code(err) == codes.OK {
				t.Error("the upload succeeded")
			}
			storesNothing(t, s)
			if lines := s.log.find(slog.LevelDebug+1, ""); len(lines) > 0 {
				t.Errorf("logged above debug: %v", lines)
			}
		})
	}
}
