package server

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// frameHeader is the length of what stands before each frame of HTTP/2, and maxFrame the most that
	// may stand behind it, since the server allows no more.
	frameHeader = 9
	maxFrame    = 16 << 10
	// maxPings is how many pings are answered before the first request.
	maxPings = 100
	// greetTime is how long the first call is waited for before a connection is left to net/http. Only then
	// is it known who acknowledges the client's settings, and gRPC's C core waits for that for a minute.
	greetTime = 20 * time.Second
	// headerTable is the size of the table with which clients compress headers, unless they are told
	// another.
	headerTable = 4096
)

// greeter looks at how connections begin, to tell those on which a gRPC client speaks for itself, and
// nobody else, from all others.
//
// A library for gRPC opens a connection, waits for the server's settings, acknowledges them, and then
// makes its first call. Proxies, and clients for HTTP/2 in general, do not wait; behind a call they may put
// any other request, which net/http answers, but gRPC's own transport can't. So what does not look in
// every way as if a library for gRPC had sent it stays with net/http.
type greeter struct {
	config  Config
	log     *slog.Logger
	time    time.Duration                    // greetTime, but in tests
	deliver func(conn net.Conn, came []byte) // takes the connections of gRPC clients

	mu     sync.Mutex
	open   map[*greetedConn]struct{} // of which is not known yet whose they are
	closed bool
}

func newGreeter(config Config, log *slog.Logger, deliver func(net.Conn, []byte)) *greeter {
	return &greeter{config: config, log: log, time: greetTime, deliver: deliver, open: map[*greetedConn]struct{}{}}
}

// greet returns a connection as net/http is to have it. If it is of *tls.Conn, the handshake is made with
// the first Read.
func (g *greeter) greet(accepted net.Conn) *greetedConn {
	conn := &greetedConn{Conn: accepted, greeter: g}
	conn.greeting = &greeting{conn: conn}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		accepted.Close()
	} else {
		g.open[conn] = struct{}{}
	}
	return conn
}

// known says that it is known whose a connection is, or that it is closed.
func (g *greeter) known(conn *greetedConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, conn)
}

// close closes the connections of which is not known whose they are, for no request has come on them, and
// http.Server.Shutdown would wait for them.
func (g *greeter) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for conn := range g.open {
		cut(conn.Conn)
	}
}

// greeting is the beginning of a connection, until net/http has read it.
type greeting struct {
	conn *greetedConn
	came []byte // what came, but for what was answered, and was not read yet
	next int    // where in it the next frame begins that is to be looked at

	settings bool // the server's were sent
	acked    bool // and acknowledged, which net/http must not see: it has sent one set less
	pings    int
	until    time.Time // how long the connection may be idle
	leave    time.Time // when it is left to net/http
	began    time.Time // when the frame began of which a part is there

	known   bool              // whose the connection is
	end     error             // what net/http reads in place of what came
	ready   []byte            // what it reads before that
	header  [frameHeader]byte // of the next frame, as far as it is there
	got     int               // how far that is
	payload int               // what is still to be read of a frame
}

func (g *greeting) read(p []byte) (int, error) {
	if !g.known {
		if err := g.conn.handshake(); err != nil {
			g.stay()
			g.end = io.EOF // for net/http, which would answer to another
			return 0, g.end
		}
		n, err := g.conn.Conn.Read(p)
		if n == 0 || !beginsHTTP2(p[:n]) {
			g.stay()
			g.conn.greeting = nil
			return n, err
		}
		g.came = append(g.came, p[:n]...)
		g.find()
	}
	switch {
	case g.end != nil:
		return 0, g.end
	case len(g.ready) > 0:
		n := copy(p, g.ready)
		g.ready = g.ready[n:]
		return n, nil
	case g.settings && !g.acked:
		return g.readFrame(p)
	}
	n, err := g.take(p)
	if len(g.came) == 0 {
		g.conn.greeting = nil
	}
	return n, err
}

// beginsHTTP2 says whether what came may be, or is, the beginning of HTTP/2.
func beginsHTTP2(came []byte) bool {
	n := min(len(came), len(http2.ClientPreface))
	return string(came[:n]) == http2.ClientPreface[:n]
}

// stay leaves the connection to net/http.
func (g *greeting) stay() {
	g.known = true
	g.conn.greeter.known(g.conn)
	if g.settings { // the rest comes frame by frame
		g.ready, g.came = g.came[:g.next], g.came[g.next:]
	}
}

// find finds out whose the connection is.
func (g *greeting) find() {
	for len(g.came) < len(http2.ClientPreface) {
		if g.more() != nil || !beginsHTTP2(g.came) {
			g.stay()
			return
		}
	}
	config := &g.conn.greeter.config
	g.next = len(http2.ClientPreface)
	g.began = time.Now()
	g.until = g.began.Add(config.IdleTimeout)
	g.leave = g.began.Add(g.conn.greeter.time)
	for first := true; g.next <= config.MaxHeaderSize+maxFrame; first = false {
		frame, err := g.frame()
		if errors.Is(err, os.ErrDeadlineExceeded) && len(g.came) == g.next && !time.Now().Before(g.leave) {
			break
		}
		if err != nil {
			g.stay()
			g.end = err
			return
		}
		if frame == nil || first && (frame.Type != http2.FrameSettings || frame.Flags.Has(http2.FlagSettingsAck)) {
			break
		}
		size := frameHeader + int(frame.Length)
		switch answered, err := g.answer(frame); {
		case err != nil:
			g.stay()
			g.end = err
			return
		case answered:
			g.came = slices.Delete(g.came, g.next, g.next+size)
			continue
		}
		if frame.Type == http2.FrameHeaders && g.acked && isGRPCClient(g.came[g.next:g.next+size], config.MaxHeaderSize) {
			g.deliver()
			return
		}
		isSettings := frame.Type == http2.FrameSettings && frame.StreamID == 0 && frame.Length%6 == 0 && !frame.Flags.Has(http2.FlagSettingsAck)
		isWindow := frame.Type == http2.FrameWindowUpdate && frame.Length == 4
		if !isSettings && !isWindow {
			break
		}
		g.next += size
	}
	g.stay()
}

// frame waits until the next frame is there, and returns its header. It returns nil if the frame is
// longer than one may be.
func (g *greeting) frame() (*http2.FrameHeader, error) {
	if err := g.need(frameHeader); err != nil {
		return nil, err
	}
	header, err := http2.ReadFrameHeader(bytes.NewReader(g.came[g.next:]))
	if err != nil || header.Length > maxFrame {
		return nil, err
	}
	if err := g.need(frameHeader + int(header.Length)); err != nil {
		return nil, err
	}
	g.began = time.Time{}
	return &header, nil
}

// need waits until n bytes of the next frame are there.
func (g *greeting) need(n int) error {
	for len(g.came)-g.next < n {
		if len(g.came) > g.next && g.began.IsZero() {
			g.began = time.Now()
		}
		if err := g.more(); err != nil {
			return err
		}
	}
	return nil
}

// more reads on. Before it waits for more than the preface, it sends the settings.
func (g *greeting) more() error {
	config := &g.conn.greeter.config
	if g.next > 0 {
		if !g.settings {
			g.settings = true
			most := http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: uint32(config.MaxStreams)}
			if err := g.write(func(f *http2.Framer) error { return f.WriteSettings(most) }); err != nil {
				return err
			}
		}
		deadline := g.until
		if end := g.began.Add(config.HeaderTimeout); !g.began.IsZero() && end.Before(deadline) {
			deadline = end
		}
		if len(g.came) == g.next && g.leave.Before(deadline) {
			deadline = g.leave
		}
		g.conn.SetReadDeadline(deadline)
	}
	g.came = slices.Grow(g.came, 128)
	n, err := g.conn.Conn.Read(g.came[len(g.came):cap(g.came)])
	g.came = g.came[:len(g.came)+n]
	if n > 0 {
		return nil
	}
	return err
}

// answer answers the frames that the transport need not see, since they were not for it.
func (g *greeting) answer(frame *http2.FrameHeader) (answered bool, err error) {
	switch {
	case frame.StreamID != 0:
		return false, nil
	case frame.Type == http2.FrameSettings && frame.Flags.Has(http2.FlagSettingsAck) && frame.Length == 0:
		answered = g.settings && !g.acked
		g.acked = g.acked || answered
		return answered, nil
	// The settings must be the first that the server sends (RFC 9113, section 3.4).
	case frame.Type == http2.FramePing && g.settings && !frame.Flags.Has(http2.FlagPingAck) && frame.Length == 8 && g.pings < maxPings:
		g.pings++
		data := [8]byte(g.came[g.next+frameHeader:])
		return true, g.write(func(f *http2.Framer) error { return f.WritePing(true, data) })
	}
	return false, nil
}

// write writes a frame.
func (g *greeting) write(write func(*http2.Framer) error) error {
	g.conn.SetWriteDeadline(time.Now().Add(g.conn.greeter.config.StallTimeout))
	defer g.conn.SetWriteDeadline(time.Time{})
	return write(http2.NewFramer(g.conn.Conn, nil))
}

// deliver gives the connection to gRPC.
func (g *greeting) deliver() {
	g.known = true
	g.conn.greeter.known(g.conn)
	g.conn.SetDeadline(time.Time{})
	g.conn.delivered.Store(true)
	g.end = io.EOF
	g.conn.greeter.deliver(g.conn.Conn, g.came)
	g.came = nil
}

// readFrame reads from the next frame, but from the one that acknowledges the settings.
func (g *greeting) readFrame(p []byte) (int, error) {
	for g.payload == 0 {
		n, err := g.take(g.header[g.got:])
		g.got += n
		if g.got < frameHeader {
			if err != nil {
				return 0, err
			}
			continue
		}
		g.got = 0
		g.payload = int(binary.BigEndian.Uint32(g.header[:]) >> 8)
		if kind, flags := http2.FrameType(g.header[3]), http2.Flags(g.header[4]); kind == http2.FrameSettings && flags.Has(http2.FlagSettingsAck) && g.payload == 0 {
			g.acked = true
			return g.read(p)
		}
		n = copy(p, g.header[:])
		g.ready = g.header[n:]
		return n, nil
	}
	n, err := g.take(p[:min(len(p), g.payload)])
	g.payload -= n
	return n, err
}

// take reads what came, and then from the connection.
func (g *greeting) take(p []byte) (int, error) {
	if len(g.came) == 0 {
		return g.conn.Conn.Read(p)
	}
	n := copy(p, g.came)
	g.came = g.came[n:]
	return n, nil
}

// isGRPCClient says whether a frame with the header of a request is from a gRPC client, and not from a
// proxy in front of one.
func isGRPCClient(frame []byte, most int) bool {
	framer := http2.NewFramer(nil, bytes.NewReader(frame))
	framer.ReadMetaHeaders = hpack.NewDecoder(headerTable, nil)
	framer.MaxHeaderListSize = uint32(most)
	read, err := framer.ReadFrame()
	header, ok := read.(*http2.MetaHeadersFrame)
	if err != nil || !ok || header.Truncated || header.PseudoValue("method") != http.MethodPost {
		return false
	}
	var isCall, isLibrary bool
	for _, field := range header.RegularFields() {
		switch name := field.Name; name {
		case "content-type":
			isCall = strings.HasPrefix(field.Value, "application/grpc")
		case "user-agent":
			// Go's client for HTTP/2 does not wait for the settings, but they may be there before its first
			// header is sent.
			isLibrary = strings.Contains(field.Value, "grpc") || strings.Contains(field.Value, "tonic")
		case "via", "forwarded", "x-real-ip", "x-request-id":
			return false
		default:
			if strings.HasPrefix(name, "x-forwarded-") || strings.HasPrefix(name, "x-envoy-") {
				return false
			}
		}
	}
	return isCall && isLibrary
}
