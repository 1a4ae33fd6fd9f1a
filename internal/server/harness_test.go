package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/retention"
	"github.com/polykit/polykit-cache/internal/server"
)

// setup says how a server under test differs from the usual one.
type setup struct {
	// store is used instead of a disk.Store in a directory of the test.
	store cache.Store
	// maxSize is the most bytes of an artifact; 0 means 64 MiB.
	maxSize int64
	// limits bound artifacts; the zero ones are artifact.DefaultLimits.
	limits artifact.Limits
	// tls says that the server speaks TLS and nothing else, which all do with POLYKIT_CACHE_TEST_TLS.
	tls bool
	// sendBuffer is how much the operating system takes from the server before a client reads it; 0
	// means as much as it likes, which can be megabytes.
	sendBuffer int
	// managed says that the server has an index, and a collector with policy.
	managed bool
	policy  retention.Policy
	// change changes the server's settings. It may be nil. With POLYKIT_CACHE_TEST_TRACES all servers trace.
	change func(*server.Config)
}

// testServer is a server on a port of its own.
type testServer struct {
	*server.Server
	cache      *cache.Cache
	store      cache.Store
	dir        string // the storage directory, empty if the store is another
	index      *index.Index
	address    string
	url        string // of the address
	log        *recorder
	management *server.Management
	conns      *atomic.Int64 // connections that were accepted

	stop context.CancelFunc // begins the shutdown
	end  func() error       // waits for its end
}

// startServer starts a server that is stopped when the test ends. Then Serve must return nil.
func startServer(t testing.TB, setup setup) *testServer {
	t.Helper()
	s := &testServer{log: &recorder{}, conns: &atomic.Int64{}}
	setup.tls = setup.tls || os.Getenv("POLYKIT_CACHE_TEST_TLS") != ""
	if setup.limits == (artifact.Limits{}) {
		setup.limits = artifact.DefaultLimits
	}
	verifier := artifact.NewVerifier(setup.limits)
	s.store = setup.store
	if s.store == nil {
		s.dir = t.TempDir()
		onDisk, err := disk.Open(disk.Config{Dir: s.dir, Verifier: verifier, Log: slog.New(s.log)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { onDisk.Close() })
		s.store = onDisk
		if setup.managed {
			s.manage(t, onDisk, setup.policy)
		}
	}
	if setup.maxSize == 0 {
		setup.maxSize = 64 << 20
	}
	config := server.DefaultConfig
	cacheConfig := cache.Config{MaxSize: setup.maxSize}
	if setup.managed {
		cacheConfig.Observer, config.Management = s.index, s.management
	}
	s.cache = cache.New(s.store, verifier, cacheConfig)
	config.ShutdownTimeout = 10 * time.Second
	if setup.tls {
		config.TLS = &tls.Config{Certificates: []tls.Certificate{certificate()}, NextProtos: []string{"h2", "http/1.1"}}
	}
	if os.Getenv("POLYKIT_CACHE_TEST_TRACES") != "" {
		config.Traces = newTraces(sdktrace.NewSimpleSpanProcessor(tracetest.NewNoopExporter()))
	}
	if setup.change != nil {
		setup.change(&config)
	}
	s.Server = server.New(s.cache, config, slog.New(s.log))

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = listener.Addr().String()
	s.url = "http://" + s.address
	if setup.tls {
		s.url = "https://" + s.address
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	accepting := make(chan struct{})
	counting := &countingListener{listener, s.conns, setup.sendBuffer, sync.OnceFunc(func() { close(accepting) })}
	go func() { served <- s.Serve(ctx, counting) }()
	s.stop, s.end = stop, sync.OnceValue(func() error { return <-served })
	t.Cleanup(func() {
		s.stop()
		if err := s.end(); err != nil {
			t.Errorf("Serve returned %v", err)
		}
		if lines := s.log.find(slog.LevelWarn, "did not finish in time"); len(lines) > 0 {
			t.Error("requests were still in flight when the server was stopped")
		}
	})
	<-accepting // so that all its goroutines are there, for those who count them
	return s
}

// manage gives the server an index and a collector.
func (s *testServer) manage(t testing.TB, store *disk.Store, policy retention.Policy) {
	t.Helper()
	var err error
	if s.index, err = index.Open(index.Config{Dir: store.OwnDir(), Log: slog.New(s.log)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.index.Close(); err != nil {
			t.Error(err)
		}
	})
	collector := retention.New(s.index, store, policy, slog.New(s.log))
	store.Manage(s.index, collector.Limits())
	s.management = &server.Management{Index: s.index, Collector: collector, Storage: store}
}

// certificate is the certificate of servers that speak TLS. All clients of these tests trust it.
var certificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
})

// clientTLS is how clients speak TLS.
func clientTLS() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(certificate().Leaf)
	return &tls.Config{RootCAs: pool}
}

// countingListener counts connections and leaves them as they are, but for the size of their buffer.
type countingListener struct {
	net.Listener
	n          *atomic.Int64
	sendBuffer int
	accepting  func()
}

func (l *countingListener) Accept() (net.Conn, error) {
	l.accepting()
	conn, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
		if l.sendBuffer > 0 {
			err = conn.(*net.TCPConn).SetWriteBuffer(l.sendBuffer)
		}
	}
	return conn, err
}

// patience is how long a request or call may take, on a busy machine too. It is less than the time in
// which the server gives up on anything, so a test notices if the server waits for that.
const patience = 25 * time.Second

// put stores an artifact, not through a socket.
func (s *testServer) put(t testing.TB, key artifact.Key, content []byte) {
	t.Helper()
	if _, err := s.cache.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
}

// path returns where an artifact is on disk.
func (s *testServer) path(key artifact.Key) string {
	digits := key.String()
	return filepath.Join(s.dir, digits[:2], digits[2:4], digits+".zst")
}

// uploadsInProgress returns how many temporary files there are.
func (s *testServer) uploadsInProgress() int {
	entries, err := os.ReadDir(filepath.Join(s.dir, "tmp"))
	if err != nil {
		return -1
	}
	return len(entries)
}

// recorder is a slog.Handler that keeps what is logged, of every level.
type recorder struct {
	mu    sync.Mutex
	lines []logLine
}

type logLine struct {
	level slog.Level
	text  string
}

func (r *recorder) Enabled(context.Context, slog.Level) bool { return true }
func (r *recorder) WithAttrs([]slog.Attr) slog.Handler       { panic("not used by the server") }
func (r *recorder) WithGroup(string) slog.Handler            { panic("not used by the server") }

func (r *recorder) Handle(_ context.Context, record slog.Record) error {
	text := record.Message
	record.Attrs(func(a slog.Attr) bool {
		text += fmt.Sprintf(" %s=%v", a.Key, a.Value)
		return true
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, logLine{record.Level, text})
	return nil
}

func (r *recorder) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = nil
}

// find returns the lines of a level, and those above it, that contain text.
func (r *recorder) find(level slog.Level, text string) []logLine {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []logLine
	for _, line := range r.lines {
		if line.level >= level && strings.Contains(line.text, text) {
			found = append(found, line)
		}
	}
	return found
}

// A mouth is a way to reach the server. Every one that a test opens has connections of its own.
type mouth struct {
	name string
	// rest is a transport for REST requests, or nil if the mouth has none.
	rest func(t *testing.T, s *testServer) http.RoundTripper
	// grpc is a connection for gRPC calls, or nil.
	grpc func(t *testing.T, s *testServer) grpc.ClientConnInterface
	// tls says that the server must speak TLS.
	tls bool
}

var mouths = []mouth{
	{name: "REST over HTTP1", rest: func(t *testing.T, s *testServer) http.RoundTripper { return newTransport(t, 1) }},
	{name: "REST over HTTP2", rest: func(t *testing.T, s *testServer) http.RoundTripper { return newTransport(t, 2) }},
	{name: "REST amid gRPC", rest: newRESTAmidGRPC},
	{name: "gRPC", grpc: newGRPC},
	{name: "gRPC amid REST", grpc: newGRPCAmidREST},
}

// tlsMouths are those of a server that speaks TLS: REST, gRPC, REST, gRPC.
var tlsMouths = []mouth{
	{tls: true, name: "REST over HTTP1 and TLS", rest: func(t *testing.T, s *testServer) http.RoundTripper { return newTransport(t, 1) }},
	{tls: true, name: "gRPC over TLS", grpc: newGRPC},
	{tls: true, name: "REST over HTTP2 and TLS", rest: func(t *testing.T, s *testServer) http.RoundTripper { return newTransport(t, 2) }},
	{tls: true, name: "gRPC amid REST over TLS", grpc: newGRPCAmidREST},
}

// newGRPC returns a connection of grpc-go's own.
func newGRPC(t *testing.T, s *testServer) grpc.ClientConnInterface {
	conn, err := grpc.NewClient(s.address, security(s.url))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// security is how clients of gRPC speak to the server at a URL.
func security(url string) grpc.DialOption {
	if strings.HasPrefix(url, "https:") {
		return grpc.WithTransportCredentials(credentials.NewTLS(clientTLS()))
	}
	return grpc.WithTransportCredentials(insecure.NewCredentials())
}

func restMouths() []mouth {
	var found []mouth
	for _, m := range mouths {
		if m.rest != nil {
			found = append(found, m)
		}
	}
	return found
}

func grpcMouths() []mouth {
	var found []mouth
	for _, m := range mouths {
		if m.grpc != nil {
			found = append(found, m)
		}
	}
	return found
}

// newTransport returns a transport that speaks only one major version of HTTP, in clear text or over
// TLS, and adds nothing to requests that a test would have to know of.
func newTransport(t *testing.T, version int) *http.Transport {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(version == 1)
	protocols.SetHTTP2(version == 2)
	protocols.SetUnencryptedHTTP2(version == 2)
	transport := &http.Transport{Protocols: protocols, DisableCompression: true, TLSClientConfig: clientTLS()}
	if version == 2 {
		// Else a request that comes just when the first one was answered may dial anew.
		transport.MaxConnsPerHost = 1
	}
	t.Cleanup(transport.CloseIdleConnections)
	return transport
}

// newRESTAmidGRPC returns a transport whose one connection also carries a gRPC call, which is open all
// the while and says something before and after the requests, as happens behind a proxy.
func newRESTAmidGRPC(t *testing.T, s *testServer) http.RoundTripper {
	conn := newGRPCAmidREST(t, s).(*sharedConn)
	ctx, cancel := context.WithCancel(context.Background()) // t.Context() ends before cleanups begin
	t.Cleanup(cancel)
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := func() {
		err := stream.Send(&reflectionpb.ServerReflectionRequest{
			MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
		})
		response, received := stream.Recv()
		if err != nil || received != nil || len(response.GetListServicesResponse().GetService()) == 0 {
			t.Errorf("the gRPC call on the same connection got %v, %v, %v", response, err, received)
		}
	}
	ask()
	t.Cleanup(func() {
		ask()
		stream.CloseSend()
		if response, err := stream.Recv(); err != io.EOF {
			t.Errorf("the gRPC call on the same connection ended with %v, %v", response, err)
		}
	})
	return conn.transport
}

// newGRPCAmidREST returns a gRPC connection that is shared with a REST request before every message.
func newGRPCAmidREST(t *testing.T, s *testServer) grpc.ClientConnInterface {
	transport := newTransport(t, 2)
	get := func() {
		request, err := http.NewRequest(http.MethodGet, s.url+"/healthz", nil)
		if err != nil {
			t.Error(err)
			return
		}
		response, err := transport.RoundTrip(request)
		if err != nil {
			t.Errorf("the REST request on the same connection: %v", err)
			return
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if response.StatusCode != 200 || err != nil || string(body) != `{"status":"ok"}` {
			t.Errorf("the REST request on the same connection got %s %s, %v", response.Status, body, err)
		}
	}
	get()
	t.Cleanup(func() {
		if n := s.conns.Load(); n != 1 {
			t.Errorf("%d connections were made; this test wants REST and gRPC on one", n)
		}
	})
	return &sharedConn{transport, s.url, get}
}

// sharedConn makes gRPC calls over an HTTP transport, and so over the connection that REST requests
// use too. grpc-go's client shares its connections with nobody, but proxies do.
type sharedConn struct {
	transport http.RoundTripper
	url       string
	between   func() // is called before every message, or nil
}

func (c *sharedConn) Invoke(ctx context.Context, method string, request, reply any, _ ...grpc.CallOption) error {
	stream, err := c.NewStream(ctx, &grpc.StreamDesc{}, method)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(request); err != nil && err != io.EOF {
		return err
	}
	stream.CloseSend()
	return stream.RecvMsg(reply)
}

func (c *sharedConn) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	body, send := io.Pipe()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+method, body)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	if sent, ok := metadata.FromOutgoingContext(ctx); ok {
		for name, values := range sent {
			request.Header[http.CanonicalHeaderKey(name)] = values
		}
	}
	answer := sync.OnceValues(func() (*http.Response, error) { return c.transport.RoundTrip(request) })
	go answer()
	return &sharedStream{ctx: ctx, desc: desc, send: send, answer: answer, between: c.between}, nil
}

type sharedStream struct {
	ctx     context.Context
	desc    *grpc.StreamDesc
	send    *io.PipeWriter
	answer  func() (*http.Response, error)
	between func()
}

func (s *sharedStream) Context() context.Context { return s.ctx }

func (s *sharedStream) Header() (metadata.MD, error) { return nil, errors.ErrUnsupported }

func (s *sharedStream) Trailer() metadata.MD { return nil }

func (s *sharedStream) CloseSend() error { return s.send.Close() }

// SendMsg returns io.EOF once a call that sends several messages has ended, as grpc.ClientStream wants.
func (s *sharedStream) SendMsg(message any) error {
	if s.between != nil {
		s.between()
	}
	data, err := proto.Marshal(message.(proto.Message))
	if err != nil {
		return err
	}
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(data)))
	if _, err := s.send.Write(append(frame, data...)); err != nil && s.desc.ClientStreams {
		return io.EOF
	}
	return nil
}

// RecvMsg reads a message, and if the call has but one, its status too.
func (s *sharedStream) RecvMsg(message any) error {
	if s.between != nil {
		s.between()
	}
	response, err := s.answer()
	if err != nil {
		return status.FromContextError(errors.Join(s.ctx.Err(), err)).Err()
	}
	if contentType := response.Header.Get("Content-Type"); response.StatusCode != 200 || contentType != "application/grpc" {
		return fmt.Errorf("not a gRPC response: %s with Content-Type %q", response.Status, contentType)
	}
	header := make([]byte, 5)
	if _, err := io.ReadFull(response.Body, header); err == io.EOF {
		return s.end(response)
	} else if err != nil {
		return status.FromContextError(errors.Join(s.ctx.Err(), err)).Err()
	}
	if header[0] != 0 {
		return errors.New("the message is compressed")
	}
	data := make([]byte, binary.BigEndian.Uint32(header[1:]))
	if _, err := io.ReadFull(response.Body, data); err != nil {
		return err
	}
	if err := proto.Unmarshal(data, message.(proto.Message)); err != nil {
		return err
	}
	if s.desc.ServerStreams {
		return nil
	}
	if _, err := io.ReadFull(response.Body, header); err != io.EOF {
		return fmt.Errorf("there is more behind the one message: %v", err)
	}
	if err := s.end(response); err != io.EOF {
		return err
	}
	return nil
}

// end returns the status of a call, io.EOF if it is OK.
func (s *sharedStream) end(response *http.Response) error {
	response.Body.Close()
	code, err := strconv.Atoi(response.Trailer.Get("Grpc-Status"))
	if err != nil {
		return fmt.Errorf("the response has no gRPC status: %w", err)
	}
	if code == int(codes.OK) {
		return io.EOF
	}
	binary := strings.TrimRight(response.Trailer.Get("Grpc-Status-Details-Bin"), "=")
	details, err := base64.RawStdEncoding.DecodeString(binary)
	if err != nil {
		return err
	}
	st := &spb.Status{}
	if err := proto.Unmarshal(details, st); err != nil {
		return err
	}
	sentence, err := url.PathUnescape(response.Trailer.Get("Grpc-Message"))
	if err != nil {
		return err
	}
	// The status stands there twice.
	if len(details) > 0 && (st.Code != int32(code) || st.Message != sentence) {
		return fmt.Errorf("the status is %d %q, but %d %q in its details", code, sentence, st.Code, st.Message)
	}
	st.Code, st.Message = int32(code), sentence
	return status.ErrorProto(st)
}

func hashOf(content []byte) string {
	hash := sha256.Sum256(content)
	return hex.EncodeToString(hash[:])
}
