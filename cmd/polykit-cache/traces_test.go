//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

// collector receives traces, over gRPC and HTTP.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer
	overGRPC, overHTTP string // URLs
	status             int    // that it answers with over HTTP

	mu       sync.Mutex
	received []*tracepb.ResourceSpans
	came     chan string // the name of each span
}

func startCollector(t *testing.T) *collector {
	t.Helper()
	c := &collector{status: 200, came: make(chan string, 10_000)}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	c.overGRPC = "http://" + listener.Addr().String()
	server := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(server, c)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	overHTTP := httptest.NewServer(c)
	t.Cleanup(overHTTP.Close)
	c.overHTTP = overHTTP.URL
	return c
}

// Export implements collectorpb.TraceServiceServer.
func (c *collector) Export(_ context.Context, request *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.received = append(c.received, request.ResourceSpans...)
	for _, span := range spansOf(request.ResourceSpans) {
		c.came <- span.Name
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

// ServeHTTP is Export over HTTP.
func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	request := &collectorpb.ExportTraceServiceRequest{}
	if err == nil {
		err = proto.Unmarshal(body, request)
	}
	if err != nil || r.Method != "POST" || r.URL.Path != "/v1/traces" {
		http.Error(w, "no traces", http.StatusBadRequest)
		return
	}
	response, _ := c.Export(r.Context(), request)
	answer, _ := proto.Marshal(response)
	w.Header().Set("Content-Type", "application/x-protobuf")
	w.WriteHeader(c.status)
	w.Write(answer)
}

// take returns what was received since it was called last.
func (c *collector) take() []*tracepb.ResourceSpans {
	c.mu.Lock()
	defer c.mu.Unlock()
	received := c.received
	c.received = nil
	for len(c.came) > 0 {
		<-c.came
	}
	return received
}

func spansOf(received []*tracepb.ResourceSpans) (spans []*tracepb.Span) {
	for _, r := range received {
		for _, s := range r.ScopeSpans {
			spans = append(spans, s.Spans...)
		}
	}
	return spans
}

// waitFor waits until a span of a name was received.
func (c *collector) waitFor(t *testing.T, name string) {
	t.Helper()
	for <-c.came != name {
	}
}

// attributesOf returns the attributes of a span as NAME=VALUE.
func attributesOf(span *tracepb.Span) map[string]string {
	attributes := map[string]string{}
	for _, a := range span.Attributes {
		value := a.Value.GetStringValue()
		if value == "" {
			value = fmt.Sprint(a.Value.GetIntValue())
		}
		attributes[a.Key] = value
	}
	return attributes
}

// tree returns the spans of a trace as "PARENT > NAME", in ascending order; the parent is the client if it is the span with
// the ID that a client said.
func tree(spans []*tracepb.Span, trace, client string) (lines []string) {
	names := map[string]string{client: "client"}
	for _, span := range spans {
		names[hex.EncodeToString(span.SpanId)] = span.Name
	}
	for _, span := range spans {
		if hex.EncodeToString(span.TraceId) == trace {
			lines = append(lines, names[hex.EncodeToString(span.ParentSpanId)]+" > "+span.Name)
		}
	}
	slices.Sort(lines)
	return lines
}

// spanOf returns the span of a trace with a name.
func spanOf(t *testing.T, spans []*tracepb.Span, trace, name string) *tracepb.Span {
	t.Helper()
	for _, span := range spans {
		if hex.EncodeToString(span.TraceId) == trace && span.Name == name {
			return span
		}
	}
	t.Errorf("no span %q in trace %s", name, trace)
	return &tracepb.Span{}
}

// startProxy starts a proxy in front of a server, which sends all over one connection, REST and gRPC.
func startProxy(t *testing.T, server string) *url.URL {
	t.Helper()
	to, err := url.Parse("http://" + server)
	check(t, err)
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, MaxConnsPerHost: 1}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := httptest.NewUnstartedServer(&httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(to) },
		Transport:     transport,
		FlushInterval: -1,
	})
	proxy.Config.Protocols = &http.Protocols{}
	proxy.Config.Protocols.SetHTTP1(true)
	proxy.Config.Protocols.SetUnencryptedHTTP2(true)
	proxy.Start()
	t.Cleanup(proxy.Close)
	response, err := http.Get(proxy.URL + "/healthz") // so that the connection is not taken for a gRPC client's
	check(t, err)
	response.Body.Close()
	at, err := url.Parse(proxy.URL)
	check(t, err)
	return at
}

const traceToken = "pkc_traced"

// traceOf returns the ID of the nth trace that a client begins, and that of its span.
func traceOf(n int) (trace, span string) { return fmt.Sprintf("%032x", n), fmt.Sprintf("%016x", n) }

// traceparent is what a client says of the nth trace.
func traceparent(n int) string {
	trace, span := traceOf(n)
	return "00-" + trace + "-" + span + "-01"
}

// TestTraces has clients of all kinds say which trace their requests are part of, and sees what a collector gets: the spans
// of the server and below them those of the cache. It gets the last of them when the server ends.
func TestTraces(t *testing.T) {
	const artifacts = "polykit.cache.v1.ArtifactService/"
	put := func(server string) []string {
		return []string{server + " > commit", server + " > queue", server + " > verify", "client > " + server}
	}
	for _, protocol := range []string{"http/protobuf", "grpc"} {
		t.Run(protocol, func(t *testing.T) {
			c := startCollector(t)
			endpoint := map[string]string{"http/protobuf": c.overHTTP, "grpc": c.overGRPC}[protocol]
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
			t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
			t.Setenv("OTEL_SERVICE_NAME", "cache-1")
			t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
			file := filepath.Join(t.TempDir(), "auth.yaml")
			check(t, os.WriteFile(file, []byte("tokens: [{name: all, sha256: "+auth.HashToken(traceToken)+", role: writer, scopes: [default, nightly]}]\nscopes: [{name: default}, {name: nightly}]\n"), 0o600))
			p := startProgram(t, "polykit-cache", t.TempDir(), "--auth-file", file)

			server := &url.URL{Scheme: "http", Host: p.address, User: url.UserPassword("x", traceToken)}
			proxy := startProxy(t, p.address)
			proxy.User = server.User
			request := func(n int, method, path string, body []byte, want int) {
				t.Helper()
				request, err := http.NewRequest(method, server.String()+path+"?token="+traceToken, bytes.NewReader(body))
				check(t, err)
				request.Header.Set("Traceparent", traceparent(n))
				if n == 4 {
					request.Header.Set("Authorization", "Bearer not-"+traceToken)
				}
				response, err := http.DefaultClient.Do(request)
				check(t, err)
				response.Body.Close()
				if response.StatusCode != want {
					t.Errorf("%s %s: %s; want %d", method, path, response.Status, want)
				}
			}
			t.Cleanup(http.DefaultClient.CloseIdleConnections)
			call := func(n int, at *url.URL, do func(context.Context, *client.GRPC)) {
				t.Helper()
				calls, err := client.NewGRPC(at, nil)
				check(t, err)
				defer calls.Close()
				do(metadata.AppendToOutgoingContext(t.Context(), "traceparent", traceparent(n)), calls)
			}
			upload := func(key artifact.Key) func(context.Context, *client.GRPC) {
				return func(ctx context.Context, c *client.GRPC) {
					content := cachetest.Sound(key, map[string]string{"a": "A"})
					check(t, c.Put(ctx, key, int64(len(content)), bytes.NewReader(content)))
				}
			}
			download := func(key artifact.Key) func(context.Context, *client.GRPC) {
				return func(ctx context.Context, c *client.GRPC) {
					got, err := c.Get(ctx, key, 0, artifact.Digest{})
					check(t, err)
					defer got.Body.Close()
					_, err = io.Copy(io.Discard, got.Body)
					check(t, err)
				}
			}
			key := cachetest.Key("rest")
			path := "/v1/artifacts/" + key.String()
			request(1, "PUT", path, cachetest.Sound(key, map[string]string{"a": "A"}), 201)
			request(2, "GET", path, nil, 200)
			request(3, "PUT", "/t/nightly"+path, []byte("junk"), 422)
			request(4, "HEAD", path, nil, 401)
			request(5, "GET", "/healthz", nil, 200)
			call(6, server, upload(cachetest.Key("native")))
			call(7, server, download(cachetest.Key("native")))
			call(8, proxy, upload(cachetest.Key("proxy")))
			call(9, proxy, download(cachetest.Key("proxy")))
			conn, err := client.DialGRPC(proxy, nil)
			check(t, err)
			defer conn.Close()
			_, err = healthpb.NewHealthClient(conn).Check(metadata.AppendToOutgoingContext(t.Context(), "traceparent", traceparent(10)), &healthpb.HealthCheckRequest{})
			check(t, err)
			check(t, p.Process.Signal(syscall.SIGTERM))
			log := p.ends(t)

			received := c.take()
			spans := spansOf(received)
			for i, want := range [][]string{
				put("PUT /v1/artifacts/{cache_key}"),
				{"client > GET /v1/artifacts/{cache_key}"},
				{"PUT /t/{scope}/v1/artifacts/{cache_key} > queue", "PUT /t/{scope}/v1/artifacts/{cache_key} > verify", "client > PUT /t/{scope}/v1/artifacts/{cache_key}"},
				{"client > HEAD /v1/artifacts/{cache_key}"},
				nil,
				put(artifacts + "PutArtifact"),
				{"client > " + artifacts + "GetArtifact"},
				put(artifacts + "PutArtifact"),
				{"client > " + artifacts + "GetArtifact"},
				nil,
			} {
				trace, span := traceOf(i + 1)
				slices.Sort(want)
				if got := tree(spans, trace, span); !slices.Equal(got, want) {
					t.Errorf("trace %d is %q; want %q", i+1, got, want)
				}
			}
			checkAttributes(t, spans, 1, "PUT /v1/artifacts/{cache_key}", map[string]string{"http.route": "/v1/artifacts/{cache_key}", "http.response.status_code": "201", "url.scheme": "http"})
			for n, name := range map[int]string{1: "verify", 2: "GET /v1/artifacts/{cache_key}", 6: "commit", 7: artifacts + "GetArtifact", 8: artifacts + "PutArtifact"} {
				checkAttributes(t, spans, n, name, map[string]string{"polykit.scope": "default", "polykit.file_count": "1", "polykit.package_name": "web", "polykit.task_name": "build"})
			}
			checkAttributes(t, spans, 1, "queue", map[string]string{"polykit.cache_key": key.String(), "polykit.scope": "default"})
			checkAttributes(t, spans, 3, "PUT /t/{scope}/v1/artifacts/{cache_key}", map[string]string{"error.type": "VERIFICATION_FAILED", "polykit.scope": "nightly", "http.response.status_code": "422"})
			checkAttributes(t, spans, 3, "verify", map[string]string{"polykit.rule": "stream"})
			checkAttributes(t, spans, 4, "HEAD /v1/artifacts/{cache_key}", map[string]string{"error.type": "UNAUTHENTICATED"})
			for _, span := range spans {
				if failed := span.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR; failed != (span.Name == "verify" && hex.EncodeToString(span.TraceId) == fmt.Sprintf("%032x", 3)) {
					t.Errorf("span %s of trace %x has status %v", span.Name, span.TraceId, span.Status)
				}
			}
			stored, _ := traceOf(1)
			if want := fmt.Sprintf("trace_id=%s span_id=%x\n", stored, spanOf(t, spans, stored, "PUT /v1/artifacts/{cache_key}").SpanId); !strings.Contains(log, want) {
				t.Errorf("no line of the log ends with %q:\n%s", want, log)
			}
			for _, r := range received {
				if about := fmt.Sprint(r.Resource.Attributes); !strings.Contains(about, `"cache-1"`) || !strings.Contains(about, `"deployment.environment.name"`) || !strings.Contains(about, `"service.version"`) {
					t.Errorf("the resource is %s", about)
				}
				// Nothing of what a client sends to show who it is may be in a span.
				sent, err := proto.Marshal(r)
				check(t, err)
				for _, secret := range []string{traceToken, base64.StdEncoding.EncodeToString([]byte("x:" + traceToken)), "Bearer", "Basic"} {
					if bytes.Contains(sent, []byte(secret)) {
						t.Errorf("the collector got %q", secret)
					}
				}
			}
		})
	}
}

func checkAttributes(t *testing.T, spans []*tracepb.Span, trace int, name string, want map[string]string) {
	t.Helper()
	id, _ := traceOf(trace)
	got := attributesOf(spanOf(t, spans, id, name))
	for attribute, value := range want {
		if got[attribute] != value {
			t.Errorf("span %s of trace %d has %s=%q; want %q", name, trace, attribute, got[attribute], value)
		}
	}
}

// TestTracesOfRemovals has a server remove what is too old: because it is time, and because somebody asks it to.
func TestTracesOfRemovals(t *testing.T) {
	c := startCollector(t)
	t.Setenv("OTEL_TRACES_EXPORTER", "otlp")
	t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", c.overHTTP+"/v1/traces")
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "1") // ms
	dir := t.TempDir()
	p := startProgram(t, "polykit-cache", dir)
	at, err := client.ParseServer("http://" + p.address)
	check(t, err)
	rest := client.NewREST(at, nil)
	defer rest.Close()
	for _, seed := range []string{"a", "b"} {
		key := cachetest.Key(seed)
		content := cachetest.Sound(key, nil)
		check(t, rest.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content)))
	}
	body := `{"policy": {"keep_last": 1}}`
	request, err := http.NewRequest("POST", "http://"+p.address+"/v1/artifacts:collectGarbage", strings.NewReader(body))
	check(t, err)
	request.Header.Set("Traceparent", traceparent(1))
	response, err := http.DefaultClient.Do(request)
	check(t, err)
	response.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	check(t, p.Process.Signal(syscall.SIGTERM))
	p.ends(t)
	trace, span := traceOf(1)
	spans := spansOf(c.take())
	if got, want := tree(spans, trace, span), []string{"POST /v1/artifacts:collectGarbage > evict", "client > POST /v1/artifacts:collectGarbage"}; !slices.Equal(got, want) {
		t.Errorf("the trace is %q; want %q", got, want)
	}
	if got := attributesOf(spanOf(t, spans, trace, "evict")); got["polykit.artifacts"] != "1" || got["polykit.disk_size"] == "0" {
		t.Errorf("evict has %v", got)
	}

	p = startProgram(t, "polykit-cache", dir, "--max-age=1ns")
	c.waitFor(t, "evict")
	check(t, p.Process.Signal(syscall.SIGTERM))
	p.ends(t)
	for _, span := range spansOf(c.take()) {
		if span.Name == "evict" && len(span.ParentSpanId) != 0 {
			t.Errorf("evict has the parent %x", span.ParentSpanId)
		}
	}
}

// TestTracesThatNobodyTakes has collectors that are not there, that never answer, and that answer with an error. Requests
// are answered all the same, the server ends in good order, and the log says it once.
func TestTracesThatNobodyTakes(t *testing.T) {
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	gone.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer silent.Close() // after all, for it accepts nothing
	refuses := startCollector(t)
	refuses.status = http.StatusBadRequest
	for name, env := range map[string][2]string{
		"gone":    {"http://" + gone.Addr().String(), "grpc"},
		"silent":  {"http://" + silent.Addr().String(), "http/protobuf"},
		"refuses": {refuses.overHTTP, "http/protobuf"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", env[0])
			t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", env[1])
			t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "1")        // ms
			t.Setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")        // and so most are dropped
			t.Setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1") // and so there is much to say
			t.Setenv("OTEL_BSP_EXPORT_TIMEOUT", "3600000")
			t.Setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600000")
			p := startProgram(t, "polykit-cache", t.TempDir(), "--shutdown-timeout=100ms")
			at, err := client.ParseServer("http://" + p.address)
			check(t, err)
			rest := client.NewREST(at, nil)
			defer rest.Close()
			for n := range 20 {
				key := cachetest.Key(fmt.Sprint(n))
				content := cachetest.Sound(key, nil)
				check(t, rest.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content)))
			}
			if name == "refuses" {
				for range 3 {
					<-refuses.came
				}
			}
			check(t, p.Process.Signal(syscall.SIGTERM))
			log := p.ends(t)
			if n := strings.Count(log, "could not send traces"); n != 1 || !strings.Contains(log, "msg=stopped") {
				t.Errorf("the log says %d times that traces could not be sent:\n%s", n, log)
			}
		})
	}
}

// TestTracesAsAsked has servers that are to send traces, to the log, and that are not to.
func TestTracesAsAsked(t *testing.T) {
	for _, c := range []struct {
		name          string
		env           map[string]string
		traced, spans bool
	}{
		{"nothing said", nil, false, false},
		{"console", map[string]string{"OTEL_TRACES_EXPORTER": "console"}, true, true},
		{"none", map[string]string{"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, false, false},
		{"disabled", map[string]string{"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "True"}, false, false},
		{"not sampled", map[string]string{"OTEL_TRACES_EXPORTER": "console", "OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, true, false},
		{"not in the client's trace", map[string]string{"OTEL_TRACES_EXPORTER": "console", "OTEL_PROPAGATORS": "b3"}, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, name := range []string{"OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG", "OTEL_PROPAGATORS"} {
				t.Setenv(name, c.env[name]) // empty as if it were not set
			}
			p := startProgram(t, "polykit-cache", t.TempDir(), "--log-level=debug")
			request, err := http.NewRequest("GET", "http://"+p.address+"/v1/artifacts/"+cachetest.Key("miss").String(), nil)
			check(t, err)
			request.Header.Set("Traceparent", traceparent(1))
			response, err := http.DefaultClient.Do(request)
			check(t, err)
			response.Body.Close()
			http.DefaultClient.CloseIdleConnections()
			check(t, p.Process.Signal(syscall.SIGTERM))
			log := p.ends(t)
			trace, _ := traceOf(1)
			for text, want := range map[string]bool{
				"requests are traced":                    c.traced,
				`"Name":"GET /v1/artifacts/{cache_key}"`: c.spans,
				"trace_id=":                              c.spans,
				"trace_id=" + trace:                      c.spans && c.env["OTEL_PROPAGATORS"] == "",
				"reason=ARTIFACT_NOT_FOUND error":        true,
			} {
				if strings.Contains(log, text) != want {
					t.Errorf("the log has %s: %t; want %t\n%s", text, !want, want, log)
				}
			}
		})
	}
}
