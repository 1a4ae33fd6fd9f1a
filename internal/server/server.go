// Package server speaks for a cache: REST and gRPC on one port, over HTTP/1.1 and HTTP/2, in clear text
// or over TLS, mixed on one connection if a proxy does so.
//
//	listener ─┬ grpc-go's transport ──── ArtifactService, health, reflection
//	          └ net/http ─┬ application/grpc ──── grpc-go: the same services
//	                      └ http.ServeMux ─┬ raw bytes: rest.go
//	                                       ├ JSON methods: grpc-gateway ── the same ArtifactService
//	                                       └ /healthz, /readyz, /openapi.json
//
// Who may do what is decided in one place for all of them, in identity.go, before any of a body is read.
//
// A connection on which a gRPC client speaks for itself is found by how it begins, in greeting.go, and
// goes to grpc-go's own transport, in native.go, which takes less than half of the time that net/http
// takes for it. All others are net/http's: there REST and gRPC can be mixed, as by proxies. TLS is below
// all that, in tls.go: neither of the two knows of it.
//
// Requests and calls are traced, if they are to be, as traces.go says.
//
// Errors become statuses of both protocols in one table: status.go. How long the server waits for a
// client is bounded in pace.go, how many connections there are and how long they are idle in
// connections.go; how many uploads run at once is the Verifier's to say.
//
// Routing is net/http's own and not the gateway's mux, which splits every path, tries its patterns
// one after the other, and knows neither Allow nor a request for a path it has with a verb behind a
// colon; the gateway serves just the JSON methods. All routes stand in one list.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/metrics"
)

// Config configures a Server. Every duration and size must be positive.
type Config struct {
	// HeaderTimeout bounds the time in which a client must have sent the header of a request.
	HeaderTimeout time.Duration
	// IdleTimeout bounds the time that a connection may be kept without a request.
	IdleTimeout time.Duration
	// StallTimeout bounds the time that a client may keep the server waiting for the bytes of an upload,
	// or with the bytes of a download, before it is given up.
	StallTimeout time.Duration
	// MinUploadRate is the least rate of an upload, in bytes per second, that lasts longer than
	// StallTimeout.
	MinUploadRate int64
	// MinDownloadRate is the same of a download.
	MinDownloadRate int64
	// MaxConnections is the most connections that are open at once; more are told to come again.
	MaxConnections int
	// MaxHeaderSize is the most bytes in the header of a request.
	MaxHeaderSize int
	// MaxStreams is the most requests and calls at once on one HTTP/2 connection.
	MaxStreams int
	// DrainSize is the most bytes that are read of the body of a refused HTTP/1.1 request, so that
	// the client gets to read the answer.
	DrainSize int64
	// DrainTimeout bounds the time for that.
	DrainTimeout time.Duration
	// ShutdownTimeout bounds the time in which requests in flight may finish at shutdown.
	ShutdownTimeout time.Duration
	// Handover says that the listener is open elsewhere too, so that connections wait there for the next server
	// when this one ends. Then what still comes on open connections at shutdown is served, not refused, and its
	// client told to open another.
	Handover bool
	// TLS is how the server speaks TLS, for which it must offer "h2" and "http/1.1" (NextProtos), and with
	// every handshake anew if it has GetConfigForClient. Nil means clear text.
	TLS *tls.Config
	// Auth says who may do what. Nil means that everybody may do everything, in the default scope.
	Auth *auth.Authenticator
	// Metrics is where requests are counted. Nil means nowhere.
	Metrics *metrics.Metrics
	// TrustedProxies are the addresses of proxies that are believed when they say whom they ask for
	// (X-Forwarded-For).
	TrustedProxies []netip.Prefix
	// Traces is how requests and calls are traced. Nil means that none is.
	Traces *Traces
	// Management is what the methods need that are for those who run a cache. Without it they refuse.
	Management *Management
}

// DefaultConfig suits clients that give a request 30 seconds.
var DefaultConfig = Config{
	HeaderTimeout:   10 * time.Second,
	IdleTimeout:     5 * time.Minute,
	StallTimeout:    30 * time.Second,
	MinUploadRate:   8 << 10,
	MinDownloadRate: 8 << 10,
	MaxConnections:  10_000,
	MaxHeaderSize:   64 << 10,
	MaxStreams:      250,
	DrainSize:       1 << 30,
	DrainTimeout:    30 * time.Second,
	ShutdownTimeout: 30 * time.Second,
}

// LevelTrace is the level below slog.LevelDebug. Every request is logged at it when it begins.
const LevelTrace = slog.LevelDebug - 4

// Server serves a cache.
type Server struct {
	config      Config
	cache       *cache.Cache
	management  *Management
	log         *slog.Logger
	http        *http.Server
	grpc        *grpc.Server // behind http
	native      *grpc.Server // for the connections of gRPC clients
	health      *health.Server
	requests    atomic.Int64  // in flight
	writing     atomic.Int64  // Writes in progress on native's connections
	draining    chan struct{} // closed when Serve begins to shut down
	idle        chan struct{} // told when there are no requests in flight while draining
	listener    atomic.Pointer[limitedListener]
	everybody   *caller // who sends requests, as long as nobody is told from others; else nil
	refusals    refusals
	unadmitted  refusals // for other reasons of requests that somebody sent who is not known yet
	comparisons comparisons
}

// New returns a server for a cache.
func New(c *cache.Cache, config Config, log *slog.Logger) *Server {
	if config.Metrics == nil {
		config.Metrics = metrics.New()
	}
	s := &Server{config: config, cache: c, management: config.Management, log: log, health: health.NewServer(), draining: make(chan struct{}), idle: make(chan struct{}, 1)}
	if config.Auth == nil {
		s.everybody = &caller{cache: c}
	}
	if config.Auth != nil && config.Management != nil {
		s.comparisons.queue = make(chan artifact.Info, maxComparisons)
	}
	s.grpc, s.native = s.newGRPC(), s.newNative()
	rest := s.newREST()

	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	s.http = &http.Server{
		Protocols:         protocols,
		ReadHeaderTimeout: config.HeaderTimeout,
		MaxHeaderBytes:    config.MaxHeaderSize,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: config.MaxStreams,
			WriteByteTimeout:     config.StallTimeout, // of the connection, beside that of each stream
		},
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		// OPTIONS * too is a path that there is not.
		DisableGeneralOptionsHandler: true,

		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		Handler:  s.traced(s.track(s.split(rest))),
	}
	return s
}

// split hands gRPC calls to grpc-go and all else to rest.
func (s *Server) split(rest http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isGRPC(r) {
			pace := newPace(s.config.StallTimeout, s.config.MinUploadRate, http.NewResponseController(w).SetReadDeadline)
			s.grpc.ServeHTTP(w, readByMessage(r, pace))
			return
		}
		defer func() {
			if p := recover(); p != nil {
				if p != http.ErrAbortHandler {
					recordOf(w).panicked(p)
				}
				panic(http.ErrAbortHandler) // the answer may have begun, so all that is left is to cut it
			}
		}()
		rest.ServeHTTP(w, r)
	})
}

// isGRPC says whether a request is a call. What only looks like one gRPC would refuse without a record.
func isGRPC(r *http.Request) bool {
	subtype, ok := strings.CutPrefix(r.Header.Get("Content-Type"), "application/grpc")
	return ok && r.ProtoMajor == 2 && r.Method == http.MethodPost && (subtype == "" || subtype[0] == '+' || subtype[0] == ';')
}

// track counts the requests in flight, and records each. While the server drains, it tells clients that
// keep a connection open to use another one.
func (s *Server) track(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.TLS = tlsState(r.Context()) // net/http does not know of it
		s.requests.Add(1)
		defer s.requestDone()
		if s.notDraining() != nil {
			w.Header().Set("Connection", "close") // over HTTP/2, net/http makes a GOAWAY of it
		}
		paced := s.paceRequest(w, r)
		defer paced.handled(r)
		if isGRPC(r) { // which is recorded where both gRPC servers are one
			next.ServeHTTP(paced, r)
			return
		}
		recorded := s.record(paced, r)
		defer paced.record.end(r.Context())
		defer func() { r.Pattern = recorded.Pattern }() // which names the span
		next.ServeHTTP(paced, recorded)
	})
}

// record begins the record of a request that w answers, and returns the request of which it counts the body.
func (s *Server) record(w *pacedWriter, r *http.Request) *http.Request {
	w.record = s.begin(protocolREST, r.Header.Get(requestIDHeader))
	setHeaders(w, requestIDHeader, w.record.id)
	w.record.request = [2]string{r.Method, r.URL.Path}
	w.record.remote, w.record.proxies = r.RemoteAddr, r.Header["X-Forwarded-For"]
	w.record.began(r.Context())
	if r.Body == http.NoBody {
		return r
	}
	recorded := r.WithContext(r.Context()) // net/http looks at the body of its own, for whether it was asked for
	recorded.Body = &recordedBody{r.Body, &w.record}
	return recorded
}

// requestDone says that a request in flight has ended.
func (s *Server) requestDone() {
	if s.requests.Add(-1) == 0 && s.notDraining() != nil {
		select {
		case s.idle <- struct{}{}:
		default: // told already
		}
	}
}

// Serve serves on a listener until ctx is done. Then it closes the listener, lets requests in flight
// finish within Config.ShutdownTimeout, and cuts those that do not. In that time requests that still
// come, on connections that are open, are refused with a status that says so, unless Config.Handover is set. It can
// be called once.
//
// The listener must not speak TLS itself: that is for Config.TLS.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	limited := newLimitedListener(listener, s.config, func(conn net.Conn) {
		s.log.Debug("refused a connection, since there are as many as there may be", "client", conn.RemoteAddr(), "connections", s.config.MaxConnections)
	})
	native := newNativeListener(listener.Addr())
	limited.greeter = newGreeter(s.config, s.log, func(conn net.Conn, came []byte) {
		native.deliver(s.newNativeConn(conn, came, limited.closed))
	})
	s.http.ConnState = limited.changed
	s.listener.Store(limited)
	if s.comparisons.queue != nil {
		comparing, stop := context.WithCancel(context.WithoutCancel(ctx))
		var compared sync.WaitGroup
		defer compared.Wait()
		defer stop()
		compared.Go(func() { s.comparisons.run(comparing, s.management, s.log) })
	}
	failed := make(chan error, 1)
	go s.native.Serve(native)
	go func() { failed <- s.http.Serve(limited) }()
	select {
	case err := <-failed:
		s.native.Stop()
		return err
	case <-ctx.Done():
	}
	s.log.Info("shutting down; requests in flight may finish", "requests", s.requests.Load(), "timeout", s.config.ShutdownTimeout)
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.ShutdownTimeout)
	defer cancel()
	close(s.draining)
	s.health.Shutdown()
	listener.Close()
	<-failed // or Shutdown would close the listener once more, and fail
	return s.shutDown(grace, limited)
}

// shutDown ends all connections of a listener that is closed: those that requests are in flight on when these have
// ended, or when grace is done.
func (s *Server) shutDown(grace context.Context, limited *limitedListener) error {
	stopped := make(chan struct{})
	stopNative := sync.OnceFunc(func() {
		limited.greeter.close()
		go func() {
			s.native.GracefulStop()
			close(stopped)
		}()
	})
	// http.Server.Shutdown would close idle connections now and drop what comes on the others
	// without a word, so it comes only after the last request; so would GracefulStop. But where calls are
	// served to the end, nothing else would tell their clients to go.
	if s.config.Handover {
		limited.linger(grace)
		stopNative()
	}
	for s.requests.Load() > 0 && grace.Err() == nil {
		select {
		case <-s.idle:
		case <-grace.Done():
		}
	}
	stopNative()
	err := errors.Join(s.http.Shutdown(grace), s.awaitNative(grace, stopped))
	if errors.Is(err, context.DeadlineExceeded) {
		s.log.Warn("requests in flight did not finish in time and were cut", "requests", s.requests.Load())
		err = s.http.Close()
	}
	s.native.Stop()
	// Not GracefulStop: behind ServeHTTP it would close streams at once, and net/http has waited.
	s.grpc.Stop()
	return err
}

// awaitNative waits until the connections of gRPC clients are closed. A client that does not answer to the GOAWAY is
// waited for only if it has a call in flight, or has not taken the end of one: gRPC counts as sent what it is about to
// write.
func (s *Server) awaitNative(grace context.Context, stopped <-chan struct{}) error {
	busy := func() bool { return s.requests.Load() > 0 || s.writing.Load() > 0 }
	for {
		select {
		case <-stopped:
			return nil
		case <-time.After(closeDelay):
			if !busy() {
				return nil
			}
		case <-grace.Done():
			if busy() {
				return grace.Err()
			}
			return nil
		}
	}
}

// InFlight returns how many requests and calls are handled now.
func (s *Server) InFlight() int64 { return s.requests.Load() }

// Connections returns how many connections are open.
func (s *Server) Connections() int64 {
	if listener := s.listener.Load(); listener != nil {
		return listener.open.Load()
	}
	return 0
}

// Ready returns an error that says why, if the server can't take uploads.
func (s *Server) Ready(ctx context.Context) error {
	if err := s.taking(); err != nil {
		return err
	}
	return s.cache.Ready(ctx)
}

// taking returns an error if requests that come now are to be refused.
func (s *Server) taking() error {
	if s.config.Handover {
		return nil
	}
	return s.notDraining()
}

func (s *Server) notDraining() error {
	select {
	case <-s.draining:
		return errDraining
	default:
		return nil
	}
}
