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
	"sync"
	"testing"
	"time"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/retention"
	"github.com/polykit/polykit-cache/internal/server"
)

// evicting does something before it removes an artifact, and does not if that returns an error.
type evicting struct {
	*disk.Store
	before func(key artifact.Key) error
}

func (e evicting) Evict(ctx context.Context, name artifact.Name, storedAt time.Time) (int64, error) {
	if err := e.before(name.Key); err != nil {
		return 0, err
	}
	return e.Store.Evict(ctx, name, storedAt)
}

// startEvicting starts a server with the artifacts a, b and c that does something before it removes one.
func startEvicting(t *testing.T, before func(s *testServer, key artifact.Key) error) *testServer {
	t.Helper()
	var s *testServer
	s = startServer(t, setup{managed: true, change: func(config *server.Config) {
		storage := evicting{config.Management.Storage.(*disk.Store), func(key artifact.Key) error { return before(s, key) }}
		config.Management.Storage = storage
		config.Management.Collector = retention.New(config.Management.Index, storage, retention.Policy{}, slog.New(slog.DiscardHandler))
	}})
	for _, name := range []string{"a", "b", "c"} {
		s.put(t, cachetest.Key(name), cachetest.Random(cachetest.Key(name), 2000))
	}
	s.flush(t)
	return s
}

var deleteAll = method{"DeleteArtifacts", &cachev1.DeleteArtifactsRequest{All: true}, "POST", "/v1/artifacts:delete"}

// TestDeleteBesideChanges deletes by a list in which artifacts were pinned, stored anew or removed since.
func TestDeleteBesideChanges(t *testing.T) {
	for name := range askers(nil) {
		t.Run(name, func(t *testing.T) {
			var once sync.Once
			s := startEvicting(t, func(s *testServer, _ artifact.Key) error {
				once.Do(func() {
					replaced := cachetest.Key("b")
					if err := s.cache.Pin(t.Context(), cachetest.Key("a"), true); err != nil {
						t.Error(err)
					}
					if err := s.cache.Delete(t.Context(), replaced); err != nil {
						t.Error(err)
					}
					s.put(t, replaced, cachetest.Random(replaced, 3000))
				})
				return nil
			})
			deleted := mustAsk(t, askers(s)[name](t), deleteAll, &cachev1.DeleteArtifactsResponse{})
			if r := deleted.GetRemovals(); deleted.GetMore() || len(r) != 1 || r[0].GetArtifactCount() != 1 || r[0].GetDiskSize() < 8192 {
				t.Errorf("deleted is %v", deleted)
			}
			if got := s.stored(t, "a", "b", "c"); got != "a b" {
				t.Errorf("left are %s", got)
			}
		})
	}
}

// TestDeleteInPart can't remove one of several artifacts: the others are, and it is said first which, then why not
// all are.
func TestDeleteInPart(t *testing.T) {
	for name := range askers(nil) {
		for _, m := range []method{
			deleteAll,
			{"CollectGarbage", &cachev1.CollectGarbageRequest{Policy: &cachev1.RetentionPolicy{MinFreeSize: new(int64(1 << 60))}}, "POST", "/v1/artifacts:collectGarbage"},
		} {
			t.Run(m.name+" "+name, func(t *testing.T) {
				s := startEvicting(t, func(_ *testServer, key artifact.Key) error {
					if key == cachetest.Key("b") {
						return errors.New("stuck, for this test")
					}
					return nil
				})
				ask := askers(s)[name](t)
				answer := interface {
					GetRemovals() []*cachev1.Removal
					GetMore() bool
				}(nil)
				if m.name == "CollectGarbage" {
					answer = mustAsk(t, ask, m, &cachev1.CollectGarbageResponse{})
				} else {
					answer = mustAsk(t, ask, m, &cachev1.DeleteArtifactsResponse{})
				}
				if r := answer.GetRemovals(); !answer.GetMore() || len(r) != 1 || r[0].GetArtifactCount() != 2 {
					t.Errorf("the first answer is %v", answer)
				}
				if err := ask(t, m, &cachev1.DeleteArtifactsResponse{}); err == nil || !strings.Contains(err.Error(), "internal error") {
					t.Errorf("the second answer is %v", err)
				}
				if got := s.stored(t, "a", "b", "c"); got != "b" {
					t.Errorf("left are %s", got)
				}
			})
		}
	}
}

// TestDeleteOfWhatIsGone deletes what somebody removed behind the server's back: the index learns of it.
func TestDeleteOfWhatIsGone(t *testing.T) {
	for name := range askers(nil) {
		for how, ask := range map[string]func(t *testing.T, ask asker){
			"by key": func(t *testing.T, ask asker) {
				key := cachetest.Key("a").String()
				m := method{"DeleteArtifact", &cachev1.DeleteArtifactRequest{CacheKey: key}, "DELETE", "/v1/artifacts/" + key}
				if err := ask(t, m, &cachev1.DeleteArtifactResponse{}); err == nil || !strings.Contains(err.Error(), "Artifact not found") {
					t.Errorf("deleted: %v", err)
				}
			},
			"all": func(t *testing.T, ask asker) {
				if deleted := mustAsk(t, ask, deleteAll, &cachev1.DeleteArtifactsResponse{}); len(deleted.GetRemovals()) > 0 || deleted.GetMore() {
					t.Errorf("deleted is %v", deleted)
				}
			},
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				s := startServer(t, setup{managed: true})
				s.put(t, cachetest.Key("a"), cachetest.Random(cachetest.Key("a"), 2000))
				s.flush(t)
				if err := os.Remove(s.path(cachetest.Key("a"))); err != nil {
					t.Fatal(err)
				}
				ask(t, askers(s)[name](t))
				if left, _, err := s.index.List(t.Context(), index.Query{Limit: 9}); err != nil || len(left) > 0 {
					t.Errorf("the index has %v, %v", left, err)
				}
			})
		}
	}
}

// TestDeleteMany deletes more than one call does, and lists more than one page has.
func TestDeleteMany(t *testing.T) {
	const n = 10_500
	s := startServer(t, setup{managed: true, change: func(config *server.Config) {
		config.Management.Storage = pretending{config.Management.Storage.(*disk.Store), config.Management.Index}
	}})
	for i := range n {
		key := cachetest.Key(fmt.Sprint(i))
		s.index.Stored(cache.Stored{Info: artifact.Info{Key: key, Size: 1, StoredAt: time.Unix(1_700_000_000, 0)}, DiskSize: 4096})
	}
	ask := askers(s)["REST"](t)
	list := mustAsk(t, ask, method{"ListArtifacts", &cachev1.ListArtifactsRequest{PageSize: 5000}, "GET", "/v1/artifacts?page_size=5000"}, &cachev1.ListArtifactsResponse{})
	if len(list.GetArtifacts()) != 1000 || list.GetNextPageToken() == "" {
		t.Errorf("a page has %d artifacts", len(list.GetArtifacts()))
	}
	for _, want := range []struct {
		deleted int64
		more    bool
	}{{10_000, true}, {500, false}} {
		deleted := mustAsk(t, ask, deleteAll, &cachev1.DeleteArtifactsResponse{})
		if r := deleted.GetRemovals(); deleted.GetMore() != want.more || len(r) != 1 || r[0].GetArtifactCount() != want.deleted || r[0].GetDiskSize() != 4096*want.deleted {
			t.Errorf("deleted is %v, want %v", deleted, want)
		}
	}
}

// pretending is a store that removes artifacts that it does not have.
type pretending struct {
	*disk.Store
	index *index.Index
}

func (p pretending) Evict(_ context.Context, name artifact.Name, _ time.Time) (int64, error) {
	p.index.Removed(name, 4096)
	return 4096, nil
}

// TestDeleteUnderstandsAll asks for something with a word that is none: nothing is deleted for the rest.
func TestDeleteUnderstandsAll(t *testing.T) {
	s := startServer(t, setup{managed: true})
	havingA(t, s)
	response, err := http.Post(s.url+"/v1/artifacts:delete", "application/json", strings.NewReader(`{"dry-run":true,"all":true}`))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusBadRequest || !strings.Contains(string(text), `unknown field \"dry-run\"`) {
		t.Errorf("status %d, %s, %v", response.StatusCode, text, err)
	}
	s.stillHasA(t)
}

// deleteCases are requests over REST that must not delete anything.
func deleteCases() []apiCase {
	refused := func(name string, status int, sentence string, header map[string]string, body string) apiCase {
		return apiCase{
			name: name, setup: func() setup { return setup{managed: true} }, given: havingA,
			rest:   &restRequest{method: http.MethodPost, target: "/v1/artifacts:delete", header: header, body: []byte(body)},
			status: status, sentence: sentence,
			then: func(t *testing.T, s *testServer) { s.stillHasA(t) },
		}
	}
	const everything = `{"all":true}`
	return []apiCase{
		refused("delete: a body without an end", 400, "Invalid request: the body has more than 4194304 bytes", nil, `{"all":true,"filter":{"package_name":"`+strings.Repeat("x", 4<<20)+`"}}`),
		refused("delete: from another site", 403, "A web page of another site must not change what is stored", map[string]string{"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}, everything),
		refused("delete: from another origin", 403, "A web page of another site must not change what is stored", map[string]string{"Origin": "https://example.com"}, everything),
	}
}
