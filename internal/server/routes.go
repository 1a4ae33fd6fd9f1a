package server

import (
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/auth"
)

// This file is which request is handled by what.

// route is one path over REST.
type route struct {
	method, path string
	call         string      // that does the same, or what it is called else
	action       auth.Action // what it does
	handle       http.HandlerFunc
}

func (s *Server) routes(gateway http.Handler) []route {
	// A JSON method does what the call does that it stands for.
	json := func(method, path, call string) route {
		return route{method, path, call, actions[call], gateway.ServeHTTP}
	}
	return []route{
		{http.MethodPut, "/v1/artifacts/{cache_key}", cachev1.ArtifactService_PutArtifact_FullMethodName, auth.Write, s.whileServing(s.putArtifact)},
		{http.MethodGet, "/v1/artifacts/{cache_key}", cachev1.ArtifactService_GetArtifact_FullMethodName, auth.Read, s.whileServing(s.getArtifact)},
		{http.MethodHead, "/v1/artifacts/{cache_key}", "HeadArtifact", auth.Read, s.whileServing(s.headArtifact)},
		json(http.MethodGet, "/v1/artifacts/{cache_key}/metadata", cachev1.ArtifactService_StatArtifact_FullMethodName),
		json(http.MethodGet, "/v1/artifacts/{cache_key}/files", cachev1.ArtifactService_ListArtifactFiles_FullMethodName),
		json(http.MethodGet, "/v1/artifacts", cachev1.ArtifactService_ListArtifacts_FullMethodName),
		json(http.MethodDelete, "/v1/artifacts/{cache_key}", cachev1.ArtifactService_DeleteArtifact_FullMethodName),
		json(http.MethodPost, "/v1/artifacts:delete", cachev1.ArtifactService_DeleteArtifacts_FullMethodName),
		json(http.MethodPost, "/v1/artifacts:findMissing", cachev1.ArtifactService_FindMissingArtifacts_FullMethodName),
		json(http.MethodPost, "/v1/artifacts:collectGarbage", cachev1.ArtifactService_CollectGarbage_FullMethodName),
		json(http.MethodPut, "/v1/artifacts/{cache_key}/pin", cachev1.ArtifactService_PinArtifact_FullMethodName),
		json(http.MethodDelete, "/v1/artifacts/{cache_key}/pin", cachev1.ArtifactService_UnpinArtifact_FullMethodName),
		json(http.MethodPost, "/v1/artifacts/{cache_key}/promote", cachev1.ArtifactService_PromoteArtifact_FullMethodName),
		json(http.MethodGet, "/v1/stats", cachev1.ArtifactService_GetCacheStats_FullMethodName),
		json(http.MethodGet, "/v1/quarantine", cachev1.ArtifactService_ListQuarantine_FullMethodName),
		{http.MethodGet, "/healthz", "/healthz", anyone, s.healthz},
		{http.MethodGet, "/readyz", "/readyz", anyone, s.readyz},
		{http.MethodGet, "/openapi.json", "/openapi.json", anyone, s.openAPI},
		{http.MethodGet, "/metrics", "/metrics", auth.Operate, s.config.Metrics.Handler().ServeHTTP},
	}
}

// newREST returns the REST side of s.
func (s *Server) newREST() http.Handler {
	mux := http.NewServeMux()
	allowed := map[string][]string{}
	for _, route := range s.routes(s.newGateway()) {
		mux.HandleFunc(route.method+" "+route.path, s.onRoute(route, s.admitted(route, route.handle)))
		allowed[route.path] = append(allowed[route.path], route.method)
	}
	for path, methods := range allowed {
		// As the mux has it, what answers GET answers HEAD too.
		if slices.Contains(methods, http.MethodGet) && !slices.Contains(methods, http.MethodHead) {
			allowed[path] = append(methods, http.MethodHead)
		}
	}
	for path, methods := range allowed {
		allow := strings.Join(methods, ", ")
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", allow)
			s.refuse(w, r, fmt.Errorf("%w: use one of %s", errMethod, allow))
		})
	}
	mux.HandleFunc("/", s.noRoute)
	var origins http.CrossOriginProtection
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Any page can have a browser send a POST, to a server on this machine too.
		if err := origins.Check(r); err != nil {
			s.refuse(w, r, fmt.Errorf("%w: %w", errCrossOrigin, err))
			return
		}
		// The mux refuses it without a word.
		if r.RequestURI == "*" {
			s.noRoute(w, r)
			return
		}
		if strings.HasPrefix(r.URL.Path, "/t/") {
			var found bool
			if r, found = inScope(r); !found {
				s.noRoute(w, r)
				return
			}
		}
		// The mux would redirect to the clean path, but a path that needs cleaning is just unknown.
		if clean := path.Clean(r.URL.Path); clean != r.URL.Path && (clean == "/" || clean+"/" != r.URL.Path) {
			s.noRoute(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// whileServing refuses requests that come on connections which are kept open while the server drains.
func (s *Server) whileServing(handle http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := s.taking(); err != nil {
			s.refuse(w, r, err)
			return
		}
		handle(w, r)
	}
}

func (s *Server) noRoute(w http.ResponseWriter, r *http.Request) {
	s.refuse(w, r, fmt.Errorf("%w: artifacts are at /v1/artifacts/{cache_key}, and /openapi.json describes the API", errNoRoute))
}

// healthz says that the process serves requests.
func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

// readyz says whether the server can take uploads, and if not, why.
func (s *Server) readyz(w http.ResponseWriter, r *http.Request) {
	if err := s.Ready(r.Context()); err != nil {
		f := faultOf(err)
		f.status, f.sentence = http.StatusServiceUnavailable, sentence(err)
		recordOf(w).failed(f, err)
		writeFault(w, f)
		return
	}
	writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
}

func (s *Server) openAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Write(cachev1.OpenAPI)
}
