//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

// Tokens of operated, which must never be logged.
const (
	operatorToken  = "pkc_operator_secret"
	writerOfTests  = "pkc_writer_secret"
	strangersToken = "pkc_stranger_secret"
)

// operated is a server with an auth file and an admin address.
type operated struct {
	*process
	admin string
}

// startOperated starts a server that logs in JSON, and tells which addresses it has.
func startOperated(t *testing.T, args ...string) *operated {
	t.Helper()
	file := filepath.Join(t.TempDir(), "auth.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, `tokens:
  - {name: operator, sha256: %s, role: admin, scopes: [default, "*"]}
  - {name: builds, sha256: %s, role: writer}
scopes: [{name: default}]
`, auth.HashToken(operatorToken), auth.HashToken(writerOfTests)), 0o600))
	admin := freeAddress(t)
	p := startProgram(t, "polykit-cache", t.TempDir(), append([]string{"--auth-file=" + file, "--admin-address=" + admin, "--log-format=json"}, args...)...)
	return &operated{p, "http://" + admin}
}

// asks sends a request, whose answer must have a status, and returns its body.
func (o *operated) asks(t *testing.T, method, url string, header http.Header, body []byte, want int) (string, http.Header) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	check(t, err)
	if header != nil {
		request.Header = header
	}
	response, err := http.DefaultTransport.RoundTrip(request)
	check(t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	check(t, err)
	if response.StatusCode != want {
		t.Errorf("%s %s: %s %s; want %d", method, url, response.Status, text, want)
	}
	return string(text), response.Header
}

func bearer(token string, more ...string) http.Header {
	header := http.Header{"Authorization": {"Bearer " + token}}
	for i := 0; i < len(more); i += 2 {
		header.Add(more[i], more[i+1])
	}
	return header
}

// line is a line of a log in JSON.
type line map[string]any

func (l line) text(name string) string {
	if value, there := l[name]; there {
		return fmt.Sprint(value)
	}
	return ""
}

// requestsIn returns the lines of requests in a log, by their id. There must be one line of each.
func requestsIn(t *testing.T, log string) map[string]line {
	t.Helper()
	found := map[string]line{}
	for text := range strings.Lines(log) {
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if message := l.text("msg"); message == "request" || message == "request failed" {
			id := l.text("request_id")
			if _, twice := found[id]; twice {
				t.Errorf("there are two lines of request %s", id)
			}
			found[id] = l
		}
	}
	return found
}

// TestRequestLog asks a server in many ways, and reads what its log says of each.
func TestRequestLog(t *testing.T) {
	t.Parallel()
	o := startOperated(t, "--log-level=debug", "--trusted-proxies=127.0.0.0/8,2001:db8::/32")
	key := cachetest.Key("logged")
	content := cachetest.Random(key, 5000)
	at := "http://" + o.address + "/v1/artifacts/" + key.String()
	missing := "http://" + o.address + "/v1/artifacts/" + cachetest.Key("missing").String()
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("x:"+writerOfTests))

	o.asks(t, "PUT", at, http.Header{"Authorization": {basic}, "X-Request-Id": {"put-1"}, "X-Forwarded-For": {"203.0.113.9, 198.51.100.7, 127.0.0.9"}}, content, 201)
	o.asks(t, "PUT", at, bearer(writerOfTests, "X-Request-Id", "put-2"), content, 409)
	o.asks(t, "PUT", missing, bearer(writerOfTests, "X-Request-Id", "put-3"), content, 422) // it names another key
	o.asks(t, "GET", at, bearer(writerOfTests, "X-Request-Id", "get-1", "X-Forwarded-For", "nonsense"), nil, 200)
	o.asks(t, "HEAD", at, bearer(writerOfTests, "X-Request-Id", "head-1"), nil, 200)
	o.asks(t, "GET", missing, bearer(writerOfTests, "X-Request-Id", "get-2"), nil, 404)
	o.asks(t, "GET", at, bearer(strangersToken, "X-Request-Id", "get-3"), nil, 401)
	o.asks(t, "DELETE", at, bearer(writerOfTests, "X-Request-Id", "delete-1"), nil, 403)
	o.asks(t, "GET", "http://"+o.address+"/nowhere?token="+strangersToken, bearer(writerOfTests, "X-Request-Id", "get-4"), nil, 404)
	o.asks(t, "GET", "http://"+o.address+"/healthz", bearer(writerOfTests, "X-Request-Id", "get-5"), nil, 200)
	o.asks(t, "GET", at+"/metadata", bearer(writerOfTests, "X-Request-Id", "get-6"), nil, 200)
	if _, header := o.asks(t, "GET", at, bearer(writerOfTests, "X-Request-Id", `bad "id`), nil, 200); !regexp.MustCompile(`^[0-9a-f]{8}-[0-9]+$`).MatchString(header.Get("X-Request-Id")) {
		t.Errorf("the id of a request whose own can't be taken is %q", header.Get("X-Request-Id"))
	}
	if _, header := o.asks(t, "DELETE", at, bearer(operatorToken, "X-Request-Id", "delete-2"), nil, 200); header.Get("X-Request-Id") != "delete-2" {
		t.Errorf("the answer has the request id %q", header.Get("X-Request-Id"))
	}
	server, err := client.ParseServer("http://x:" + writerOfTests + "@" + o.address)
	check(t, err)
	overGRPC, err := client.NewGRPC(server, nil)
	check(t, err)
	check(t, overGRPC.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content)))
	check(t, overGRPC.Close())

	check(t, o.Process.Signal(syscall.SIGTERM))
	log := o.ends(t)
	found := requestsIn(t, log)
	artifacts, scope := "/v1/artifacts/"+key.String(), "default"
	for id, want := range map[string]line{
		"put-1":    {"level": "INFO", "method": "PutArtifact", "request": "PUT " + artifacts, "key": key, "scope": scope, "who": "token builds", "protocol": "rest", "status": 201, "received": len(content), "sent": 0, "client": "198.51.100.7", "files": 1},
		"put-2":    {"level": "DEBUG", "status": 409, "reason": "ARTIFACT_EXISTS", "key": key, "client": "127.0.0.1:"},
		"put-3":    {"level": "INFO", "status": 422, "reason": "VERIFICATION_FAILED", "error": "names the cache key", "key": cachetest.Key("missing")},
		"get-1":    {"level": "DEBUG", "method": "GetArtifact", "status": 200, "received": 0, "sent": len(content), "key": key, "client": "127.0.0.1:"},
		"head-1":   {"level": "DEBUG", "method": "HeadArtifact", "status": 200, "sent": 0, "key": key},
		"get-2":    {"level": "DEBUG", "status": 404, "reason": "ARTIFACT_NOT_FOUND"},
		"get-3":    {"level": "INFO", "status": 401, "reason": "UNAUTHENTICATED", "refused": "unknown_token", "who": ""},
		"delete-1": {"level": "INFO", "method": "DeleteArtifact", "status": 403, "reason": "PERMISSION_DENIED", "refused": "role"},
		"delete-2": {"level": "INFO", "method": "DeleteArtifact", "status": 200, "who": "token operator", "key": key, "reason": ""},
		"get-4":    {"level": "DEBUG", "method": "other", "request": "GET /nowhere", "status": 404, "reason": "NOT_FOUND"},
		"get-5":    {"level": "DEBUG", "method": "healthz", "status": 200, "who": ""},
		"get-6":    {"level": "DEBUG", "method": "StatArtifact", "status": 200, "key": key},
	} {
		got, there := found[id]
		if !there {
			t.Errorf("there is no line of request %s", id)
			continue
		}
		for name, value := range want {
			if is, want := got.text(name), fmt.Sprint(value); is != want && !(want != "" && strings.Contains(is, want)) {
				t.Errorf("%s: %s is %q; want %q", id, name, is, want)
			}
		}
		if duration, _ := got["duration"].(float64); duration <= 0 {
			t.Errorf("%s: it took %v", id, got["duration"])
		}
		delete(found, id)
	}
	var calls []string
	for _, l := range found { // whose ids the server made
		calls = append(calls, strings.Join([]string{l.text("protocol"), l.text("method"), l.text("status"), l.text("level")}, " "))
	}
	slices.Sort(calls)
	if want := []string{"grpc PutArtifact OK INFO", "rest GetArtifact 200 DEBUG"}; !slices.Equal(calls, want) {
		t.Errorf("of other requests there are the lines %q; want %q", calls, want)
	}
	for _, secret := range []string{operatorToken, writerOfTests, strangersToken, strings.TrimPrefix(basic, "Basic ")} {
		if strings.Contains(log, secret) {
			t.Errorf("the log has %q", secret)
		}
	}
}

// TestLogLevelChanges changes how much a running server logs, by its admin address and by a signal.
func TestLogLevelChanges(t *testing.T) {
	t.Parallel()
	o := startOperated(t)
	level := func() string {
		text, _ := o.asks(t, "GET", o.admin+"/log-level", nil, nil, 200)
		return strings.TrimSpace(text)
	}
	get := func(id string) {
		o.asks(t, "GET", "http://"+o.address+"/v1/artifacts/"+cachetest.Key("a").String(), bearer(writerOfTests, "X-Request-Id", id), nil, 404)
	}
	toggle := func(want string) {
		t.Helper()
		check(t, o.Process.Signal(syscall.SIGUSR1))
		for level() != want { // the signal is on its way
			check(t, t.Context().Err())
		}
	}
	if got := level(); got != "info" {
		t.Errorf("at first the level is %q", got)
	}
	get("quiet-1")
	o.asks(t, "PUT", o.admin+"/log-level", nil, []byte("debug\n"), 200)
	get("loud-1")
	if text, _ := o.asks(t, "PUT", o.admin+"/log-level", nil, []byte("chatty"), 400); !strings.Contains(text, "debug, error, info, trace, warn") {
		t.Errorf("a level that there is not is refused with %q", text)
	}
	o.asks(t, "PUT", o.admin+"/log-level", http.Header{"Sec-Fetch-Site": {"cross-site"}}, []byte("trace"), 403)
	toggle("info") // what --log-level says
	get("quiet-2")
	toggle("debug")
	get("loud-2")
	o.asks(t, "PUT", o.admin+"/log-level", nil, []byte("error"), 200)
	get("quiet-3")
	check(t, o.Process.Signal(syscall.SIGTERM))
	log := o.ends(t)
	found := requestsIn(t, log)
	for id, want := range map[string]bool{"quiet-1": false, "loud-1": true, "quiet-2": false, "loud-2": true, "quiet-3": false} {
		if _, logged := found[id]; logged != want {
			t.Errorf("request %s is logged: %v", id, logged)
		}
	}
	if n := strings.Count(log, `"changed the log level"`); n != 4 {
		t.Errorf("that the level changed is logged %d times; want 4", n)
	}
}

// TestAdmin asks for what there is on the admin address, and that the port of clients has it for nobody else.
func TestAdmin(t *testing.T) {
	t.Parallel()
	o := startOperated(t)
	for path, want := range map[string]string{
		"/healthz": "ok", "/readyz": "ready", "/metrics": "polykit_cache_build_info{", "/debug/pprof/": "goroutine",
		"/debug/pprof/goroutine?debug=1": "internal/server", "/debug/pprof/cmdline": "--admin-address",
	} {
		if text, _ := o.asks(t, "GET", o.admin+path, nil, nil, 200); !strings.Contains(text, want) {
			t.Errorf("%s is %.300q; want something with %q", path, text, want)
		}
	}
	o.asks(t, "GET", o.admin+"/v1/artifacts/"+cachetest.Key("a").String(), nil, nil, 404) // that is for clients
	metrics := "http://" + o.address + "/metrics"
	o.asks(t, "GET", metrics, nil, nil, 401)
	o.asks(t, "GET", metrics, bearer(writerOfTests), nil, 403)
	if text, _ := o.asks(t, "GET", metrics, bearer(operatorToken), nil, 200); !strings.Contains(text, `polykit_cache_auth_failures_total{reason="role"} 1`) {
		t.Error("the metrics have no refusal of who may not")
	}
	o.asks(t, "GET", "http://"+o.address+"/debug/pprof/", bearer(operatorToken), nil, 404)
	check(t, o.Process.Signal(syscall.SIGTERM))
	o.ends(t)
}

// TestAdminWaitsForNobody has clients of the admin address send half of a request, and not take answers.
func TestAdminWaitsForNobody(t *testing.T) {
	t.Parallel()
	log, level := newLog(io.Discard, "text", "info")
	a, err := newAdmin("127.0.0.1:0", log)
	check(t, err)
	a.timeout = 100 * time.Millisecond
	mux := http.NewServeMux()
	mux.Handle("/log-level", level)
	mux.HandleFunc("/large", func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, mebi)) })
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		a.serve(ctx, mux)
	}()
	defer func() {
		stop()
		<-ended
	}()
	for name, text := range map[string]string{
		"a body that does not come":         "PUT /log-level HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
		"a body that nobody reads":          "PUT /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
		"answers that the client leaves":    strings.Repeat("GET /large HTTP/1.1\r\nHost: a\r\n\r\n", 1_000),
		"a header that does not come whole": "GET /log-level HTTP/1.1\r\nHost:",
	} {
		conn, err := net.Dial("tcp", a.listener.Addr().String())
		check(t, err)
		defer conn.Close()
		check(t, conn.SetDeadline(time.Now().Add(time.Minute))) // or a server that waits would not be noticed
		if strings.HasPrefix(text, "GET /large") {
			for err == nil { // until the connection is cut
				_, err = io.WriteString(conn, text)
			}
		} else {
			_, err = io.WriteString(conn, text)
			check(t, err)
			_, err = io.Copy(io.Discard, conn) // until the connection is closed
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the server waits", name)
		}
	}
}
