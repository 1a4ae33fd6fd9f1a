package client_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// manager is what both clients have for those who run a cache.
type manager interface {
	List(context.Context, *client.ListRequest) iter.Seq2[*client.Stored, error]
	Delete(context.Context, artifact.Key) error
	DeleteMatching(context.Context, *client.DeleteRequest) (*client.Deleted, error)
	Missing(context.Context, []artifact.Key) ([]string, error)
	Pin(context.Context, artifact.Key) error
	Unpin(context.Context, artifact.Key) error
	Stats(context.Context, int) (*client.Stats, error)
	Quarantine(context.Context) iter.Seq2[*client.Quarantined, error]
	CollectGarbage(context.Context, *client.CollectRequest) (*client.Collected, error)
}

// fakeManager remembers what it is asked, and answers with two pages where there are pages.
type fakeManager struct {
	cachev1.UnimplementedArtifactServiceServer
	asked []proto.Message
}

func (f *fakeManager) ListArtifacts(_ context.Context, request *cachev1.ListArtifactsRequest) (*cachev1.ListArtifactsResponse, error) {
	f.asked = append(f.asked, request)
	if request.GetPageToken() == "" {
		return &cachev1.ListArtifactsResponse{Artifacts: []*client.Stored{{UseCount: 1}, {UseCount: 2}}, NextPageToken: "b&c=d"}, nil
	}
	return &cachev1.ListArtifactsResponse{Artifacts: []*client.Stored{{UseCount: 3}}}, nil
}

func (f *fakeManager) DeleteArtifact(_ context.Context, request *cachev1.DeleteArtifactRequest) (*cachev1.DeleteArtifactResponse, error) {
	f.asked = append(f.asked, request)
	return &cachev1.DeleteArtifactResponse{}, nil
}

func (f *fakeManager) DeleteArtifacts(_ context.Context, request *cachev1.DeleteArtifactsRequest) (*cachev1.DeleteArtifactsResponse, error) {
	f.asked = append(f.asked, request)
	return &cachev1.DeleteArtifactsResponse{More: true}, nil
}

func (f *fakeManager) FindMissingArtifacts(_ context.Context, request *cachev1.FindMissingArtifactsRequest) (*cachev1.FindMissingArtifactsResponse, error) {
	f.asked = append(f.asked, request)
	return &cachev1.FindMissingArtifactsResponse{MissingCacheKeys: request.GetCacheKeys()}, nil
}

func (f *fakeManager) PinArtifact(_ context.Context, request *cachev1.PinArtifactRequest) (*cachev1.PinArtifactResponse, error) {
	f.asked = append(f.asked, request)
	return &cachev1.PinArtifactResponse{}, nil
}

func (f *fakeManager) UnpinArtifact(_ context.Context, request *cachev1.UnpinArtifactRequest) (*cachev1.UnpinArtifactResponse, error) {
	f.asked = append(f.asked, request)
	return &cachev1.UnpinArtifactResponse{}, nil
}

func (f *fakeManager) GetCacheStats(_ context.Context, request *cachev1.GetCacheStatsRequest) (*cachev1.GetCacheStatsResponse, error) {
	f.asked = append(f.asked, request)
	return &cachev1.GetCacheStatsResponse{TaskCount: 134}, nil
}

func (f *fakeManager) ListQuarantine(_ context.Context, request *cachev1.ListQuarantineRequest) (*cachev1.ListQuarantineResponse, error) {
	f.asked = append(f.asked, request)
	if request.GetPageToken() == "" {
		return &cachev1.ListQuarantineResponse{Files: []*client.Quarantined{{Name: "a"}}, NextPageToken: "a"}, nil
	}
	return &cachev1.ListQuarantineResponse{Files: []*client.Quarantined{{Name: "b"}}}, nil
}

func (f *fakeManager) CollectGarbage(_ context.Context, request *cachev1.CollectGarbageRequest) (*cachev1.CollectGarbageResponse, error) {
	f.asked = append(f.asked, request)
	return &cachev1.CollectGarbageResponse{More: true}, nil
}

// eachManager runs a test with a client over each protocol. Over REST the service is behind the gateway that a
// server has, and behind a path.
func eachManager(t *testing.T, test func(t *testing.T, manager manager, service *fakeManager)) {
	t.Parallel()
	t.Run("rest", func(t *testing.T) {
		t.Parallel()
		service := &fakeManager{}
		gateway := runtime.NewServeMux()
		if err := cachev1.RegisterArtifactServiceHandlerServer(t.Context(), gateway, service); err != nil {
			t.Fatal(err)
		}
		server := httptest.NewServer(http.StripPrefix("/some/prefix", gateway))
		defer server.Close()
		test(t, newREST(t, server.URL+"/some/prefix"), service)
	})
	t.Run("grpc", func(t *testing.T) {
		t.Parallel()
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		service, server := &fakeManager{}, grpc.NewServer()
		cachev1.RegisterArtifactServiceServer(server, service)
		go server.Serve(listener)
		t.Cleanup(server.Stop)
		test(t, newGRPC(t, "http://"+listener.Addr().String()), service)
	})
}

// checkAsked checks what a service was asked since the last time.
func checkAsked(t *testing.T, service *fakeManager, want ...proto.Message) {
	t.Helper()
	if !slices.EqualFunc(service.asked, want, proto.Equal) {
		t.Errorf("the service was asked %v, want %v", service.asked, want)
	}
	service.asked = nil
}

// Every field of a request arrives, and all pages are asked for.
func TestListAsksForAllPages(t *testing.T) {
	eachManager(t, func(t *testing.T, manager manager, service *fakeManager) {
		at := func(seconds int64) *timestamppb.Timestamp {
			return timestamppb.New(time.Unix(seconds, 123456789))
		}
		for name, request := range map[string]*client.ListRequest{
			"everything": {
				Filter: &client.Filter{
					PackageName: "a&b", TaskName: "ä b", KeyPrefix: "0f",
					StoredAfter: at(1), StoredBefore: at(2), UsedAfter: at(3), UsedBefore: at(4),
					MinSize: 1 << 60, MaxSize: proto.Int64(0), Pinned: proto.Bool(false),
				},
				OrderBy: client.BySize, Descending: true, PageSize: 7,
			},
			"nothing": {},
		} {
			request.PageToken = "is left alone"
			var uses []int64
			for stored, err := range manager.List(t.Context(), request) {
				if err != nil {
					t.Fatal(err)
				}
				uses = append(uses, stored.GetUseCount())
			}
			if !slices.Equal(uses, []int64{1, 2, 3}) {
				t.Errorf("%s: artifacts %d", name, uses)
			}
			first, second := proto.CloneOf(request), proto.CloneOf(request)
			first.PageToken, second.PageToken = "", "b&c=d"
			checkAsked(t, service, first, second)
			if request.PageToken != "is left alone" {
				t.Errorf("%s: the request was changed", name)
			}
		}
		for range manager.List(t.Context(), &client.ListRequest{}) {
			break
		}
		checkAsked(t, service, &client.ListRequest{}) // and not for the second page
	})
}

func TestQuarantineAsksForAllPages(t *testing.T) {
	eachManager(t, func(t *testing.T, manager manager, service *fakeManager) {
		var names []string
		for file, err := range manager.Quarantine(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, file.GetName())
		}
		if !slices.Equal(names, []string{"a", "b"}) {
			t.Errorf("files %q", names)
		}
		checkAsked(t, service, &cachev1.ListQuarantineRequest{PageSize: 1000}, &cachev1.ListQuarantineRequest{PageSize: 1000, PageToken: "a"})
	})
}

func TestManagersAsk(t *testing.T) {
	eachManager(t, func(t *testing.T, manager manager, service *fakeManager) {
		ctx, key := t.Context(), testKey(t)
		digits := key.String()
		for _, do := range []func() error{
			func() error { return manager.Delete(ctx, key) },
			func() error { return manager.Pin(ctx, key) },
			func() error { return manager.Unpin(ctx, key) },
		} {
			if err := do(); err != nil {
				t.Error(err)
			}
		}
		checkAsked(t, service, &cachev1.DeleteArtifactRequest{CacheKey: digits}, &cachev1.PinArtifactRequest{CacheKey: digits}, &cachev1.UnpinArtifactRequest{CacheKey: digits})

		for _, request := range []*client.DeleteRequest{
			{Filter: &client.Filter{PackageName: "a", UsedBefore: timestamppb.New(time.Unix(1, 1)), Pinned: proto.Bool(true)}, DryRun: true},
			{All: true},
		} {
			deleted, err := manager.DeleteMatching(ctx, request)
			if err != nil || !deleted.GetMore() {
				t.Errorf("answer %v, %v", deleted, err)
			}
			checkAsked(t, service, request)
		}

		for _, request := range []*client.CollectRequest{
			{Policy: &client.RetentionPolicy{MaxStorageSize: proto.Int64(1 << 60), MinFreeSize: proto.Int64(0), MaxAge: durationpb.New(90 * time.Minute), KeepLast: proto.Int32(5)}, DryRun: true},
			{},
		} {
			collected, err := manager.CollectGarbage(ctx, request)
			if err != nil || !collected.GetMore() {
				t.Errorf("answer %v, %v", collected, err)
			}
			checkAsked(t, service, request)
		}

		missing, err := manager.Missing(ctx, []artifact.Key{key, key})
		if err != nil || !slices.Equal(missing, []string{digits, digits}) {
			t.Errorf("missing %q, %v", missing, err)
		}
		checkAsked(t, service, &cachev1.FindMissingArtifactsRequest{CacheKeys: []string{digits, digits}})

		stats, err := manager.Stats(ctx, 20)
		if err != nil || stats.GetTaskCount() != 134 {
			t.Errorf("statistics %v, %v", stats, err)
		}
		checkAsked(t, service, &cachev1.GetCacheStatsRequest{MaxTasks: 20})
	})
}

// A fault is the error of every method, and of a list an error at its end.
func TestManagersFail(t *testing.T) {
	t.Parallel()
	refusal := answer(t, "HTTP/1.1 404 Not Found\r\n\r\n{\"error\":\"Artifact not found\"}")
	for protocol, test := range map[string]struct {
		manager manager
		want    error // or, if it is nil, a *client.TransportError
	}{
		"REST":           {newREST(t, refusal), client.ErrNotFound},
		"REST, no HTTP":  {newREST(t, answer(t, "SSH-2.0-OpenSSH_9.9\r\n")), nil},
		"gRPC, no HTTP2": {newGRPC(t, refusal), nil},
	} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			ctx, key := t.Context(), testKey(t)
			_, listed := one(test.manager.List(ctx, &client.ListRequest{}))
			_, quarantined := one(test.manager.Quarantine(ctx))
			_, deleted := test.manager.DeleteMatching(ctx, &client.DeleteRequest{All: true})
			_, missing := test.manager.Missing(ctx, []artifact.Key{key})
			_, stats := test.manager.Stats(ctx, 1)
			_, collected := test.manager.CollectGarbage(ctx, &client.CollectRequest{})
			for i, err := range []error{
				listed, quarantined, deleted, missing, stats, collected,
				test.manager.Delete(ctx, key), test.manager.Pin(ctx, key), test.manager.Unpin(ctx, key),
			} {
				_, broken := errors.AsType[*client.TransportError](err)
				if err == nil || test.want != nil && !errors.Is(err, test.want) || test.want == nil && !broken {
					t.Errorf("method %d: error %v", i, err)
				}
			}
		})
	}
}

// one returns the only entry of a list.
func one[T any](entries iter.Seq2[T, error]) (last T, err error) {
	n := 0
	for last, err = range entries {
		n++
	}
	if n != 1 {
		return last, fmt.Errorf("there are %d entries", n)
	}
	return last, err
}

// As many keys as may be asked about at once, of the most digits, fit into what a server reads.
func TestMissingOfTheMostKeys(t *testing.T) {
	eachManager(t, func(t *testing.T, manager manager, _ *fakeManager) {
		var keys []artifact.Key
		for i := range client.MaxKeys {
			key, err := artifact.ParseKey(fmt.Sprintf("%s%08x", strings.Repeat("0", artifact.MaxKeyDigits-8), i))
			if err != nil {
				t.Fatal(err)
			}
			keys = append(keys, key)
		}
		missing, err := manager.Missing(t.Context(), keys)
		if err != nil || len(missing) != client.MaxKeys {
			t.Errorf("%d are missing, %v", len(missing), err)
		}
	})
}
