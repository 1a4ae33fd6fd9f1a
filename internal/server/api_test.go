package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
)

// apiCase is one thing that the server is asked, and what it answers, in the words of both protocols.
// It is asked through every mouth, each time of a server of its own.
type apiCase struct {
	name string

	// setup returns how the server differs from the usual one. It may be nil.
	setup func() setup
	// given prepares what the server has stored. It may be nil.
	given func(t *testing.T, s *testServer)

	// rest is the request over REST, nil if the case is one of gRPC only.
	rest *restRequest
	// grpc is the call over gRPC, nil if the case is one of REST only.
	grpc grpcCall

	// status is expected over REST.
	status int
	// header is expected over REST; what is empty must not be there.
	header map[string]string
	// body is expected over REST if the status is not an error.
	body []byte

	// code and reason are expected over gRPC.
	code   codes.Code
	reason string

	// sentence is expected of an error, over both protocols.
	sentence string
	// restSentence is expected over REST if it is not the same.
	restSentence string

	// answer checks what a call over gRPC returned if it succeeded. It may be nil.
	answer func(t *testing.T, got answer)
	// logged is part of a line that must be logged as an error. If it is empty there must be none.
	logged string
	// then checks what is the case afterwards. It may be nil.
	then func(t *testing.T, s *testServer)
}

// restRequest is a request over REST.
type restRequest struct {
	method string
	target string // path and query as they stand on the wire
	header map[string]string
	body   []byte
	// undeclared says that the length of the body is not told beforehand.
	undeclared bool
}

// grpcCall makes a call.
type grpcCall func(ctx context.Context, client cachev1.ArtifactServiceClient) (answer, error)

// answer is what any of the calls returned.
type answer struct {
	artifact *cachev1.Artifact
	chunks   [][]byte
	files    []*cachev1.ArtifactFile
	next     string // page token
}

func (a answer) content() []byte { return bytes.Join(a.chunks, nil) }

// TestAPI holds the server to its contract over every mouth. TLS makes little difference, so that of the
// mouths of a server that speaks it one for REST and one for gRPC take turns.
func TestAPI(t *testing.T) {
	for i, c := range slices.Concat(putCases(), getCases(), methodCases(), managementCases(), deleteCases(), routeCases(), faultCases()) {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for _, m := range append(slices.Clone(mouths), tlsMouths[2*(i%2):][:2]...) {
				if m.rest != nil && c.rest != nil || m.grpc != nil && c.grpc != nil {
					t.Run(m.name, func(t *testing.T) { c.run(t, m) })
				}
			}
		})
	}
}

func (c *apiCase) run(t *testing.T, m mouth) {
	var changes setup
	if c.setup != nil {
		changes = c.setup()
	}
	changes.tls = m.tls
	s := startServer(t, changes)
	if c.given != nil {
		c.given(t, s)
	}
	if m.rest != nil {
		response, body := c.rest.do(t, s, m.rest(t, s))
		c.checkREST(t, response, body)
	} else {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		got, err := c.grpc(ctx, cachev1.NewArtifactServiceClient(m.grpc(t, s)))
		c.checkGRPC(t, got, err)
	}
	if c.then != nil {
		c.then(t, s)
	}
	if c.logged != "" { // when the request has ended
		waitUntil(t, "it is logged", func() bool { return len(s.log.find(slog.LevelError, "")) > 0 })
	}
	errors := s.log.find(slog.LevelError, "")
	if c.logged == "" && len(errors) > 0 || c.logged != "" && (len(errors) != 1 || !strings.Contains(errors[0].text, c.logged)) {
		t.Errorf("logged as errors: %v; want %q", errors, c.logged)
	}
}

// to returns the request to a server.
func (r *restRequest) to(t *testing.T, s *testServer) *http.Request {
	t.Helper()
	path, query, _ := strings.Cut(r.target, "?")
	unescaped, err := url.PathUnescape(path)
	if err != nil {
		t.Fatal(err)
	}
	scheme, _, _ := strings.Cut(s.url, ":")
	request := (&http.Request{
		Method: r.method,
		URL:    &url.URL{Scheme: scheme, Host: s.address, Path: unescaped, RawPath: path, RawQuery: query},
		Header: http.Header{},
	}).WithContext(t.Context())
	if r.body != nil {
		request.Body = io.NopCloser(bytes.NewReader(r.body))
		request.ContentLength = int64(len(r.body))
		if r.undeclared {
			request.ContentLength = -1
		}
	}
	for name, value := range r.header {
		request.Header.Set(name, value)
	}
	return request
}

// do sends the request, and returns the response with its body.
func (r *restRequest) do(t *testing.T, s *testServer, transport http.RoundTripper) (*http.Response, []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	response, err := transport.RoundTrip(r.to(t, s).WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, body
}

func (c *apiCase) checkREST(t *testing.T, response *http.Response, body []byte) {
	t.Helper()
	if response.StatusCode != c.status {
		t.Errorf("status is %d with the body %.300s; want %d", response.StatusCode, body, c.status)
	}
	for name, want := range c.header {
		if got := response.Header.Get(name); got != want {
			t.Errorf("header %s is %q; want %q", name, got, want)
		}
	}
	if got := response.Header.Get("Content-Encoding"); got != "" {
		t.Errorf("header Content-Encoding is %q; want none", got)
	}
	if c.sentence == "" {
		if !bytes.Equal(body, c.body) {
			t.Errorf("the body has %d bytes that begin with %.300q; want %d bytes that begin with %.300q", len(body), body, len(c.body), c.body)
		}
		return
	}
	want := c.sentence
	if c.restSentence != "" {
		want = c.restSentence
	}
	checkErrorBody(t, c.rest.method, response, body, want)
}

// checkErrorBody holds a response to the form of every error over REST.
func checkErrorBody(t *testing.T, method string, response *http.Response, body []byte, sentence string) {
	t.Helper()
	if got := response.Header.Get("Content-Type"); got != "application/json" {
		t.Errorf("header Content-Type is %q; want application/json", got)
	}
	if method == http.MethodHead {
		if len(body) > 0 {
			t.Errorf("the body of an answer to HEAD is %q; want none", body)
		}
		return
	}
	if got := response.Header.Get("Content-Length"); got != strconv.Itoa(len(body)) {
		t.Errorf("header Content-Length is %q; want %d", got, len(body))
	}
	var members map[string]any
	if err := json.Unmarshal(body, &members); err != nil || len(members) != 1 || members["error"] != sentence {
		t.Errorf("the body is %s (%v); want only the member \"error\" that says %q", body, err, sentence)
	}
}

func (c *apiCase) checkGRPC(t *testing.T, got answer, err error) {
	t.Helper()
	if c.code != codes.OK {
		checkStatus(t, err, c.code, c.reason, c.sentence)
		return
	}
	if err != nil {
		t.Errorf("the call failed: %v", err)
	} else if c.answer != nil {
		c.answer(t, got)
	}
}

// checkStatus holds an error to the form of every error over gRPC. Only those that are gRPC's own have
// no reason.
func checkStatus(t *testing.T, err error, code codes.Code, reason, sentence string) {
	t.Helper()
	got := status.Convert(err)
	if got.Code() != code || got.Message() != sentence {
		t.Errorf("the status is %v %q; want %v %q", got.Code(), got.Message(), code, sentence)
	}
	if details := got.Details(); reason == "" && len(details) == 0 {
		return
	} else if len(details) != 1 {
		t.Errorf("the status has the details %v; want one", details)
	} else if info, ok := details[0].(*errdetails.ErrorInfo); !ok || info.Reason != reason || info.Domain != "polykit-cache" || len(info.Metadata) > 0 {
		t.Errorf("the status has the details %v; want the reason %s of the domain polykit-cache", details, reason)
	}
}

// The requests and calls that the cases make.

func put(key string, body []byte) *restRequest {
	return &restRequest{method: http.MethodPut, target: "/v1/artifacts/" + key, body: body}
}

func putUndeclared(key string, body []byte) *restRequest {
	return &restRequest{method: http.MethodPut, target: "/v1/artifacts/" + key, body: body, undeclared: true}
}

// get is a GET of an artifact. The header is given as pairs of name and value.
func get(key string, header ...string) *restRequest {
	r := &restRequest{method: http.MethodGet, target: "/v1/artifacts/" + key, header: map[string]string{}}
	for i := 0; i < len(header); i += 2 {
		r.header[header[i]] = header[i+1]
	}
	return r
}

func head(key string, header ...string) *restRequest {
	r := get(key, header...)
	r.method = http.MethodHead
	return r
}

// upload sends the messages and then asks for the answer.
func upload(messages ...*cachev1.PutArtifactRequest) grpcCall {
	return func(ctx context.Context, client cachev1.ArtifactServiceClient) (answer, error) {
		stream, err := client.PutArtifact(ctx)
		if err != nil {
			return answer{}, err
		}
		for _, message := range messages {
			if err := stream.Send(message); err == io.EOF {
				break // CloseAndRecv says why
			} else if err != nil {
				return answer{}, err
			}
		}
		response, err := stream.CloseAndRecv()
		return answer{artifact: response.GetArtifact()}, err
	}
}

// uploadAll sends a header and then content in chunks of a good size.
func uploadAll(key string, content []byte) grpcCall {
	messages := []*cachev1.PutArtifactRequest{header(key)}
	for part := range slices.Chunk(content, 256<<10) {
		messages = append(messages, chunk(part))
	}
	return upload(messages...)
}

func header(key string) *cachev1.PutArtifactRequest {
	return &cachev1.PutArtifactRequest{Payload: &cachev1.PutArtifactRequest_Header{Header: &cachev1.PutArtifactHeader{CacheKey: key}}}
}

func headerWithSize(key string, size int) *cachev1.PutArtifactRequest {
	request, declared := header(key), int64(size)
	request.GetHeader().Size = &declared
	return request
}

func chunk(content []byte) *cachev1.PutArtifactRequest {
	return &cachev1.PutArtifactRequest{Payload: &cachev1.PutArtifactRequest_Chunk{Chunk: content}}
}

// download reads a range of an artifact.
func download(key string, offset, length int64) grpcCall {
	return func(ctx context.Context, client cachev1.ArtifactServiceClient) (answer, error) {
		stream, err := client.GetArtifact(ctx, &cachev1.GetArtifactRequest{CacheKey: key, Offset: offset, Length: length})
		if err != nil {
			return answer{}, err
		}
		first, err := stream.Recv()
		got := answer{artifact: first.GetArtifact()}
		for err == nil {
			var next *cachev1.GetArtifactResponse
			if next, err = stream.Recv(); err == nil {
				got.chunks = append(got.chunks, next.GetChunk())
			}
		}
		if err == io.EOF {
			err = nil
		}
		return got, err
	}
}

func stat(key string) grpcCall {
	return func(ctx context.Context, client cachev1.ArtifactServiceClient) (answer, error) {
		response, err := client.StatArtifact(ctx, &cachev1.StatArtifactRequest{CacheKey: key})
		return answer{artifact: response.GetArtifact()}, err
	}
}

func list(key string, pageSize int32, pageToken string) grpcCall {
	return func(ctx context.Context, client cachev1.ArtifactServiceClient) (answer, error) {
		response, err := client.ListArtifactFiles(ctx, &cachev1.ListArtifactFilesRequest{CacheKey: key, PageSize: pageSize, PageToken: pageToken})
		return answer{files: response.GetFiles(), next: response.GetNextPageToken()}, err
	}
}
