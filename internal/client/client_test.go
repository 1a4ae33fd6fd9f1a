package client_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// basicToken is the header of the name x and the password TOKEN.
const basicToken = "Basic eDpUT0tFTg=="

func testKey(t *testing.T) artifact.Key {
	t.Helper()
	key, err := artifact.ParseKey("0123456789abcdef0123456789abcdef")
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func parse(t *testing.T, text string) *url.URL {
	t.Helper()
	server, err := client.ParseServer(text)
	if err != nil {
		t.Fatal(err)
	}
	return server
}

func newREST(t *testing.T, text string) *client.REST {
	t.Helper()
	rest := client.NewREST(parse(t, text), nil)
	t.Cleanup(func() { rest.Close() })
	return rest
}

func newGRPC(t *testing.T, text string) *client.GRPC {
	t.Helper()
	conn, err := client.NewGRPC(parse(t, text), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestParseServer(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"http://127.0.0.1:8080":          "",
		"https://x:TOKEN@host/some/path": "",
		"http://[::1]:8080/":             "",
		"":                               "it does not begin with http:// or https://",
		"127.0.0.1:8080":                 "first path segment in URL cannot contain colon",
		"localhost:8080":                 "it does not begin with http:// or https://",
		"ftp://host":                     "it does not begin with http:// or https://",
		"http://":                        "it names no host",
		"http://:8080":                   "it names no host",
		"http://host?key=1":              "it has something behind its path",
		"http://host?":                   "it has something behind its path",
		"http://host#x":                  "it has something behind its path",
		"http://x:TOKEN@ho st":           `invalid character " " in host name`,
		"http://x:TOKEN@host:port":       `invalid port ":port" after host`,
	} {
		_, err := client.ParseServer(text)
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v", text, err)
			}
			continue
		}
		want = "not the URL of a server, such as http://127.0.0.1:8080: " + want
		if err == nil || err.Error() != want {
			t.Errorf("%s: error %v, want %s", text, err, want)
		}
	}
}

// The URL's path goes in front of every path of the API, its name and password into a header.
func TestRESTUsesTheWholeURL(t *testing.T) {
	t.Parallel()
	var requests []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		requests = append(requests, r.Method+" "+r.URL.String())
		if got := r.Header.Get("Authorization"); got != basicToken {
			t.Errorf("%s: Authorization %q, want %q", r.URL, got, basicToken)
		}
		switch {
		case r.Method == http.MethodPut:
			w.WriteHeader(http.StatusCreated)
		case strings.HasSuffix(r.URL.Path, "/files"), strings.HasSuffix(r.URL.Path, "/metadata"):
			io.WriteString(w, "{}")
		default:
			w.Header().Set("X-Artifact-Hash", strings.Repeat("0", 64))
		}
	}))
	defer server.Close()
	for _, path := range []string{"/some/prefix", "/some/prefix/"} {
		requests = nil
		rest := newREST(t, strings.Replace(server.URL, "://", "://x:TOKEN@", 1)+path)
		if err := rest.Put(t.Context(), testKey(t), 1, strings.NewReader("a")); err != nil {
			t.Error(err)
		}
		d, err := rest.Get(t.Context(), testKey(t), 0, artifact.Digest{})
		if err != nil {
			t.Fatal(err)
		}
		d.Body.Close()
		if _, err := rest.Stat(t.Context(), testKey(t)); err != nil {
			t.Error(err)
		}
		for _, err := range rest.Files(t.Context(), testKey(t)) {
			t.Error(err)
		}
		if err := rest.Ready(t.Context()); err != nil {
			t.Error(err)
		}
		want := []string{
			"PUT /some/prefix/v1/artifacts/0123456789abcdef0123456789abcdef",
			"GET /some/prefix/v1/artifacts/0123456789abcdef0123456789abcdef",
			"GET /some/prefix/v1/artifacts/0123456789abcdef0123456789abcdef/metadata",
			"GET /some/prefix/v1/artifacts/0123456789abcdef0123456789abcdef/files?page_size=10000&page_token=",
			"GET /some/prefix/readyz",
		}
		if !slices.Equal(requests, want) {
			t.Errorf("%s: requests %q, want %q", path, requests, want)
		}
	}
}

func TestRESTErrors(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, answer string
		status       int
		means        error
		temporary    bool
		want         string
	}{
		{"miss", "404 Not Found\r\n\r\n{\"error\":\"Artifact not found\"}", 404, client.ErrNotFound, false,
			"the server answered 404 Not Found: Artifact not found"},
		{"unknown path", "404 Not Found\r\n\r\n{\"error\":\"There is nothing at this path\"}", 404, nil, false,
			"the server answered 404 Not Found: There is nothing at this path"},
		{"a proxy's miss", "404 Not Found\r\n\r\n<h1>404</h1>", 404, nil, false,
			"the server answered 404 Not Found, but not as a polykit-cache does: is this its address?"},
		{"exists", "409 Conflict\r\n\r\n{\"error\":\"Artifact already exists\"}", 409, client.ErrExists, false,
			"the server answered 409 Conflict: Artifact already exists"},
		{"overloaded", "503 Service Unavailable\r\n\r\n{\"error\":\"The server is overloaded: try again later\"}", 503, nil, true,
			"the server answered 503 Service Unavailable: The server is overloaded: try again later"},
		{"a proxy's error", "502 Bad Gateway\r\n\r\n", 502, nil, true,
			"the server answered 502 Bad Gateway, but not as a polykit-cache does: is this its address?"},
		{"lines", "422 Unprocessable Entity\r\n\r\n{\"error\":\"one\\ntwo\\u001b[2J\"}", 422, nil, false,
			"the server answered 422 Unprocessable Entity: one two [2J"},
		{"elsewhere", "301 Moved Permanently\r\nLocation: https://host/\r\n\r\n", 301, nil, false,
			"the server answered 301 Moved Permanently: it is at another address, https://host/"},
		{"not created", "200 OK\r\n\r\n", 200, nil, false,
			"the server answered 200 OK, but not as a polykit-cache does: is this its address?"},
		{"a status without a name", "599 What\r\n\r\n", 599, nil, false,
			"the server answered 599, but not as a polykit-cache does: is this its address?"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			err := newREST(t, answer(t, "HTTP/1.1 "+test.answer)).Put(t.Context(), testKey(t), 1, strings.NewReader("a"))
			refused, ok := errors.AsType[*client.Error](err)
			if !ok {
				t.Fatalf("error %v", err)
			}
			if refused.Error() != test.want || refused.Status != test.status || refused.Temporary() != test.temporary {
				t.Errorf("got %d, temporary %v, %s, want %d, temporary %v, %s",
					refused.Status, refused.Temporary(), refused, test.status, test.temporary, test.want)
			}
			for _, means := range []error{client.ErrNotFound, client.ErrExists} {
				if errors.Is(err, means) != (means == test.means) {
					t.Errorf("errors.Is(%v) is %v", means, errors.Is(err, means))
				}
			}
		})
	}
}

// answer starts a server that answers every connection with the same text as soon as it has read
// the header of the request, reads on to the end, and closes. It returns its URL.
func answer(t *testing.T, text string) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				request := bufio.NewReader(conn)
				for line := ""; line != "\r\n"; {
					if line, err = request.ReadString('\n'); err != nil {
						return
					}
				}
				io.WriteString(conn, text)
				if tcp := conn.(*net.TCPConn); !strings.Contains(text, "Content-Length") {
					tcp.CloseWrite()
				}
				io.Copy(io.Discard, request)
			}()
		}
	}()
	return "http://" + listener.Addr().String()
}

// A server may refuse an upload before it has it: with and without Expect, and also if it answers
// what it can't know, that it wants the body, before.
func TestRESTReadsAnEarlyRefusal(t *testing.T) {
	t.Parallel()
	refusal := "HTTP/1.1 409 Conflict\r\nContent-Length: 35\r\n\r\n{\"error\":\"Artifact already exists\"}"
	for name, test := range map[string]struct {
		answer string
		size   int64
	}{
		"small":             {refusal, 1 << 20},
		"large":             {refusal, 64 << 20},
		"large and wanted":  {"HTTP/1.1 100 Continue\r\n\r\n" + refusal, 64 << 20},
		"connection closes": {strings.Replace(refusal, "\r\n", "\r\nConnection: close\r\n", 1), 64 << 20},
		"unknown size":      {refusal, client.UnknownSize},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			size := test.size
			if size == client.UnknownSize {
				size = 64 << 20
			}
			body := io.LimitReader(zeros{}, size)
			if err := newREST(t, answer(t, test.answer)).Put(t.Context(), testKey(t), test.size, body); !errors.Is(err, client.ErrExists) {
				t.Errorf("error %v, want %v", err, client.ErrExists)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestRESTPutSends(t *testing.T) {
	t.Parallel()
	var header http.Header
	var length int64
	var body []byte
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header, length = r.Header, r.ContentLength
		body, _ = io.ReadAll(r.Body)
		w.WriteHeader(http.StatusCreated)
	}))
	defer server.Close()
	for _, test := range []struct {
		name       string
		size, sent int64
		expect     string
	}{
		{"nothing", 0, 0, ""},
		{"1 MiB", 1 << 20, 1 << 20, ""},
		{"more", 1<<20 + 1, 1<<20 + 1, "100-continue"},
		{"unknown", client.UnknownSize, 3, "100-continue"},
		{"unknown and nothing", client.UnknownSize, 0, "100-continue"},
	} {
		t.Run(test.name, func(t *testing.T) {
			content := bytes.Repeat([]byte{'a'}, int(test.sent))
			if err := newREST(t, server.URL).Put(t.Context(), testKey(t), test.size, bytes.NewReader(content)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(body, content) {
				t.Errorf("%d bytes arrived, want %d", len(body), len(content))
			}
			if length != test.size {
				t.Errorf("Content-Length %d, want %d", length, test.size)
			}
			if got := header.Get("Expect"); got != test.expect {
				t.Errorf("Expect %q, want %q", got, test.expect)
			}
		})
	}
}

func TestRESTGetAsksForTheRest(t *testing.T) {
	t.Parallel()
	content := []byte("0123456789")
	hash, err := artifact.ParseDigest("84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882")
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Artifact-Hash", hash.String())
		w.Header().Set("ETag", `"`+hash.String()+`"`)
		if r.Header.Get("Range") == "bytes=8-" { // as if something knew Range, but not If-Range
			r.Header.Del("If-Range")
		}
		http.ServeContent(w, r, "", timestamppb.Now().AsTime(), bytes.NewReader(content))
	}))
	defer server.Close()
	for _, test := range []struct {
		name   string
		offset int64
		hash   artifact.Digest
		want   string
	}{
		{"all", 0, artifact.Digest{}, "0123456789"},
		{"the rest", 4, hash, "456789"},
		{"the rest of another one", 4, artifact.Digest{1}, "0123456789"},
		{"the rest of another one, without If-Range", 8, artifact.Digest{1}, "0123456789"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, err := newREST(t, server.URL).Get(t.Context(), testKey(t), test.offset, test.hash)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Body.Close()
			got, err := io.ReadAll(d.Body)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != test.want || d.Size != 10 || d.Hash != hash || d.Offset != int64(10-len(test.want)) {
				t.Errorf("got %q, %d, %s, %d", got, d.Size, d.Hash, d.Offset)
			}
		})
	}
}

func TestRESTMalformedAnswers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ answer, want string }{
		"no hash": {"HTTP/1.1 200 OK\r\n\r\nabc",
			" sent an answer whose X-Artifact-Hash is not 64 lower-case hexadecimal digits: is this the address of a polykit-cache?"},
		"no range": {"HTTP/1.1 206 Partial Content\r\nX-Artifact-Hash: " + strings.Repeat("0", 64) + "\r\n\r\nabc",
			`the server answered with the malformed range ""`},
		"another unit": {"HTTP/1.1 206 Partial Content\r\nContent-Range: lines 1-2/3\r\nX-Artifact-Hash: " + strings.Repeat("0", 64) + "\r\n\r\nabc",
			`the server answered with the malformed range "lines 1-2/3"`},
		"no HTTP": {"SSH-2.0-OpenSSH_9.9\r\n", `malformed HTTP response "SSH-2.0-OpenSSH_9.9"; try again`},
		"nothing": {"", " broke: EOF; try again"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := newREST(t, answer(t, test.answer)).Get(t.Context(), testKey(t), 1, artifact.Digest{})
			if err == nil || !strings.HasSuffix(err.Error(), test.want) {
				t.Errorf("error %v, want %s", err, test.want)
			}
		})
	}
	t.Run("metadata", func(t *testing.T) {
		t.Parallel()
		_, err := newREST(t, answer(t, "HTTP/1.1 200 OK\r\n\r\n<html>")).Stat(t.Context(), testKey(t))
		if err == nil || !strings.HasSuffix(err.Error(), " sent an answer that can't be understood: is this the address of a polykit-cache?") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("short", func(t *testing.T) {
		t.Parallel()
		// answer would not close after "Content-Length".
		url := answer(t, "HTTP/1.1 200 OK\r\ncontent-length: 10\r\nX-Artifact-Hash: "+strings.Repeat("0", 64)+"\r\n\r\nabc")
		d, err := newREST(t, url).Get(t.Context(), testKey(t), 0, artifact.Digest{})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Body.Close()
		got, err := io.ReadAll(d.Body)
		if broken, ok := errors.AsType[*client.TransportError](err); !ok || !broken.Reached || broken.Server != url || !errors.Is(err, io.ErrUnexpectedEOF) || string(got) != "abc" {
			t.Errorf("got %q, %v", got, err)
		}
	})
}

// fakeService answers gRPC calls with what a test gives it.
type fakeService struct {
	cachev1.UnimplementedArtifactServiceServer
	get  func(*cachev1.GetArtifactRequest, grpc.ServerStreamingServer[cachev1.GetArtifactResponse]) error
	stat func(context.Context) error
	page func(token string, size int32) *cachev1.ListArtifactFilesResponse
}

func (f *fakeService) GetArtifact(request *cachev1.GetArtifactRequest, stream grpc.ServerStreamingServer[cachev1.GetArtifactResponse]) error {
	return f.get(request, stream)
}

func (f *fakeService) StatArtifact(ctx context.Context, _ *cachev1.StatArtifactRequest) (*cachev1.StatArtifactResponse, error) {
	return &cachev1.StatArtifactResponse{}, f.stat(ctx)
}

func (f *fakeService) ListArtifactFiles(_ context.Context, request *cachev1.ListArtifactFilesRequest) (*cachev1.ListArtifactFilesResponse, error) {
	return f.page(request.GetPageToken(), request.GetPageSize()), nil
}

// serve starts a gRPC server and returns its host and port.
func (f *fakeService) serve(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	cachev1.RegisterArtifactServiceServer(server, f)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

func TestGRPCSendsThePassword(t *testing.T) {
	t.Parallel()
	var got []string
	service := &fakeService{stat: func(ctx context.Context) error {
		md, _ := metadata.FromIncomingContext(ctx)
		got = md.Get("authorization")
		return nil
	}}
	address := service.serve(t)
	for server, want := range map[string][]string{
		"http://x:TOKEN@" + address:       {basicToken},
		"http://x:TOKEN@" + address + "/": {basicToken},
		"http://t%3A%2F@" + address:       {"Basic " + base64.StdEncoding.EncodeToString([]byte("t:/:"))},
		"http://" + address:               nil,
	} {
		if _, err := newGRPC(t, server).Stat(t.Context(), testKey(t)); err != nil {
			t.Error(err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: authorization %q, want %q", server, got, want)
		}
	}
}

func TestGRPCHasNoPath(t *testing.T) {
	t.Parallel()
	_, err := client.NewGRPC(parse(t, "http://127.0.0.1:8080/some/prefix"), nil)
	want := "the URL of a server has no path over gRPC: give http://host:port or https://host:port"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

func TestGRPCErrors(t *testing.T) {
	t.Parallel()
	refusal := func(code codes.Code, sentence, reason string) error {
		st, err := status.New(code, sentence).WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: "polykit-cache"})
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	for _, test := range []struct {
		name      string
		err       error
		means     error
		temporary bool
		want      string
	}{
		{"miss", refusal(codes.NotFound, "Artifact not found", "ARTIFACT_NOT_FOUND"), client.ErrNotFound, false,
			"the server answered NotFound (ARTIFACT_NOT_FOUND): Artifact not found"},
		{"not the server's miss", status.Error(codes.NotFound, "no route"), nil, false,
			"the server answered NotFound: no route"},
		{"exists", refusal(codes.AlreadyExists, "Artifact already exists", "ARTIFACT_EXISTS"), client.ErrExists, false,
			"the server answered AlreadyExists (ARTIFACT_EXISTS): Artifact already exists"},
		{"overloaded", refusal(codes.Unavailable, "The server is overloaded: try again later", "OVERLOADED"), nil, true,
			"the server answered Unavailable (OVERLOADED): The server is overloaded: try again later"},
		{"lines", refusal(codes.InvalidArgument, "one\ntwo", "VERIFICATION_FAILED"), nil, false,
			"the server answered InvalidArgument (VERIFICATION_FAILED): one two"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			address := (&fakeService{stat: func(context.Context) error { return test.err }}).serve(t)
			_, err := newGRPC(t, "http://"+address).Stat(t.Context(), testKey(t))
			refused, ok := errors.AsType[*client.Error](err)
			if !ok {
				t.Fatalf("error %v", err)
			}
			if refused.Error() != test.want || refused.Temporary() != test.temporary || refused.Code != status.Code(test.err) {
				t.Errorf("got %v, temporary %v, %s, want %s", refused.Code, refused.Temporary(), refused, test.want)
			}
			for _, means := range []error{client.ErrNotFound, client.ErrExists} {
				if errors.Is(err, means) != (means == test.means) {
					t.Errorf("errors.Is(%v) is %v", means, errors.Is(err, means))
				}
			}
		})
	}
}

// A download that ends early, or does not end, must not look like a whole one.
func TestGRPCBrokenDownloads(t *testing.T) {
	t.Parallel()
	info := &cachev1.Artifact{Hash: strings.Repeat("0", 64), Size: 10}
	chunk := func(data string) *cachev1.GetArtifactResponse {
		return &cachev1.GetArtifactResponse{Payload: &cachev1.GetArtifactResponse_Chunk{Chunk: []byte(data)}}
	}
	for name, test := range map[string]struct {
		messages []*cachev1.GetArtifactResponse
		err      error
		want     string
	}{
		"short":          {[]*cachev1.GetArtifactResponse{chunk("abc")}, nil, "broke: unexpected EOF; try again"},
		"long":           {[]*cachev1.GetArtifactResponse{chunk("0123456789a")}, nil, "broke: more bytes than the artifact has; try again"},
		"cut":            {[]*cachev1.GetArtifactResponse{chunk("abc")}, status.Error(codes.Unavailable, "going away"), "broke: going away; try again"},
		"server's fault": {[]*cachev1.GetArtifactResponse{chunk("abc")}, status.Error(codes.Internal, "internal error"), "broke: internal error; try again"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := (&fakeService{get: func(_ *cachev1.GetArtifactRequest, stream grpc.ServerStreamingServer[cachev1.GetArtifactResponse]) error {
				stream.Send(&cachev1.GetArtifactResponse{Payload: &cachev1.GetArtifactResponse_Artifact{Artifact: info}})
				for _, message := range test.messages {
					stream.Send(message)
				}
				return test.err
			}}).serve(t)
			d, err := newGRPC(t, "http://"+address).Get(t.Context(), testKey(t), 0, artifact.Digest{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Body.Close()
			_, err = io.ReadAll(d.Body)
			want := "the connection to http://" + address + " " + test.want
			if err == nil || err.Error() != want {
				t.Errorf("error %v, want %s", err, want)
			}
		})
	}

	t.Run("no artifact first", func(t *testing.T) {
		t.Parallel()
		address := (&fakeService{get: func(_ *cachev1.GetArtifactRequest, stream grpc.ServerStreamingServer[cachev1.GetArtifactResponse]) error {
			return stream.Send(chunk("abc"))
		}}).serve(t)
		_, err := newGRPC(t, "http://"+address).Get(t.Context(), testKey(t), 0, artifact.Digest{})
		if err == nil || !strings.HasSuffix(err.Error(), " sent an answer that can't be understood: is this the address of a polykit-cache?") {
			t.Errorf("error %v", err)
		}
	})
}

// Over gRPC the offset may lie behind the end of an artifact that has replaced a larger one.
func TestGRPCGetOfASmallerArtifact(t *testing.T) {
	t.Parallel()
	var offsets []int64
	address := (&fakeService{get: func(request *cachev1.GetArtifactRequest, stream grpc.ServerStreamingServer[cachev1.GetArtifactResponse]) error {
		offsets = append(offsets, request.GetOffset())
		if request.GetOffset() > 0 {
			return status.Error(codes.OutOfRange, "offset is 100, but the artifact has 3 bytes")
		}
		stream.Send(&cachev1.GetArtifactResponse{Payload: &cachev1.GetArtifactResponse_Artifact{
			Artifact: &cachev1.Artifact{Hash: strings.Repeat("0", 64), Size: 3},
		}})
		return stream.Send(&cachev1.GetArtifactResponse{Payload: &cachev1.GetArtifactResponse_Chunk{Chunk: []byte("abc")}})
	}}).serve(t)
	d, err := newGRPC(t, "http://"+address).Get(t.Context(), testKey(t), 100, artifact.Digest{1})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Body.Close()
	got, err := io.ReadAll(d.Body)
	if err != nil || string(got) != "abc" || d.Offset != 0 || !slices.Equal(offsets, []int64{100, 0}) {
		t.Errorf("got %q from %d, %v, offsets %d", got, d.Offset, err, offsets)
	}
}

// All pages are asked for, the largest that there are.
func TestFilesOfAllPages(t *testing.T) {
	t.Parallel()
	page := func(token string, size int32) *cachev1.ListArtifactFilesResponse {
		if size != 10_000 {
			t.Errorf("page size %d, want 10000", size)
		}
		switch token {
		case "":
			return &cachev1.ListArtifactFilesResponse{Files: []*client.File{{Path: "a"}, {Path: "b"}}, NextPageToken: "b&c=d"}
		case "b&c=d":
			return &cachev1.ListArtifactFilesResponse{Files: []*client.File{{Path: "c"}}}
		}
		t.Errorf("page token %q", token)
		return nil
	}
	rest := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var size int32
		fmt.Sscan(r.FormValue("page_size"), &size)
		text, err := client.JSON(page(r.FormValue("page_token"), size))
		if err != nil {
			t.Error(err)
		}
		w.Write(text)
	}))
	defer rest.Close()
	check := func(name string, files func(yield func(*client.File, error) bool)) {
		var paths []string
		for file, err := range files {
			if err != nil {
				t.Errorf("%s: %v", name, err)
				break
			}
			paths = append(paths, file.GetPath())
		}
		if !slices.Equal(paths, []string{"a", "b", "c"}) {
			t.Errorf("%s: paths %q", name, paths)
		}
	}
	check("REST", newREST(t, rest.URL).Files(t.Context(), testKey(t)))
	check("gRPC", newGRPC(t, "http://"+(&fakeService{page: page}).serve(t)).Files(t.Context(), testKey(t)))
}

func TestJSON(t *testing.T) {
	t.Parallel()
	got, err := client.JSON(&client.File{Path: "a <b>", Size: 1 << 60})
	if want := `{"path":"a <b>","hash":"","size":"1152921504606846976"}`; err != nil || string(got) != want {
		t.Errorf("got %s, %v, want %s", got, err, want)
	}
}
