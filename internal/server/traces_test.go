package server_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	grpccodes "google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/server"
)

// newTraces returns traces of which processor is told.
func newTraces(processor sdktrace.SpanProcessor) *server.Traces {
	return &server.Traces{
		Provider:   sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(processor), sdktrace.WithoutPanicRecording()),
		Propagator: propagation.TraceContext{},
	}
}

// served is told of the spans of requests and calls when they have ended, each as its name, the reason why it failed, and
// an exclamation mark if that is the server's fault.
type served chan string

func (s served) OnEnd(span sdktrace.ReadOnlySpan) {
	if span.SpanKind() != trace.SpanKindServer {
		return
	}
	line := span.Name()
	for _, a := range span.Attributes() {
		if a.Key == "error.type" {
			line += " " + a.Value.AsString()
		}
	}
	if span.Status().Code == codes.Error {
		line += "!"
	}
	s <- line
}

func (s served) OnStart(context.Context, sdktrace.ReadWriteSpan) {}
func (s served) Shutdown(context.Context) error                  { return nil }
func (s served) ForceFlush(context.Context) error                { return nil }

// TestServerSpans checks how requests and calls of all kinds are called, and which of them failed: the names are few, what
// asks whether the server works has none, and only what is the server's fault is an error.
func TestServerSpans(t *testing.T) {
	trouble := errors.New("trouble")
	artifactPath := "/v1/artifacts/" + keyA
	artifacts := "polykit.cache.v1.ArtifactService/"
	cases := []struct {
		faults cachetest.Faults
		panics string // the store's method that panics
		rest   *restRequest
		grpc   func(ctx context.Context, conn grpc.ClientConnInterface) error
		want   string // empty for no span
	}{
		{rest: get(keyA), want: "GET /v1/artifacts/{cache_key}"},
		{rest: get("x"), want: "GET /v1/artifacts/{cache_key} INVALID_CACHE_KEY"},
		{rest: get(cachetest.Key("miss").String()), want: "GET /v1/artifacts/{cache_key} ARTIFACT_NOT_FOUND"},
		{rest: put(keyA, artifactA), want: "PUT /v1/artifacts/{cache_key} ARTIFACT_EXISTS"},
		{rest: get(keyA + "/metadata"), want: "GET /v1/artifacts/{cache_key}/metadata"},
		{rest: &restRequest{method: "HEAD", target: artifactPath + "/metadata"}, want: "HEAD /v1/artifacts/{cache_key}/metadata"},
		{rest: &restRequest{method: "GET", target: "/t/default" + artifactPath}, want: "GET /t/{scope}/v1/artifacts/{cache_key}"},
		{rest: &restRequest{method: "GET", target: "/t/secret" + artifactPath}, want: "GET /t/{scope}/v1/artifacts/{cache_key} NO_SCOPES"},
		{rest: &restRequest{method: "PATCH", target: artifactPath}, want: "PATCH /v1/artifacts/{cache_key} METHOD_NOT_ALLOWED"},
		{rest: &restRequest{method: "BREW", target: artifactPath}, want: "HTTP /v1/artifacts/{cache_key} METHOD_NOT_ALLOWED"},
		{rest: &restRequest{method: "GET", target: "/nothing"}, want: "GET NOT_FOUND"},
		{rest: &restRequest{method: "BREW", target: "/nothing"}, want: "HTTP NOT_FOUND"},
		{rest: &restRequest{method: "GET", target: artifactPath + "?" + strings.Repeat("x", 5000)}}, // or the span would keep it
		{rest: &restRequest{method: "GET", target: artifactPath, header: map[string]string{"User-Agent": strings.Repeat("x", 5000)}}},
		{rest: &restRequest{method: "GET", target: "/healthz"}},
		{rest: &restRequest{method: "GET", target: "/readyz"}},
		{rest: get(keyA), faults: cachetest.Faults{Open: trouble}, want: "GET /v1/artifacts/{cache_key} INTERNAL!"},
		{rest: get(keyA), faults: cachetest.Faults{Read: trouble}, want: "GET /v1/artifacts/{cache_key} INTERNAL!"},
		{rest: get(keyA), panics: "Open", want: "GET /v1/artifacts/{cache_key} INTERNAL!"},
		{rest: get(keyA + "/metadata"), faults: cachetest.Faults{Stat: trouble}, want: "GET /v1/artifacts/{cache_key}/metadata INTERNAL!"},
		{rest: put(cachetest.Key("b").String(), artifactA), faults: cachetest.Faults{Create: cache.ErrNoSpace}, want: "PUT /v1/artifacts/{cache_key} STORAGE_FULL!"},

		{grpc: callOf(stat(keyA)), want: artifacts + "StatArtifact"},
		{grpc: callOf(download(keyA, 0, 0)), want: artifacts + "GetArtifact"},
		{grpc: callOf(download(cachetest.Key("miss").String(), 0, 0)), want: artifacts + "GetArtifact ARTIFACT_NOT_FOUND"},
		{grpc: callOf(uploadAll(keyA, artifactA)), want: artifacts + "PutArtifact ARTIFACT_EXISTS"},
		{grpc: callOf(stat(keyA)), faults: cachetest.Faults{Stat: trouble}, want: artifacts + "StatArtifact INTERNAL!"},
		{grpc: callOf(stat(keyA)), panics: "Stat", want: artifacts + "StatArtifact INTERNAL!"},
		{grpc: callOf(uploadAll(cachetest.Key("b").String(), artifactA)), faults: cachetest.Faults{Create: cache.ErrNoSpace}, want: artifacts + "PutArtifact STORAGE_FULL!"},
		{grpc: func(ctx context.Context, conn grpc.ClientConnInterface) error {
			_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
			return err
		}},
		{grpc: func(ctx context.Context, conn grpc.ClientConnInterface) error {
			return conn.Invoke(ctx, "/polykit.cache.v1.ArtifactService/Brew", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{})
		}},
	}
	for _, m := range mouths {
		if m.name == "REST amid gRPC" {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			memory, spans := &cachetest.Memory{}, make(served, len(cases))
			store := &panicking{Store: memory}
			s := startServer(t, setup{store: store, change: func(c *server.Config) { c.Traces = newTraces(spans) }})
			s.put(t, cachetest.Key("a"), artifactA)
			defer func() { // what should have no span may have had one
				s.stop()
				s.end()
				for len(spans) > 0 {
					t.Errorf("there was a span %q too many", <-spans)
				}
			}()
			do := func(c *restRequest, transport http.RoundTripper) {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				request, err := http.NewRequestWithContext(ctx, c.method, s.url+c.target, bytes.NewReader(c.body))
				if err != nil {
					t.Fatal(err)
				}
				for name, value := range c.header {
					request.Header.Set(name, value)
				}
				request.Close = true // or one that is cut might be sent again
				if response, err := transport.RoundTrip(request); err == nil {
					io.Copy(io.Discard, response.Body)
					response.Body.Close()
				}
			}
			var transport *http.Transport
			var conn grpc.ClientConnInterface
			if m.rest != nil {
				transport = m.rest(t, s).(*http.Transport)
				defer transport.CloseIdleConnections()
			} else {
				conn = m.grpc(t, s)
				if native, ok := conn.(*grpc.ClientConn); ok {
					defer native.Close()
				}
			}
			for _, c := range cases {
				memory.Fail(c.faults)
				store.method = c.panics
				switch {
				case m.rest != nil && c.rest != nil:
					do(c.rest, transport)
				case m.grpc != nil && c.grpc != nil:
					c.grpc(t.Context(), conn)
				default:
					continue
				}
				if c.want == "" {
					continue
				}
				if got := <-spans; got != c.want {
					t.Errorf("got %q; want %q", got, c.want)
				}
			}
		})
	}
}

// callOf makes a call of a client's on a connection.
func callOf(call grpcCall) func(ctx context.Context, conn grpc.ClientConnInterface) error {
	return func(ctx context.Context, conn grpc.ClientConnInterface) error {
		_, err := call(ctx, cachev1.NewArtifactServiceClient(conn))
		return err
	}
}

// TestSendfileTraced proves that net/http is given files by traced requests too, in the form in which it sends them by
// sendfile(2).
func TestSendfileTraced(t *testing.T) {
	spans := make(served, 1)
	s := startServer(t, setup{change: func(c *server.Config) { c.Traces = newTraces(spans) }})
	if s.dir == "" {
		t.Fatal("the store has no files")
	}
	s.put(t, cachetest.Key("a"), artifactA)
	w := &fileSender{ResponseRecorder: httptest.NewRecorder()}
	s.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/v1/artifacts/"+keyA, nil))
	if !bytes.Equal(w.Body.Bytes(), artifactA) {
		t.Errorf("got %d bytes", w.Body.Len())
	}
	part, ok := w.from.(*io.LimitedReader)
	if ok {
		_, ok = part.R.(*os.File)
	}
	if !ok {
		t.Errorf("the content came from %T; want an *io.LimitedReader of a file", w.from)
	}
	if got, want := <-spans, "GET /v1/artifacts/{cache_key}"; got != want {
		t.Errorf("got %q; want %q", got, want)
	}
}

// TestTracesOffCostNothing has a server without traces, which must not be wrapped in anything.
func TestTracesOffCostNothing(t *testing.T) {
	handler := http.NotFoundHandler()
	handle := http.HandlerFunc(http.NotFound)
	for name, traces := range map[string]*server.Traces{"off": nil, "on": newTraces(tracetest.NewSpanRecorder())} {
		s := startServer(t, setup{change: func(c *server.Config) { c.Traces = traces }})
		traced, onRoute, options, fault := s.Tracing(handler, handle)
		pointer := func(f any) uintptr { return reflect.ValueOf(f).Pointer() }
		wrapped := []bool{pointer(traced) != pointer(handler), pointer(onRoute) != pointer(handle), options > 0}
		if want := traces != nil; !slices.Equal(wrapped, []bool{want, want, want}) {
			t.Errorf("traces are %s: wrapped are %v", name, wrapped)
		}
		if n := testing.AllocsPerRun(1000, func() { fault(t.Context()) }); n > 0 {
			t.Errorf("traces are %s: a request that failed and is not traced allocates %v", name, n)
		}
	}
}

// TestTraceStateIsBounded has calls say which trace they are part of, and much more.
func TestTraceStateIsBounded(t *testing.T) {
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for _, m := range grpcMouths() {
		spans := tracetest.NewSpanRecorder()
		s := startServer(t, setup{tls: m.tls, change: func(c *server.Config) { c.Traces = newTraces(spans) }})
		conn := m.grpc(t, s)
		for state, want := range map[string]string{"a=b": "a=b", "a=b," + strings.Repeat(" ", 5000) + "c=d": ""} {
			ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", parent, "tracestate", state)
			if err := callOf(stat(keyA))(ctx, conn); status.Code(err) != grpccodes.NotFound {
				t.Errorf("%s: %v", m.name, err)
			}
			var ended []sdktrace.ReadOnlySpan
			waitUntil(t, "the span has ended", func() bool {
				ended = spans.Ended()
				return len(ended) > 0
			})
			about := ended[0].SpanContext()
			if about.TraceID().String() != parent[3:35] || about.TraceState().String() != want {
				t.Errorf("%s: of a state of %d bytes the span %s has %q; want %q", m.name, len(state), about.TraceID(), about.TraceState(), want)
			}
			spans.Reset()
		}
	}
}
