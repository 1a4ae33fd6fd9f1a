package server_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// crowded has room for two uploads at once.
func crowded(queue int, timeout time.Duration) artifact.Limits {
	limits := artifact.DefaultLimits
	limits.Capacity = artifact.Capacity{Memory: 2 * 2 * (limits.Window + 2<<20), Queue: queue, QueueTimeout: timeout}
	return limits
}

// TestOverload has as many uploads in progress as there may be. More are told to come again before
// they send their bodies; what is stored is served all the same.
func TestOverload(t *testing.T) {
	const sentence = "The server is overloaded: try again later"
	for name, limits := range map[string]artifact.Limits{
		"none may wait":      crowded(0, time.Hour),
		"none may wait long": crowded(100, time.Millisecond),
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, setup{limits: limits})
			stored := cachetest.Key("stored")
			content := cachetest.Random(stored, 100_000)
			s.put(t, stored, content)
			var inProgress []halfUpload
			for i := range 2 {
				key := cachetest.Key(fmt.Sprint("in progress ", i))
				inProgress = append(inProgress, halfUploads["HTTP1"](t, s.url, key, cachetest.Random(key, 100_000)))
				waitUntil(t, "the upload begins", func() bool { return s.uploadsInProgress() == i+1 })
			}
			for _, m := range mouths {
				t.Run(m.name, func(t *testing.T) {
					s.conns.Store(0) // the mouths count theirs
					if m.rest != nil {
						transport := m.rest(t, s)
						r := put(keyA, artifactA)
						response, body := r.do(t, s, transport)
						if response.StatusCode != 503 || response.Header.Get("Retry-After") != "1" {
							t.Errorf("PUT got %s, %v", response.Status, response.Header)
						}
						checkErrorBody(t, http.MethodPut, response, body, sentence)
						response, body = get(stored.String()).do(t, s, transport)
						if response.StatusCode != 200 || string(body) != string(content) {
							t.Errorf("GET of what is stored got %s with %d bytes", response.Status, len(body))
						}
						if response, _ = head(stored.String()).do(t, s, transport); response.StatusCode != 200 {
							t.Errorf("HEAD of what is stored got %s", response.Status)
						}
						// That this is stored is known without a place.
						if response, _ = put(stored.String(), content).do(t, s, transport); response.StatusCode != 409 {
							t.Errorf("PUT of what is stored got %s", response.Status)
						}
						return
					}
					client := cachev1.NewArtifactServiceClient(m.grpc(t, s))
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					_, err := uploadAll(keyA, artifactA)(ctx, client)
					checkStatus(t, err, codes.Unavailable, "OVERLOADED", sentence)
					if _, err := download(stored.String(), 0, 0)(ctx, client); err != nil {
						t.Errorf("GetArtifact of what is stored: %v", err)
					}
				})
			}
			// Nothing is held for those that were refused.
			if n := s.uploadsInProgress(); n != 2 {
				t.Errorf("%d uploads are in progress, want 2", n)
			}
			for _, upload := range inProgress {
				if err := upload.finish(); err != nil {
					t.Error("an upload in progress:", err)
				}
			}
			s.put(t, cachetest.Key("a"), artifactA)
		})
	}
}

// TestUploadsWait has more uploads than there may be at once, which follow one another.
func TestUploadsWait(t *testing.T) {
	s := startServer(t, setup{limits: crowded(100, time.Hour)})
	var first []halfUpload
	for i := range 2 {
		key := cachetest.Key(fmt.Sprint("first ", i))
		first = append(first, halfUploads["HTTP1"](t, s.url, key, cachetest.Random(key, 100_000)))
	}
	waitUntil(t, "two uploads begin", func() bool { return s.uploadsInProgress() == 2 })
	finished := make(chan error)
	n := 0
	for protocol, begin := range halfUploads {
		for i := range 3 {
			key := cachetest.Key(fmt.Sprint(protocol, i))
			upload := begin(t, s.url, key, cachetest.Random(key, 1000))
			go func() { finished <- upload.finish() }()
			n++
		}
	}
	waitUntil(t, "all of them are there", func() bool { return s.Requests() == 2+n })
	if n := s.uploadsInProgress(); n != 2 {
		t.Errorf("%d uploads are in progress, want 2", n)
	}
	for _, upload := range first {
		if err := upload.finish(); err != nil {
			t.Error("an upload in progress:", err)
		}
	}
	for range n {
		if err := <-finished; err != nil {
			t.Error("an upload that waited:", err)
		}
	}
}

// TestWaitingUploadsAreCharged has more uploads that wait than there is memory for what gRPC may receive of
// them meanwhile.
func TestWaitingUploadsAreCharged(t *testing.T) {
	limits := crowded(1000, time.Hour)
	limits.ManifestSize, limits.MetadataSize, limits.Files = 64<<10, 64<<10, 1000 // or one artifact could need more
	s := startServer(t, setup{limits: limits})
	var uploads []halfUpload
	conn := newGRPC(t, s)
	for i := range 2 {
		key := cachetest.Key(fmt.Sprint("in progress ", i))
		uploads = append(uploads, halfGRPC(t, conn, key, cachetest.Random(key, 100_000)))
		waitUntil(t, "the upload begins", func() bool { return s.uploadsInProgress() == i+1 })
	}
	const many = 100 // of which the memory has room for 67
	for i := range many {
		key := cachetest.Key(fmt.Sprint("waiting ", i))
		uploads = append(uploads, halfGRPC(t, conn, key, cachetest.Random(key, 40_000)))
	}
	refused := func() int { return len(s.log.find(slog.LevelWarn, "no memory for one more")) }
	waitUntil(t, "some are refused", func() bool { return refused() > 0 && s.Requests() == len(uploads)-refused() })
	ended := make(chan error)
	for _, upload := range uploads {
		go func() { ended <- upload.finish() }()
	}
	failed := 0
	for range uploads {
		if err := <-ended; err != nil {
			failed++
		}
	}
	if failed != refused() || failed < many/4 {
		t.Errorf("%d uploads failed, and %d were refused; want about a third", failed, refused())
	}
}
