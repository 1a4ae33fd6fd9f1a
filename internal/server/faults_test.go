package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// errStore is trouble in a store, of which clients must not learn anything.
var errStore = errors.New("read /srv/secret: input/output error")

// faultCases are those of a store that is in trouble.
func faultCases() []apiCase {
	// failing is a server that has artifactA and then gets a fault. Memory fails for everybody, so
	// that what the test stores must be there before.
	failing := func(faults cachetest.Faults) func() setup {
		return func() setup {
			memory := &cachetest.Memory{}
			verifier := artifact.NewVerifier(artifact.DefaultLimits)
			c := cache.New(memory, verifier, cache.Config{MaxSize: 1 << 20})
			if _, err := c.Put(context.Background(), cachetest.Key("a"), cache.UnknownSize, strings.NewReader(string(artifactA))); err != nil {
				panic(err)
			}
			memory.Fail(faults)
			return setup{store: memory}
		}
	}
	b := cachetest.Key("b").String()
	artifactB := cachetest.Random(cachetest.Key("b"), 300_000)
	putB, uploadB := put(b, artifactB), uploadAll(b, artifactB)

	internal := apiCase{
		status: 500, code: codes.Internal, reason: "INTERNAL",
		header:   map[string]string{"Retry-After": "", "ETag": "", "X-Artifact-Hash": ""},
		sentence: "internal error",
		logged:   "read /srv/secret: input/output error",
	}
	full := apiCase{
		status: 507, code: codes.ResourceExhausted, reason: "STORAGE_FULL",
		header:   map[string]string{"Retry-After": ""},
		sentence: "The server has no space left for this artifact",
	}
	overloaded := apiCase{
		status: 503, code: codes.Unavailable, reason: "OVERLOADED",
		header:   map[string]string{"Retry-After": "1"},
		sentence: "The server is overloaded: try again later",
	}
	miss := apiCase{
		status: 404, code: codes.NotFound, reason: "ARTIFACT_NOT_FOUND",
		header:   map[string]string{"Retry-After": ""},
		sentence: "Artifact not found",
	}
	noSpace := fmt.Errorf("%w: %w", cache.ErrNoSpace, errStore)
	overload := fmt.Errorf("%w: %w", cache.ErrOverloaded, errStore)

	var cases []apiCase
	for _, f := range []struct {
		name   string
		faults cachetest.Faults
		rest   *restRequest
		grpc   grpcCall
		want   apiCase
	}{
		{"put where Create fails", cachetest.Faults{Create: errStore}, putB, uploadB, internal},
		{"put where the first Write fails", cachetest.Faults{Write: errStore}, putB, uploadB, internal},
		{"put where a Write fails midway", cachetest.Faults{Write: errStore, WriteAfter: 100_000}, putB, uploadB, internal},
		{"put where Commit fails", cachetest.Faults{Commit: errStore}, putB, uploadB, internal},
		{"put where Commit fails but happens", cachetest.Faults{Commit: errStore, CommitHappens: true}, putB, uploadB, internal},
		{"get where Open fails", cachetest.Faults{Open: errStore}, get(keyA), download(keyA, 0, 0), internal},
		{"get of a range where Open fails", cachetest.Faults{Open: errStore}, get(keyA, "Range", "bytes=1-2"), download(keyA, 1, 2), internal},
		{"head where Stat fails", cachetest.Faults{Stat: errStore}, head(keyA), nil, internal},
		{"metadata where Stat fails", cachetest.Faults{Stat: errStore}, get(keyA + "/metadata"), stat(keyA), internal},
		{"files where Open fails", cachetest.Faults{Open: errStore}, get(keyA + "/files"), list(keyA, 0, ""), internal},
		{"files where Read fails", cachetest.Faults{Read: errStore, ReadAfter: 3000}, get(keyA + "/files"), list(keyA, 0, ""), internal},
		{"files where Quarantine fails", cachetest.Faults{Read: io.EOF, ReadAfter: 3000, Quarantine: errStore}, get(keyA + "/files"), list(keyA, 0, ""), internal},

		{"put where Create finds no space", cachetest.Faults{Create: noSpace}, putB, uploadB, full},
		{"put where Write finds no space", cachetest.Faults{Write: noSpace, WriteAfter: 100_000}, putB, uploadB, full},
		{"put where Commit finds no space", cachetest.Faults{Commit: noSpace}, putB, uploadB, full},
		{"put where Create is overloaded", cachetest.Faults{Create: overload}, putB, uploadB, overloaded},
		{"get where Open is overloaded", cachetest.Faults{Open: overload}, get(keyA), download(keyA, 0, 0), overloaded},
		{"head where Stat is overloaded", cachetest.Faults{Stat: overload}, head(keyA), nil, overloaded},
		{"metadata where Stat is overloaded", cachetest.Faults{Stat: overload}, get(keyA + "/metadata"), stat(keyA), overloaded},
		{"files where Open is overloaded", cachetest.Faults{Open: overload}, get(keyA + "/files"), list(keyA, 0, ""), overloaded},
		{"get where Open finds damage", cachetest.Faults{Open: fmt.Errorf("%w: %w", cache.ErrNotFound, errStore)}, get(keyA), download(keyA, 0, 0), miss},

		// What was found wrong first is told: here the disk, though the artifact is not sound either.
		{"put of an unsound artifact where Write fails", cachetest.Faults{Write: errStore}, put(b, []byte("nonsense")), uploadAll(b, []byte("nonsense")), internal},
	} {
		c := f.want
		c.name, c.setup, c.rest, c.grpc = f.name, failing(f.faults), f.rest, f.grpc
		c.then = func(t *testing.T, s *testServer) {
			logged := func() int { return len(s.log.find(slog.LevelDebug, "request failed")) }
			waitUntil(t, "the request is logged", func() bool { return logged() > 0 })
			if n := logged(); n != 1 {
				t.Errorf("there are %d lines of the request; want one", n)
			}
			checkReleased(t, s)
		}
		cases = append(cases, c)
	}
	return cases
}

// checkReleased checks that the server holds nothing of a Memory any more.
func checkReleased(t *testing.T, s *testServer) {
	t.Helper()
	waitUntil(t, "the server holds no upload and no file", func() bool {
		uploads, files := s.store.(*cachetest.Memory).InUse()
		return uploads == 0 && files == 0
	})
}

// TestFaultMidDownload proves that an answer which a fault cuts short never looks like a whole one.
func TestFaultMidDownload(t *testing.T) {
	a := cachetest.Key("a")
	large := cachetest.Random(a, 1_000_000)
	for _, fault := range []struct {
		name   string
		faults cachetest.Faults
		logged string
	}{
		{"a fault at the first byte", cachetest.Faults{Read: errStore}, errStore.Error()},
		{"a fault midway", cachetest.Faults{Read: errStore, ReadAfter: 600_000}, errStore.Error()},
		{"a fault at the last byte", cachetest.Faults{Read: errStore, ReadAfter: int64(len(large) - 1)}, errStore.Error()},
		{"an early end", cachetest.Faults{Read: io.EOF, ReadAfter: 600_000}, ""},
		{"no bytes", cachetest.Faults{Read: io.EOF}, ""},
	} {
		for _, m := range mouths {
			for _, request := range []struct {
				name   string
				rest   *restRequest
				grpc   grpcCall
				length int // of the body
			}{
				{"whole", get(keyA), download(keyA, 0, 0), len(large)},
				{"range", get(keyA, "Range", "bytes=100-"), download(keyA, 100, 0), len(large) - 100},
				{"ranges", get(keyA, "Range", "bytes=0-99,200-"), nil, 0},
			} {
				if m.grpc != nil && request.grpc == nil {
					continue
				}
				t.Run(fmt.Sprint(fault.name, "/", m.name, "/", request.name), func(t *testing.T) {
					t.Parallel()
					memory := &cachetest.Memory{}
					s := startServer(t, setup{store: memory})
					s.put(t, a, large)
					memory.Fail(fault.faults)
					if m.rest != nil {
						checkCutShort(t, s, request.rest, m.rest(t, s), request.length)
					} else {
						got, err := request.grpc(t.Context(), cachev1.NewArtifactServiceClient(m.grpc(t, s)))
						checkStatus(t, err, codes.Internal, "INTERNAL", "internal error")
						if n := len(got.content()); got.artifact == nil || n >= request.length || n < int(fault.faults.ReadAfter)-100-256<<10 {
							t.Errorf("got %v and %d bytes before the error", got.artifact, n)
						}
					}
					if lines := s.log.find(slog.LevelError, fault.logged); len(lines) != 1 {
						t.Errorf("logged as errors %v; want one that says %q", s.log.find(slog.LevelError, ""), fault.logged)
					}
					checkReleased(t, s)
				})
			}
		}
	}
}

// checkCutShort makes a request over REST whose answer must break off.
func checkCutShort(t *testing.T, s *testServer, r *restRequest, transport http.RoundTripper, length int) {
	t.Helper()
	response, err := transport.RoundTrip(r.to(t, s))
	if err != nil {
		return // it broke off before its first byte, or soon enough to be noticed now
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	switch {
	case err == nil:
		t.Errorf("the answer %s ended cleanly after %d bytes", response.Status, n)
	case response.ProtoMajor == 1 && err != io.ErrUnexpectedEOF:
		t.Errorf("the answer ended with %v; want %v", err, io.ErrUnexpectedEOF)
	case response.ProtoMajor == 2 && !strings.Contains(err.Error(), "INTERNAL_ERROR"):
		t.Errorf("the answer ended with %v; want the stream reset with INTERNAL_ERROR", err)
	case length > 0 && response.ContentLength != int64(length):
		t.Errorf("Content-Length is %d; want %d", response.ContentLength, length)
	}
}

// TestFileCutMidDownload proves the same of an artifact on disk, which net/http sends by sendfile(2),
// and that an artifact which was cut so is a miss from then on.
func TestFileCutMidDownload(t *testing.T) {
	a := cachetest.Key("a")
	content := cachetest.Random(a, 16<<20) // more than sockets buffer
	for _, m := range mouths {
		t.Run(m.name, func(t *testing.T) {
			s := startServer(t, setup{})
			s.put(t, a, content)
			cut := func() {
				if err := os.Truncate(s.path(a), 15<<20); err != nil {
					t.Fatal(err)
				}
			}
			if m.rest != nil {
				transport := m.rest(t, s)
				response, err := transport.RoundTrip(get(keyA).to(t, s))
				if err != nil {
					t.Fatal(err)
				}
				cut()
				n, err := io.Copy(io.Discard, response.Body)
				if response.Body.Close(); err == nil || response.ContentLength != int64(len(content)) {
					t.Errorf("an answer of %d bytes ended after %d, %v", response.ContentLength, n, err)
				}
				response, body := get(keyA).do(t, s, transport)
				if response.StatusCode != 404 {
					t.Errorf("the next download got %s %.100s; want 404", response.Status, body)
				}
			} else {
				client := cachev1.NewArtifactServiceClient(m.grpc(t, s))
				stream, err := client.GetArtifact(t.Context(), &cachev1.GetArtifactRequest{CacheKey: keyA})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := stream.Recv(); err != nil {
					t.Fatal(err)
				}
				cut()
				for err == nil {
					_, err = stream.Recv()
				}
				checkStatus(t, err, codes.Internal, "INTERNAL", "internal error")
				_, err = download(keyA, 0, 0)(t.Context(), client)
				checkStatus(t, err, codes.NotFound, "ARTIFACT_NOT_FOUND", "Artifact not found")
			}
			if lines := s.log.find(slog.LevelError, ""); len(lines) != 1 {
				t.Errorf("logged as errors: %v; want one line", lines)
			}
			s.put(t, a, artifactA)
		})
	}
}

// seekless is a store whose files can't seek.
type seekless struct{ cache.Store }

func (s seekless) Open(ctx context.Context, key artifact.Key) (io.ReadSeekCloser, artifact.Info, error) {
	file, info, err := s.Store.Open(ctx, key)
	return seeklessFile{file}, info, err
}

type seeklessFile struct{ io.ReadSeekCloser }

func (seeklessFile) Seek(int64, int) (int64, error) { return 0, errStore }

// TestSeekFails proves that a fault which http.ServeContent answers by itself is told as any other.
func TestSeekFails(t *testing.T) {
	for _, m := range mouths {
		if m.rest == nil {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, setup{store: seekless{&cachetest.Memory{}}})
			s.put(t, cachetest.Key("a"), artifactA)
			response, body := get(keyA, "Range", "bytes=1-").do(t, s, m.rest(t, s))
			if response.StatusCode != 500 || string(body) != `{"error":"internal error"}` {
				t.Errorf("the answer is %s %s", response.Status, body)
			}
			for name, want := range map[string]string{"Content-Type": "application/json", "X-Artifact-Hash": "", "ETag": "", "Last-Modified": ""} {
				if got := response.Header.Get(name); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
			if lines := s.log.find(slog.LevelError, "seek in the artifact"); len(lines) != 1 {
				t.Errorf("logged as errors: %v; want one line", s.log.find(slog.LevelError, ""))
			}
		})
	}
}

// panicking is a store of which one method panics.
type panicking struct {
	cache.Store
	method string
}

func (p *panicking) at(method string) {
	if p.method == method {
		panic("panicked in " + method)
	}
}

func (p *panicking) Create(ctx context.Context, key artifact.Key, size int64) (cache.Upload, error) {
	p.at("Create")
	upload, err := p.Store.Create(ctx, key, size)
	return &panickingUpload{upload, p}, err
}

func (p *panicking) Open(ctx context.Context, key artifact.Key) (io.ReadSeekCloser, artifact.Info, error) {
	p.at("Open")
	file, info, err := p.Store.Open(ctx, key)
	return &panickingFile{file, p}, info, err
}

func (p *panicking) Stat(ctx context.Context, key artifact.Key) (artifact.Info, error) {
	p.at("Stat")
	return p.Store.Stat(ctx, key)
}

func (p *panicking) Check(ctx context.Context) error {
	p.at("Check")
	return p.Store.Check(ctx)
}

type panickingUpload struct {
	cache.Upload
	store *panicking
}

func (u *panickingUpload) Write(p []byte) (int, error) {
	u.store.at("Write")
	return u.Upload.Write(p)
}

func (u *panickingUpload) Commit(ctx context.Context, info artifact.Info) (artifact.Info, error) {
	u.store.at("Commit")
	return u.Upload.Commit(ctx, info)
}

type panickingFile struct {
	io.ReadSeekCloser
	store *panicking
}

func (f *panickingFile) Read(p []byte) (int, error) {
	f.store.at("Read")
	return f.ReadSeekCloser.Read(p)
}

// TestPanic proves that a panic ends one request, whichever mouth it came through, and neither the
// process nor other requests, and that it is logged for somebody to see.
func TestPanic(t *testing.T) {
	a := cachetest.Key("a")
	b := cachetest.Key("b").String()
	artifactB := cachetest.Random(cachetest.Key("b"), 100)
	for _, p := range []struct {
		method string
		rest   *restRequest
		grpc   grpcCall
	}{
		{"Create", put(b, artifactB), uploadAll(b, artifactB)},
		{"Write", put(b, artifactB), uploadAll(b, artifactB)},
		{"Commit", put(b, artifactB), uploadAll(b, artifactB)},
		{"Open", get(keyA), download(keyA, 0, 0)},
		{"Read", get(keyA), download(keyA, 0, 0)},
		{"Stat", head(keyA), nil},
		{"Stat", get(keyA + "/metadata"), stat(keyA)},
		{"Read", get(keyA + "/files"), list(keyA, 0, "")},
		{"Check", &restRequest{method: "GET", target: "/readyz"}, nil},
	} {
		for _, m := range mouths {
			if m.grpc != nil && p.grpc == nil {
				continue
			}
			t.Run(fmt.Sprint(p.method, " ", p.rest.method, " ", p.rest.target, "/", m.name), func(t *testing.T) {
				t.Parallel()
				memory := &cachetest.Memory{}
				store := &panicking{Store: memory}
				s := startServer(t, setup{store: store})
				s.put(t, a, artifactA)
				store.method = p.method
				if m.rest != nil {
					transport := m.rest(t, s)
					checkCutShort(t, s, p.rest, transport, 0)
					if response, body := (&restRequest{method: "GET", target: "/healthz"}).do(t, s, transport); response.StatusCode != 200 {
						t.Errorf("afterwards /healthz is %s %s", response.Status, body)
					}
				} else {
					conn := m.grpc(t, s)
					_, err := p.grpc(t.Context(), cachev1.NewArtifactServiceClient(conn))
					checkStatus(t, err, codes.Internal, "INTERNAL", "internal error")
					if _, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
						t.Errorf("afterwards the server's health is %v", err)
					}
				}
				lines := s.log.find(slog.LevelError, "panicked in "+p.method)
				if len(lines) != 1 || !strings.Contains(lines[0].text, "faults_test.go") {
					t.Errorf("logged as errors %v; want one with the panic and where it was", s.log.find(slog.LevelError, ""))
				}
				waitUntil(t, "the server holds no upload and no file", func() bool {
					uploads, files := memory.InUse()
					return uploads == 0 && files == 0
				})
			})
		}
	}
}
