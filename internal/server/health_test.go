package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// services are the names whose health can be asked for; the empty one is the whole server's.
var services = []string{"", "polykit.cache.v1.ArtifactService"}

// TestReadiness proves that a server whose storage directory can't be written says so through every
// mouth, and that it is ready again when the trouble is over. Only uploads need to write.
func TestReadiness(t *testing.T) {
	for _, m := range mouths {
		t.Run(m.name, func(t *testing.T) {
			s := startServer(t, setup{})
			havingA(t, s)
			b, contentB := cachetest.Key("b"), cachetest.Random(cachetest.Key("b"), 100)
			tmp := filepath.Join(s.dir, "tmp")
			var check func(t *testing.T, ready bool)
			if m.rest != nil {
				transport := m.rest(t, s)
				check = func(t *testing.T, ready bool) { checkReadyREST(t, s, transport, ready) }
			} else {
				conn := m.grpc(t, s)
				check = func(t *testing.T, ready bool) {
					checkReadyGRPC(t, healthpb.NewHealthClient(conn), ready)
					if got, err := download(keyA, 0, 0)(t.Context(), cachev1.NewArtifactServiceClient(conn)); err != nil || string(got.content()) != string(artifactA) {
						t.Errorf("a download got %d bytes, %v", len(got.content()), err)
					}
				}
			}

			check(t, true)
			// Without tmp/ the store would make it again.
			if err := errors.Join(os.Remove(tmp), os.Symlink("tmp", tmp)); err != nil {
				t.Fatal(err)
			}
			check(t, false)
			if lines := s.log.find(slog.LevelWarn, "storage directory can't be written"); m.rest != nil && len(lines) == 0 {
				t.Error("it is not logged that the server is not ready")
			}
			if err := os.Remove(tmp); err != nil {
				t.Fatal(err)
			}
			check(t, true)
			s.put(t, b, contentB)
		})
	}
}

func checkReadyREST(t *testing.T, s *testServer, transport http.RoundTripper, ready bool) {
	t.Helper()
	response, body := (&restRequest{method: "GET", target: "/healthz"}).do(t, s, transport)
	if response.StatusCode != 200 || string(body) != `{"status":"ok"}` {
		t.Errorf("/healthz: got %s %s; want 200, since the process serves", response.Status, body)
	}
	response, body = (&restRequest{method: "GET", target: "/readyz"}).do(t, s, transport)
	if ready {
		if response.StatusCode != 200 || string(body) != `{"status":"ready"}` {
			t.Errorf("/readyz: got %s %s; want 200", response.Status, body)
		}
	} else {
		var said struct{ Error string }
		if err := json.Unmarshal(body, &said); err != nil {
			t.Errorf("/readyz: %v in %s", err, body)
		}
		// What follows is the operating system's.
		want := "Storage directory can't be written: open " + filepath.Join(s.dir, "tmp")
		if response.StatusCode != 503 || !strings.HasPrefix(said.Error, want) {
			t.Errorf("/readyz: got %s %s; want 503 and that the %s", response.Status, body, want)
		}
		checkErrorBody(t, "GET", response, body, said.Error)
	}
	response, body = get(keyA).do(t, s, transport)
	if response.StatusCode != 200 || string(body) != string(artifactA) {
		t.Errorf("a download got %s and %d bytes", response.Status, len(body))
	}
	const want = 409 // since it is stored, which is looked at before anything is written
	if response, body = put(keyA, artifactA).do(t, s, transport); response.StatusCode != want {
		t.Errorf("an upload of what exists got %s %s; want %d", response.Status, body, want)
	}
}

func checkReadyGRPC(t *testing.T, client healthpb.HealthClient, ready bool) {
	t.Helper()
	want := healthpb.HealthCheckResponse_SERVING
	if !ready {
		want = healthpb.HealthCheckResponse_NOT_SERVING
	}
	for _, service := range services {
		// Watch comes first: it must not depend on somebody having asked before.
		ctx, cancel := context.WithCancel(t.Context())
		watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{Service: service})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := watch.Recv(); err != nil || got.GetStatus() != want {
			t.Errorf("Watch of %q: got %v, %v; want %v", service, got.GetStatus(), err, want)
		}
		cancel()
		got, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil || got.GetStatus() != want {
			t.Errorf("Check of %q: got %v, %v; want %v", service, got.GetStatus(), err, want)
		}
		all, err := client.List(t.Context(), &healthpb.HealthListRequest{})
		if err != nil || all.GetStatuses()[service].GetStatus() != want {
			t.Errorf("List has %v, %v; want %v of %q", all.GetStatuses(), err, want, service)
		}
	}
	if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "other"}); status.Code(err) != codes.NotFound {
		t.Errorf("Check of a service that is not there: got %v; want NOT_FOUND", err)
	}
}

// TestWatch proves that who watches the server's health is told when it changes.
func TestWatch(t *testing.T) {
	for _, m := range grpcMouths() {
		t.Run(m.name, func(t *testing.T) {
			memory := &cachetest.Memory{}
			s := startServer(t, setup{store: memory})
			client := healthpb.NewHealthClient(m.grpc(t, s))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
			if err != nil {
				t.Fatal(err)
			}
			want := func(want healthpb.HealthCheckResponse_ServingStatus) {
				t.Helper()
				if got, err := watch.Recv(); err != nil || got.GetStatus() != want {
					t.Fatalf("got %v, %v; want %v", got.GetStatus(), err, want)
				}
			}
			// The server looks whenever somebody asks.
			check := func() {
				t.Helper()
				if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
					t.Fatal(err)
				}
			}
			want(healthpb.HealthCheckResponse_SERVING)
			memory.Fail(cachetest.Faults{Check: io.ErrClosedPipe})
			check()
			want(healthpb.HealthCheckResponse_NOT_SERVING)
			memory.Fail(cachetest.Faults{})
			check()
			want(healthpb.HealthCheckResponse_SERVING)
		})
	}
}

// TestReflection proves that tools can find out what there is to call.
func TestReflection(t *testing.T) {
	for _, m := range grpcMouths() {
		t.Run(m.name, func(t *testing.T) {
			client := reflectionpb.NewServerReflectionClient(m.grpc(t, startServer(t, setup{})))
			stream, err := client.ServerReflectionInfo(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&reflectionpb.ServerReflectionRequest{
				MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
			}); err != nil {
				t.Fatal(err)
			}
			response, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, service := range response.GetListServicesResponse().GetService() {
				names = append(names, service.GetName())
			}
			want := []string{
				"grpc.health.v1.Health",
				"grpc.reflection.v1.ServerReflection",
				"grpc.reflection.v1alpha.ServerReflection",
				"polykit.cache.v1.ArtifactService",
			}
			if !slices.Equal(names, want) {
				t.Errorf("the services are %q; want %q", names, want)
			}
			stream.CloseSend()
			if response, err := stream.Recv(); err != io.EOF {
				t.Errorf("the stream ended with %v, %v", response, err)
			}
		})
	}
}
