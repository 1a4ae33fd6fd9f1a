package server_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/retention"
)

// method is one call of the methods for those who run a cache, in the words of both protocols.
type method struct {
	name    string
	request proto.Message
	// verb and target are the request over REST; its body is the request's JSON if the verb is POST.
	verb, target string
}

// asker asks a server one way.
type asker func(t *testing.T, m method, response proto.Message) error

// askers returns a way for each protocol.
func askers(s *testServer) map[string]func(t *testing.T) asker {
	return map[string]func(t *testing.T) asker{
		"REST": func(t *testing.T) asker {
			transport := newTransport(t, 1)
			return func(t *testing.T, m method, response proto.Message) error {
				var body io.Reader
				if m.verb == http.MethodPost {
					text, err := protojson.Marshal(m.request)
					if err != nil {
						t.Fatal(err)
					}
					body = bytes.NewReader(text)
				}
				request, err := http.NewRequestWithContext(t.Context(), m.verb, s.url+m.target, body)
				if err != nil {
					t.Fatal(err)
				}
				answer, err := transport.RoundTrip(request)
				if err != nil {
					t.Fatal(err)
				}
				defer answer.Body.Close()
				text, err := io.ReadAll(answer.Body)
				if err != nil {
					t.Fatal(err)
				}
				if answer.StatusCode != http.StatusOK {
					return errors.New(strings.TrimSpace(string(text)))
				}
				if err := protojson.Unmarshal(text, response); err != nil {
					t.Fatal(err)
				}
				return nil
			}
		},
		"gRPC": func(t *testing.T) asker {
			conn := newGRPC(t, s)
			return func(t *testing.T, m method, response proto.Message) error {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				err := conn.Invoke(ctx, "/polykit.cache.v1.ArtifactService/"+m.name, m.request, response)
				if st, ok := status.FromError(err); ok && err != nil {
					return errors.New(st.Message())
				}
				return err
			}
		},
	}
}

// mustAsk asks, or ends the test.
func mustAsk[T proto.Message](t *testing.T, ask asker, m method, response T) T {
	t.Helper()
	if err := ask(t, m, response); err != nil {
		t.Fatalf("%s: %v", m.name, err)
	}
	return response
}

// TestManagement plays the life of a few artifacts, over each protocol.
func TestManagement(t *testing.T) {
	for name := range askers(nil) {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, setup{managed: true})
			ask := askers(s)[name](t)
			names := []string{"a", "b", "c"}
			keys := map[string]string{}
			for _, name := range names {
				key := cachetest.Key(name)
				keys[name] = key.String()
				s.put(t, key, cachetest.Random(key, 2000))
			}
			miss := cachetest.Key("miss").String()

			// What is asked for and is there counts as used.
			missing := mustAsk(t, ask, method{"FindMissingArtifacts", &cachev1.FindMissingArtifactsRequest{CacheKeys: []string{keys["a"], miss, strings.ToUpper(miss), keys["b"]}},
				"POST", "/v1/artifacts:findMissing"}, &cachev1.FindMissingArtifactsResponse{})
			if got := missing.GetMissingCacheKeys(); !slices.Equal(got, []string{miss}) {
				t.Errorf("missing are %q", got)
			}
			if _, _, err := s.cache.Get(t.Context(), cachetest.Key("c")); err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.cache.Get(t.Context(), cachetest.Key("miss")); !errors.Is(err, cache.ErrNotFound) {
				t.Fatal(err)
			}
			mustAsk(t, ask, method{"PinArtifact", &cachev1.PinArtifactRequest{CacheKey: keys["b"]}, "PUT", "/v1/artifacts/" + keys["b"] + "/pin"}, &cachev1.PinArtifactResponse{})
			s.flush(t)

			list := mustAsk(t, ask, method{"ListArtifacts", &cachev1.ListArtifactsRequest{OrderBy: cachev1.ArtifactOrder_ARTIFACT_ORDER_LAST_USED_AT, PageSize: 2},
				"GET", "/v1/artifacts?order_by=ARTIFACT_ORDER_LAST_USED_AT&page_size=2"}, &cachev1.ListArtifactsResponse{})
			if got := listed(list); !slices.Equal(got, []string{keys["a"], keys["b"]}) || list.GetNextPageToken() == "" {
				t.Errorf("the first page has %q, and the token %q", got, list.GetNextPageToken())
			}
			if b := list.GetArtifacts()[1]; !b.GetPinned() || b.GetUseCount() != 0 || b.GetDiskSize() < 8192 || b.GetArtifact().GetTaskName() == "" ||
				!b.GetLastUsedAt().AsTime().After(b.GetArtifact().GetStoredAt().AsTime()) {
				t.Errorf("of b is said %v", b)
			}
			list = mustAsk(t, ask, method{"ListArtifacts", &cachev1.ListArtifactsRequest{OrderBy: cachev1.ArtifactOrder_ARTIFACT_ORDER_LAST_USED_AT, PageSize: 2, PageToken: list.GetNextPageToken()},
				"GET", "/v1/artifacts?order_by=ARTIFACT_ORDER_LAST_USED_AT&page_size=2&page_token=" + list.GetNextPageToken()}, &cachev1.ListArtifactsResponse{})
			if got := listed(list); !slices.Equal(got, []string{keys["c"]}) || list.GetNextPageToken() != "" || list.GetArtifacts()[0].GetUseCount() != 1 {
				t.Errorf("the last page is %v", list)
			}
			list = mustAsk(t, ask, method{"ListArtifacts", &cachev1.ListArtifactsRequest{Filter: &cachev1.ArtifactFilter{
				KeyPrefix: strings.ToUpper(keys["c"][:9]), MaxSize: proto.Int64(1 << 20), Pinned: proto.Bool(false),
				StoredAfter: timestamppb.New(time.Now().Add(-time.Hour)),
			}}, "GET", "/v1/artifacts?filter.key_prefix=" + strings.ToUpper(keys["c"][:9]) + "&filter.max_size=1048576&filter.pinned=false&filter.stored_after=" +
				time.Now().Add(-time.Hour).UTC().Format("2006-01-02T15:04:05Z")}, &cachev1.ListArtifactsResponse{})
			if got := listed(list); !slices.Equal(got, []string{keys["c"]}) {
				t.Errorf("filtered there is %q", got)
			}

			stats := mustAsk(t, ask, method{"GetCacheStats", &cachev1.GetCacheStatsRequest{MaxTasks: 1}, "GET", "/v1/stats?max_tasks=1"}, &cachev1.GetCacheStatsResponse{})
			usage := stats.GetTotal().GetUsage()
			if stats.GetTotal().GetArtifactCount() != 3 || usage.GetHitCount() != 1 || usage.GetMissCount() != 1 || usage.GetHitRate() != 0.5 || usage.GetStoredCount() != 3 ||
				!proto.Equal(usage, stats.GetSinceStart()) || stats.GetIndexComplete() || len(stats.GetTasks()) != 1 || stats.GetTaskCount() != 1 || stats.GetTasks()[0].GetStats().GetArtifactCount() != 3 {
				t.Errorf("statistics are %v", stats)
			}
			if onDisk := s.store.(*disk.Store); !s.index.Complete() { // as after a crash
				if _, err := s.index.Reconcile(t.Context(), onDisk, nil); err != nil {
					t.Fatal(err)
				}
			}
			if again := mustAsk(t, ask, method{"GetCacheStats", &cachev1.GetCacheStatsRequest{}, "GET", "/v1/stats"}, &cachev1.GetCacheStatsResponse{}); !again.GetIndexComplete() {
				t.Error("the index does not count as complete")
			}
			if storage := stats.GetStorage(); storage.GetUsedSize() < stats.GetTotal().GetDiskSize() || storage.GetFreeSize() <= 0 || storage.GetDiskSize() < storage.GetFreeSize() {
				t.Errorf("the storage is %v", storage)
			}

			// Nothing is removed by a dry run.
			for _, dry := range []bool{true, false} {
				gone := mustAsk(t, ask, method{"DeleteArtifacts", &cachev1.DeleteArtifactsRequest{All: true, DryRun: dry}, "POST", "/v1/artifacts:delete"}, &cachev1.DeleteArtifactsResponse{})
				if len(gone.GetRemovals()) != 1 || gone.GetMore() || gone.GetRemovals()[0].GetArtifactCount() != 2 || gone.GetRemovals()[0].GetDiskSize() < 16384 ||
					gone.GetRemovals()[0].GetReason() != cachev1.RemovalReason_REMOVAL_REASON_DELETED {
					t.Errorf("dry %t: deleted are %v", dry, gone)
				}
				want := map[bool]string{true: "a b c", false: "b"}[dry]
				if got := s.stored(t, names...); got != want {
					t.Errorf("dry %t: left are %s, want %s", dry, got, want)
				}
				s.flush(t)
			}
			mustAsk(t, ask, method{"UnpinArtifact", &cachev1.UnpinArtifactRequest{CacheKey: keys["b"]}, "DELETE", "/v1/artifacts/" + keys["b"] + "/pin"}, &cachev1.UnpinArtifactResponse{})
			remove := method{"DeleteArtifact", &cachev1.DeleteArtifactRequest{CacheKey: keys["b"]}, "DELETE", "/v1/artifacts/" + keys["b"]}
			mustAsk(t, ask, remove, &cachev1.DeleteArtifactResponse{})
			if err := ask(t, remove, &cachev1.DeleteArtifactResponse{}); err == nil || !strings.Contains(err.Error(), "Artifact not found") {
				t.Errorf("deleted once more: %v", err)
			}
			if got := s.stored(t, names...); got != "" {
				t.Errorf("left are %s", got)
			}
			s.put(t, cachetest.Key("b"), cachetest.Random(cachetest.Key("b"), 2000))
		})
	}
}

// scopes returns a policy that keeps one artifact of each task in some scopes.
func scopes(patterns ...string) *cachev1.RetentionPolicy {
	policy := &cachev1.RetentionPolicy{}
	for _, pattern := range patterns {
		policy.Scopes = append(policy.Scopes, &cachev1.ScopeRetentionPolicy{Pattern: pattern, KeepLast: 1})
	}
	return policy
}

func TestCollectGarbage(t *testing.T) {
	for name := range askers(nil) {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, setup{managed: true, policy: retention.Policy{KeepLast: 3}})
			ask := askers(s)[name](t)
			names := []string{"a", "b", "c", "d"}
			for _, name := range names {
				s.put(t, cachetest.Key(name), cachetest.Random(cachetest.Key(name), 2000))
			}
			collect := func(request *cachev1.CollectGarbageRequest) string {
				t.Helper()
				response := mustAsk(t, ask, method{"CollectGarbage", request, "POST", "/v1/artifacts:collectGarbage"}, &cachev1.CollectGarbageResponse{})
				var all []string
				for _, r := range response.GetRemovals() {
					all = append(all, strings.Repeat("x", int(r.GetArtifactCount()))+" "+r.GetReason().String())
				}
				if response.GetMore() {
					t.Error("there is more")
				}
				return strings.Join(all, ", ")
			}
			policy := &cachev1.RetentionPolicy{KeepLast: proto.Int32(2)}
			for _, step := range []struct {
				request *cachev1.CollectGarbageRequest
				removed string
				left    string
			}{
				{&cachev1.CollectGarbageRequest{DryRun: true}, "x REMOVAL_REASON_KEEP_LAST", "a b c d"},
				{&cachev1.CollectGarbageRequest{DryRun: true, Policy: policy}, "xx REMOVAL_REASON_KEEP_LAST", "a b c d"},
				{&cachev1.CollectGarbageRequest{}, "x REMOVAL_REASON_KEEP_LAST", "b c d"},
				{&cachev1.CollectGarbageRequest{}, "", "b c d"},
				{&cachev1.CollectGarbageRequest{DryRun: true, Policy: scopes("pr-*", "default")}, "xx REMOVAL_REASON_KEEP_LAST", "b c d"},
				{&cachev1.CollectGarbageRequest{DryRun: true, Policy: scopes("default*", "default")}, "xx REMOVAL_REASON_KEEP_LAST", "b c d"},
				{&cachev1.CollectGarbageRequest{Policy: scopes("pr-*")}, "", "b c d"},
				{&cachev1.CollectGarbageRequest{Policy: policy}, "x REMOVAL_REASON_KEEP_LAST", "c d"},
				{&cachev1.CollectGarbageRequest{Policy: &cachev1.RetentionPolicy{MaxAge: durationpb.New(time.Hour)}}, "", "c d"},
				{&cachev1.CollectGarbageRequest{Policy: &cachev1.RetentionPolicy{MaxAge: durationpb.New(1)}}, "xx REMOVAL_REASON_MAX_AGE", ""},
			} {
				if got := collect(step.request); got != step.removed {
					t.Errorf("%v removed %q, want %q", step.request, got, step.removed)
				}
				if got := s.stored(t, names...); got != step.left {
					t.Errorf("%v left %q, want %q", step.request, got, step.left)
				}
			}
		})
	}
}

func TestListQuarantine(t *testing.T) {
	for name := range askers(nil) {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, setup{managed: true})
			ask := askers(s)[name](t)
			for _, name := range []string{"a", "b", "c"} {
				s.put(t, cachetest.Key(name), cachetest.Random(cachetest.Key(name), 2000))
				if err := os.WriteFile(s.path(cachetest.Key(name)), []byte("damaged"), 0o644); err != nil {
					t.Fatal(err)
				}
				if got := s.stored(t, name); got != "" {
					t.Errorf("%s is stored", got)
				}
			}
			found, files := map[string]bool{}, 0
			for token := ""; ; {
				page := mustAsk(t, ask, method{"ListQuarantine", &cachev1.ListQuarantineRequest{PageSize: 2, PageToken: token}, "GET", "/v1/quarantine?page_size=2&page_token=" + url.QueryEscape(token)},
					&cachev1.ListQuarantineResponse{})
				for _, file := range page.GetFiles() {
					if file.GetSize() != 7 || file.GetReason() == "" || file.GetName() == "" || time.Since(file.GetQuarantinedAt().AsTime()) > time.Hour {
						t.Errorf("in quarantine is %v", file)
					}
					found[file.GetCacheKey()] = true
					files++
				}
				if token = page.GetNextPageToken(); token == "" {
					break
				}
			}
			if len(found) != 3 || files != 3 || !found[cachetest.Key("b").String()] {
				t.Errorf("in quarantine are %v", found)
			}
		})
	}
}

// managementCases are what is refused.
func managementCases() []apiCase {
	managed := func() setup { return setup{managed: true} }
	refused := func(name string, m method, sentence string) apiCase {
		c := apiCase{
			name: name, setup: managed, given: havingA,
			rest:   &restRequest{method: m.verb, target: m.target},
			status: 400, code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: sentence,
			then:     func(t *testing.T, s *testServer) { s.stillHasA(t) },
		}
		if m.request != nil {
			if m.verb == http.MethodPost {
				body, err := protojson.Marshal(m.request)
				if err != nil {
					panic(err)
				}
				c.rest.body = body
			}
			c.grpc = invoke(m)
		}
		return c
	}
	refusedScopes := func(name, sentence string, scopes ...*cachev1.ScopeRetentionPolicy) apiCase {
		for i := range scopes {
			if scopes[i] == nil {
				scopes[i] = &cachev1.ScopeRetentionPolicy{}
			}
		}
		return refused("collect garbage: policies of scopes: "+name,
			method{"CollectGarbage", &cachev1.CollectGarbageRequest{Policy: &cachev1.RetentionPolicy{Scopes: scopes}}, "POST", "/v1/artifacts:collectGarbage"}, sentence)
	}
	unindexed := func(name string, m method) apiCase {
		c := refused(name, m, "The index is not available: this server has none")
		c.setup, c.status, c.code, c.reason = nil, 503, codes.Unavailable, "INDEX_UNAVAILABLE"
		return c
	}
	const artifacts = "/v1/artifacts"
	tooMany := slices.Repeat([]string{keyA}, 10_001)
	return []apiCase{
		refused("list: a negative page size", method{"ListArtifacts", &cachev1.ListArtifactsRequest{PageSize: -1}, "GET", artifacts + "?page_size=-1"},
			"Invalid request: page_size is -1; it must not be negative"),
		refused("list: a page token that is none", method{"ListArtifacts", &cachev1.ListArtifactsRequest{PageToken: "x"}, "GET", artifacts + "?page_token=x"},
			"Invalid request: page_token is not one that this server gave out for this list"),
		otherwise(refused("list: an order that is none", method{"ListArtifacts", &cachev1.ListArtifactsRequest{OrderBy: 9}, "GET", artifacts + "?order_by=9"},
			"Invalid request: order_by is 9, which is none"), `Invalid request: parsing field "order_by": "9" is not a valid value`),
		refused("list: a prefix that is none", method{"ListArtifacts", &cachev1.ListArtifactsRequest{Filter: &cachev1.ArtifactFilter{KeyPrefix: "%"}}, "GET", artifacts + "?filter.key_prefix=%25"},
			"Invalid request: key_prefix must be at most 128 hexadecimal digits"),
		refused("list: a negative size", method{"ListArtifacts", &cachev1.ListArtifactsRequest{Filter: &cachev1.ArtifactFilter{MaxSize: proto.Int64(-1)}}, "GET", artifacts + "?filter.max_size=-1"},
			"Invalid request: min_size and max_size must not be negative"),
		refused("list: a time too late", method{"ListArtifacts", &cachev1.ListArtifactsRequest{Filter: &cachev1.ArtifactFilter{UsedBefore: timestamppb.New(time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC))}},
			"GET", artifacts + "?filter.used_before=9999-01-01T00:00:00Z"},
			"Invalid request: used_before must be from 1970-01-01 to 2262-01-01"),
		refused("delete: neither a filter nor all", method{"DeleteArtifacts", &cachev1.DeleteArtifactsRequest{Filter: &cachev1.ArtifactFilter{}}, "POST", artifacts + ":delete"},
			"Invalid request: give a filter, or set all to delete everything that is not pinned, and not both"),
		refused("delete: a filter and all", method{"DeleteArtifacts", &cachev1.DeleteArtifactsRequest{Filter: &cachev1.ArtifactFilter{TaskName: "t"}, All: true}, "POST", artifacts + ":delete"},
			"Invalid request: give a filter, or set all to delete everything that is not pinned, and not both"),
		refused("find missing: too many keys", method{"FindMissingArtifacts", &cachev1.FindMissingArtifactsRequest{CacheKeys: tooMany}, "POST", artifacts + ":findMissing"},
			"Invalid request: there are 10001 keys; ask for at most 10000 at once"),
		refused("collect garbage: a negative number", method{"CollectGarbage", &cachev1.CollectGarbageRequest{Policy: &cachev1.RetentionPolicy{KeepLast: proto.Int32(-1)}}, "POST", artifacts + ":collectGarbage"},
			"Invalid request: keep_last is -1; it must not be negative"),
		refused("collect garbage: a negative age", method{"CollectGarbage", &cachev1.CollectGarbageRequest{Policy: &cachev1.RetentionPolicy{MaxAge: durationpb.New(-1)}}, "POST", artifacts + ":collectGarbage"},
			"Invalid request: max_age must be from 0 to 292 years"),
		refusedScopes("nameless", "Invalid request: pattern \"\" is neither the name of a scope nor the beginning of names with a * behind it: invalid scope: its name has 0 characters; it must have 1 to 63",
			&cachev1.ScopeRetentionPolicy{KeepLast: 1}),
		refusedScopes("twice", "Invalid request: pattern \"x*\" is given twice", &cachev1.ScopeRetentionPolicy{Pattern: "x*"}, &cachev1.ScopeRetentionPolicy{Pattern: "x*"}),
		refusedScopes("a negative number", "Invalid request: keep_last is -1; it must not be negative", &cachev1.ScopeRetentionPolicy{Pattern: "x", KeepLast: -1}),
		refusedScopes("a negative age", "Invalid request: max_age must be from 0 to 292 years", &cachev1.ScopeRetentionPolicy{Pattern: "x", MaxAge: durationpb.New(-1)}),
		refusedScopes("too many", "Invalid request: there are 101 policies of scopes; give at most 100", make([]*cachev1.ScopeRetentionPolicy, 101)...),
		refused("quarantine: a page token that is none", method{"ListQuarantine", &cachev1.ListQuarantineRequest{PageToken: "x"}, "GET", "/v1/quarantine?page_token=x"},
			"Invalid request: page_token is not one that this server gave out"),
		unindexed("list without an index", method{"ListArtifacts", &cachev1.ListArtifactsRequest{}, "GET", artifacts}),
		unindexed("statistics without an index", method{"GetCacheStats", &cachev1.GetCacheStatsRequest{}, "GET", "/v1/stats"}),
		unindexed("delete without an index", method{"DeleteArtifacts", &cachev1.DeleteArtifactsRequest{All: true}, "POST", artifacts + ":delete"}),
		unindexed("collect garbage without an index", method{"CollectGarbage", &cachev1.CollectGarbageRequest{}, "POST", artifacts + ":collectGarbage"}),
	}
}

// otherwise is a case that is told otherwise over REST, by the gateway.
func otherwise(c apiCase, restSentence string) apiCase {
	c.restSentence = restSentence
	return c
}

// invoke calls a method whose answer does not matter.
func invoke(m method) grpcCall {
	return func(ctx context.Context, client cachev1.ArtifactServiceClient) (answer, error) {
		var err error
		switch request := m.request.(type) {
		case *cachev1.ListArtifactsRequest:
			_, err = client.ListArtifacts(ctx, request)
		case *cachev1.DeleteArtifactsRequest:
			_, err = client.DeleteArtifacts(ctx, request)
		case *cachev1.FindMissingArtifactsRequest:
			_, err = client.FindMissingArtifacts(ctx, request)
		case *cachev1.CollectGarbageRequest:
			_, err = client.CollectGarbage(ctx, request)
		case *cachev1.ListQuarantineRequest:
			_, err = client.ListQuarantine(ctx, request)
		case *cachev1.GetCacheStatsRequest:
			_, err = client.GetCacheStats(ctx, request)
		}
		return answer{}, err
	}
}

func (s *testServer) flush(t *testing.T) {
	t.Helper()
	if err := s.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// stored returns which of some names have an artifact.
func (s *testServer) stored(t *testing.T, names ...string) string {
	t.Helper()
	var found []string
	for _, name := range names {
		if _, err := s.store.Stat(t.Context(), cachetest.Key(name)); err == nil {
			found = append(found, name)
		} else if !errors.Is(err, cache.ErrNotFound) {
			t.Error(err)
		}
	}
	return strings.Join(found, " ")
}

func (s *testServer) stillHasA(t *testing.T) {
	if got := s.stored(t, "a"); got != "a" {
		t.Error("the artifact is gone")
	}
}

func listed(response *cachev1.ListArtifactsResponse) []string {
	var keys []string
	for _, a := range response.GetArtifacts() {
		keys = append(keys, a.GetArtifact().GetCacheKey())
	}
	return keys
}
