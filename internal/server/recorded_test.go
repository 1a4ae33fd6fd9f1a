package server_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"
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
			for name, test := range map[string]struct{ method, path, want string }{
				"HEAD of a miss":                  {"HEAD", "/v1/artifacts/" + keyA, " received=0 sent=0 "},
				"HEAD of a JSON method":           {"HEAD", "/v1/stats", " received=0 sent=0 "},
				"JSON that the decoder gives up":  {"POST", "/v1/artifacts:findMissing", " received=3000 sent="},
				"JSON of a method that has none":  {"DELETE", "/v1/artifacts/zz", " received=3000 sent="},
				"upload that is refused before":   {"PUT", "/v1/artifacts/zz", " received=3000 sent="},
				"upload that is refused in it":    {"PUT", "/v1/artifacts/" + keyA, " received=3000 sent="},
				"body of what there is not":       {"PATCH", "/nowhere", " received=3000 sent="},
				"answer that is not of artifacts": {"GET", "/healthz", " received=0 sent=15 "},
			} {
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
