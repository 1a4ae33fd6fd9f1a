package server_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/server"
)

// authFile is what the servers of these tests go by, with the URL of an issuer.
const authFile = `
tokens:
  - {name: reader, sha256: %[2]s, role: reader}
  - {name: writer, sha256: %[3]s, role: writer, scopes: [default, nightly]}
  - {name: admin, sha256: %[4]s, role: admin}
  - {name: operator, sha256: %[5]s, role: admin, scopes: [default, "*"]}
issuers:
  - {name: ci, url: %[1]s, audience: polykit-cache}
rules:
  - name: main
    issuer: ci
    when: claims.repository == "octo/x" && claims.ref == "refs/heads/main" && claims.event_name == "push"
    role: writer
  - name: pull requests
    issuer: ci
    when: claims.repository == "octo/x" && claims.event_name == "pull_request"
    role: writer
    scope: pr-{claims.ref.split("/")[2]}
scopes:
  - name: default
  - name: nightly
    reads: [default]
  - name: pr-*
    reads: [default]
promote:
  - {from: nightly, to: default, by: [writer]}
`

// The tokens of authFile.
const readerToken, writerToken, adminToken, operatorToken = "pkc_reader", "pkc_writer", "pkc_admin", "pkc_operator"

// guarded is a server that tells callers from each other.
type guarded struct {
	*testServer
	issuer  *cachetest.Issuer
	auth    *auth.Authenticator
	authLog *recorder
	file    string
	ahead   atomic.Int64 // nanoseconds that its clock goes ahead
}

func startGuarded(t *testing.T, setup setup) *guarded {
	t.Helper()
	g := &guarded{issuer: cachetest.StartIssuer(t), file: filepath.Join(t.TempDir(), "auth.yaml")}
	g.write(t, "")
	var err error
	g.authLog = &recorder{}
	g.auth, err = auth.New(auth.Config{File: g.file, Log: slog.New(g.authLog), HTTPClient: g.issuer.Client(),
		Now: func() time.Time { return time.Now().Add(time.Duration(g.ahead.Load())) }})
	if err != nil {
		t.Fatal(err)
	}
	change := setup.change
	setup.change = func(c *server.Config) {
		c.Auth = g.auth
		if change != nil {
			change(c)
		}
	}
	g.testServer = startServer(t, setup)
	return g
}

// write writes the auth file, with more at its end.
func (g *guarded) write(t *testing.T, more string) {
	t.Helper()
	text := fmt.Sprintf(authFile, g.issuer.URL, auth.HashToken(readerToken), auth.HashToken(writerToken), auth.HashToken(adminToken), auth.HashToken(operatorToken))
	if err := os.WriteFile(g.file, []byte(text+more), 0o600); err != nil {
		t.Fatal(err)
	}
}

// main and pull return ID tokens of builds of main and of a pull request, with the key of an ID.
func (g *guarded) main(t *testing.T, key string) string {
	return g.issuer.Token(t, key, map[string]any{"repository": "octo/x", "ref": "refs/heads/main", "event_name": "push"})
}

func (g *guarded) pull(t *testing.T, number int) string {
	return g.issuer.Token(t, "1", map[string]any{"repository": "octo/x", "ref": fmt.Sprintf("refs/pull/%d/merge", number), "event_name": "pull_request"})
}

// way is a way to ask a server with a token, and for a scope if it is not empty. Each returns an HTTP status.
type way struct {
	put  func(t *testing.T, token, scope, key string, content []byte) int
	get  func(t *testing.T, token, scope, key string) (int, []byte)
	stat func(t *testing.T, token, scope, key string) int
}

// ways returns the ways in which clients send credentials.
func (g *guarded) ways() map[string]func(t *testing.T) way {
	bearer := func(token string) string { return "Bearer " + token }
	basic := func(token string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte("x:"+token)) }
	return map[string]func(t *testing.T) way{
		"REST with Bearer":          func(t *testing.T) way { return g.overREST(newTransport(t, 1), bearer) },
		"REST with Basic":           func(t *testing.T) way { return g.overREST(newTransport(t, 1), basic) },
		"REST over HTTP2":           func(t *testing.T) way { return g.overREST(newTransport(t, 2), bearer) },
		"gRPC":                      func(t *testing.T) way { return overGRPC(newGRPC(t, g.testServer), bearer) },
		"gRPC amid REST with Basic": func(t *testing.T) way { return overGRPC(&sharedConn{transport: newTransport(t, 2), url: g.url}, basic) },
	}
}

func (g *guarded) overREST(transport http.RoundTripper, header func(token string) string) way {
	do := func(t *testing.T, method, token, scope, key string, content []byte) (int, []byte) {
		t.Helper()
		target := g.url
		if scope != "" {
			target += "/t/" + scope
		}
		request, err := http.NewRequestWithContext(t.Context(), method, target+"/v1/artifacts/"+key, bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			request.Header.Set("Authorization", header(token))
		}
		response, err := transport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		if challenged := len(response.Header["Www-Authenticate"]) > 0; challenged != (response.StatusCode == 401) {
			t.Errorf("%s %s: %s with challenges %q", method, key, response.Status, response.Header["Www-Authenticate"])
		}
		return response.StatusCode, body
	}
	return way{
		put: func(t *testing.T, token, scope, key string, content []byte) int {
			status, _ := do(t, http.MethodPut, token, scope, key, content)
			return status
		},
		get: func(t *testing.T, token, scope, key string) (int, []byte) {
			return do(t, http.MethodGet, token, scope, key, nil)
		},
		stat: func(t *testing.T, token, scope, key string) int {
			status, _ := do(t, http.MethodHead, token, scope, key, nil)
			return status
		},
	}
}

func overGRPC(conn grpc.ClientConnInterface, header func(token string) string) way {
	client := cachev1.NewArtifactServiceClient(conn)
	do := func(t *testing.T, token, scope string, call grpcCall, done int) (int, []byte) {
		t.Helper()
		ctx := t.Context()
		if token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", header(token))
		}
		if scope != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, server.ScopeMetadata, scope)
		}
		got, err := call(ctx, client)
		switch status.Code(err) {
		case codes.OK:
			return done, got.content()
		case codes.Unauthenticated:
			return 401, nil
		case codes.PermissionDenied:
			return 403, nil
		case codes.NotFound:
			return 404, nil
		case codes.AlreadyExists:
			return 409, nil
		}
		t.Fatal(err)
		return 0, nil
	}
	return way{
		put: func(t *testing.T, token, scope, key string, content []byte) int {
			status, _ := do(t, token, scope, uploadAll(key, content), 201)
			return status
		},
		get: func(t *testing.T, token, scope, key string) (int, []byte) {
			return do(t, token, scope, download(key, 0, 0), 200)
		},
		stat: func(t *testing.T, token, scope, key string) int {
			status, _ := do(t, token, scope, stat(key), 200)
			return status
		},
	}
}

// TestPoisoning plays CVE-2025-36852, over each way: a pull request uploads a poisoned artifact under the key that main
// will ask for, before main does.
func TestPoisoning(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	for name, open := range g.ways() {
		t.Run(name, func(t *testing.T) {
			w := open(t)
			key := cachetest.Key(name)
			poisoned, good := cachetest.Random(key, 1000), cachetest.Random(key, 2000)
			main, attacker, other := g.main(t, "1"), g.pull(t, 7), g.pull(t, 8)
			want := func(what string, got, want int) {
				t.Helper()
				if got != want {
					t.Errorf("%s: got %d, want %d", what, got, want)
				}
			}
			wantContent := func(what, token string, content []byte) {
				t.Helper()
				if status, got := w.get(t, token, "", key.String()); status != 200 || !bytes.Equal(got, content) {
					t.Errorf("%s: got %d with %d bytes, want %d bytes", what, status, len(got), len(content))
				}
			}

			want("the pull request writes into the scope of main", w.put(t, attacker, "default", key.String(), poisoned), 403)
			want("and into that of another pull request", w.put(t, attacker, "pr-8", key.String(), poisoned), 403)
			want("and into its own", w.put(t, attacker, "", key.String(), poisoned), 201)
			want("and once more", w.put(t, attacker, "pr-7", key.String(), good), 409)
			wantContent("it reads its own", attacker, poisoned)

			status, _ := w.get(t, main, "", key.String())
			want("main reads", status, 404)
			want("main asks", w.stat(t, main, "", key.String()), 404)
			want("another pull request asks", w.stat(t, other, "", key.String()), 404)
			want("main asks in the scope of the pull request", w.stat(t, main, "pr-7", key.String()), 403)

			want("main writes", w.put(t, main, "", key.String(), good), 201)
			wantContent("main reads its own", main, good)
			wantContent("another pull request reads what is of main", other, good)
			wantContent("the first one still reads its own", attacker, poisoned)
			want("nobody asks", w.stat(t, "", "", key.String()), 401)

			text := fmt.Sprintf("an artifact differs from that of another scope: one of the two is poisoned, or its task does not make the same each time key=%s", key)
			waitUntil(t, "it is told that they differ", func() bool { return len(g.log.find(slog.LevelWarn, text)) == 1 })
		})
	}
	stats, err := cachev1.NewArtifactServiceClient(newGRPC(t, g.testServer)).GetCacheStats(
		metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+operatorToken), &cachev1.GetCacheStatsRequest{})
	if n := int64(len(g.ways())); err != nil || stats.GetComparisons().GetDifferedCount() != n || stats.GetComparisons().GetAgreedCount() != 0 {
		t.Errorf("comparisons are %v, %v", stats.GetComparisons(), err)
	}
}

// TestIssuer has ID tokens that are good no longer, or signed with keys that are new.
func TestIssuer(t *testing.T) {
	g := startGuarded(t, setup{})
	for name, open := range g.ways() {
		t.Run(name, func(t *testing.T) {
			w := open(t)
			claims := map[string]any{"repository": "octo/x", "ref": "refs/heads/main", "event_name": "push"}
			expired := map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}
			for name, value := range claims {
				expired[name] = value
			}
			for what, c := range map[string]struct {
				token string
				want  int
			}{
				"good":              {g.main(t, "1"), 404},
				"expired":           {g.issuer.Token(t, "1", expired), 401},
				"another audience":  {g.issuer.Token(t, "1", map[string]any{"aud": "x"}), 401},
				"no rule":           {g.issuer.Token(t, "1", nil), 403},
				"of another issuer": {cachetest.StartIssuer(t).Token(t, "1", claims), 401},
			} {
				if got := w.stat(t, c.token, "", keyA); got != c.want {
					t.Errorf("%s: got %d, want %d", what, got, c.want)
				}
			}
		})
	}
	for _, reason := range []auth.Reason{auth.ReasonExpired, auth.ReasonAudience, auth.ReasonNoRule, auth.ReasonIssuer} {
		if n := g.Refusals()[reason]; n != int64(len(g.ways())) {
			t.Errorf("%d were refused for %s", n, reason)
		}
		if len(g.log.find(slog.LevelInfo, "refused="+string(reason))) != len(g.ways()) {
			t.Errorf("the log does not say %s", reason)
		}
	}
}

// TestKeyRotation has an issuer that signs with a key which the server does not know yet.
func TestKeyRotation(t *testing.T) {
	g := startGuarded(t, setup{})
	w := g.ways()["gRPC"](t)
	if got := w.stat(t, g.main(t, "1"), "", keyA); got != 404 {
		t.Errorf("before: %d", got)
	}
	g.issuer.Rotate(t, "2")
	if got := w.stat(t, g.main(t, "2"), "", keyA); got != 401 { // the issuer was asked a moment ago
		t.Errorf("at once: %d", got)
	}
	g.ahead.Store(int64(10 * time.Second))
	if got := w.stat(t, g.main(t, "2"), "", keyA); got != 404 {
		t.Errorf("later: %d", got)
	}
}

// TestEveryMethodHasAnAction fails when there is a route or call of which nobody said who may use it.
func TestEveryMethodHasAnAction(t *testing.T) {
	g := startGuarded(t, setup{})
	if g.Unadmitted() {
		t.Error("what is not admitted is done as if everybody might do everything")
	}
	request := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	request.Header.Set("Authorization", "Bearer "+operatorToken)
	answer := httptest.NewRecorder()
	g.Undecided(func() { t.Error("what nobody said who may do is done") })(answer, request)
	if answer.Code != http.StatusInternalServerError {
		t.Errorf("what nobody said who may do is answered with %d", answer.Code)
	}
	s := startServer(t, setup{managed: true})
	if !s.Unadmitted() {
		t.Error("without an auth file nobody may do anything")
	}
	for _, name := range slices.Concat(s.Routes(), s.Calls()) {
		if s.Action(name) == 0 {
			t.Errorf("nothing says who may do %s", name)
		}
	}
	if n := len(s.Calls()); n < 2*17 {
		t.Errorf("there are only %d calls", n)
	}
}

// TestRoles has callers of each role use each route and call.
func TestRoles(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	callers := map[string]struct {
		token string
		may   map[auth.Action]bool
	}{
		"anonymous":          {"", map[auth.Action]bool{server.Anyone: true}},
		"who has no token":   {"pkc_x", map[auth.Action]bool{server.Anyone: true}},
		"reader":             {readerToken, map[auth.Action]bool{server.Anyone: true, auth.Read: true}},
		"writer":             {writerToken, map[auth.Action]bool{server.Anyone: true, auth.Read: true, auth.Write: true}},
		"admin of one scope": {adminToken, map[auth.Action]bool{server.Anyone: true, auth.Read: true, auth.Write: true, auth.Administrate: true}},
		"admin of all": {operatorToken, map[auth.Action]bool{server.Anyone: true, auth.Read: true, auth.Write: true, auth.Administrate: true,
			auth.Operate: true}},
	}
	for name, caller := range callers {
		t.Run(name, func(t *testing.T) {
			transport := newTransport(t, 1)
			for _, route := range g.Routes() {
				method, path, _ := strings.Cut(route, " ")
				request, err := http.NewRequestWithContext(t.Context(), method, g.url+strings.ReplaceAll(path, "{cache_key}", keyA), strings.NewReader(`{"dry_run": true, "all": true}`))
				if err != nil {
					t.Fatal(err)
				}
				if caller.token != "" {
					request.Header.Set("Authorization", "Bearer "+caller.token)
				}
				response, err := transport.RoundTrip(request)
				if err != nil {
					t.Fatal(err)
				}
				response.Body.Close()
				refused := response.StatusCode == 401 || response.StatusCode == 403
				if strings.HasSuffix(path, "/promote") && name == "writer" { // who may promote from another scope to this one
					refused = false
				}
				if may := caller.may[g.Action(route)]; may == refused || refused && (response.StatusCode == 401) != strings.HasPrefix(name, "a") && name != "who has no token" && name != "admin of one scope" {
					t.Errorf("%s: got %s", route, response.Status)
				}
			}
			for way, conn := range map[string]grpc.ClientConnInterface{"gRPC": newGRPC(t, g.testServer), "gRPC amid REST": &sharedConn{transport: newTransport(t, 2), url: g.url}} {
				for _, call := range g.Calls() {
					ctx, cancel := context.WithCancel(t.Context())
					if caller.token != "" {
						ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+caller.token)
					}
					// All of them can be spoken to as streams, and have no argument that could be done.
					stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, call)
					if err == nil {
						stream.SendMsg(&cachev1.StatArtifactRequest{})
						stream.CloseSend()
						err = stream.RecvMsg(&cachev1.StatArtifactRequest{})
					}
					cancel()
					code := status.Code(err)
					refused := code == codes.Unauthenticated || code == codes.PermissionDenied
					if may := caller.may[g.Action(call)]; may == refused {
						t.Errorf("%s %s: got %v", way, call, err)
					}
				}
			}
		})
	}
}

// TestPaths asks for scopes by paths, those that can't be scopes among them.
func TestPaths(t *testing.T) {
	g := startGuarded(t, setup{})
	open := startServer(t, setup{})
	transport := newTransport(t, 1)
	for target, want := range map[string][2]int{ // of a server that tells callers from each other, and of one that does not
		"/t/default/v1/artifacts/" + keyA:               {404, 404},
		"/t/nightly/v1/artifacts/" + keyA:               {404, 404},
		"/t/nightly/v1/artifacts/" + keyA + "/metadata": {404, 404},
		"/t/pr-7/v1/artifacts/" + keyA:                  {403, 404},
		"/t/-/v1/artifacts/" + keyA:                     {400, 404},
		"/t/A/v1/artifacts/" + keyA:                     {400, 404},
		"/t/%2e%2e/v1/artifacts/" + keyA:                {404, 404},
		"/t/default%2Fx/v1/artifacts/" + keyA:           {404, 404},
		"/t/default%2Fv1/artifacts/" + keyA:             {404, 404},
		"/t/default/v1%2Fartifacts/" + keyA:             {404, 404},
		"/t%2Fdefault/v1/artifacts/" + keyA:             {404, 404},
		"/t/%64efault/v1/artifacts/" + keyA:             {404, 404},
		"/t/default%00/v1/artifacts/" + keyA:            {400, 404},
		"/t/default/v1/../../nightly/v1/artifacts/x":    {404, 404},
		"/t//v1/artifacts/" + keyA:                      {404, 404},
		"/t/default/t/default/v1/artifacts/" + keyA:     {404, 404},
		"/t/default/healthz":                            {404, 404},
		"/t/default":                                    {404, 404},
		"/t/":                                           {404, 404},
		"/t":                                            {404, 404},
		"/t/default/v1/artifacts/x":                     {400, 400},
	} {
		for i, url := range []string{g.url, open.url} {
			request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+target, nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Authorization", "Bearer "+writerToken)
			response, err := transport.RoundTrip(request)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(response.Body)
			response.Body.Close()
			if response.StatusCode != want[i] {
				t.Errorf("%s: got %s %s, want %d", target, response.Status, body, want[i])
			}
		}
	}
	havingA(t, open)
	response, _ := (&restRequest{method: http.MethodGet, target: "/t/default/v1/artifacts/" + keyA}).do(t, open, transport)
	if response.StatusCode != 200 {
		t.Errorf("the default scope of a server without others: %s", response.Status)
	}
}

// TestOfAllScopes asks for one scope where something can only be done in all: nothing is done, and the answer says what
// to do.
func TestOfAllScopes(t *testing.T) {
	g, open := startGuarded(t, setup{managed: true}), startServer(t, setup{managed: true})
	for _, s := range []*testServer{g.testServer, open} {
		havingA(t, s)
		s.flush(t)
	}
	const sentence = "This is about all scopes together and can't be done in one: leave the scope out; what is kept in single scopes --scope-retention says"
	for name, c := range map[string]struct {
		server        *testServer
		token, scope  string
		status        int
		reason, wants string
	}{
		"an admin of all, of nightly":          {g.testServer, operatorToken, "nightly", 400, "INVALID_REQUEST", sentence},
		"an admin of all, of its own":          {g.testServer, operatorToken, "default", 400, "INVALID_REQUEST", sentence},
		"an admin of all, of a pattern":        {g.testServer, operatorToken, "pr-7", 400, "INVALID_REQUEST", sentence},
		"an admin of one":                      {g.testServer, adminToken, "default", 403, "PERMISSION_DENIED", "This needs an admin of all scopes"},
		"a server that has one scope":          {open, "", "default", 400, "INVALID_REQUEST", sentence},
		"a server that has one scope, another": {open, "", "nightly", 404, "NO_SCOPES", "This server has no scopes: it was started without --auth-file"},
	} {
		transport := newTransport(t, 1)
		for _, asked := range []struct{ method, path, body string }{
			{http.MethodPost, "/v1/artifacts:collectGarbage", `{"policy": {"max_age": "0.000000001s"}}`}, {http.MethodGet, "/v1/quarantine", ""},
		} {
			request := &restRequest{method: asked.method, target: "/t/" + c.scope + asked.path, body: []byte(asked.body), header: map[string]string{}}
			if c.token != "" {
				request.header["Authorization"] = "Bearer " + c.token
			}
			response, body := request.do(t, c.server, transport)
			if response.StatusCode != c.status || !strings.Contains(string(body), c.wants) {
				t.Errorf("%s: %s: got %d %s, want %d %s", name, asked.path, response.StatusCode, body, c.status, c.wants)
			}
		}
		client := cachev1.NewArtifactServiceClient(newGRPC(t, c.server))
		ctx := metadata.AppendToOutgoingContext(t.Context(), server.ScopeMetadata, c.scope)
		if c.token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.token)
		}
		_, collected := client.CollectGarbage(ctx, &cachev1.CollectGarbageRequest{Policy: &cachev1.RetentionPolicy{MaxAge: durationpb.New(1)}})
		_, listed := client.ListQuarantine(ctx, &cachev1.ListQuarantineRequest{})
		for _, err := range []error{collected, listed} {
			got := status.Convert(err)
			if details := got.Details(); got.Message() != c.wants || len(details) != 1 || details[0].(*errdetails.ErrorInfo).GetReason() != c.reason {
				t.Errorf("%s over gRPC: got %v %v, want %s %s", name, err, details, c.reason, c.wants)
			}
		}
	}
	for _, s := range []*testServer{g.testServer, open} {
		if _, err := s.cache.Stat(t.Context(), cachetest.Key("a")); err != nil {
			t.Errorf("the artifact is gone: %v", err)
		}
	}
}

// TestScopeInTheWrongPlace names a scope where none is looked for: it must not be as if none was named, for that can mean
// all scopes.
func TestScopeInTheWrongPlace(t *testing.T) {
	for name, s := range map[string]*testServer{"with an auth file": startGuarded(t, setup{managed: true}).testServer, "without one": startServer(t, setup{managed: true})} {
		header := map[string]string{"Authorization": "Bearer " + operatorToken, "Polykit-Cache-Scope": "default"}
		for _, version := range []int{1, 2} {
			request := &restRequest{method: http.MethodPost, target: "/v1/artifacts:delete", header: header, body: []byte(`{"all": true, "dry_run": true}`)}
			response, body := request.do(t, s, newTransport(t, version))
			const want = `{"error":"Invalid request: a scope is named by the path, as in /t/nightly/v1/artifacts:delete, and not by the header polykit-cache-scope"}`
			if strings.TrimSpace(string(body)) != want || response.StatusCode != 400 {
				t.Errorf("%s: a header over HTTP/%d: got %d %s", name, version, response.StatusCode, body)
			}
		}
		for way, conn := range map[string]grpc.ClientConnInterface{"gRPC": newGRPC(t, s), "gRPC amid REST": &sharedConn{transport: newTransport(t, 2), url: s.url}} {
			ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+operatorToken, server.ScopeMetadata, "")
			_, err := cachev1.NewArtifactServiceClient(conn).DeleteArtifacts(ctx, &cachev1.DeleteArtifactsRequest{All: true, DryRun: true})
			checkStatus(t, err, codes.InvalidArgument, "INVALID_SCOPE", "Invalid scope: its name has 0 characters; it must have 1 to 63")
			ctx = metadata.AppendToOutgoingContext(ctx, server.ScopeMetadata, "default")
			_, err = cachev1.NewArtifactServiceClient(conn).DeleteArtifacts(ctx, &cachev1.DeleteArtifactsRequest{All: true, DryRun: true})
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s: two scopes over %s: got %v", name, way, err)
			}
		}
	}
}

// TestMethodOverride asks for another method than the one that is admitted.
func TestMethodOverride(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	transport := newTransport(t, 1)
	havingA(t, g.testServer)
	for _, method := range []string{"GET", "PUT", "DELETE"} {
		request := &restRequest{method: http.MethodPost, target: "/v1/artifacts:findMissing", body: []byte(`{"cache_keys": ["` + keyA + `"]}`), header: map[string]string{
			"Authorization": "Bearer " + readerToken, "X-HTTP-Method-Override": method, "Content-Type": "application/x-www-form-urlencoded"}}
		if response, body := request.do(t, g.testServer, transport); response.StatusCode != 200 || strings.TrimSpace(string(body)) != `{"missing_cache_keys":[]}` {
			t.Errorf("instead of %s: got %d %s", method, response.StatusCode, body)
		}
	}
}

// TestPromote lets artifacts be those of a more trusted scope.
func TestPromote(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	w := g.ways()["REST with Bearer"](t)
	client := cachev1.NewArtifactServiceClient(newGRPC(t, g.testServer))
	key := cachetest.Key("x")
	content := cachetest.Random(key, 1000)
	if got := w.put(t, writerToken, "nightly", key.String(), content); got != 201 {
		t.Fatalf("a nightly build got %d", got)
	}
	for _, step := range []struct {
		token, from, to string
		want            codes.Code
	}{
		{readerToken, "nightly", "default", codes.PermissionDenied},
		{adminToken, "nightly", "default", codes.PermissionDenied}, // of default only
		{writerToken, "nightly", "pr-7", codes.PermissionDenied},
		{writerToken, "default", "nightly", codes.PermissionDenied},
		{writerToken, "-", "default", codes.InvalidArgument},
		{writerToken, "nightly", "", codes.InvalidArgument},
		{operatorToken, "pr-7", "default", codes.NotFound},
		{writerToken, "nightly", "default", codes.OK},
		{operatorToken, "nightly", "default", codes.AlreadyExists},
	} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+step.token)
		response, err := client.PromoteArtifact(ctx, &cachev1.PromoteArtifactRequest{CacheKey: key.String(), FromScope: step.from, ToScope: step.to})
		if status.Code(err) != step.want || err == nil && response.GetArtifact().GetScope() != step.to {
			t.Errorf("%+v: got %v, %v", step, response, err)
		}
	}
	if status, got := w.get(t, readerToken, "", key.String()); status != 200 || !bytes.Equal(got, content) {
		t.Errorf("behind that, default has %d", status)
	}
}

// TestReloadOfAuth reads the auth file again and again while clients are served: no request fails.
func TestReloadOfAuth(t *testing.T) {
	g := startGuarded(t, setup{})
	havingA(t, g.testServer)
	ctx, stop := context.WithCancel(t.Context())
	var working sync.WaitGroup
	asked := make(chan struct{}, 1)
	for name, open := range g.ways() {
		w := open(t)
		for _, token := range []string{readerToken, g.main(t, "1")} {
			working.Go(func() {
				for ctx.Err() == nil {
					if got := w.stat(t, token, "", keyA); got != 200 {
						t.Errorf("%s: got %d", name, got)
						return
					}
					select {
					case asked <- struct{}{}:
					default:
					}
				}
			})
		}
	}
	for i := range 100 {
		g.write(t, fmt.Sprintf("# %d\n", i))
		if err := g.auth.Reload(); err != nil {
			t.Error(err)
		}
		<-asked
	}
	stop()
	working.Wait()
}

// TestNoSecretIsLogged sends credentials of each kind, good and bad, and looks for them in all that is logged.
func TestNoSecretIsLogged(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	secrets := []string{"pkc_unknown_secret", writerToken, g.main(t, "1"), g.issuer.Token(t, "1", nil), g.issuer.Token(t, "1", map[string]any{"exp": 1})}
	for _, open := range g.ways() {
		w := open(t)
		for i, secret := range secrets {
			w.stat(t, secret, "", keyA)
			w.put(t, secret, "", keyA, artifactA)
			w.get(t, secret, "nightly", cachetest.Key(fmt.Sprint(i)).String())
		}
	}
	for _, secret := range secrets {
		for _, form := range []string{secret, base64.StdEncoding.EncodeToString([]byte("x:" + secret)), secret[len(secret)-10:]} {
			if lines := g.log.find(server.LevelTrace, form); len(lines) > 0 {
				t.Errorf("the log has %q: %v", form, lines[0])
			}
		}
	}
	if len(g.log.find(slog.LevelInfo, "request failed")) == 0 {
		t.Error("nothing is logged of refusals")
	}
}

// TestExplainAgreesWithServer asks the server for generated things by generated callers, and explain about each of
// them.
func TestExplainAgreesWithServer(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	transport := newTransport(t, 1)
	random := rand.New(rand.NewPCG(3, 4))
	pick := func(from ...string) string { return from[random.IntN(len(from))] }
	var idTokens []string
	for range 200 {
		idTokens = append(idTokens, g.issuer.Token(t, "1", map[string]any{
			"repository": pick("octo/x", "octo/x", "evil/x"), "ref": pick("refs/heads/main", "refs/pull/7/merge", "refs/pull/8/merge", "refs/heads/x", "x"),
			"event_name": pick("push", "pull_request"), "aud": pick("polykit-cache", "polykit-cache", "polykit-cache", "x"),
			"exp": time.Now().Add(time.Duration(random.IntN(5)-1) * time.Hour).Unix(),
		}))
	}
	seen := map[int]int{}
	const cases = 10_000
	for range cases {
		c := auth.Credentials{Scope: pick("", "", "", "default", "nightly", "pr-7", "pr-8", "X")}
		switch random.IntN(6) {
		case 0:
		case 1:
			c.Authorization = []string{pick("Bearer", "Bearer x y", "Digest x", "Basic !", "Basic eDp4", "bearer "+writerToken)}
		case 2, 3:
			c.Authorization = []string{"Bearer " + pick(readerToken, writerToken, adminToken, operatorToken, "pkc_x")}
		default:
			c.Authorization = []string{"Bearer " + idTokens[random.IntN(len(idTokens))]}
		}
		asked := []struct {
			method, path, body string
			action             auth.Action
		}{
			{"GET", "/v1/artifacts/" + keyA, "", auth.Read},
			{"HEAD", "/v1/artifacts/" + keyA, "", auth.Read},
			{"PUT", "/v1/artifacts/" + keyA, "x", auth.Write},
			{"DELETE", "/v1/artifacts/" + keyA, "", auth.Administrate},
			{"POST", "/v1/artifacts:collectGarbage", `{"dry_run": true}`, auth.Operate},
			{"GET", "/v1/quarantine", "", auth.Operate},
			{"GET", "/v1/stats", "", auth.Read},
		}[random.IntN(7)]
		target := g.url + asked.path
		if c.Scope != "" {
			target = g.url + "/t/" + c.Scope + asked.path
		}
		request, err := http.NewRequestWithContext(t.Context(), asked.method, target, strings.NewReader(asked.body))
		if err != nil {
			t.Fatal(err)
		}
		request.Header["Authorization"] = c.Authorization
		response, err := transport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		seen[response.StatusCode]++
		refused := response.StatusCode == 401 || response.StatusCode == 403 || response.StatusCode == 400
		d := g.auth.Explain(t.Context(), c, asked.action)
		if unknown := errors.Is(d.Refused, auth.ErrUnauthenticated); unknown != (response.StatusCode == 401) {
			t.Fatalf("%s %s with %q: the server answers %s, but it is explained as %v", asked.method, target, c.Authorization, response.Status, d.Refused)
		}
		if forbidden := errors.Is(d.Refused, auth.ErrForbidden); forbidden != (response.StatusCode == 403) {
			t.Fatalf("%s %s with %q: the server answers %s, but it is explained as %v", asked.method, target, c.Authorization, response.Status, d.Refused)
		}
		if d.Allowed == refused {
			t.Fatalf("%s %s with %q: the server answers %s, but it is explained as %v", asked.method, target, c.Authorization, response.Status, d.Refused)
		}
	}
	for _, status := range []int{200, 400, 401, 403, 404, 422} {
		if seen[status] < 100 {
			t.Errorf("of %d cases only %d got %d: %v", cases, seen[status], status, seen)
		}
	}
}

// TestScopesOfLists lists what callers may see.
func TestScopesOfLists(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	w := g.ways()["REST with Bearer"](t)
	for i, put := range []struct{ token, scope string }{{writerToken, ""}, {writerToken, "nightly"}, {g.pull(t, 7), ""}, {g.pull(t, 8), ""}} {
		key := cachetest.Key(fmt.Sprint(i))
		if got := w.put(t, put.token, put.scope, key.String(), cachetest.Random(key, 100)); got != 201 {
			t.Fatalf("an upload got %d", got)
		}
	}
	client := cachev1.NewArtifactServiceClient(newGRPC(t, g.testServer))
	for _, test := range []struct {
		token string
		asked []string
		want  string
	}{
		{operatorToken, nil, "default nightly pr-7 pr-8"},
		{operatorToken, []string{"pr-8", "nightly"}, "nightly pr-8"},
		{readerToken, nil, "default"},
		{readerToken, []string{"nightly"}, ""},
		{writerToken, nil, "default"},
		{g.pull(t, 7), nil, "default pr-7"},
		{g.pull(t, 7), []string{"pr-7", "pr-8"}, "pr-7"},
	} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+test.token)
		response, err := client.ListArtifacts(ctx, &cachev1.ListArtifactsRequest{OrderBy: cachev1.ArtifactOrder_ARTIFACT_ORDER_CACHE_KEY, Filter: &cachev1.ArtifactFilter{Scopes: test.asked}})
		var got []string
		for _, a := range response.GetArtifacts() {
			got = append(got, a.GetArtifact().GetScope())
		}
		if err != nil || strings.Join(got, " ") != test.want {
			t.Errorf("%s %q: got %q, %v, want %q", test.token, test.asked, got, err, test.want)
		}
	}
}
