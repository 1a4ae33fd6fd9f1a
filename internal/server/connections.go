package server

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxRefusals is how many connections over the limit are told so at once. What comes beyond is
	// closed without a word.
	maxRefusals = 16
	// refusalTimeout bounds the time for telling one.
	refusalTimeout = time.Second
	// refusalSize is how much is read of what a refused client sends, so that it gets to read the answer.
	refusalSize = 64 << 10
	// lingerTime is how long a connection that is open at a handover may take to send its next request, or its
	// first.
	lingerTime = time.Second
	// lingerInterval is how often it is looked whether there is still one.
	lingerInterval = 10 * time.Millisecond
)

// overloadAnswer is what a connection over the limit gets. Clients of gRPC take it for a
// server that is unavailable.
const overloadAnswer = "HTTP/1.1 503 Service Unavailable\r\n" +
	"Content-Type: application/json\r\n" +
	"Retry-After: 1\r\n" +
	"Content-Length: 67\r\n" +
	"Connection: close\r\n\r\n" +
	`{"error":"The server has too many connections: try again in a bit"}`

// limitedListener accepts up to a number of connections, refuses more, and closes idle ones.
type limitedListener struct {
	net.Listener
	most     int64
	stall    time.Duration // how long net/http may take to write what it answers itself
	tls      *tls.Config   // nil for clear text
	open     atomic.Int64
	refusals chan struct{}
	refused  func(net.Conn)
	greeter  *greeter
	idle     idleConns
}

func newLimitedListener(listener net.Listener, config Config, refused func(net.Conn)) *limitedListener {
	return &limitedListener{
		Listener: listener,
		most:     int64(config.MaxConnections),
		stall:    config.StallTimeout,
		tls:      config.TLS,
		refusals: make(chan struct{}, maxRefusals),
		refused:  refused,
		idle:     idleConns{timeout: config.IdleTimeout, since: map[net.Conn]time.Time{}},
	}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= l.most {
			if l.tls != nil {
				conn = tls.Server(conn, l.tls)
			}
			return l.greeter.greet(conn), nil
		}
		l.closed()
		l.refused(conn)
		select {
		case l.refusals <- struct{}{}:
			if l.tls != nil {
				conn = tls.Server(conn, refusingTLS(l.tls))
			}
			go func() {
				refuseConnection(conn)
				<-l.refusals
			}()
		default:
			conn.Close()
		}
	}
}

// changed is told of the state of every connection that was accepted.
func (l *limitedListener) changed(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateActive:
		// net/http writes some answers of HTTP/1 before a handler runs, or without one, and has taken the
		// deadline of the answer before away. What it writes while the connection counts as idle ends with
		// that; HTTP/2 sets a deadline for each write.
		conn.SetWriteDeadline(time.Now().Add(l.stall))
	case http.StateClosed, http.StateHijacked:
		if !conn.(*greetedConn).delivered.Load() {
			l.closed()
		}
	}
	l.idle.changed(conn, state)
}

// linger waits at a handover for what clients have sent, or are about to, on the connections that were accepted.
func (l *limitedListener) linger(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lingerTime)
	defer cancel()
	look := time.NewTicker(lingerInterval)
	defer look.Stop()
	for l.open.Load() > 0 && ctx.Err() == nil {
		select {
		case <-look.C:
		case <-ctx.Done():
		}
	}
}

// closed is told when a connection was closed.
func (l *limitedListener) closed() { l.open.Add(-1) }

// connKey is the key of a request's connection in its context.
type connKey struct{}

// idleConns closes connections that are idle for too long.
//
// net/http could do that itself. But where an HTTP/2 connection ends in the middle of a request, it starts
// the timer of the connection anew after it stopped it, and so keeps all memory of the connection until the
// timer fires. And one timer for all is cheaper than one that each request stops and starts.
type idleConns struct {
	timeout time.Duration
	mu      sync.Mutex
	since   map[net.Conn]time.Time
	timer   *time.Timer // runs while a connection is idle
}

func (i *idleConns) changed(conn net.Conn, state http.ConnState) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if state != http.StateIdle {
		delete(i.since, conn)
		return
	}
	i.since[conn] = time.Now()
	if i.timer == nil {
		i.timer = time.AfterFunc(i.timeout, i.look)
	}
}

// look closes the connections that are idle for too long, and comes back when the next one may be, but not
// all the time.
func (i *idleConns) look() {
	i.mu.Lock()
	defer i.mu.Unlock()
	next := i.timeout
	for conn, since := range i.since {
		if left := i.timeout - time.Since(since); left <= 0 {
			delete(i.since, conn)
			go conn.Close() // which tells changed, in the end
		} else {
			next = min(next, left)
		}
	}
	i.timer = nil
	if len(i.since) > 0 {
		i.timer = time.AfterFunc(max(next, i.timeout/100), i.look)
	}
}

// refuseConnection tells a client that there are too many.
func refuseConnection(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(refusalTimeout))
	answer := overloadAnswer
	if over, ok := conn.(*tls.Conn); ok {
		if err := over.Handshake(); err != nil {
			if conn = clearTextOf(err); conn == nil {
				return
			}
			answer = notTLS
		}
	}
	if _, err := io.WriteString(conn, answer); err != nil {
		return
	}
	// A connection that is closed while the client sends is reset, and the answer lost.
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
		io.CopyN(io.Discard, conn, refusalSize)
	}
}
