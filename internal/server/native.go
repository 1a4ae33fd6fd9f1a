package server

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/keepalive"
)

const (
	// streamWindow is how much of an upload may come before it is asked for. While a message is waited
	// for, all of it may come. With less, uploads over long distances would be slower.
	streamWindow = 256 << 10
	// connWindow is how much may come on a connection before the server says that it has taken it, which
	// it does at once.
	connWindow = 1 << 20
	// readBuffer and writeBuffer are the sizes of a connection's buffers. It keeps the first while it is
	// idle, and has the second only while it sends.
	readBuffer  = 8 << 10
	writeBuffer = 128 << 10
	// leastPingInterval is how often a client may ping the server.
	leastPingInterval = 5 * time.Second
	// maxGivenUp is how many downloads may be given up on one connection while others are in progress.
	maxGivenUp = 4
	// tinyFrame is how many bytes a DATA frame must have to be worth what it costs: gRPC keeps each as it
	// came until the message is there, in some 50 bytes beside its own.
	tinyFrame = 32
	// maxTinyFrames is how many that have fewer may come on a connection beside those of messages that were
	// received, which may be two for each.
	maxTinyFrames = 64 << 10
	// callWorkers is how many calls are handled by goroutines that stay, since the stack of a new one has to grow
	// first, which takes a tenth of the time of a small download. Further calls have a goroutine each.
	callWorkers = 32
	// closeDelay is how long a connection stays open when the last of what was sent on it is on its way.
	closeDelay = time.Second
)

// newNative returns the gRPC side of s for the connections of gRPC clients, which need no net/http in
// between: gRPC's own transport takes less than half of its time.
func (s *Server) newNative() *grpc.Server {
	server := grpc.NewServer(append(s.traceCalls(),
		grpc.Creds(connCredentials{insecure.NewCredentials()}),
		grpc.ForceServerCodecV2(newCodec()),
		experimental.BufferPool(&buffers),
		grpc.MaxRecvMsgSize(maxMessageSize),
		grpc.MaxConcurrentStreams(uint32(s.config.MaxStreams)),
		grpc.MaxHeaderListSize(uint32(s.config.MaxHeaderSize)),
		grpc.ConnectionTimeout(s.config.HeaderTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: s.config.IdleTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: leastPingInterval, PermitWithoutStream: true}),
		grpc.StaticStreamWindowSize(streamWindow), // or it would grow, to 16 MiB
		grpc.StaticConnWindowSize(connWindow),
		grpc.ReadBufferSize(readBuffer),
		grpc.WriteBufferSize(writeBuffer),
		grpc.NumStreamWorkers(callWorkers),
		grpc.StreamInterceptor(s.countCalls()),
		grpc.UnknownServiceHandler(s.unknownCall),
	)...)
	s.register(&streamRegistrar{server, s.serveCall})
	return server
}

// nativeListener is where gRPC gets the connections of gRPC clients from.
type nativeListener struct {
	address net.Addr
	conns   chan net.Conn
	closed  chan struct{}
	close   func()
}

func newNativeListener(address net.Addr) *nativeListener {
	l := &nativeListener{address: address, conns: make(chan net.Conn), closed: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.closed) })
	return l
}

func (l *nativeListener) deliver(conn net.Conn) {
	select {
	case l.conns <- conn:
	case <-l.closed:
		conn.Close()
	}
}

func (l *nativeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *nativeListener) Close() error {
	l.close()
	return nil
}

func (l *nativeListener) Addr() net.Addr { return l.address }

// nativeConn is a connection of a gRPC client.
type nativeConn struct {
	net.Conn
	came       []byte // and is to be read first
	frames     frameCounter
	tiny       atomic.Int64 // tiny frames that came, beside those of messages that were received
	config     *Config
	writeUntil time.Time     // the deadline for writing
	writing    atomic.Bool   // what no call owes any more may be in a Write that is not done yet
	allWriting *atomic.Int64 // Writes in progress on all connections
	received   atomic.Int64  // bytes
	waiting    atomic.Int64  // calls that wait for a message
	close      func() error

	mu      sync.Mutex
	calls   map[*call]struct{} // of which something is still to be sent, or may be
	givenUp int                // calls
	closing bool               // closeIdle will be called
	closed  bool
}

// newNativeConn returns a connection on which came is to be read first. When it is closed, closed is
// called once.
func (s *Server) newNativeConn(conn net.Conn, came []byte, closed func()) *nativeConn {
	c := &nativeConn{Conn: conn, came: came, config: &s.config, allWriting: &s.writing, frames: frameCounter{left: len(http2.ClientPreface)}, calls: map[*call]struct{}{}}
	c.close = sync.OnceValue(func() error {
		defer closed()
		c.mu.Lock()
		c.closed = true
		calls := slices.Collect(maps.Keys(c.calls))
		c.mu.Unlock()
		for _, call := range calls {
			call.lose()
		}
		return conn.Close()
	})
	return c
}

func (c *nativeConn) Read(p []byte) (n int, err error) {
	if len(c.came) > 0 {
		n = copy(p, c.came)
		c.came = c.came[n:]
	} else {
		c.came = nil
		n, err = c.Conn.Read(p)
	}
	c.received.Add(int64(n))
	if tiny := c.frames.tiny(p[:n]); tiny > 0 && c.tiny.Add(int64(tiny)) > maxTinyFrames {
		return 0, errTinyFrames
	}
	return n, err
}

// errTinyFrames says that a client sends messages in very many pieces.
var errTinyFrames = errors.New("the client sends too many DATA frames of a few bytes")

// frameCounter counts tiny DATA frames.
type frameCounter struct {
	header [frameHeader]byte // of the next frame, as far as it came
	got    int               // how far that is
	left   int               // bytes that are still to come before it
}

// tiny returns how many tiny frames begin in what came next.
func (f *frameCounter) tiny(p []byte) (tiny int) {
	for len(p) > 0 {
		skipped := min(f.left, len(p))
		f.left -= skipped
		n := copy(f.header[f.got:], p[skipped:])
		f.got += n
		p = p[skipped+n:]
		if f.got < frameHeader {
			continue
		}
		f.got = 0
		f.left = int(binary.BigEndian.Uint32(f.header[:]) >> 8)
		if http2.FrameType(f.header[3]) == http2.FrameData && 0 < f.left && f.left < tinyFrame {
			tiny++
		}
	}
	return tiny
}

// Write gives a client up that does not take p in the time that it may. It is not called concurrently.
func (c *nativeConn) Write(p []byte) (int, error) {
	stall := c.config.StallTimeout
	if until := time.Now().Add(stall + worth(len(p), c.config.MinDownloadRate)); until.Sub(c.writeUntil) > stall/10 {
		c.SetWriteDeadline(until)
		c.writeUntil = until
	}
	c.writing.Store(true)
	c.allWriting.Add(1)
	defer func() {
		c.allWriting.Add(-1)
		c.writing.Store(false)
	}()
	n, err := c.Conn.Write(p)
	if err != nil {
		c.cut() // for gRPC now waits until Read fails
	}
	return n, err
}

// SetDeadline leaves the deadline for writing to Write.
func (c *nativeConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// Close implements net.Conn.
func (c *nativeConn) Close() error { return c.close() }

// cut closes the connection of a client that does not take what is sent to it.
func (c *nativeConn) cut() {
	cut(c.Conn)
	c.Close()
}

func (c *nativeConn) begin(call *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls[call] = struct{}{}
	call.lost = c.closed // which it has not been told of, and nobody else knows of it yet
}

// end says that all of a call was sent, or that the client does not take it. In that case gRPC keeps what
// is to be sent for as long as the connection is open, so this is closed when the other calls on it have
// ended, or at once if there are too many of those calls. For a call that was given up it may be called twice.
func (c *nativeConn) end(call *call, givenUp bool) {
	c.mu.Lock()
	delete(c.calls, call)
	if givenUp {
		c.givenUp++
	}
	tooMany := c.givenUp > maxGivenUp
	idle := c.givenUp > 0 && len(c.calls) == 0 && !c.closing
	c.closing = c.closing || idle
	c.mu.Unlock()
	switch {
	case tooMany:
		c.cut()
	case idle:
		time.AfterFunc(closeDelay, c.closeIdle)
	}
}

// closeIdle closes the connection if no call has begun on it and all is written.
func (c *nativeConn) closeIdle() {
	c.mu.Lock()
	begun, writing := len(c.calls) > 0, c.writing.Load()
	c.closing = writing && !begun
	c.mu.Unlock()
	switch {
	case begun: // whose end will come back to it
	case writing:
		time.AfterFunc(closeDelay, c.closeIdle)
	default:
		c.Close()
	}
}

// connCredentials let a call know on which connection it is.
type connCredentials struct {
	credentials.TransportCredentials
}

// connInfo is what connCredentials say.
type connInfo struct {
	credentials.AuthInfo
	conn *nativeConn
}

// ServerHandshake implements credentials.TransportCredentials.
func (c connCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	native := conn.(*nativeConn)
	if over, ok := native.Conn.(*tls.Conn); ok { // whose handshake was made already
		info := credentials.TLSInfo{State: over.ConnectionState(), CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
		return conn, connInfo{info, native}, nil
	}
	_, info, err := c.TransportCredentials.ServerHandshake(conn)
	return conn, connInfo{info, native}, err
}
