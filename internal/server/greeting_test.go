package server_test

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/server"
)

// greetingFrames returns the frames that write writes.
func greetingFrames(write func(f *http2.Framer)) string {
	var b bytes.Buffer
	f := http2.NewFramer(&b, nil)
	f.AllowIllegalWrites = true
	write(f)
	return b.String()
}

// statCall is a StatArtifact of keyA, on stream 1, with more fields in its header.
func statCall(t *testing.T, end bool, fields ...string) string {
	t.Helper()
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	all := append([]string{":method", "POST", ":scheme", "http", ":authority", "x", ":path", cachev1.ArtifactService_StatArtifact_FullMethodName}, fields...)
	for i := 0; i < len(all); i += 2 {
		encoder.WriteField(hpack.HeaderField{Name: all[i], Value: all[i+1]})
	}
	message, err := proto.Marshal(&cachev1.StatArtifactRequest{CacheKey: keyA})
	if err != nil {
		t.Fatal(err)
	}
	return greetingFrames(func(f *http2.Framer) {
		if end {
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, PadLength: 3, Priority: http2.PriorityParam{Weight: 15}})
		} else {
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes()[:20]})
			f.WriteContinuation(1, true, block.Bytes()[20:])
		}
		f.WriteData(1, true, append([]byte{0, 0, 0, 0, byte(len(message))}, message...))
	})
}

// TestGreeting has connections that begin in many ways, and looks who serves them: their call is answered
// by whoever does, and a request for /healthz behind it by net/http only.
func TestGreeting(t *testing.T) {
	var (
		settings = greetingFrames(func(f *http2.Framer) { f.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20}) })
		ack      = greetingFrames(func(f *http2.Framer) { f.WriteSettingsAck() })
		window   = greetingFrames(func(f *http2.Framer) { f.WriteWindowUpdate(0, 1<<20) })
		ping     = greetingFrames(func(f *http2.Framer) { f.WritePing(false, [8]byte{1, 2, 3, 4, 5, 6, 7, 8}) })
		priority = greetingFrames(func(f *http2.Framer) { f.WritePriority(3, http2.PriorityParam{Weight: 100}) })
		unknown  = greetingFrames(func(f *http2.Framer) { f.WriteRawFrame(0xFF, 0, 0, []byte("extension")) })
		call     = statCall(t, true, callHeader...)
	)
	with := func(fields ...string) string {
		return statCall(t, true, append(slices.Clone(callHeader), fields...)...)
	}
	for _, test := range []struct {
		name string
		// What is sent: at "<" the test waits for the server's settings.
		sent   string
		native bool
		pings  int
	}{
		{"a gRPC client", settings + "<" + ack + call, true, 0},
		{"a window before the settings came", settings + window + "<" + ack + call, true, 0},
		{"a window behind them", settings + "<" + ack + window + call, true, 0},
		{"settings twice", settings + "<" + ack + settings + call, true, 0},
		{"pings", settings + "<" + ping + ack + ping + call, true, 2},
		{"tonic", settings + "<" + ack + statCall(t, true, "content-type", "application/grpc", "te", "trailers", "user-agent", "tonic/0.14"), true, 0},
		{"another format", settings + "<" + ack + statCall(t, true, "content-type", "application/grpc+proto", "te", "trailers", "user-agent", "grpc-test/1"), true, 0},

		{"all at once", settings + call, false, 0},
		{"settings that are acknowledged too late", settings + "<" + call + ack, false, 0},
		{"settings that are never acknowledged", settings + "<" + call, false, 0},
		{"a header in pieces", settings + "<" + ack + statCall(t, false, callHeader...), false, 0},
		{"a priority", settings + "<" + ack + priority + call, false, 0},
		{"a frame that there is not", settings + "<" + ack + unknown + call, false, 0},
		{"another user agent", settings + "<" + ack + statCall(t, true, "content-type", "application/grpc", "te", "trailers", "user-agent", "Go-http-client/2.0"), false, 0},
		{"no user agent", settings + "<" + ack + statCall(t, true, "content-type", "application/grpc", "te", "trailers"), false, 0},
		{"via", settings + "<" + ack + with("via", "2 proxy"), false, 0},
		{"forwarded", settings + "<" + ack + with("forwarded", "for=10.0.0.1"), false, 0},
		{"x-forwarded-for", settings + "<" + ack + with("x-forwarded-for", "10.0.0.1"), false, 0},
		{"x-real-ip", settings + "<" + ack + with("x-real-ip", "10.0.0.1"), false, 0},
		{"x-request-id", settings + "<" + ack + with("x-request-id", "1"), false, 0},
		{"x-envoy-internal", settings + "<" + ack + with("x-envoy-internal", "true"), false, 0},
		{"pings before all", settings + ping + ping + call, false, 2},
		{"very many settings", settings + "<" + ack + strings.Repeat(settings, 80<<10/len(settings)) + call, false, 0},
		{"very many pings", settings + "<" + ack + strings.Repeat(ping, 150) + call, false, 150},
	} {
		for how, size := range map[string]int{"": 1 << 20, " in bytes": 1} {
			if size == 1 && len(test.sent) > 2000 {
				continue
			}
			t.Run(test.name+how, func(t *testing.T) {
				t.Parallel()
				s := startServer(t, setup{})
				havingA(t, s)
				conn := dial(t, s)
				conn.tcp.SetNoDelay(true)
				framer := http2.NewFramer(conn, conn.in)
				framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
				g := &greeted{t: t, framer: framer}
				first, rest, waits := strings.Cut(http2.ClientPreface+test.sent, "<")
				conn.sendInPieces(first, size)
				if waits {
					g.until("the server's settings", func() bool { return g.settings == 1 })
					conn.sendInPieces(rest, size)
				}
				g.until("the answer to the call", func() bool { return g.ended[1] })
				if g.status != "0" || g.pongs != test.pings {
					t.Errorf("the call ended with %q behind %d pongs; want 0 and %d", g.status, g.pongs, test.pings)
				}

				// A second acknowledgement is for the settings of whoever serves the connection.
				g.until("its settings", func() bool { return g.settings == 2 || !waits })
				framer.WriteSettingsAck()
				framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, EndHeaders: true, EndStream: true, BlockFragment: block(":method", "GET", ":scheme", "http", ":authority", "x", ":path", "/healthz")})
				g.until("the answer to the request", func() bool { return g.ended[3] })
				want := "200"
				if test.native {
					want = "415"
				}
				if g.last != want {
					t.Errorf("a request for /healthz got %s; want %s", g.last, want)
				}
			})
		}
	}
}

// block encodes the fields of a header without a table.
func block(fields ...string) []byte {
	var b bytes.Buffer
	encoder := hpack.NewEncoder(&b)
	encoder.SetMaxDynamicTableSize(0)
	for i := 0; i < len(fields); i += 2 {
		encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return b.Bytes()
}

// greeted is what came on a connection.
type greeted struct {
	t               *testing.T
	framer          *http2.Framer
	settings, pongs int
	status, last    string // of the call, and of the last header
	ended           [5]bool
}

func (g *greeted) until(what string, condition func() bool) {
	g.t.Helper()
	for !condition() {
		frame, err := g.framer.ReadFrame()
		if err != nil {
			g.t.Fatalf("waiting for %s: %v", what, err)
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				g.settings++
			}
		case *http2.PingFrame:
			if g.settings == 0 {
				g.t.Fatalf("waiting for %s: a ping was answered before the settings were sent", what)
			}
			if frame.IsAck() {
				g.pongs++
			}
		case *http2.MetaHeadersFrame:
			for _, field := range frame.Fields {
				switch field.Name {
				case ":status":
					g.last = field.Value
				case "grpc-status":
					if frame.StreamID == 1 {
						g.status = field.Value
					}
				}
			}
			g.ended[frame.StreamID] = frame.StreamEnded()
		case *http2.DataFrame:
			g.ended[frame.StreamID] = frame.StreamEnded()
		case *http2.GoAwayFrame:
			g.t.Fatalf("waiting for %s: the server goes away with %v %s", what, frame.ErrCode, frame.DebugData())
		}
	}
}

func (w *wire) sendInPieces(text string, size int) {
	w.t.Helper()
	for len(text) > 0 {
		n := min(len(text), size)
		w.send(text[:n])
		text = text[n:]
	}
}

// TestBrokenGreeting has connections that begin like HTTP/2 and then do not go on like it. The server
// closes them as it closes others, and the next client is served.
func TestBrokenGreeting(t *testing.T) {
	idle := map[string]time.Duration{"silence behind settings": stall, "an acknowledgement": stall} // the others are not idle
	empty := greetingFrames(func(f *http2.Framer) { f.WriteSettings() })
	for name, sent := range map[string]string{
		"a part of the preface":        "PRI * HT",
		"another preface":              "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
		"the preface only":             http2.ClientPreface,
		"a part of a frame":            http2.ClientPreface + empty[:5],
		"no settings":                  http2.ClientPreface + greetingFrames(func(f *http2.Framer) { f.WritePing(false, [8]byte{}) }),
		"an acknowledgement":           http2.ClientPreface + greetingFrames(func(f *http2.Framer) { f.WriteSettingsAck() }),
		"a frame that is too long":     http2.ClientPreface + empty + "\xFF\xFF\xFF\x04\x00\x00\x00\x00\x00",
		"settings of a strange length": http2.ClientPreface + "\x00\x00\x01\x04\x00\x00\x00\x00\x00\x00",
		"garbage":                      http2.ClientPreface + empty + strings.Repeat("\xA5", 100),
		"half of a header":             http2.ClientPreface + empty + statCall(t, true, callHeader...)[:40],
		"silence":                      "",
		"silence behind settings":      http2.ClientPreface + empty,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, setup{change: func(c *server.Config) {
				c.HeaderTimeout = stall
				c.IdleTimeout = cmp.Or(idle[name], time.Hour)
			}})
			havingA(t, s)
			conn := dial(t, s)
			conn.send(sent)
			if _, err := io.Copy(io.Discard, conn.in); err != nil && !strings.Contains(err.Error(), "reset") { // to the end that the server makes
				t.Error(err)
			}
			client := newGRPC(t, s)
			if _, err := stat(keyA)(t.Context(), cachev1.NewArtifactServiceClient(client)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestNativeConnectionLimit proves that connections of gRPC's own transport count as the others do: once,
// until they are closed.
func TestNativeConnectionLimit(t *testing.T) {
	const most = 3
	s := startServer(t, setup{change: func(c *server.Config) { c.MaxConnections = most }})
	havingA(t, s)
	healthy := func() bool {
		conn := dial(t, s)
		defer conn.Close()
		conn.send("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		text, err := io.ReadAll(conn.in)
		return err == nil && strings.HasPrefix(string(text), "HTTP/1.1 200")
	}
	for range 3 {
		var open []io.Closer
		for range most {
			conn := newGRPC(t, s)
			open = append(open, conn.(io.Closer))
			waitUntil(t, "a client is served", func() bool {
				_, err := stat(keyA)(t.Context(), cachev1.NewArtifactServiceClient(conn))
				return err == nil
			})
		}
		if healthy() {
			t.Error("there is room for one more connection")
		}
		for _, conn := range open {
			conn.Close()
		}
		waitUntil(t, "there is room again", healthy)
	}
}

// TestNativeIdle proves that a gRPC client which is connected and makes no call is not taken for one that
// does not send its header, and that it is let go when it was idle for as long as it may be.
func TestNativeIdle(t *testing.T) {
	s := startServer(t, setup{change: func(c *server.Config) {
		c.HeaderTimeout = stall
		c.IdleTimeout = 5 * stall
	}})
	havingA(t, s)
	ended := make(chan struct{}, 10)
	conn, err := grpc.NewClient(s.address, security(s.url),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
			return &endingConn{Conn: conn, ended: ended}, err
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	began := time.Now()
	conn.Connect()
	<-ended
	conn.WaitForStateChange(t.Context(), connectivity.Ready) // or the next call may be made on what has ended
	if took := time.Since(began); took < 4*stall {
		t.Errorf("the server let an idle client go after %v", took)
	}
	client := cachev1.NewArtifactServiceClient(conn)
	if _, err := stat(keyA)(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	<-ended
	if took := time.Since(began); took < 4*stall {
		t.Errorf("the server let a client that had made a call go after %v", took)
	}
	conn.WaitForStateChange(t.Context(), connectivity.Ready)
	if _, err := stat(keyA)(t.Context(), client); err != nil {
		t.Errorf("a call behind an idle time: %v", err)
	}
}

// endingConn tells of its end.
type endingConn struct {
	net.Conn
	ended chan struct{}
	once  sync.Once
}

func (c *endingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.once.Do(func() { c.ended <- struct{}{} })
	}
	return n, err
}

// Close is what a client does which has read of the end within TLS.
func (c *endingConn) Close() error {
	c.once.Do(func() { c.ended <- struct{}{} })
	return c.Conn.Close()
}

// TestSlowUploadOfLargeMessage proves that a client which sends slowly, but as fast as it must, may take
// longer for one message than it may be silent.
func TestSlowUploadOfLargeMessage(t *testing.T) {
	s := startServer(t, setup{change: func(c *server.Config) {
		c.StallTimeout = stall
		c.MinUploadRate = 1000
	}})
	conn := dialNative(t, s)
	id := conn.call()
	conn.send(id, grpcFrame(t, header(keyA)), 16<<10, false)
	message := grpcFrame(t, chunk(artifactA))
	tick := time.NewTicker(stall / 10)
	defer tick.Stop()
	for len(message) > 0 { // in 6 times as long as it may be silent
		n := min(len(message), 100)
		conn.send(id, message[:n], n, n == len(message))
		message = message[n:]
		<-tick.C
	}
	conn.wantStatus(id, codes.OK, "", "")
}

// TestStalledNeighbour has a download that the client does not take, beside an upload on the same
// connection. The download is given up, and the upload finishes.
func TestStalledNeighbour(t *testing.T) {
	s := startServer(t, setup{change: func(c *server.Config) {
		impatient(c)
		c.MinUploadRate = 1
	}})
	s.put(t, cachetest.Key("b"), cachetest.Random(cachetest.Key("b"), 4<<20))
	conn := dialNative(t, s)
	conn.write(func() error { return conn.framer.WriteWindowUpdate(0, 1<<20) }) // only the stream's own is in the way
	upload := conn.call()
	conn.send(upload, grpcFrame(t, header(keyA)), 16<<10, false)
	request, err := proto.Marshal(&cachev1.GetArtifactRequest{CacheKey: cachetest.Key("b").String()})
	if err != nil {
		t.Fatal(err)
	}
	download := conn.mustOpen(false, "POST", cachev1.ArtifactService_GetArtifact_FullMethodName, callHeader...)
	conn.send(download, append([]byte{0, 0, 0, 0, byte(len(request))}, request...), 100, true)
	waitUntil(t, "the download begins", func() bool { return openArtifacts(t, s) == 1 })
	tick := time.NewTicker(stall / 10)
	defer tick.Stop()
	message := grpcFrame(t, chunk(artifactA))
	for openArtifacts(t, s) > 0 { // the upload goes on while the download does not
		if len(message) > 20 {
			conn.send(upload, message[:10], 10, false)
			message = message[10:]
		}
		<-tick.C
	}
	conn.send(upload, message, len(message), true)
	conn.wantStatus(upload, codes.OK, "", "")
	<-conn.done // for the server holds what was not taken until the connection is closed
}

// TestBusyNeighbour has an upload whose client says nothing more, on a connection on which much else comes.
// That is taken for the upload only up to what a message may have.
func TestBusyNeighbour(t *testing.T) {
	const rate = 4 << 20 // at which a message may take a second
	s := startServer(t, setup{change: func(c *server.Config) {
		c.StallTimeout = stall
		c.MinUploadRate = rate
	}})
	conn := dialNative(t, s)
	id := conn.call()
	conn.send(id, grpcFrame(t, header(keyA)), 16<<10, false)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		nothing := make([]byte, 16<<10)
		for err := error(nil); err == nil; { // frames that gRPC does not know
			select {
			case <-stop:
				return
			default:
				err = conn.write(func() error { return conn.framer.WriteRawFrame(0xFF, 0, 0, nothing) })
			}
		}
	}()
	conn.wantStatus(id, codes.DeadlineExceeded, "CLIENT_TOO_SLOW", strings.Replace(tooSlowText, "8192", fmt.Sprint(rate), 1))
	close(stop)
	<-stopped
}

// TestUntakenEnds has clients that do not take what is left of an answer when its handler has returned.
func TestUntakenEnds(t *testing.T) {
	s := startServer(t, setup{change: impatient})
	havingA(t, s)
	for _, method := range []string{cachev1.ArtifactService_GetArtifact_FullMethodName, cachev1.ArtifactService_StatArtifact_FullMethodName, healthpb.Health_Check_FullMethodName} {
		t.Run(method, func(t *testing.T) {
			conn := dialNative(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
			request, err := proto.Marshal(&cachev1.StatArtifactRequest{CacheKey: keyA})
			if method == healthpb.Health_Check_FullMethodName {
				request = nil
			}
			if err != nil {
				t.Fatal(err)
			}
			id := conn.mustOpen(false, "POST", method, callHeader...)
			conn.send(id, append([]byte{0, 0, 0, 0, byte(len(request))}, request...), 100, true)
			<-conn.done
		})
	}
	// Here gRPC itself ends the call, behind an answer.
	t.Run("a message that is too large", func(t *testing.T) {
		conn := dialNative(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		request, err := proto.Marshal(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		if err != nil {
			t.Fatal(err)
		}
		id := conn.mustOpen(false, "POST", reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName, callHeader...)
		conn.send(id, slices.Concat([]byte{0, 0, 0, 0, byte(len(request))}, request, []byte{0, 0xFF, 0, 0, 0}), 100, false)
		<-conn.done
	})
}

// TestRequestThatDoesNotCome has calls whose one message does not come.
func TestRequestThatDoesNotCome(t *testing.T) {
	s := startServer(t, setup{change: impatient})
	for _, method := range []string{cachev1.ArtifactService_GetArtifact_FullMethodName, cachev1.ArtifactService_StatArtifact_FullMethodName} {
		conn := dialNative(t, s)
		id := conn.mustOpen(false, "POST", method, callHeader...)
		conn.wantStatus(id, codes.DeadlineExceeded, "CLIENT_TOO_SLOW", strings.Replace(tooSlowText, "Upload aborted: the", "The", 1))
	}
}

// TestChunksInPieces has messages in which a chunk is written in other ways than usual.
func TestChunksInPieces(t *testing.T) {
	usual, err := proto.Marshal(chunk(artifactA))
	if err != nil {
		t.Fatal(err)
	}
	aHeader, err := proto.Marshal(header(keyA))
	if err != nil {
		t.Fatal(err)
	}
	for name, message := range map[string][]byte{
		"usual":                     usual,
		"with an unknown field":     append(slices.Clone(usual), 0x78, 1),
		"behind an unknown field":   append([]byte{0x78, 1}, usual...),
		"behind another chunk":      append([]byte{0x12, 3, 'a', 'b', 'c'}, usual...),
		"behind a header":           append(slices.Clone(aHeader), usual...),
		"with a length of 5 digits": append([]byte{0x12, 0x89, 0xAC, 0x80, 0x80, 0x00}, artifactA...),
	} {
		for _, size := range []int{1, 6, 16 << 10} {
			t.Run(fmt.Sprintf("%s/%d", name, size), func(t *testing.T) {
				s := startServer(t, setup{})
				conn := dialNative(t, s)
				id := conn.call()
				conn.send(id, grpcFrame(t, header(keyA)), size, false)
				prefix := []byte{0, 0, 0, byte(len(message) >> 8), byte(len(message))}
				conn.send(id, append(prefix, message...), size, true)
				conn.wantStatus(id, codes.OK, "", "")
				stores(keyA, artifactA)(t, s)
			})
		}
	}
}

// TestSettingsThatNobodyReads has a gRPC client that has settings acknowledged all the time, and does not
// read that.
func TestSettingsThatNobodyReads(t *testing.T) {
	s := startServer(t, setup{sendBuffer: 64 << 10, change: impatient})
	havingA(t, s)
	conn := dial(t, s)
	settings := greetingFrames(func(f *http2.Framer) { f.WriteSettings() })
	g := &greeted{t: t, framer: http2.NewFramer(conn, conn.in)}
	g.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	conn.send(http2.ClientPreface, settings)
	g.until("the server's settings", func() bool { return g.settings == 1 })
	conn.send(greetingFrames(func(f *http2.Framer) { f.WriteSettingsAck() }), statCall(t, true, callHeader...))
	g.until("the answer to the call", func() bool { return g.ended[1] })
	conn.sendUntilCut(strings.Repeat(settings, 1000))
}

// slowReader reads no more than some KiB at each tick.
type slowReader struct {
	io.Reader
	tick <-chan time.Time
}

func (r slowReader) Read(p []byte) (int, error) {
	<-r.tick
	return r.Reader.Read(p[:min(len(p), 4<<10)])
}

// getCall begins a connection on which from reads, and downloads an artifact over it.
func (w *wire) getCall(key artifact.Key, from io.Reader) *greeted {
	w.t.Helper()
	framer := http2.NewFramer(w, from)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	g := &greeted{t: w.t, framer: framer}
	w.send(http2.ClientPreface)
	framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 16 << 20})
	framer.WriteWindowUpdate(0, 16<<20)
	g.until("the server's settings", func() bool { return g.settings == 1 })
	framer.WriteSettingsAck()
	request, err := proto.Marshal(&cachev1.GetArtifactRequest{CacheKey: key.String()})
	if err != nil {
		w.t.Fatal(err)
	}
	fields := append([]string{":method", "POST", ":scheme", "http", ":authority", "x", ":path", cachev1.ArtifactService_GetArtifact_FullMethodName}, callHeader...)
	framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(fields...), EndHeaders: true})
	framer.WriteData(1, true, append([]byte{0, 0, 0, 0, byte(len(request))}, request...))
	return g
}

// TestSlowDownload proves that a client which takes a download slowly, but as fast as it must, may take
// longer for what the server writes at once than it may take nothing.
func TestSlowDownload(t *testing.T) {
	s := startServer(t, setup{sendBuffer: 16 << 10, change: func(c *server.Config) {
		c.StallTimeout = stall
		c.MinDownloadRate = 1000
	}})
	a := cachetest.Key("a")
	s.put(t, a, cachetest.Random(a, 512<<10))
	tick := time.NewTicker(stall / 20) // in which the server's buffer is taken in 1.6 times of what is allowed for nothing
	defer tick.Stop()
	conn := dial(t, s)
	g := conn.getCall(a, slowReader{conn, tick.C})
	g.until("the end of the download", func() bool { return g.ended[1] })
	if g.status != "0" {
		t.Errorf("the download ended with %q", g.status)
	}
}
