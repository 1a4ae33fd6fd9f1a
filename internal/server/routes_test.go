package server_test

import (
	"encoding/json"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

const nothingHere = "There is nothing at this path: artifacts are at /v1/artifacts/{cache_key}, and /openapi.json describes the API"

func routeCases() []apiCase {
	var cases []apiCase
	for _, r := range []struct {
		path  string
		other []string // methods that the path lacks
		allow string
	}{
		{"/v1/artifacts", []string{"PUT", "POST", "DELETE", "OPTIONS"}, "GET, HEAD"},
		{"/v1/artifacts/" + keyA, []string{"POST", "PATCH", "OPTIONS", "PROPFIND"}, "PUT, GET, HEAD, DELETE"},
		{"/v1/artifacts/no-key", []string{"POST"}, "PUT, GET, HEAD, DELETE"},
		{"/v1/artifacts/" + keyA + "/pin", []string{"GET", "HEAD", "POST", "OPTIONS"}, "PUT, DELETE"},
		{"/v1/artifacts:delete", []string{"GET", "PUT", "DELETE"}, "POST"},
		{"/v1/artifacts:findMissing", []string{"GET", "PUT", "DELETE"}, "POST"},
		{"/v1/artifacts:collectGarbage", []string{"GET", "PUT", "DELETE"}, "POST"},
		{"/v1/stats", []string{"PUT", "POST", "DELETE"}, "GET, HEAD"},
		{"/v1/quarantine", []string{"PUT", "POST", "DELETE"}, "GET, HEAD"},
		{"/v1/artifacts/" + keyA + "/metadata", []string{"PUT", "POST", "DELETE", "OPTIONS"}, "GET, HEAD"},
		{"/v1/artifacts/" + keyA + "/files", []string{"PUT", "POST", "DELETE", "OPTIONS"}, "GET, HEAD"},
		{"/healthz", []string{"PUT", "POST", "DELETE", "OPTIONS"}, "GET, HEAD"},
		{"/readyz", []string{"PUT", "POST", "DELETE", "OPTIONS"}, "GET, HEAD"},
		{"/openapi.json", []string{"PUT", "POST", "DELETE", "OPTIONS"}, "GET, HEAD"},
	} {
		for _, method := range r.other {
			c := apiCase{
				name:   method + " " + r.path,
				rest:   &restRequest{method: method, target: r.path},
				status: 405, header: map[string]string{"Allow": r.allow},
				sentence: "The method is not allowed here: use one of " + r.allow,
				then:     storesNothing,
			}
			if method == "POST" || method == "PUT" {
				c.rest.body = artifactA
			}
			cases = append(cases, c)
		}
	}
	for _, target := range []string{
		"/", "//", "/.", "/..", "/./", "/../",
		"/v1", "/v1/", "/v2", "/v1/artifacts/", "/v1/artifacts:list", "/v1/stats/", "/v1/artifacts//", "/v1/artifacts/.", "/v1/artifacts/..",
		"/v1/artifacts/" + keyA + "/",
		"/v1/artifacts/" + keyA + "//",
		"/v1/artifacts/" + keyA + "/.",
		"/v1/artifacts/" + keyA + "/other",
		"/v1/artifacts/" + keyA + "/metadata/",
		"/v1/artifacts/" + keyA + "/metadata:get",
		"/v1/artifacts/" + keyA + "/files/",
		"/v1/artifacts/" + keyA + "/files/data.bin",
		"//v1/artifacts/" + keyA,
		"/v1//artifacts/" + keyA,
		"/./v1/artifacts/" + keyA,
		"/x/../v1/artifacts/" + keyA,
		"/v1/artifacts/x/../" + keyA,
		"/v1/artifacts/%2E%2E",
		"/v1/artifacts/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
		"/v1/artifacts%2F" + keyA,
		"/V1/artifacts/" + keyA,
		"/ca/97/" + keyA + ".zst",
		"/healthz/", "/metrics/", "/openapi.json/", "/favicon.ico",
		"/polykit.cache.v1.ArtifactService/StatArtifact",
	} {
		for _, method := range []string{"GET", "PUT"} {
			c := apiCase{
				name:   method + " " + target,
				rest:   &restRequest{method: method, target: target},
				status: 404, header: map[string]string{"Location": "", "Allow": ""},
				sentence: nothingHere,
				then:     storesNothing,
			}
			if method == "PUT" {
				c.rest.body = artifactA
			}
			cases = append(cases, c)
		}
	}
	return append(cases,
		apiCase{
			name:   "healthz",
			rest:   &restRequest{method: "GET", target: "/healthz"},
			status: 200, header: map[string]string{"Content-Type": "application/json"},
			body: []byte(`{"status":"ok"}`),
		},
		apiCase{
			name:   "readyz",
			rest:   &restRequest{method: "GET", target: "/readyz"},
			status: 200, header: map[string]string{"Content-Type": "application/json"},
			body: []byte(`{"status":"ready"}`),
		},
		apiCase{
			name:   "openapi.json",
			rest:   &restRequest{method: "GET", target: "/openapi.json"},
			status: 200, header: map[string]string{"Content-Type": "application/json"},
			body: cachev1.OpenAPI,
		},
		apiCase{
			name:   "HEAD healthz",
			rest:   &restRequest{method: "HEAD", target: "/healthz"},
			status: 200, header: map[string]string{"Content-Type": "application/json", "Content-Length": "15"},
		},
		apiCase{
			name:   "HEAD openapi.json",
			rest:   &restRequest{method: "HEAD", target: "/openapi.json"},
			status: 200, header: map[string]string{"Content-Type": "application/json"},
		},
		apiCase{
			name: "HEAD metadata", given: havingA,
			rest:   head(keyA + "/metadata"),
			status: 200, header: map[string]string{"Content-Type": "application/json"},
		},
		apiCase{
			name:   "HEAD files of a miss",
			rest:   head(keyA + "/files"),
			status: 404, header: map[string]string{"Content-Length": "30"},
			sentence: "Artifact not found",
		},
	)
}

// TestUnknownCall proves that gRPC says of what it does not know that it does not know it.
func TestUnknownCall(t *testing.T) {
	for _, m := range grpcMouths() {
		t.Run(m.name, func(t *testing.T) {
			conn := m.grpc(t, startServer(t, setup{}))
			for _, method := range []string{"/polykit.cache.v1.ArtifactService/Other", "/polykit.cache.v2.ArtifactService/StatArtifact", "/other"} {
				err := conn.Invoke(t.Context(), method, &cachev1.StatArtifactRequest{}, &cachev1.StatArtifactResponse{}, grpc.WaitForReady(false))
				if status.Code(err) != codes.Unimplemented {
					t.Errorf("%s: got %v; want UNIMPLEMENTED", method, err)
				}
			}
		})
	}
}

// TestDocumentation proves that every operation of the OpenAPI description is served, and that every
// route of the server is in it.
func TestDocumentation(t *testing.T) {
	var document struct {
		Swagger string
		Paths   map[string]map[string]json.RawMessage
	}
	if err := json.Unmarshal(cachev1.OpenAPI, &document); err != nil || document.Swagger != "2.0" {
		t.Fatalf("not an OpenAPI 2.0 document: version %q, %v", document.Swagger, err)
	}
	var documented []string
	for path, operations := range document.Paths {
		for method := range operations {
			documented = append(documented, strings.ToUpper(method)+" "+path)
		}
	}
	s := startServer(t, setup{managed: true})
	routes := s.Routes()
	slices.Sort(documented)
	slices.Sort(routes)
	if !slices.Equal(documented, routes) {
		t.Errorf("documented are\n%s\nbut served are\n%s", strings.Join(documented, "\n"), strings.Join(routes, "\n"))
	}

	// The list of routes could say what the server does not do, so ask it.
	transport := newTransport(t, 1)
	content := cachetest.Random(cachetest.Key("a"), 100)
	for _, operation := range documented {
		if s.stored(t, "a") == "" { // or no more
			s.put(t, cachetest.Key("a"), content)
		}
		method, path, _ := strings.Cut(operation, " ")
		request := &restRequest{method: method, target: strings.ReplaceAll(path, "{cache_key}", keyA)}
		want := http.StatusOK
		switch path {
		case "/v1/artifacts/{cache_key}":
			if method == http.MethodPut {
				request.body, want = content, http.StatusConflict
			}
		case "/v1/artifacts/{cache_key}/promote":
			want = http.StatusNotFound // a server without an auth file has no scopes
		case "/v1/artifacts:delete":
			request.body = []byte(`{"all": true}`)
		}
		if response, body := request.do(t, s, transport); response.StatusCode != want {
			t.Errorf("%s: got %s %s; want %d", operation, response.Status, body, want)
		}
	}
}

// TestDocumentationOfCredentials holds what the OpenAPI description says of credentials and scopes to what the server
// does.
func TestDocumentationOfCredentials(t *testing.T) {
	g := startGuarded(t, setup{managed: true})
	transport := newTransport(t, 1)
	response, text := (&restRequest{method: http.MethodGet, target: "/openapi.json"}).do(t, g.testServer, transport)
	type operation struct {
		Security  *[]map[string][]string
		Responses map[string]any
	}
	var document struct {
		Info                struct{ Description string }
		SecurityDefinitions map[string]struct{ Type, In, Name string }
		Security            []map[string][]string
		Paths               map[string]map[string]operation
	}
	if err := json.Unmarshal(text, &document); err != nil || response.StatusCode != http.StatusOK {
		t.Fatal(response.Status, err)
	}
	bearer, basic := document.SecurityDefinitions["bearer"], document.SecurityDefinitions["basic"]
	if bearer.Type != "apiKey" || bearer.In != "header" || bearer.Name != "Authorization" || basic.Type != "basic" || len(document.SecurityDefinitions) != 2 {
		t.Errorf("credentials are described as %+v", document.SecurityDefinitions)
	}
	if want := []map[string][]string{{}, {"bearer": {}}, {"basic": {}}}; !reflect.DeepEqual(document.Security, want) {
		t.Errorf("asked for is %v, want %v", document.Security, want)
	}
	if !strings.Contains(document.Info.Description, "`/t/{scope}`") {
		t.Errorf("nothing is said of the scope in paths: %s", document.Info.Description)
	}
	for path, operations := range document.Paths {
		for method, described := range operations {
			open := described.Security != nil && len(*described.Security) == 0
			request := &restRequest{method: strings.ToUpper(method), target: strings.ReplaceAll(path, "{cache_key}", keyA)}
			response, body := request.do(t, g.testServer, transport)
			if open == (response.StatusCode == http.StatusUnauthorized) {
				t.Errorf("%s %s: without a credential got %s %s, but described is %v", method, path, response.Status, body, described.Security)
			}
			if _, told := described.Responses["401"]; told == open {
				t.Errorf("%s %s: that 401 can be answered: %t", method, path, told)
			}
			if _, told := described.Responses["403"]; told == open {
				t.Errorf("%s %s: that 403 can be answered: %t", method, path, told)
			}
			// All of /v1 can be asked for in a scope, and nothing else.
			inScope := strings.HasPrefix(path, "/v1/")
			request.target = "/t/default" + request.target
			if response, body := request.do(t, g.testServer, transport); inScope == (response.StatusCode == http.StatusNotFound) {
				t.Errorf("%s %s: got %s %s", method, request.target, response.Status, body)
			}
		}
	}
}
