package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/server"
)

// permissions are what each route and call needs. They are written down here once more, so that nobody changes who
// may do what without being asked whether that was meant.
var permissions = map[auth.Action][]string{
	server.Anyone: {
		"GET /healthz", "GET /readyz", "GET /openapi.json",
		"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
	},
	auth.Read: {
		"GET /v1/artifacts/{cache_key}", "HEAD /v1/artifacts/{cache_key}", "GET /v1/artifacts/{cache_key}/metadata",
		"GET /v1/artifacts/{cache_key}/files", "GET /v1/artifacts", "POST /v1/artifacts:findMissing", "GET /v1/stats",
		"GetArtifact", "StatArtifact", "ListArtifactFiles", "ListArtifacts", "FindMissingArtifacts", "GetCacheStats",
	},
	auth.Write: {
		"PUT /v1/artifacts/{cache_key}", "POST /v1/artifacts/{cache_key}/promote",
		"PutArtifact", "PromoteArtifact",
	},
	auth.Administrate: {
		"DELETE /v1/artifacts/{cache_key}", "POST /v1/artifacts:delete", "PUT /v1/artifacts/{cache_key}/pin", "DELETE /v1/artifacts/{cache_key}/pin",
		"DeleteArtifact", "DeleteArtifacts", "PinArtifact", "UnpinArtifact",
	},
	auth.Operate: {
		"POST /v1/artifacts:collectGarbage", "GET /v1/quarantine", "GET /metrics",
		"CollectGarbage", "ListQuarantine",
	},
}

// TestPermissions compares what every route and call needs with what it is meant to need.
func TestPermissions(t *testing.T) {
	want := map[string]auth.Action{}
	for action, names := range permissions {
		for _, name := range names {
			if !strings.Contains(name, "/") {
				name = "/polykit.cache.v1.ArtifactService/" + name
			}
			want[name] = action
		}
	}
	s := startServer(t, setup{managed: true})
	got := map[string]auth.Action{}
	for _, name := range slices.Concat(s.Routes(), s.Calls()) {
		got[name] = s.Action(name)
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if action, known := want[name]; !known || action != got[name] {
			t.Errorf("%s needs action %d, and is meant to need %d", name, got[name], action)
		}
		delete(want, name)
	}
	for name := range want {
		t.Errorf("there is no %s", name)
	}
}

// TestScopeOfRemoval has an admin of all scopes delete by a filter that names no scope: a request that is about one scope
// leaves the others alone.
func TestScopeOfRemoval(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	w := g.ways()["REST with Bearer"](t)
	transport := newTransport(t, 1)
	client := cachev1.NewArtifactServiceClient(newGRPC(t, g.testServer))
	ways := map[string]func(t *testing.T, scope string){
		"REST": func(t *testing.T, scope string) {
			request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url+"/t/"+scope+"/v1/artifacts:delete", strings.NewReader(`{"all": true}`))
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Authorization", "Bearer "+operatorToken)
			response, err := transport.RoundTrip(request)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			if body, err := io.ReadAll(response.Body); response.StatusCode != 200 || err != nil {
				t.Errorf("got %s %s, %v", response.Status, body, err)
			}
		},
		"gRPC": func(t *testing.T, scope string) {
			ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+operatorToken, server.ScopeMetadata, scope)
			if _, err := client.DeleteArtifacts(ctx, &cachev1.DeleteArtifactsRequest{All: true}); err != nil {
				t.Error(err)
			}
		},
	}
	for name, remove := range ways {
		for _, scope := range []string{"nightly", "default"} {
			t.Run(name+" in "+scope, func(t *testing.T) {
				keys := map[string]string{}
				for _, in := range []string{"default", "nightly"} {
					key := cachetest.Key(name + scope + in)
					keys[in] = key.String()
					if got := w.put(t, writerToken, in, key.String(), cachetest.Random(key, 100)); got != 201 {
						t.Fatalf("an upload got %d", got)
					}
				}
				g.flush(t)
				remove(t, scope)
				for in, key := range keys {
					want := 200
					if in == scope {
						want = 404
					}
					if got := w.stat(t, writerToken, in, key); got != want {
						t.Errorf("%s has %d behind it, want %d", in, got, want)
					}
				}
			})
		}
	}
}

// TestScopeOfRemovalOfOpenServer has a server without an auth file, whose directory has other scopes of the time when it
// had one.
func TestScopeOfRemovalOfOpenServer(t *testing.T) {
	s := startServer(t, setup{managed: true})
	scope, err := artifact.ParseScope("nightly")
	if err != nil {
		t.Fatal(err)
	}
	key := cachetest.Key("a")
	content := cachetest.Random(key, 100)
	for _, in := range []artifact.Scope{artifact.DefaultScope, scope} {
		if _, err := s.cache.In(in).Put(t.Context(), key, int64(len(content)), bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	s.flush(t)
	transport := newTransport(t, 1)
	for _, c := range []struct{ path, want string }{{"/v1/artifacts", "default nightly"}, {"/t/default/v1/artifacts", "default"}} {
		_, body := (&restRequest{method: http.MethodGet, target: c.path}).do(t, s, transport)
		var got []string
		for _, name := range []string{"default", "nightly"} {
			if bytes.Contains(body, []byte(`"scope":"`+name+`"`)) || bytes.Contains(body, []byte(`"scope": "`+name+`"`)) {
				got = append(got, name)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s lists %s", c.path, body)
		}
	}
	(&restRequest{method: http.MethodPost, target: "/t/default/v1/artifacts:delete", body: []byte(`{"all": true}`)}).do(t, s, transport)
	if _, err := s.cache.Stat(t.Context(), key); !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("in the default scope there is still one: %v", err)
	}
	if _, err := s.cache.In(scope).Stat(t.Context(), key); err != nil {
		t.Errorf("in the other scope: %v", err)
	}
}

// TestOthersScopesAreHidden has callers look for what they must not learn: whether a scope that they don't read has an
// artifact under a key, and how much there is in it.
func TestOthersScopesAreHidden(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	w := g.ways()["REST with Bearer"](t)
	client := cachev1.NewArtifactServiceClient(newGRPC(t, g.testServer))
	stats := func(token, scope string) *cachev1.GetCacheStatsResponse {
		t.Helper()
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
		if scope != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, server.ScopeMetadata, scope)
		}
		response, err := client.GetCacheStats(ctx, &cachev1.GetCacheStatsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return response
	}
	put := func(token, scope, name string, size int) {
		t.Helper()
		key := cachetest.Key(name)
		if got := w.put(t, token, scope, key.String(), cachetest.Random(key, size)); got != 201 {
			t.Fatalf("an upload got %d", got)
		}
		g.flush(t)
	}
	put(g.main(t, "1"), "", "of all", 1000)
	put(g.pull(t, 7), "", "secret", 2000)

	callers := map[string]struct {
		token, scope string
		scopes       []string
		artifacts    int64
	}{
		"a pull request":             {g.pull(t, 7), "", []string{"default", "pr-7"}, 2},
		"a reader":                   {readerToken, "", []string{"default"}, 1},
		"an admin of one scope":      {adminToken, "", []string{"default"}, 1},
		"an admin of all, of one":    {operatorToken, "default", []string{"default"}, 1},
		"an admin of all, of a pull": {operatorToken, "pr-7", []string{"default", "pr-7"}, 2},
	}
	before := map[string]*cachev1.GetCacheStatsResponse{}
	for name, caller := range callers {
		got := stats(caller.token, caller.scope)
		before[name] = got
		var scopes []string
		for _, s := range got.GetScopes() {
			scopes = append(scopes, s.GetScope())
		}
		if got.GetTotal().GetArtifactCount() != caller.artifacts || got.GetTotal().GetSize() == 0 || !slices.Equal(scopes, caller.scopes) || len(got.GetTasks()) != 1 || got.GetTaskCount() != 1 {
			t.Errorf("%s is told %v", name, got)
		}
		if got.GetTotal().GetUsage() != nil || got.GetTasks()[0].GetStats().GetUsage() != nil || got.GetSinceStart() != nil || got.GetStorage() != nil || got.GetComparisons() != nil {
			t.Errorf("%s is told what is counted for all scopes: %v", name, got)
		}
	}
	// Another pull request stores, downloads, misses, and has something deleted.
	put(g.pull(t, 8), "", "secret", 3000)
	put(g.pull(t, 8), "", "more", 4000)
	w.get(t, g.pull(t, 8), "", cachetest.Key("secret").String())
	w.get(t, g.pull(t, 8), "", cachetest.Key("missed").String())
	if _, err := client.DeleteArtifact(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+operatorToken, server.ScopeMetadata, "pr-8"),
		&cachev1.DeleteArtifactRequest{CacheKey: cachetest.Key("more").String()}); err != nil {
		t.Fatal(err)
	}
	g.flush(t)
	waitUntil(t, "the two are compared", func() bool { return stats(operatorToken, "").GetComparisons().GetDifferedCount() == 1 })
	for name, caller := range callers {
		if got := stats(caller.token, caller.scope); !proto.Equal(got, before[name]) {
			t.Errorf("%s learns what happened in another scope: was told %v before, and %v behind it", name, before[name], got)
		}
	}
	all := stats(operatorToken, "")
	if usage := all.GetTotal().GetUsage(); all.GetTotal().GetArtifactCount() != 3 || len(all.GetScopes()) != 3 || usage.GetHitCount() != 1 || usage.GetMissCount() != 1 || usage.GetStoredCount() != 4 ||
		!proto.Equal(usage, all.GetSinceStart()) || all.GetStorage().GetUsedSize() == 0 || all.GetTasks()[0].GetStats().GetUsage().GetHitCount() != 1 {
		t.Errorf("an admin of all scopes is told %v", all)
	}
}

// TestRefusedBeforeBody asks for what is not allowed, and sends nothing behind the header: the answer does not wait for it.
func TestRefusedBeforeBody(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	for token, want := range map[string]int{"": 401, "pkc_x": 401, readerToken: 403} {
		for _, route := range []string{"PUT /v1/artifacts/" + keyA, "POST /v1/artifacts:delete", "POST /v1/artifacts:collectGarbage", "POST /v1/artifacts/" + keyA + "/promote"} {
			w := dial(t, g.testServer)
			header := ""
			if token != "" {
				header = "Authorization: Bearer " + token + "\r\n"
			}
			method, path, _ := strings.Cut(route, " ")
			w.send(method + " " + path + " HTTP/1.1\r\nHost: x\r\n" + header + "Content-Length: 1000000\r\n\r\n")
			response, err := http.ReadResponse(w.in, nil)
			if err != nil || response.StatusCode != want {
				t.Errorf("%s with %q: got %v, %v, want %d", route, token, response, err, want)
			}
		}
		code := codes.Unauthenticated
		if want == 403 {
			code = codes.PermissionDenied
		}
		for way, conn := range map[string]grpc.ClientConnInterface{"gRPC": newGRPC(t, g.testServer), "gRPC amid REST": &sharedConn{transport: newTransport(t, 2), url: g.url}} {
			for _, call := range g.Calls() {
				if need := g.Action(call); need == server.Anyone || need == auth.Read {
					continue
				}
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				if token != "" {
					ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
				}
				stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, call)
				if err == nil {
					err = stream.RecvMsg(&cachev1.StatArtifactRequest{})
				}
				cancel()
				if status.Code(err) != code {
					t.Errorf("%s %s with %q: got %v, want %v", way, call, token, err, code)
				}
			}
		}
	}
}

// TestCertificatesAsCredentials has clients that prove who they are by a certificate, over each protocol.
func TestCertificatesAsCredentials(t *testing.T) {
	authority := cachetest.NewAuthority("authority")
	const rules = `
  - name: machines
    certificate: true
    when: certificate.subject.common_name.endsWith(".build.example")
    role: writer
`
	g := startGuarded(t, setup{tls: true, change: func(c *server.Config) {
		c.TLS.ClientAuth, c.TLS.ClientCAs = tls.VerifyClientCertIfGiven, authority.Pool()
	}})
	text, err := os.ReadFile(g.file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(g.file, bytes.Replace(text, []byte("\nrules:\n"), []byte("\nrules:"+rules), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := g.auth.Reload(); err != nil {
		t.Fatal(err)
	}
	havingA(t, g.testServer)
	bearer := func(token string) string { return "Bearer " + token }
	ways := map[string]func(t *testing.T, config *tls.Config) way{
		"REST": func(t *testing.T, config *tls.Config) way {
			transport := newTransport(t, 1)
			transport.TLSClientConfig = config
			return g.overREST(transport, bearer)
		},
		"REST over HTTP2": func(t *testing.T, config *tls.Config) way {
			transport := newTransport(t, 2)
			transport.TLSClientConfig = config
			return g.overREST(transport, bearer)
		},
		"gRPC": func(t *testing.T, config *tls.Config) way {
			conn, err := grpc.NewClient(g.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			return overGRPC(conn, bearer)
		},
		"gRPC behind net/http": func(t *testing.T, config *tls.Config) way {
			transport := newTransport(t, 2)
			transport.TLSClientConfig = config
			return overGRPC(&sharedConn{transport: transport, url: g.url}, bearer)
		},
	}
	for name, open := range ways {
		for _, c := range []struct {
			certificate, token string
			stat, put          int
		}{
			{"a.build.example", "", 200, 409},
			{"a.build.example", readerToken, 200, 403}, // the header decides
			{"a.build.example", "pkc_x", 401, 401},
			{"a.example", "", 403, 403},
			{"", "", 401, 401},
		} {
			t.Run(fmt.Sprint(name, " ", c.certificate, " ", c.token), func(t *testing.T) {
				config := clientTLS()
				if c.certificate != "" {
					config.Certificates = []tls.Certificate{authority.Pair(c.certificate, nil)}
				}
				w := open(t, config)
				if got := w.stat(t, c.token, "", keyA); got != c.stat {
					t.Errorf("stat: got %d, want %d", got, c.stat)
				}
				if got := w.put(t, c.token, "", keyA, artifactA); got != c.put {
					t.Errorf("put: got %d, want %d", got, c.put)
				}
			})
		}
	}
}

// TestCredentialsOfCurl sends credentials as curl does from a URL, also with characters that must be escaped there.
func TestCredentialsOfCurl(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	g := startGuarded(t, setup{})
	const odd = "pkc_a/b+c=:@%?#d"
	text, err := os.ReadFile(g.file)
	if err != nil {
		t.Fatal(err)
	}
	more := fmt.Sprintf("\ntokens:\n  - {name: odd, sha256: %s, role: reader}\n", auth.HashToken(odd))
	if err := os.WriteFile(g.file, bytes.Replace(text, []byte("\ntokens:\n"), []byte(more), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := g.auth.Reload(); err != nil {
		t.Fatal(err)
	}
	scheme, host, _ := strings.Cut(g.url, "://")
	for _, c := range []struct{ user, password, want string }{
		{"x", readerToken, "404"},
		{"somebody else", readerToken, "404"},
		{"", readerToken, "404"},
		{"x", odd, "404"},
		{"x", g.main(t, "1"), "404"},
		{"x", "pkc_x", "401"},
		{readerToken, "", "401"}, // a name is no credential
	} {
		target := fmt.Sprintf("%s://%s@%s/v1/artifacts/%s", scheme, url.UserPassword(c.user, c.password), host, keyA)
		output, err := exec.Command("curl", "-k", "-sS", "-o", filepath.Join(t.TempDir(), "body"), "-w", "%{http_code}", target).CombinedOutput()
		if err != nil || string(output) != c.want {
			t.Errorf("%q with %q: curl printed %s, %v, want %s", c.user, c.password, output, err, c.want)
		}
	}
}

// TestNoSecretIsLoggedOfIssuers has issuers and an auth file that fail, and looks for credentials in what is said of that.
func TestNoSecretIsLoggedOfIssuers(t *testing.T) {
	g := startGuarded(t, setup{})
	w := g.ways()["REST with Basic"](t)
	good, rotated := g.main(t, "1"), ""
	w.stat(t, good, "", keyA)
	g.issuer.Rotate(t, "2")
	rotated = g.main(t, "2")
	w.stat(t, rotated, "", keyA)
	g.issuer.Close()
	g.write(t, "wrong: true\n")
	if g.auth.Reload() == nil {
		t.Error("a wrong file was taken")
	}
	for _, secret := range []string{good, rotated, readerToken, writerToken, adminToken, operatorToken} {
		for _, form := range []string{secret, base64.StdEncoding.EncodeToString([]byte("x:" + secret))} {
			for _, log := range []*recorder{g.log, g.authLog} {
				if lines := log.find(server.LevelTrace, form); len(lines) > 0 {
					t.Errorf("the log has a credential: %v", lines[0])
				}
			}
		}
	}
	if len(g.authLog.find(slog.LevelError, "")) == 0 {
		t.Error("nothing is logged of the wrong file")
	}
}

// TestLogOfRefusalsIsBounded has somebody guess tokens: all of that is counted, and the log stays readable.
func TestLogOfRefusalsIsBounded(t *testing.T) {
	g := startGuarded(t, setup{})
	w := g.ways()["REST with Bearer"](t)
	const guesses = 2000
	for i := range guesses {
		if got := w.stat(t, fmt.Sprint("pkc_", i), "", keyA); got != 401 {
			t.Fatalf("got %d", got)
		}
	}
	if n := g.Refusals()[auth.ReasonUnknownToken]; n != guesses {
		t.Errorf("%d are counted", n)
	}
	lines := g.log.find(slog.LevelInfo, "refused=unknown_token")
	if len(lines) < 10 || len(lines) > guesses/2 {
		t.Errorf("there are %d lines of %d refusals", len(lines), guesses)
	}
	// Another reason is not drowned by that.
	w.put(t, readerToken, "", keyA, artifactA)
	waitUntil(t, "the log says what else was refused", func() bool { return len(g.log.find(slog.LevelInfo, "refused=role")) == 1 })
	// The line that comes next says how many were left out. One comes in a second; these are guesses until then.
	waitUntil(t, "a line says how many were left out", func() bool {
		w.stat(t, "pkc_x", "", keyA)
		return len(g.log.find(slog.LevelInfo, " unlogged=")) > 0
	})
	// Who wants to see all of them can.
	waitUntil(t, "all are logged at the level debug", func() bool {
		return int64(len(g.log.find(slog.LevelDebug, "refused=unknown_token"))) == g.Refusals()[auth.ReasonUnknownToken]
	})
}

// TestAdmissionCostsNothing has a server without an auth file, where nothing may be allocated to find out that everybody may
// do everything.
func TestAdmissionCostsNothing(t *testing.T) {
	s := startServer(t, setup{})
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+"/v1/artifacts/"+keyA, nil)
	if err != nil {
		t.Fatal(err)
	}
	handle := s.Admitted(func(found *cache.Cache) {
		if found != s.cache {
			t.Error("it is another cache")
		}
	})
	if n := testing.AllocsPerRun(1000, func() { handle(request) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
