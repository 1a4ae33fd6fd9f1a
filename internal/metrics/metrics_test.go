package metrics_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/metrics"
	"github.com/polykit/polykit-cache/internal/retention"
	"github.com/polykit/polykit-cache/internal/server"
)

// rig is a server on a port of its own, with all that is behind it.
type rig struct {
	address   string
	index     *index.Index
	store     *disk.Store
	collector *retention.Collector
}

func start(t *testing.T) rig {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	verifier := artifact.NewVerifier(artifact.DefaultLimits)
	var r rig
	var err error
	if r.store, err = disk.Open(disk.Config{Dir: t.TempDir(), Verifier: verifier, Log: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.store.Close() })
	if r.index, err = index.Open(index.Config{Dir: r.store.OwnDir(), Log: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.index.Close() })
	r.collector = retention.New(r.index, r.store, retention.Policy{}, log)
	r.store.Manage(r.index, r.collector.Limits())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.address = listener.Addr().String()
	config := server.DefaultConfig
	config.Metrics = metrics.New()
	config.Management = &server.Management{Index: r.index, Collector: r.collector, Storage: r.store}
	s := server.New(cache.New(r.store, verifier, cache.Config{MaxSize: 1 << 20, Observer: r.index}), config, log)
	config.Metrics.Build("v1.2.3", "go1.99")
	config.Metrics.Watch(metrics.Sources{
		Index: r.index, Collector: r.collector, Store: r.store, Verifier: verifier, Requests: s.InFlight,
		Connections: s.Connections, ConnectionsLimit: config.MaxConnections, Ready: s.Ready, Refusals: s.Refusals,
	})
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, listener) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return r
}

// do sends a request, and returns the answer's status and body.
func (r rig) do(t *testing.T, method, path string, body []byte) (int, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, "http://"+r.address+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

// scrape returns what the server tells: its text, and the value of each series.
func (r rig) scrape(t *testing.T) (text string, values map[string]string) {
	t.Helper()
	code, text := r.do(t, http.MethodGet, "/metrics", nil)
	if code != http.StatusOK {
		t.Fatalf("a scrape is answered with %d %s", code, text)
	}
	values = map[string]string{}
	for line := range strings.Lines(text) {
		if at := strings.LastIndexByte(line, ' '); !strings.HasPrefix(line, "#") {
			values[strings.TrimPrefix(line[:at], "polykit_cache_")] = strings.TrimSpace(line[at:])
		}
	}
	return text, values
}

// expect compares the values of some series. Those that must not be there are "".
func expect(t *testing.T, values, want map[string]string) {
	t.Helper()
	for _, series := range slices.Sorted(maps.Keys(want)) {
		if values[series] != want[series] {
			t.Errorf("%s is %q, want %q", series, values[series], want[series])
		}
	}
}

// TestValues asks a server for several things, and reads what it tells of them.
func TestValues(t *testing.T) {
	r := start(t)
	key := cachetest.Key("stored")
	content := cachetest.Random(key, 5000)
	at := "/v1/artifacts/"
	for _, ask := range []struct {
		method, path string
		body         []byte
		want         int
	}{
		{"PUT", at + key.String(), content, 201},
		{"PUT", at + key.String(), content, 409},
		{"PUT", at + cachetest.Key("other").String(), content, 422},
		{"GET", at + key.String(), nil, 200},
		{"GET", at + key.String(), nil, 200},
		{"GET", at + cachetest.Key("missing").String(), nil, 404},
		{"GET", "/favicon.ico", nil, 404},
		{"POST", "/healthz", nil, 405},
	} {
		if code, text := r.do(t, ask.method, ask.path, ask.body); code != ask.want {
			t.Fatalf("%s %s: %d %s", ask.method, ask.path, code, text)
		}
	}
	_, values := r.scrape(t)
	expect(t, values, map[string]string{
		`build_info{go_version="go1.99",version="v1.2.3"}`: "1",
		`ready`: "1", `index_available`: "1", `index_complete`: "0",
		`requests_in_flight`: "1", `connections`: "1", `connections_limit`: "10000",
		`uploads_in_flight`: "0", `uploads_queued`: "0", `uploads_limit`: fmt.Sprint(artifact.DefaultLimits.Slots()),
		`requests_total{method="PutArtifact",protocol="rest",status="201"}`:      "1",
		`requests_total{method="PutArtifact",protocol="rest",status="409"}`:      "1",
		`requests_total{method="PutArtifact",protocol="rest",status="422"}`:      "1",
		`requests_total{method="GetArtifact",protocol="rest",status="200"}`:      "2",
		`requests_total{method="GetArtifact",protocol="rest",status="404"}`:      "1",
		`requests_total{method="other",protocol="rest",status="404"}`:            "1",
		`requests_total{method="other",protocol="rest",status="405"}`:            "1",
		`request_duration_seconds_count{method="GetArtifact",protocol="rest"}`:   "3",
		`request_first_byte_seconds_count{method="PutArtifact",protocol="rest"}`: "3",
		`sent_bytes_total{method="PutArtifact",protocol="grpc"}`:                 "",
		`verification_failures_total{reason="key"}`:                              "1",
		`verification_failures_total{reason="path"}`:                             "0",
		`hits_total`: "2", `misses_total`: "1", `uploads_total`: "1",
		`artifacts`: "1", `stored_bytes`: fmt.Sprint(len(content)),
		`evictions_total{reason="max-age"}`: "0", `evicted_bytes_total{reason="min-free"}`: "0",
		`quarantine_files`: "0", `quarantine_bytes`: "0",
		`scrub_start_timestamp_seconds`: "", `last_scrub_timestamp_seconds`: "", `scrubbed_bytes_total`: "0",
	})
	for _, reason := range auth.Reasons {
		expect(t, values, map[string]string{fmt.Sprintf(`auth_failures_total{reason="%s"}`, reason): "0"})
	}
	sent := 0
	fmt.Sscan(values[`sent_bytes_total{method="GetArtifact",protocol="rest"}`], &sent)
	if least := 2 * len(content); sent < least || sent > least+200 { // and the sentence of the miss
		t.Errorf("%d bytes were sent for two downloads of %d bytes and a miss", sent, len(content))
	}

	if _, err := r.index.Reconcile(t.Context(), r.store, nil); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	scrubbed := make(chan struct{})
	go func() {
		defer close(scrubbed)
		r.store.Scrub(ctx, disk.ScrubConfig{Interval: time.Nanosecond, Rate: 1 << 30})
	}()
	for r.store.Scrubbed().EndedAt.IsZero() && t.Context().Err() == nil {
		r.scrape(t)
	}
	stop()
	<-scrubbed
	_, values = r.scrape(t)
	expect(t, values, map[string]string{`index_complete`: "1", `scrubbed_artifacts_total{result="damaged"}`: "0"})
	if values["scrubbed_bytes_total"] == "0" || values["scrub_start_timestamp_seconds"] == "" || values["last_scrub_timestamp_seconds"] == "" {
		t.Error("a scrub that has ended is not told")
	}
}

// TestLeftOut takes away what figures are from. They are left out then, not 0.
func TestLeftOut(t *testing.T) {
	r := start(t)
	r.index.Close()
	_, values := r.scrape(t)
	expect(t, values, map[string]string{`index_available`: "0", `artifacts`: "", `stored_bytes`: "", `ready`: "1"})
	if values["storage_used_bytes"] == "" {
		t.Error("what can be told is left out too")
	}
}

// TestBoundedLabels asks for ever other things. All of them are one thing to the metrics.
func TestBoundedLabels(t *testing.T) {
	r := start(t)
	conn, err := grpc.NewClient(r.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := func(i int) {
		t.Helper()
		made := fmt.Sprintf("MADEUP%d", i)
		if code, _ := r.do(t, made, "/v1/"+made, nil); code != 404 && code != 405 {
			t.Errorf("%d", code)
		}
		if code, _ := r.do(t, "GET", "/v1/artifacts/"+cachetest.Key(made).String()+"?"+made, nil); code != 404 {
			t.Errorf("%d", code)
		}
		for _, method := range []string{"/" + made + ".Service/" + made, "/polykit.cache.v1.ArtifactService/" + made} {
			if err := conn.Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unimplemented {
				t.Errorf("%s: %v", method, err)
			}
		}
	}
	ask(0)
	r.scrape(t) // is a request too
	_, before := r.scrape(t)
	for i := range 20 {
		ask(i + 1)
	}
	text, after := r.scrape(t)
	if before, after := slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)); !slices.Equal(before, after) {
		t.Errorf("there were %d series and are %d", len(before), len(after))
	}
	for _, never := range []string{"MADEUP", cachetest.Key("MADEUP1").String()} {
		if strings.Contains(text, never) {
			t.Errorf("what a client made up is in the metrics: %s", never)
		}
	}
	expect(t, after, map[string]string{`requests_total{method="other",protocol="grpc",status="Unimplemented"}`: "42"})
}

// TestNames looks at every metric of the server's own: what it is called, and that it is explained.
func TestNames(t *testing.T) {
	text, _ := start(t).scrape(t)
	kinds := regexp.MustCompile(`(?m)^# TYPE (polykit_cache_\S+) (\S+)$`).FindAllStringSubmatch(text, -1)
	if len(kinds) < 20 {
		t.Errorf("there are only %d metrics", len(kinds))
	}
	for _, found := range kinds {
		name, kind := found[1], found[2]
		if !regexp.MustCompile(`(?m)^# HELP ` + name + ` [A-Z1].*\.$`).MatchString(text) {
			t.Errorf("%s has no sentence that says what it is", name)
		}
		if strings.HasSuffix(name, "_total") != (kind == "counter") {
			t.Errorf("%s is a %s", name, kind)
		}
		if kind == "histogram" && !strings.HasSuffix(name, "_seconds") {
			t.Errorf("%s has no unit", name)
		}
	}
}
