package server

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
)

// This file is traces: the span of each request and call, in the trace that its client says. What the cache does for it
// has spans below that one: package cache makes them, and knows from the context whether to.
//
//	net/http ── traced ─┬ REST: otelhttp
//	                    └ application/grpc: nothing, for it is a call
//	grpc-go, on its own transport and behind net/http: otelgrpc
//
// What says whether the server works has no spans: it is asked all the time. The names of spans are routes and calls,
// which are few, never what a client sent. Of a request they have the path but not the query, and of its header what says
// who sent it from where to which host: never a credential. Spans wait in memory to be sent, thousands of them, so what
// one can keep of a request is bounded: one with more than anybody needs has no span.

// Traces is how requests and calls are traced.
type Traces struct {
	// Provider makes the spans.
	Provider trace.TracerProvider
	// Propagator finds out which trace a request is part of.
	Propagator propagation.TextMapPropagator
}

// probes are the paths that are asked for all the time by who watches the server, and so have no spans.
var probes = []string{"/healthz", "/readyz", "/metrics"}

// maxTraced is the most bytes of a request that its span may keep: its target, its method, and the headers below.
const maxTraced = 4 << 10

// tracedHeaders are the headers that a span keeps something of.
var tracedHeaders = []string{"User-Agent", "X-Forwarded-For", "Tracestate"}

// traceable says whether a span may keep what it does of a request. A part of a text keeps all of it.
func traceable(r *http.Request) bool {
	size := len(r.RequestURI) + len(r.Method) + len(r.Host)
	for _, name := range tracedHeaders {
		for _, value := range r.Header[name] {
			size += len(value)
		}
	}
	return size <= maxTraced
}

// shortPropagator takes nothing from a call that is longer than maxTraced.
type shortPropagator struct{ propagation.TextMapPropagator }

// Extract implements propagation.TextMapPropagator.
func (p shortPropagator) Extract(ctx context.Context, carrier propagation.TextMapCarrier) context.Context {
	return p.TextMapPropagator.Extract(ctx, shortCarrier{carrier})
}

// shortCarrier has no long values.
type shortCarrier struct{ propagation.TextMapCarrier }

// Get implements propagation.TextMapCarrier.
func (c shortCarrier) Get(key string) string {
	if value := c.TextMapCarrier.Get(key); len(value) <= maxTraced {
		return value
	}
	return ""
}

// traced is a handler of requests that are traced, if any are. It must be in front of all that should know of the trace.
func (s *Server) traced(next http.Handler) http.Handler {
	traces := s.config.Traces
	if traces == nil {
		return next
	}
	traced := otelhttp.NewHandler(next, "",
		otelhttp.WithTracerProvider(traces.Provider),
		otelhttp.WithPropagators(traces.Propagator),
		otelhttp.WithMeterProvider(noop.NewMeterProvider()),
		otelhttp.WithSpanNameFormatter(func(_ string, r *http.Request) string { return spanName(r.Method, r.Pattern) }))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isGRPC(r) || slices.Contains(probes, r.URL.Path) || !traceable(r) {
			next.ServeHTTP(w, r)
			return
		}
		r.TLS = tlsState(r.Context()) // or its span would say that it came in clear text
		traced.ServeHTTP(w, r)
	})
}

// spanName returns the name of the span of a request with a method, which may be anything, and a pattern of the mux.
func spanName(method, pattern string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPut, http.MethodPost, http.MethodDelete, http.MethodPatch, http.MethodOptions:
	default:
		method = "HTTP"
	}
	_, path, _ := strings.Cut(pattern, "/")
	if path == "" { // which is all other paths
		return method
	}
	return method + " /" + path
}

// onRoute is a handler of the requests of a route, the spans of which are to say so.
func (s *Server) onRoute(route route, handle http.HandlerFunc) http.HandlerFunc {
	if s.config.Traces == nil {
		return handle
	}
	return func(w http.ResponseWriter, r *http.Request) {
		path := route.path
		if scopeOf(r) != "" {
			path = "/t/{scope}" + path // which the mux did not see
		}
		span := trace.SpanFromContext(r.Context())
		span.SetName(spanName(r.Method, path))
		span.SetAttributes(attribute.String("http.route", path))
		handle(w, r)
	}
}

// traceCalls returns what has a gRPC server trace calls, if any are.
func (s *Server) traceCalls() []grpc.ServerOption {
	traces := s.config.Traces
	if traces == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(traces.Provider),
		otelgrpc.WithPropagators(shortPropagator{traces.Propagator}),
		otelgrpc.WithMeterProvider(noop.NewMeterProvider()),
		// Not those that say whether the server works, nor those that there are not, whose names are the client's.
		otelgrpc.WithFilter(func(info *stats.RPCTagInfo) bool { return actions[info.FullMethodName] > 0 })))}
}

// traceFault tells the span of a request or call, if it is recorded, that it failed. As with all servers, what the client
// did wrong is no error of the span.
func traceFault(ctx context.Context, f fault) {
	span := trace.SpanFromContext(ctx)
	if !span.IsRecording() || f.reason == "" { // or the fault is one of gRPC's own, which is told already
		return
	}
	span.SetAttributes(attribute.String("error.type", f.reason))
	if f.status >= http.StatusInternalServerError {
		span.SetStatus(codes.Error, f.sentence)
	}
}
