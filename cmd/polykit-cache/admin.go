package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/metrics"
	"github.com/polykit/polykit-cache/internal/server"
)

// adminTimeout is how long a client of the admin address may keep the server waiting for a request, and for taking an
// answer but those of /debug/pprof, which are made while it waits. A scrape may take 30 s.
const adminTimeout = 40 * time.Second

// admin is what those who run a server see of it on --admin-address. It asks for no credential.
type admin struct {
	listener net.Listener
	http     *http.Server
	log      *slog.Logger
	timeout  time.Duration // adminTimeout, but in tests
}

// newAdmin listens on an address.
func newAdmin(address string, log *slog.Logger) (*admin, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("--admin-address: %w", err)
	}
	return &admin{listener: listener, log: log, timeout: adminTimeout}, nil
}

// routes are what there is.
func (a *admin) routes(s *server.Server, m *metrics.Metrics, level *logLevel) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.Handler())
	mux.Handle("GET /log-level", level)
	mux.Handle("PUT /log-level", level)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := s.Ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index) // which has all but those below
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return http.NewCrossOriginProtection().Handler(mux)
}

// serve serves until ctx is done.
func (a *admin) serve(ctx context.Context, handler http.Handler) {
	a.http = &http.Server{Handler: a.inTime(handler), ReadHeaderTimeout: a.timeout, IdleTimeout: 5 * time.Minute, ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelWarn)}
	stopped := context.AfterFunc(ctx, func() { a.http.Close() })
	defer stopped()
	if err := a.http.Serve(a.listener); ctx.Err() == nil {
		a.log.Error("nothing is served on --admin-address any more", "error", err)
	}
}

// inTime is a handler of requests that are not waited for any longer than they may be.
func (a *admin) inTime(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control, until := http.NewResponseController(w), time.Now().Add(a.timeout)
		if r.Body != http.NoBody { // else the deadline would end the request
			control.SetReadDeadline(until)
		}
		if !strings.HasPrefix(r.URL.Path, "/debug/pprof/") {
			control.SetWriteDeadline(until)
		}
		next.ServeHTTP(w, r)
	})
}
