package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

const crowd = 64

// visitor uses the server through one of its mouths, any number of times at once.
type visitor struct {
	name string
	// put returns "201" or the reason why not.
	put func(ctx context.Context, key artifact.Key, content []byte) (string, error)
	// get returns the artifact, nil if it is a miss.
	get func(ctx context.Context, key artifact.Key) ([]byte, error)
}

// openVisitors returns a visitor for every protocol. Those of HTTP/2 share one connection.
func openVisitors(t *testing.T, s *testServer) []visitor {
	shared := newTransport(t, 2)
	return []visitor{
		restVisitor("REST over HTTP1", s, newTransport(t, 1)),
		restVisitor("REST over HTTP2", s, shared),
		grpcVisitor("gRPC", cachev1.NewArtifactServiceClient(grpcMouths()[0].grpc(t, s))),
		grpcVisitor("gRPC amid REST", cachev1.NewArtifactServiceClient(&sharedConn{transport: shared, url: s.url})),
	}
}

func restVisitor(name string, s *testServer, transport http.RoundTripper) visitor {
	ask := func(ctx context.Context, method string, key artifact.Key, content []byte) (*http.Response, []byte, error) {
		request, err := http.NewRequestWithContext(ctx, method, s.url+"/v1/artifacts/"+key.String(), bytes.NewReader(content))
		if err != nil {
			return nil, nil, err
		}
		response, err := transport.RoundTrip(request)
		if err != nil {
			return nil, nil, err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		return response, body, err
	}
	return visitor{
		name: name,
		put: func(ctx context.Context, key artifact.Key, content []byte) (string, error) {
			response, body, err := ask(ctx, http.MethodPut, key, content)
			switch {
			case err != nil:
				return "", err
			case response.StatusCode == 201:
				return "201", nil
			case response.StatusCode == 409 && string(body) == `{"error":"Artifact already exists"}`:
				return "ARTIFACT_EXISTS", nil
			}
			return "", fmt.Errorf("%s %s", response.Status, body)
		},
		get: func(ctx context.Context, key artifact.Key) ([]byte, error) {
			response, body, err := ask(ctx, http.MethodGet, key, nil)
			switch {
			case err != nil:
				return nil, err
			case response.StatusCode == 404 && string(body) == `{"error":"Artifact not found"}`:
				return nil, nil
			case response.StatusCode != 200:
				return nil, fmt.Errorf("%s %s", response.Status, body)
			case response.Header.Get("X-Artifact-Hash") != hashOf(body):
				return nil, errors.New("the hash is not that of the bytes")
			}
			return body, nil
		},
	}
}

func grpcVisitor(name string, client cachev1.ArtifactServiceClient) visitor {
	reason := func(err error) string {
		for _, detail := range status.Convert(err).Details() {
			if info, ok := detail.(*errdetails.ErrorInfo); ok {
				return info.Reason
			}
		}
		return ""
	}
	return visitor{
		name: name,
		put: func(ctx context.Context, key artifact.Key, content []byte) (string, error) {
			got, err := uploadAll(key.String(), content)(ctx, client)
			if reason := reason(err); reason == "ARTIFACT_EXISTS" {
				return reason, nil
			}
			if err == nil && got.artifact.GetHash() != hashOf(content) {
				err = errors.New("the hash is not that of the bytes")
			}
			return "201", err
		},
		get: func(ctx context.Context, key artifact.Key) ([]byte, error) {
			got, err := download(key.String(), 0, 0)(ctx, client)
			if reason(err) == "ARTIFACT_NOT_FOUND" {
				return nil, nil
			}
			if err == nil && got.artifact.GetHash() != hashOf(got.content()) {
				err = errors.New("the hash is not that of the bytes")
			}
			return got.content(), err
		},
	}
}

// TestOneWinner proves that of many concurrent uploads of one key, over all protocols, exactly one
// succeeds, that its bytes are served from then on, and that nobody ever sees anything else.
func TestOneWinner(t *testing.T) {
	s := startServer(t, setup{})
	visitors := openVisitors(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	for round := range 3 {
		key := cachetest.Key(fmt.Sprint("round ", round))
		contents := make([][]byte, crowd)
		for i := range contents {
			contents[i] = cachetest.Sound(key, map[string]string{"number": fmt.Sprint(i), "same": string(artifactA)})
		}
		start := make(chan struct{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		var winners []int
		for i, content := range contents {
			v := visitors[i%len(visitors)]
			wg.Go(func() {
				<-start
				outcome, err := v.put(ctx, key, content)
				if err != nil {
					t.Errorf("an upload through %s: %v", v.name, err)
				} else if outcome == "201" {
					mu.Lock()
					winners = append(winners, i)
					mu.Unlock()
				}
			})
		}
		// In the meantime others look.
		seen := make([][]byte, 2*len(visitors))
		stop := make(chan struct{})
		var readers sync.WaitGroup
		for i := range seen {
			v := visitors[i%len(visitors)]
			readers.Go(func() {
				<-start
				for last := false; !last; {
					select {
					case <-stop:
						last = true // and it must be there now
					default:
					}
					got, err := v.get(ctx, key)
					switch {
					case err != nil:
						t.Errorf("a download through %s: %v", v.name, err)
						return
					case seen[i] != nil && string(got) != string(seen[i]):
						t.Errorf("a download through %s got %d bytes, other ones than the last time", v.name, len(got))
						return
					}
					seen[i] = got
				}
			})
		}
		close(start)
		wg.Wait()
		close(stop)
		readers.Wait()
		if len(winners) != 1 {
			t.Fatalf("the uploads %v succeeded; want exactly one", winners)
		}
		for i, got := range seen {
			if string(got) != string(contents[winners[0]]) {
				t.Errorf("%s saw %d bytes that are not the winner's", visitors[i%len(visitors)].name, len(got))
			}
		}
	}
	checkQuiet(t, s)
}

// TestManyKeys proves that concurrent uploads of different keys do not disturb each other, nor those who
// download meanwhile.
func TestManyKeys(t *testing.T) {
	s := startServer(t, setup{})
	visitors := openVisitors(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	shared := cachetest.Key("shared")
	sharedContent := cachetest.Random(shared, 600_000)
	s.put(t, shared, sharedContent)

	var wg sync.WaitGroup
	for i := range crowd {
		key := cachetest.Key(fmt.Sprint("key ", i))
		content := cachetest.Random(key, 100_000+i)
		putter, getter := visitors[i%len(visitors)], visitors[(i/len(visitors))%len(visitors)]
		wg.Go(func() {
			if outcome, err := putter.put(ctx, key, content); outcome != "201" || err != nil {
				t.Errorf("an upload through %s: %s, %v", putter.name, outcome, err)
			}
			if got, err := getter.get(ctx, key); err != nil || string(got) != string(content) {
				t.Errorf("a download through %s: %d bytes, %v; want %d", getter.name, len(got), err, len(content))
			}
		})
		wg.Go(func() {
			if got, err := getter.get(ctx, shared); err != nil || string(got) != string(sharedContent) {
				t.Errorf("a download through %s: %d bytes, %v; want %d", getter.name, len(got), err, len(sharedContent))
			}
		})
	}
	wg.Wait()
	checkQuiet(t, s)
}

// checkQuiet checks that no upload is left and that nothing was logged as wrong. Who looks just when an
// artifact was stored may find it before its memo, and the store says that it verified it once more.
func checkQuiet(t *testing.T, s *testServer) {
	t.Helper()
	waitUntil(t, "no upload is in progress", func() bool { return s.uploadsInProgress() == 0 })
	if lines := s.log.find(slog.LevelWarn, ""); len(lines) > 0 {
		t.Errorf("logged: %v", lines)
	}
}
