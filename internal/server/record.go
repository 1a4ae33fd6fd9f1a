package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/metrics"
)

// This file is what is said of requests: one line in the log for each, when it has ended, and counts.

const (
	// protocolREST and protocolGRPC are what requests are counted by.
	protocolREST = "rest"
	protocolGRPC = "grpc"
	// otherMethod stands for all requests that no route has.
	otherMethod = "other"

	requestIDHeader   = "X-Request-Id"
	requestIDMetadata = "x-request-id"
	// maxRequestID is the most bytes of a request's own id. A longer one is not taken.
	maxRequestID = 128
	// maxAddress is the most bytes of what a proxy says is an address. A longer one is none.
	maxAddress = 128
	// maxLogged is the most bytes in the log of one thing that others wrote, as a path or the name of a package. More
	// are left out, or anybody could fill the disk with few requests.
	maxLogged = 1 << 10
)

// record is what there is to say of one request or call. It belongs to the goroutine that handles it.
type record struct {
	server   *Server
	start    time.Time
	protocol string
	method   *metrics.Method // nil until it is known, and if there is none
	id       string
	// request is what was asked for over REST, a method and a path, and call the full name of a method of gRPC.
	request [2]string
	call    string
	remote  string   // address
	proxies []string // X-Forwarded-For
	action  auth.Action
	caller  *caller // nil if nobody was told from others

	key            artifact.Key
	stored         *artifact.Info // by an upload
	received, sent int64          // bytes of bodies or messages
	first          time.Duration  // until the first byte of the answer; 0 before that
	status         int            // of HTTP; 0 before the answer
	code           codes.Code     // of gRPC
	fault          fault          // if err is not nil
	err            error
}

// begin returns the record of a request that begins.
func (s *Server) begin(protocol, id string) record {
	if !isRequestID(id) {
		id = newRequestID()
	}
	return record{server: s, start: time.Now(), protocol: protocol, id: id}
}

// began logs that a request began, for who looks for one that does not end.
func (rec *record) began(ctx context.Context) {
	if log := rec.server.log; log.Enabled(ctx, LevelTrace) { // its arguments cost more than the question
		log.Log(ctx, LevelTrace, "request began", "protocol", rec.protocol, "request", shortened(rec.asked()), "client", rec.server.clientOf(rec.remote, rec.proxies), "request_id", rec.id)
	}
}

// recordOf returns the record of the request that w answers; w is a pacedWriter, or has one below it.
func recordOf(w http.ResponseWriter) *record {
	for {
		if paced, ok := w.(*pacedWriter); ok {
			return &paced.record
		}
		w = w.(interface{ Unwrap() http.ResponseWriter }).Unwrap()
	}
}

type recordKey struct{}

// recordIn returns the record of the call or JSON method that ctx is of.
func recordIn(ctx context.Context) *record { return ctx.Value(recordKey{}).(*record) }

// failed says why a request failed. What went wrong first counts.
func (rec *record) failed(f fault, err error) {
	if rec.err == nil {
		rec.fault, rec.err = f, err
	}
}

// panicked says that a request ended with a panic. That counts whatever went wrong before, which is told too, but as a
// text only: wrapped, a refusal would still be taken for the reason.
func (rec *record) panicked(p any) {
	err := fmt.Errorf("panic: %v\n%s", p, debug.Stack())
	if rec.err != nil {
		err = fmt.Errorf("%w\nbefore that: %v", err, rec.err)
	}
	rec.fault, rec.err = internal, err
}

// answering says that the first byte of the answer is on its way.
func (rec *record) answering() {
	if rec.first == 0 {
		rec.first = time.Since(rec.start)
	}
}

// end says what there is to say of a request that has ended.
func (rec *record) end(ctx context.Context) {
	took := time.Since(rec.start)
	if rec.err != nil {
		traceFault(ctx, rec.fault)
	}
	rec.answering() // at the latest
	s := rec.server
	method := rec.method
	if method == nil {
		method = s.config.Metrics.Method(rec.protocol, otherMethod)
	}
	method.Ended(metrics.Request{Status: rec.statusText(), Received: rec.received, Sent: rec.sent, FirstByte: rec.first, Duration: took})
	if unsound, ok := errors.AsType[*artifact.UnsoundError](rec.err); ok {
		s.config.Metrics.Unsound(unsound.Rule)
	}
	level := rec.level()
	if !s.log.Enabled(ctx, level) {
		return
	}
	attributes := make([]slog.Attr, 0, 24)
	add := func(name string, value any) { attributes = append(attributes, slog.Any(name, value)) }
	add("method", method.Name)
	add("request", shortened(rec.asked()))
	if rec.key != (artifact.Key{}) {
		add("key", rec.key)
	}
	if rec.caller != nil && rec.caller.access != nil {
		add("scope", rec.caller.access.Scope)
		add("who", shortened(rec.caller.access.Who))
	} else if rec.key != (artifact.Key{}) {
		add("scope", artifact.DefaultScope)
	}
	add("protocol", rec.protocol)
	add("status", rec.statusText())
	add("received", rec.received)
	add("sent", rec.sent)
	add("duration", took)
	add("first_byte", rec.first)
	add("client", s.clientOf(rec.remote, rec.proxies))
	add("request_id", rec.id)
	if rec.stored != nil {
		add("files", rec.stored.FileCount)
		add("package", shortened(rec.stored.PackageName))
		add("task", shortened(rec.stored.TaskName))
	}
	if rec.err != nil {
		if rec.fault.reason != "" {
			add("reason", rec.fault.reason)
		}
		if rec.fault.status == http.StatusInternalServerError {
			add("error", rec.err) // which has all that is known, as where a panic was
		} else {
			add("error", shortened(rec.err.Error()))
		}
		lines, reason := &s.unadmitted, auth.Reason(rec.fault.reason)
		refusal, ok := errors.AsType[*auth.Error](rec.err)
		if ok { // the client is told less
			add("refused", refusal.Reason)
			add("detail", shortened(refusal.Detail))
			lines, reason = &s.refusals, refusal.Reason
		}
		if ok || rec.caller == nil && level > slog.LevelDebug {
			if unlogged, ok := lines.log(reason); !ok {
				level = slog.LevelDebug
			} else if unlogged > 0 {
				add("unlogged", unlogged)
			}
		}
	}
	message := "request"
	if rec.err != nil {
		message = "request failed"
	}
	s.log.LogAttrs(ctx, level, message, attributes...)
}

// shortened returns the beginning of a text that others wrote, if there is more of it than is logged.
func shortened(text string) string {
	if len(text) <= maxLogged {
		return text
	}
	return strings.ToValidUTF8(text[:maxLogged], "") + "…"
}

// asked returns what was asked for.
func (rec *record) asked() string {
	if rec.protocol == protocolGRPC {
		return rec.call
	}
	return rec.request[0] + " " + rec.request[1]
}

// statusText returns the status as the protocol says it.
func (rec *record) statusText() string {
	if rec.protocol == protocolGRPC {
		return rec.code.String()
	}
	return statusText(rec.status)
}

// statusText returns a status of HTTP as text, without making one each time of those that are seen all the time.
func statusText(status int) string {
	switch status {
	case http.StatusOK:
		return "200"
	case http.StatusCreated:
		return "201"
	case http.StatusNotFound:
		return "404"
	case http.StatusConflict:
		return "409"
	}
	return strconv.Itoa(status)
}

// level returns how much somebody should care. What the server has to answer for, and what is refused of what
// somebody wanted to store or change, is seen without being asked for; what is read is not, since that is nearly all.
func (rec *record) level() slog.Level {
	if rec.err == nil {
		if rec.action > auth.Read {
			return slog.LevelInfo
		}
		return slog.LevelDebug
	}
	switch rec.fault.status {
	case http.StatusInternalServerError:
		return slog.LevelError
	case http.StatusInsufficientStorage, http.StatusServiceUnavailable:
		return slog.LevelWarn
	case http.StatusUnprocessableEntity, http.StatusRequestEntityTooLarge, http.StatusUnauthorized, http.StatusForbidden:
		return slog.LevelInfo
	}
	return slog.LevelDebug
}

// methodName returns what a call is called in log and metrics: our own without their service.
func methodName(call string) string {
	return strings.TrimPrefix(strings.TrimPrefix(call, "/"), cachev1.ArtifactService_ServiceDesc.ServiceName+"/")
}

// Request ids that the server gives are those of one run of it, counted.
var (
	runID        = fmt.Sprintf("%08x", rand.Uint32())
	requestCount atomic.Uint64
)

func newRequestID() string {
	var buf [32]byte
	id := append(buf[:0], runID...)
	id = append(id, '-')
	return string(strconv.AppendUint(id, requestCount.Add(1), 10))
}

// isRequestID says whether what a client calls its request can be put into a header and a log as it is.
func isRequestID(id string) bool {
	for _, c := range []byte(id) {
		if c <= ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return id != "" && len(id) <= maxRequestID
}

// clientOf returns the address of the client of a request that came from remote. Only what proxies say that are
// trusted counts: each adds the address that it was asked from, so it is the last one that is not theirs.
func (s *Server) clientOf(remote string, forwarded []string) string {
	client := remote
	for _, header := range slices.Backward(forwarded) {
		for more := true; more; {
			if !s.isProxy(client) {
				return client
			}
			last := strings.LastIndexByte(header, ',')
			said := strings.TrimSpace(header[last+1:])
			if _, ok := addressOf(said); !ok {
				return client // a proxy says nothing that can be used
			}
			client, header, more = said, header[:max(0, last)], last >= 0
		}
	}
	return client
}

func (s *Server) isProxy(address string) bool {
	ip, ok := addressOf(address)
	return ok && slices.ContainsFunc(s.config.TrustedProxies, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// addressOf returns the IP address in an address with or without a port.
func addressOf(address string) (netip.Addr, bool) {
	if len(address) > maxAddress { // as of a zone, which can be anything
		return netip.Addr{}, false
	}
	if host, _, err := net.SplitHostPort(address); err == nil {
		address = host
	}
	ip, err := netip.ParseAddr(strings.Trim(address, "[]"))
	return ip.Unmap().WithZone(""), err == nil
}

// recordCall begins the record of a call.
func (s *Server) recordCall(method string, stream grpc.ServerStream) *record {
	ctx := stream.Context()
	var id string
	if given := metadata.ValueFromIncomingContext(ctx, requestIDMetadata); len(given) > 0 {
		id = given[0]
	}
	rec := s.begin(protocolGRPC, id)
	rec.call, rec.action = method, actions[method]
	if rec.action != 0 {
		rec.method = s.config.Metrics.Method(protocolGRPC, methodName(method))
	}
	if client, ok := peer.FromContext(ctx); ok {
		rec.remote = client.Addr.String()
	}
	rec.proxies = metadata.ValueFromIncomingContext(ctx, "x-forwarded-for")
	stream.SetHeader(metadata.MD{requestIDMetadata: {rec.id}}) // fails only if the call has ended
	rec.began(ctx)
	return &rec
}

// countCalls returns an interceptor that counts calls as all servers of gRPC do. Those of methods that there are not
// count as one method: what clients make up would be kept for ever otherwise.
func (s *Server) countCalls() grpc.StreamServerInterceptor {
	count := s.config.Metrics.Calls().StreamServerInterceptor()
	return func(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
		if actions[info.FullMethod] == 0 {
			info = &grpc.StreamServerInfo{FullMethod: "/" + otherMethod + "/" + otherMethod, IsClientStream: true, IsServerStream: true}
		}
		return count(service, stream, info, handle)
	}
}

// recordedBody is the body of a request over REST that counts what is received, whoever reads it.
type recordedBody struct {
	io.ReadCloser
	record *record
}

// Read implements io.Reader.
func (b *recordedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.record.received += int64(n)
	return n, err
}

// recordedStream is the stream of a call that counts what is sent and received.
type recordedStream struct {
	grpc.ServerStream
	record *record
}

// RecvMsg implements grpc.ServerStream.
func (r *recordedStream) RecvMsg(message any) error {
	err := r.ServerStream.RecvMsg(message)
	if err == nil {
		if in, ok := message.(*incoming); ok {
			r.record.received += int64(in.size)
		} else {
			r.record.received += int64(proto.Size(message.(proto.Message)))
		}
	}
	return err
}

// SendMsg implements grpc.ServerStream.
func (r *recordedStream) SendMsg(message any) error {
	r.record.answering()
	size := 0
	if out, ok := message.(*outgoing); ok {
		size = len(*out.encoded)
	} else {
		size = proto.Size(message.(proto.Message))
	}
	err := r.ServerStream.SendMsg(message)
	if err == nil {
		r.record.sent += int64(size)
	}
	return err
}
