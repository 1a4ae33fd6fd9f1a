package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// ask sends a request that is called by an id, and returns the line of the log about it.
func (s *testServer) ask(t *testing.T, transport http.RoundTripper, request *http.Request, id string) logLine {
	t.Helper()
	request.Header.Set("X-Request-Id", id)
	response, err := transport.RoundTrip(request.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if got := response.Header.Get("X-Request-Id"); got != id {
		t.Errorf("the answer to %s has the request id %q", id, got)
	}
	var lines []logLine
	waitUntil(t, "the log has the request "+id, func() bool {
		lines = s.log.find(slog.LevelDebug, " request_id="+id)
		return len(lines) > 0
	})
	return lines[0]
}

// TestBytesOfRequests counts what is received and sent of requests whose bodies are not read, or not sent, as those of
// others are.
func TestBytesOfRequests(t *testing.T) {
	body := make([]byte, 3000) // is sent in one piece
	for i, m := range restMouths() {
		t.Run(m.name, func(t *testing.T) {
			s := startServer(t, setup{managed: true, tls: m.tls})
			transport := m.rest(t, s)
			// Over HTTP/2 a client that has read the answer may send no more.
			stops := !strings.Contains(m.name, "HTTP1")
			for name, test := range map[string]struct {
				method, path, want string
				answeredEarly      bool
			}{
				"HEAD of a miss":                  {"HEAD", "/v1/artifacts/" + keyA, " received=0 sent=0 ", false},
				"HEAD of a JSON method":           {"HEAD", "/v1/stats", " received=0 sent=0 ", false},
				"JSON that the decoder gives up":  {"POST", "/v1/artifacts:findMissing", " received=3000 sent=", false},
				"JSON of a method that has none":  {"DELETE", "/v1/artifacts/zz", " received=3000 sent=", true},
				"upload that is refused before":   {"PUT", "/v1/artifacts/zz", " received=3000 sent=", true},
				"upload that is refused in it":    {"PUT", "/v1/artifacts/" + keyA, " received=3000 sent=", false},
				"body of what there is not":       {"PATCH", "/nowhere", " received=3000 sent=", true},
				"answer that is not of artifacts": {"GET", "/healthz", " received=0 sent=15 ", false},
			} {
				if test.answeredEarly && stops {
					continue
				}
				request, err := http.NewRequest(test.method, s.url+test.path, nil)
				if strings.Contains(test.want, "3000") {
					request, err = http.NewRequest(test.method, s.url+test.path, bytes.NewReader(body))
				}
				if err != nil {
					t.Fatal(err)
				}
				if line := s.ask(t, transport, request, fmt.Sprint(i, strings.ReplaceAll(name, " ", "-"))); !strings.Contains(line.text, test.want) {
					t.Errorf("%s: want%sin %s", name, test.want, line.text)
				}
			}
		})
	}
}

// TestLoggedTextIsBounded has clients send as much as they may of what is logged.
func TestLoggedTextIsBounded(t *testing.T) {
	const long = 20_000
	s := startServer(t, setup{managed: true, maxSize: 1 << 20})
	transport := newTransport(t, 1)
	request := func(method, path string, body []byte) *http.Request {
		r, err := http.NewRequest(method, s.url+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	lines := []logLine{
		s.ask(t, transport, request("GET", "/"+strings.Repeat("x", long), nil), "path"),
		s.ask(t, transport, request(strings.Repeat("X", long), "/healthz", nil), "method"),
	}
	key := cachetest.Key("names")
	metadata := fmt.Sprintf(`{"package_name": %q, "task_name": %q, "command": "x", "cache_key_hash": %q, "created_at": 1700000000, "version": 1}`,
		strings.Repeat("p", long), "x"+strings.Repeat("ä", long/2), key)
	names := append(cachetest.Compress(cachetest.File("metadata.json", metadata)), cachetest.Rest(map[string]string{"a": "b"})...)
	lines = append(lines, s.ask(t, transport, request("PUT", "/v1/artifacts/"+key.String(), names), "names"))
	conn := newGRPC(t, s)
	if err := conn.Invoke(t.Context(), "/"+strings.Repeat("x", long)+"/Y", &cachev1.StatArtifactRequest{}, &cachev1.StatArtifactResponse{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a method that there is not: %v", err)
	}
	waitUntil(t, "the call is logged", func() bool { return len(s.log.find(slog.LevelDebug, "protocol=grpc status=Unimplemented")) > 0 })
	lines = append(lines, s.log.find(slog.LevelDebug, "protocol=grpc status=Unimplemented")...)
	for _, line := range lines {
		if len(line.text) > 4000 || !strings.Contains(line.text, "…") {
			t.Errorf("a line has %d bytes: %.200s", len(line.text), line.text)
		}
		if !utf8.ValidString(line.text) {
			t.Errorf("a character was cut in two: %.200s", line.text)
		}
	}
}

// TestLinesOfUnknownsAreBounded has somebody without a credential be refused for other reasons than that, all the time.
func TestLinesOfUnknownsAreBounded(t *testing.T) {
	g := startGuarded(t, setup{})
	transport := newTransport(t, 1)
	const requests = 1000
	for range requests {
		request, err := http.NewRequest("POST", g.url+"/v1/artifacts:delete", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Sec-Fetch-Site", "cross-site")
		response, err := transport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
	}
	waitUntil(t, "all are logged at the level debug", func() bool {
		return len(g.log.find(slog.LevelDebug, "a web page of another site")) == requests
	})
	if n := len(g.log.find(slog.LevelInfo, "a web page of another site")); n < 10 || n > requests/2 {
		t.Errorf("there are %d lines of %d requests", n, requests)
	}
}

// TestWhatLooksLikeACallIsRecorded sends what gRPC would refuse before anybody learns of it.
func TestWhatLooksLikeACallIsRecorded(t *testing.T) {
	s := startServer(t, setup{})
	transport := newTransport(t, 2)
	for id, test := range map[string]struct {
		method, contentType string
		want                string
	}{
		"method":  {"GET", "application/grpc", "status=200"},
		"subtype": {"POST", "application/grpcx", "status=405"},
	} {
		request, err := http.NewRequest(test.method, s.url+"/healthz", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", test.contentType)
		if line := s.ask(t, transport, request, id); !strings.Contains(line.text, test.want) {
			t.Errorf("%s: %s", id, line.text)
		}
	}
}

// TestLevelsOfRequests says how much somebody should care of each way in which an upload ends.
func TestLevelsOfRequests(t *testing.T) {
	memory := &cachetest.Memory{}
	s := startServer(t, setup{store: memory, maxSize: 10_000})
	transport := newTransport(t, 1)
	for id, test := range map[string]struct {
		fault error
		body  []byte
		want  slog.Level
	}{
		"sound":     {nil, artifactA, slog.LevelInfo},
		"unsound":   {nil, []byte("x"), slog.LevelInfo},
		"too-large": {nil, make([]byte, 10_001), slog.LevelInfo},
		"exists":    {cache.ErrExists, artifactA, slog.LevelDebug},
		"no-space":  {cache.ErrNoSpace, artifactA, slog.LevelWarn},
		"busy":      {cache.ErrOverloaded, artifactA, slog.LevelWarn},
		"trouble":   {errors.New("trouble"), artifactA, slog.LevelError},
	} {
		memory.Fail(cachetest.Faults{Create: test.fault})
		key := cachetest.Key(id).String()
		if id == "sound" {
			key = keyA
		}
		request, err := http.NewRequest("PUT", s.url+"/v1/artifacts/"+key, bytes.NewReader(test.body))
		if err != nil {
			t.Fatal(err)
		}
		if line := s.ask(t, transport, request, id); line.level != test.want {
			t.Errorf("%s: the level is %v; want %v: %s", id, line.level, test.want, line.text)
		}
	}
}

// TestIDsOfCalls has calls answered and logged with the ids that their clients gave them.
func TestIDsOfCalls(t *testing.T) {
	for i, m := range grpcMouths() {
		s := startServer(t, setup{tls: m.tls})
		conn, ok := m.grpc(t, s).(*grpc.ClientConn)
		if !ok {
			continue // which does not tell the header
		}
		for _, method := range []string{"StatArtifact", "Brew"} {
			var header metadata.MD
			id := fmt.Sprint(method, "-", i)
			ctx := metadata.AppendToOutgoingContext(t.Context(), "x-request-id", id)
			conn.Invoke(ctx, "/polykit.cache.v1.ArtifactService/"+method, &cachev1.StatArtifactRequest{}, &cachev1.StatArtifactResponse{}, grpc.Header(&header))
			if got := header.Get("x-request-id"); len(got) != 1 || got[0] != id {
				t.Errorf("%s: the header of the answer to %s has the request id %q", m.name, method, got)
			}
			waitUntil(t, "the log has call "+id, func() bool { return len(s.log.find(slog.LevelDebug, " request_id="+id)) == 1 })
		}
	}
}
