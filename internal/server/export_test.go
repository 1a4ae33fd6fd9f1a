package server

import (
	"context"
	"net/http"

	"google.golang.org/grpc"

	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cache"
)

// Routes returns the routes over REST, each as "METHOD /path", so that tests can compare them with
// what is documented.
func (s *Server) Routes() []string {
	var routes []string
	for _, r := range s.routes(http.NotFoundHandler()) {
		routes = append(routes, r.method+" "+r.path)
	}
	return routes
}

// Handler returns what answers requests, of both protocols.
func (s *Server) Handler() http.Handler { return s.http.Handler }

// Requests returns how many requests are in flight.
func (s *Server) Requests() int { return int(s.requests.Load()) }

// Download returns w as a download of an artifact writes to it.
func Download(w http.ResponseWriter) http.ResponseWriter { return &download{ResponseWriter: w} }

// Calls returns the full names of all methods that both gRPC servers have.
func (s *Server) Calls() []string {
	var calls []string
	for _, server := range []*grpc.Server{s.grpc, s.native} {
		for service, info := range server.GetServiceInfo() {
			for _, method := range info.Methods {
				calls = append(calls, "/"+service+"/"+method.Name)
			}
		}
	}
	return calls
}

// Action returns what a call does, or as Routes has it a route; 0 if nothing says so.
func (s *Server) Action(name string) auth.Action {
	for _, r := range s.routes(http.NotFoundHandler()) {
		if name == r.method+" "+r.path {
			return r.action
		}
	}
	return actions[name]
}

// Anyone is the action that needs no credential.
const Anyone = anyone

// Admitted returns handle for those who may read, and tells it whose cache it is.
func (s *Server) Admitted(handle func(*cache.Cache)) func(*http.Request) {
	admitted := s.admitted(route{call: "x", action: auth.Read}, func(_ http.ResponseWriter, r *http.Request) { handle(s.caller(r.Context()).cache) })
	w := &pacedWriter{}
	return func(r *http.Request) { admitted(w, r) }
}

// Undecided is what nobody said who may do: it is called if a request is let do it.
func (s *Server) Undecided(called func()) http.HandlerFunc {
	return s.track(s.admitted(route{call: "x"}, func(http.ResponseWriter, *http.Request) { called() })).ServeHTTP
}

// Unadmitted says whether a request that was not admitted could do anything.
func (s *Server) Unadmitted() bool { return s.caller(context.Background()) != nil }

// Tracing returns what a server does for traces: how it wraps a handler, and one of a route, how many options its gRPC
// servers have for it, and what it does when a request fails.
func (s *Server) Tracing(handler http.Handler, handle http.HandlerFunc) (http.Handler, http.HandlerFunc, int, func(context.Context)) {
	return s.traced(handler), s.onRoute(route{}, handle), len(s.traceCalls()), func(ctx context.Context) { traceFault(ctx, internal) }
}
