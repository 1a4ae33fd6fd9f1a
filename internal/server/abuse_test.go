package server_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

const putMethod = "/polykit.cache.v1.ArtifactService/PutArtifact"

// frames is a connection over HTTP/2 on which a test sends what frames it likes. What comes is noted
// down, but for what says which windows there are nothing is done about it.
type frames struct {
	t *testing.T
	net.Conn
	done chan struct{} // closed when nothing comes any more

	writing sync.Mutex // for the framer and the encoder
	framer  *http2.Framer
	block   bytes.Buffer
	encoder *hpack.Encoder

	mu       sync.Mutex
	changed  *sync.Cond
	settings map[http2.SettingID]uint32
	windows  map[uint32]int64 // what may be sent, beside the first window of a stream; 0 is the connection's
	answers  map[uint32]*streamAnswer
	pongs    int
	goAway   *http2.ErrCode
	acks     int    // of settings that were sent
	next     uint32 // stream
}

// streamAnswer is what came on a stream.
type streamAnswer struct {
	header, trailer map[string]string
	body            []byte
	ended           bool
	reset           *http2.ErrCode
	resets          int
}

// dialFrames makes a connection and exchanges settings on it. It is net/http's, since a gRPC client does
// not send a frame of a type that there is not.
func dialFrames(t *testing.T, s *testServer, settings ...http2.Setting) *frames {
	t.Helper()
	f := dialNative(t, s, settings...)
	f.write(func() error { return f.framer.WriteRawFrame(0xFF, 0, 0, nil) })
	f.wait("net/http's own settings are acknowledged", func() bool { return f.acks == 2 })
	return f
}

// dialNative makes a connection and exchanges settings on it. If the first request is a call, it is gRPC's.
func dialNative(t *testing.T, s *testServer, settings ...http2.Setting) *frames {
	t.Helper()
	f := &frames{
		t: t, Conn: dial(t, s).Conn, done: make(chan struct{}), next: 1,
		settings: map[http2.SettingID]uint32{}, windows: map[uint32]int64{0: 65535}, answers: map[uint32]*streamAnswer{},
	}
	f.changed = sync.NewCond(&f.mu)
	f.SetDeadline(time.Now().Add(4 * patience)) // for some send very much
	f.framer = http2.NewFramer(f.Conn, f.Conn)
	f.framer.SetMaxReadFrameSize(1 << 20)
	f.framer.AllowIllegalWrites = true
	f.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.encoder = hpack.NewEncoder(&f.block)
	if _, err := io.WriteString(f.Conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	f.write(func() error { return f.framer.WriteSettings(settings...) })
	go f.read()
	t.Cleanup(func() {
		f.Close()
		<-f.done
	})
	f.wait("the server's settings are acknowledged", func() bool { return f.acks == 1 })
	return f
}

// bothWays runs a test on connections of net/http, and on those of gRPC's own transport.
func bothWays(t *testing.T, test func(t *testing.T, dial func(*testing.T, *testServer, ...http2.Setting) *frames)) {
	t.Run("behind net/http", func(t *testing.T) { test(t, dialFrames) })
	t.Run("native", func(t *testing.T) { test(t, dialNative) })
}

// write writes a frame; that the server has closed the connection is noticed elsewhere.
func (f *frames) write(write func() error) error {
	f.writing.Lock()
	defer f.writing.Unlock()
	return write()
}

func (f *frames) read() {
	defer close(f.done)
	defer f.changed.Broadcast()
	for {
		frame, err := f.framer.ReadFrame()
		if err != nil {
			return
		}
		f.mu.Lock()
		id := frame.Header().StreamID
		answer := f.answers[id]
		if answer == nil {
			answer = &streamAnswer{}
			f.answers[id] = answer
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				frame.ForeachSetting(func(s http2.Setting) error {
					f.settings[s.ID] = s.Val
					return nil
				})
				f.mu.Unlock() // or a write that blocks would keep all others from what came
				f.write(f.framer.WriteSettingsAck)
				f.mu.Lock()
				f.acks++
			}
		case *http2.WindowUpdateFrame:
			f.windows[id] += int64(frame.Increment)
		case *http2.MetaHeadersFrame:
			fields := map[string]string{}
			for _, field := range frame.Fields {
				fields[field.Name] = field.Value
			}
			if answer.header == nil {
				answer.header = fields
			}
			if frame.StreamEnded() {
				answer.trailer, answer.ended = fields, true
			}
		case *http2.DataFrame:
			answer.body = append(answer.body, frame.Data()...)
			answer.ended = frame.StreamEnded()
		case *http2.RSTStreamFrame:
			if code := frame.ErrCode; answer.reset == nil {
				answer.reset = &code
			}
			answer.resets++
		case *http2.PingFrame:
			f.pongs++
		case *http2.GoAwayFrame:
			code := frame.ErrCode
			f.goAway = &code
		}
		f.changed.Broadcast()
		f.mu.Unlock()
	}
}

// wait waits until a condition holds, which is called with f.mu locked.
func (f *frames) wait(what string, condition func() bool) {
	f.t.Helper()
	waitUntil(f.t, what, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return condition()
	})
}

// header encodes the header of a request.
func (f *frames) header(method, path string, more ...string) []byte {
	f.block.Reset()
	fields := append([]string{":method", method, ":scheme", "http", ":authority", "x", ":path", path}, more...)
	for i := 0; i < len(fields); i += 2 {
		f.encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return f.block.Bytes()
}

// open begins a request.
func (f *frames) open(end bool, method, path string, more ...string) (id uint32, err error) {
	id = f.next
	f.next += 2
	err = f.write(func() error {
		return f.framer.WriteHeaders(http2.HeadersFrameParam{
			StreamID: id, BlockFragment: f.header(method, path, more...), EndStream: end, EndHeaders: true,
		})
	})
	return id, err
}

// mustOpen is open that has to succeed.
func (f *frames) mustOpen(end bool, method, path string, more ...string) uint32 {
	f.t.Helper()
	id, err := f.open(end, method, path, more...)
	if err != nil {
		f.t.Fatal(err)
	}
	return id
}

// call begins a gRPC call.
func (f *frames) call(more ...string) uint32 {
	f.t.Helper()
	return f.mustOpen(false, "POST", putMethod, append(slices.Clone(callHeader), more...)...)
}

// callHeader is what stands in the header of a call from a gRPC client.
var callHeader = []string{"content-type", "application/grpc", "te", "trailers", "user-agent", "grpc-test/1"}

// send sends data in frames of at most size bytes, as the windows allow, until the server wants no more.
func (f *frames) send(id uint32, data []byte, size int, end bool) {
	for len(data) > 0 {
		f.mu.Lock()
		room := func() int64 {
			return min(f.windows[0], int64(f.settings[http2.SettingInitialWindowSize])+f.windows[id])
		}
		over := func() bool { a := f.answers[id]; return a != nil && (a.ended || a.reset != nil) || f.goAway != nil }
		for room() <= 0 && !over() {
			f.changed.Wait()
		}
		n := int(min(int64(min(len(data), size)), room()))
		if over() {
			f.mu.Unlock()
			return
		}
		f.windows[0] -= int64(n)
		f.windows[id] -= int64(n)
		f.mu.Unlock()
		if f.write(func() error { return f.framer.WriteData(id, end && n == len(data), data[:n]) }) != nil {
			return
		}
		data = data[n:]
	}
}

func (f *frames) reset(id uint32) error {
	return f.write(func() error { return f.framer.WriteRSTStream(id, http2.ErrCodeCancel) })
}

// ping waits until the server has taken all frames so far.
func (f *frames) ping() {
	f.t.Helper()
	f.mu.Lock()
	want := f.pongs + 1
	f.mu.Unlock()
	f.write(func() error { return f.framer.WritePing(false, [8]byte{}) })
	f.wait("the server answers a ping", func() bool { return f.pongs >= want })
}

// wantGoAway waits until the server gives the connection up.
func (f *frames) wantGoAway(code http2.ErrCode) {
	f.t.Helper()
	f.wait("the server says that it goes away", func() bool { return f.goAway != nil })
	f.mu.Lock()
	defer f.mu.Unlock()
	if *f.goAway != code {
		f.t.Errorf("the server goes away with %v; want %v", *f.goAway, code)
	}
}

// wantReset waits until the server gives a stream up.
func (f *frames) wantReset(id uint32, code http2.ErrCode) {
	f.t.Helper()
	f.wait("the stream is reset", func() bool { return f.answers[id] != nil && f.answers[id].reset != nil })
	f.mu.Lock()
	defer f.mu.Unlock()
	if got := *f.answers[id].reset; got != code {
		f.t.Errorf("stream %d is reset with %v; want %v", id, got, code)
	}
}

// want waits for the answer to a request over REST.
func (f *frames) want(id uint32, status, body string) {
	f.t.Helper()
	f.wait("the request is answered", func() bool { return f.answers[id] != nil && f.answers[id].ended })
	f.mu.Lock()
	defer f.mu.Unlock()
	if a := f.answers[id]; a.header[":status"] != status || string(a.body) != body {
		f.t.Errorf("got %s %.300q; want %s %q", a.header[":status"], a.body, status, body)
	}
}

// wantStatus waits for the end of a gRPC call.
func (f *frames) wantStatus(id uint32, code codes.Code, reason, sentence string) {
	f.t.Helper()
	f.wait("the call has ended", func() bool { return f.answers[id] != nil && f.answers[id].ended })
	f.mu.Lock()
	defer f.mu.Unlock()
	trailer := f.answers[id].trailer
	got := &spb.Status{}
	details, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(trailer["grpc-status-details-bin"], "="))
	if err == nil {
		err = proto.Unmarshal(details, got)
	}
	number, _ := strconv.Atoi(trailer["grpc-status"])
	got.Code = int32(number)
	if got.Message, _ = url.PathUnescape(trailer["grpc-message"]); err != nil {
		f.t.Errorf("%v in %v", err, trailer)
	}
	if code == codes.OK {
		if trailer["grpc-status"] != "0" {
			f.t.Errorf("the call ended with %v", trailer)
		}
		return
	}
	checkStatus(f.t, status.ErrorProto(got), code, reason, sentence)
}

// grpcFrame is a message as it stands on the wire.
func grpcFrame(t *testing.T, request *cachev1.PutArtifactRequest) []byte {
	t.Helper()
	data, err := proto.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(data))), data...)
}

// A visit uploads an artifact and downloads it again, over both protocols, as one who has nothing to do
// with what else happens.
func visit(t *testing.T, s *testServer, name string) {
	t.Helper()
	transport := newTransport(t, 1)
	defer transport.CloseIdleConnections()
	conn, _ := dialGRPC(t, s, false)
	defer conn.(io.Closer).Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for over, visitor := range map[string]visitor{
		"REST": restVisitor("", s, transport),
		"gRPC": grpcVisitor("", cachev1.NewArtifactServiceClient(conn)),
	} {
		key := cachetest.Key(name + over)
		content := cachetest.Random(key, 100_000)
		outcome, err := visitor.put(ctx, key, content)
		if err != nil || outcome != "201" {
			t.Errorf("another client's upload over %s: %s, %v", over, outcome, err)
		}
		if got, err := visitor.get(ctx, key); err != nil || !bytes.Equal(got, content) {
			t.Errorf("another client's download over %s: %d bytes, %v", over, len(got), err)
		}
	}
}

// checkAbuse has a client do what it should not, and checks what that costs. Others are served while
// the abuse calls meanwhile, and afterwards. Then nothing is left of it.
func checkAbuse(t *testing.T, s *testServer, heap uint64, abuse func(t *testing.T, meanwhile func())) {
	t.Helper()
	visit(t, s, "before") // so that what is there once for all is there
	waitUntil(t, "no request is in flight", func() bool { return s.Requests() == 0 })
	goroutines := runtime.NumGoroutine()
	served := false
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	peak := peakHeap(withGarbage, func() {
		t.Run("abuse", func(t *testing.T) { // so that its connections are closed behind it
			defer debug.SetGCPercent(-1) // a collection would close files that the server forgot
			abuse(t, func() {
				t.Helper()
				visit(t, s, "meanwhile")
				served = true
			})
		})
	})
	if !served {
		t.Error("this test does not look whether others are served meanwhile")
	}
	visit(t, s, "afterwards")
	waitUntil(t, "no request is in flight", func() bool { return s.Requests() == 0 })
	waitUntil(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= goroutines })
	if s.dir != "" {
		waitUntil(t, "no upload is in progress", func() bool { return s.uploadsInProgress() == 0 })
		waitUntil(t, "no artifact is open", func() bool { return openArtifacts(t, s) == 0 })
	}
	if peak > heap {
		t.Errorf("the heap grew by %d MiB; want at most %d", peak>>20, heap>>20)
	}
	t.Logf("the heap grew by %d KiB", peak>>10)
}

const (
	// withGarbage is the heap with what is not collected yet.
	withGarbage = "/memory/classes/heap/objects:bytes"
	// living is what lived of it when the collector looked last. How much garbage there is beside that depends on when
	// the collector gets a processor.
	living = "/gc/heap/live:bytes"
)

// peakHeap returns by how much the heap grows at most while f runs, as one of these counts it.
func peakHeap(counted string, f func()) uint64 {
	heap := func() uint64 {
		sample := []metrics.Sample{{Name: counted}}
		metrics.Read(sample)
		return sample[0].Value.Uint64()
	}
	// So that the collector looks often.
	defer debug.SetGCPercent(debug.SetGCPercent(10))
	runtime.GC()
	before, peak := heap(), uint64(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		look := time.NewTicker(time.Millisecond)
		defer look.Stop()
		for last := false; !last; {
			select {
			case <-look.C:
			case <-stop:
				last = true
			}
			peak = max(peak, heap())
		}
	}()
	f()
	close(stop)
	<-stopped
	return peak - min(peak, before)
}

// blockingStore is a store that does not know whether it has an artifact until it is released.
type blockingStore struct {
	cache.Store
	key     artifact.Key // of which it does not know
	release chan struct{}
}

func (b *blockingStore) Stat(ctx context.Context, key artifact.Key) (artifact.Info, error) {
	if key == b.key {
		<-b.release
	}
	return b.Store.Stat(ctx, key)
}

func (b *blockingStore) Create(ctx context.Context, key artifact.Key, size int64) (cache.Upload, error) {
	if key == b.key {
		<-b.release
	}
	return b.Store.Create(ctx, key, size)
}

// TestRapidReset has a client that resets each request as soon as it has sent it, so that more may be in
// work than it may have at once.
func TestRapidReset(t *testing.T) {
	t.Run("requests that take long", func(t *testing.T) {
		store := &blockingStore{Store: &cachetest.Memory{}, key: cachetest.Key("a"), release: make(chan struct{})}
		s := startServer(t, setup{store: store})
		checkAbuse(t, s, 64<<20, func(t *testing.T, meanwhile func()) {
			defer close(store.release)
			conn := dialFrames(t, s)
			for range 100_000 {
				id, err := conn.open(true, "HEAD", "/v1/artifacts/"+keyA)
				if err != nil || conn.reset(id) != nil {
					break
				}
			}
			conn.wantGoAway(http2.ErrCodeEnhanceYourCalm)
			if n, most := s.Requests(), int(conn.settings[http2.SettingMaxConcurrentStreams]); n > most {
				t.Errorf("%d requests are in work; want at most %d", n, most)
			}
			meanwhile()
		})
	})
	for _, test := range []struct {
		name  string
		begin func(conn *frames) (uint32, error)
	}{
		{"uploads", func(conn *frames) (uint32, error) {
			id, err := conn.open(false, "PUT", "/v1/artifacts/"+keyA)
			if err == nil {
				err = conn.write(func() error { return conn.framer.WriteData(id, false, artifactA[:100]) })
			}
			return id, err
		}},
		{"calls", func(conn *frames) (uint32, error) {
			return conn.open(false, "POST", putMethod, callHeader...)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := startServer(t, setup{})
			checkAbuse(t, s, 192<<20, func(t *testing.T, meanwhile func()) { // as many as may be in work, each with what it takes to verify
				conn := dialFrames(t, s)
				var err error
				for n := 0; n < 2_000 && err == nil; n++ {
					var id uint32
					if id, err = test.begin(conn); err == nil {
						err = conn.reset(id)
					}
					if n == 1_000 {
						meanwhile()
					}
				}
				// How many are in work at once depends on the machine, and so does whether it is too much.
				conn.write(func() error { return conn.framer.WritePing(false, [8]byte{}) })
				calm := false
				conn.wait("the server answers", func() bool {
					calm = conn.goAway != nil
					return calm || conn.pongs > 0
				})
				if calm {
					conn.wantGoAway(http2.ErrCodeEnhanceYourCalm)
				} else if err != nil {
					t.Errorf("the connection ended with %v", err)
				}
				if n := s.uploadsInProgress(); n > int(conn.settings[http2.SettingMaxConcurrentStreams]) {
					t.Errorf("%d uploads are in progress", n)
				}
			})
		})
	}
}

// TestEndlessHeader has clients whose header does not end.
func TestEndlessHeader(t *testing.T) {
	begin := func(conn *frames, block []byte) error {
		return conn.write(func() error {
			return conn.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block})
		})
	}
	t.Run("fields", func(t *testing.T) {
		s := startServer(t, setup{})
		checkAbuse(t, s, 32<<20, func(t *testing.T, meanwhile func()) {
			conn := dialFrames(t, s)
			err := begin(conn, slices.Clone(conn.header("GET", "/healthz")))
			// A field that is not indexed: its name, and a value of 16,000 bytes.
			sent, block := 0, []byte("\x00\x01x\x7F\x81\x7C"+strings.Repeat("x", 16_000))
			for err == nil && sent < 64<<20 {
				err = conn.write(func() error { return conn.framer.WriteContinuation(1, false, block) })
				sent += len(block)
			}
			conn.wantGoAway(http2.ErrCodeProtocol)
			if sent > 16<<20 { // what the sockets buffer was sent too
				t.Errorf("%d bytes of a header were taken", sent)
			}
			meanwhile()
		})
	})
	t.Run("nothing", func(t *testing.T) {
		s := startServer(t, setup{})
		checkAbuse(t, s, 16<<20, func(t *testing.T, meanwhile func()) {
			conn := dialFrames(t, s)
			err := begin(conn, slices.Clone(conn.header("GET", "/healthz")))
			for n := 0; n < 100_000 && err == nil; n++ {
				err = conn.write(func() error { return conn.framer.WriteContinuation(1, false, nil) })
				if n == 50_000 {
					meanwhile()
				}
			}
			if err != nil {
				t.Error(err)
			}
			conn.write(func() error { return conn.framer.WriteContinuation(1, true, nil) })
			conn.ping()
		})
	})
	t.Run("one field again and again", func(t *testing.T) {
		s := startServer(t, setup{})
		checkAbuse(t, s, 32<<20, func(t *testing.T, meanwhile func()) {
			conn := dialFrames(t, s)
			// A field of 4,000 bytes goes into the table, and from then on costs a byte.
			block := slices.Clone(conn.header("GET", "/healthz", "x", strings.Repeat("x", 4_000)))
			block = append(block, bytes.Repeat([]byte{0x80 | 62}, 16_000-len(block))...)
			conn.write(func() error {
				return conn.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndStream: true, EndHeaders: true})
			})
			conn.want(1, "431", "<h1>HTTP Error 431</h1><p>Request Header Field(s) Too Large</p>")
			meanwhile()
		})
	})
}

// TestZeroWindow has clients that ask for artifacts and give no room for them.
func TestZeroWindow(t *testing.T) {
	const streams = 100
	content := cachetest.Random(cachetest.Key("a"), 8<<20)
	noRoom := http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}
	t.Run("REST", func(t *testing.T) {
		s := startServer(t, setup{})
		s.put(t, cachetest.Key("a"), content)
		checkAbuse(t, s, 64<<20, func(t *testing.T, meanwhile func()) {
			conn := dialFrames(t, s, noRoom)
			for range streams {
				conn.mustOpen(true, "GET", "/v1/artifacts/"+keyA)
			}
			conn.wait("all have a header", func() bool {
				n := 0
				for _, a := range conn.answers {
					if a.header[":status"] == "200" {
						n++
					}
				}
				return n == streams
			})
			conn.ping()
			for id, a := range conn.answers {
				if len(a.body) > 0 || a.ended || a.reset != nil {
					t.Errorf("stream %d has %d bytes, ended %v, reset %v", id, len(a.body), a.ended, a.reset)
				}
			}
			if n := openArtifacts(t, s); n != streams {
				t.Errorf("%d artifacts are open; want %d", n, streams)
			}
			meanwhile()
		})
	})
	t.Run("gRPC", func(t *testing.T) {
		s := startServer(t, setup{})
		s.put(t, cachetest.Key("a"), content)
		request, err := proto.Marshal(&cachev1.GetArtifactRequest{CacheKey: keyA})
		if err != nil {
			t.Fatal(err)
		}
		message := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request))), request...)
		checkAbuse(t, s, 256<<20, func(t *testing.T, meanwhile func()) { // each a chunk, which gRPC takes a buffer of 1 MiB to send
			conn := dialFrames(t, s, noRoom)
			for range streams {
				id := conn.mustOpen(false, "POST", "/polykit.cache.v1.ArtifactService/GetArtifact", callHeader...)
				conn.send(id, message, len(message), true)
			}
			waitUntil(t, "all are open", func() bool { return openArtifacts(t, s) == streams })
			conn.ping()
			meanwhile()
		})
	})
	t.Run("a window that overflows", func(t *testing.T) {
		s := startServer(t, setup{})
		s.put(t, cachetest.Key("a"), content)
		checkAbuse(t, s, 32<<20, func(t *testing.T, meanwhile func()) {
			conn := dialFrames(t, s)
			id := conn.mustOpen(true, "GET", "/v1/artifacts/"+keyA)
			// Once may fit, if all of the window is used up.
			for range 2 {
				conn.write(func() error { return conn.framer.WriteWindowUpdate(id, 1<<31-1) })
			}
			conn.wantReset(id, http2.ErrCodeFlowControl)
			meanwhile()
			for range 2 {
				conn.write(func() error { return conn.framer.WriteWindowUpdate(0, 1<<31-1) })
			}
			conn.wantGoAway(http2.ErrCodeFlowControl)
		})
	})
}

// TestStreamsThatNeverClose has a client that begins all it may begin, and ends nothing of it.
func TestStreamsThatNeverClose(t *testing.T) {
	s := startServer(t, setup{})
	checkAbuse(t, s, 128<<20, func(t *testing.T, meanwhile func()) {
		const uploads = 4
		conn := dialFrames(t, s)
		most := int(conn.settings[http2.SettingMaxConcurrentStreams])
		for range uploads {
			id := conn.call()
			conn.send(id, slices.Concat(grpcFrame(t, header(keyA)), grpcFrame(t, chunk(artifactA[:inFile]))), 16<<10, false)
			id = conn.mustOpen(false, "PUT", "/v1/artifacts/"+keyA)
			conn.send(id, artifactA[:inFile], 16<<10, false)
		}
		for range most - 2*uploads {
			conn.call() // and does not even say of which key
		}
		waitUntil(t, "all are in work", func() bool { return s.Requests() == most })
		conn.ping()
		conn.wantReset(conn.call(), http2.ErrCodeProtocol) // since it has acknowledged how many it may have
		waitUntil(t, "all uploads have begun", func() bool { return s.uploadsInProgress() == 2*uploads })
		meanwhile()
		// One of those that were served meanwhile may still be counted.
		waitUntil(t, "as many are in work as before", func() bool { return s.Requests() == most })
	})
}

// TestMessagesThatClaimMuch has messages that say of themselves that they are large.
func TestMessagesThatClaimMuch(t *testing.T) {
	bothWays(t, func(t *testing.T, dial func(*testing.T, *testServer, ...http2.Setting) *frames) {
		prefix := func(flag byte, length uint32) []byte { return binary.BigEndian.AppendUint32([]byte{flag}, length) }
		s := startServer(t, setup{})
		checkAbuse(t, s, 64<<20, func(t *testing.T, meanwhile func()) {
			conn := dial(t, s)
			for _, test := range []struct {
				name     string
				encoding string
				message  []byte
				code     codes.Code
				sentence string
			}{
				{"a byte over the limit", "identity", prefix(0, 4<<20+1), codes.ResourceExhausted, "grpc: received message larger than max (4194305 vs. 4194304)"},
				{"4 GiB", "identity", prefix(0, 1<<32-1), codes.ResourceExhausted, "grpc: received message larger than max (4294967295 vs. 4194304)"},
				{"compressed, but not said how", "identity", append(prefix(1, 5), "alpha"...), codes.Internal,
					"grpc: compressed flag set with identity or empty encoding"},
				{"compressed", "gzip", append(prefix(1, 5), "alpha"...), codes.Unimplemented,
					`grpc: Decompressor is not installed for grpc-encoding "gzip"`},
				{"a flag that there is not", "identity", append(prefix(2, 5), "alpha"...), codes.Internal, "grpc: received unexpected payload format 2"},
			} {
				for _, first := range []bool{true, false} {
					id := conn.call("grpc-encoding", test.encoding)
					if !first {
						conn.send(id, grpcFrame(t, header(keyA)), 16<<10, false)
					}
					conn.send(id, test.message, 16<<10, false)
					conn.wantStatus(id, test.code, "", test.sentence)
					conn.reset(id)
				}
			}
			// As much as a message may have, and nothing of it.
			for range 200 {
				conn.send(conn.call(), prefix(0, 4<<20), 16<<10, false)
			}
			conn.ping()
			waitUntil(t, "all are in work", func() bool { return s.Requests() == 200 })
			meanwhile()
		})
	})
}

// TestMessagesInDisorder has uploads over gRPC whose messages are not those that must come, each beside
// one of which they are.
func TestMessagesInDisorder(t *testing.T) {
	bothWays(t, func(t *testing.T, dial func(*testing.T, *testServer, ...http2.Setting) *frames) {
		s := startServer(t, setup{})
		checkAbuse(t, s, 32<<20, func(t *testing.T, meanwhile func()) {
			conn := dial(t, s)
			const first, behind = "Invalid request: the first message must be a header", "Invalid request: every message behind the header must be a chunk"
			theHeader, theChunk := grpcFrame(t, header(keyA)), grpcFrame(t, chunk(artifactA))
			empty := grpcFrame(t, &cachev1.PutArtifactRequest{})
			for _, test := range []struct {
				name     string
				messages [][]byte
				sentence string
			}{
				{"header first twice", [][]byte{theHeader, theHeader, theChunk}, behind},
				{"chunk before header", [][]byte{theChunk, theHeader}, first},
				{"chunk of 0 bytes before header", [][]byte{grpcFrame(t, chunk(nil)), theHeader, theChunk}, first},
				{"no message in a message", [][]byte{empty, theHeader, theChunk}, first},
				{"no message in a message behind the header", [][]byte{theHeader, empty, theChunk}, behind},
				{"header behind all", [][]byte{theHeader, theChunk, theHeader}, behind},
			} {
				id := conn.call()
				conn.send(id, slices.Concat(test.messages...), 16<<10, false)
				conn.wantStatus(id, codes.InvalidArgument, "INVALID_REQUEST", test.sentence)
				conn.reset(id)
			}
			meanwhile()
			id := conn.call()
			conn.send(id, slices.Concat(theHeader, theChunk), 16<<10, true)
			conn.wantStatus(id, codes.OK, "", "")
		})
	})
}

// TestChunksOfNothing has uploads of which much carries nothing. They are accepted, and cost nothing.
func TestChunksOfNothing(t *testing.T) {
	const many = 100_000
	nothing := func(t *testing.T) []byte { return bytes.Repeat(grpcFrame(t, chunk(nil)), many) }
	for _, test := range []struct {
		name   string
		isCall bool
		send   func(t *testing.T, conn *frames) (wanted func())
	}{
		{"messages", true, func(t *testing.T, conn *frames) func() {
			id := conn.call()
			conn.send(id, grpcFrame(t, header(keyA)), 16<<10, false)
			conn.send(id, nothing(t), 16<<10, false)
			conn.send(id, grpcFrame(t, chunk(artifactA)), 16<<10, true)
			return func() { conn.wantStatus(id, codes.OK, "", "") }
		}},
		{"messages, each in a frame", true, func(t *testing.T, conn *frames) func() {
			id := conn.call()
			conn.send(id, grpcFrame(t, header(keyA)), 16<<10, false)
			conn.send(id, nothing(t), len(grpcFrame(t, chunk(nil))), false)
			conn.send(id, grpcFrame(t, chunk(artifactA)), 16<<10, true)
			return func() { conn.wantStatus(id, codes.OK, "", "") }
		}},
		{"frames", false, func(t *testing.T, conn *frames) func() {
			id := conn.mustOpen(false, "PUT", "/v1/artifacts/"+keyA)
			for range many {
				if err := conn.write(func() error { return conn.framer.WriteData(id, false, nil) }); err != nil {
					t.Fatal(err)
				}
			}
			conn.send(id, artifactA, 16<<10, true)
			return func() { conn.want(id, "201", "") }
		}},
		{"frames of padding", false, func(t *testing.T, conn *frames) func() {
			id := conn.mustOpen(false, "PUT", "/v1/artifacts/"+keyA)
			padding := make([]byte, 255)
			for range 200 { // as the window allows, whatever comes back
				if err := conn.write(func() error { return conn.framer.WriteDataPadded(id, false, nil, padding) }); err != nil {
					t.Fatal(err)
				}
			}
			conn.ping()
			conn.send(id, artifactA, 16<<10, true)
			return func() { conn.want(id, "201", "") }
		}},
	} {
		run := func(t *testing.T, dial func(*testing.T, *testServer, ...http2.Setting) *frames) {
			s := startServer(t, setup{})
			checkAbuse(t, s, 64<<20, func(t *testing.T, meanwhile func()) {
				wanted := test.send(t, dial(t, s))
				meanwhile()
				wanted()
				stores(keyA, artifactA)(t, s)
			})
		}
		t.Run(test.name, func(t *testing.T) {
			if test.isCall {
				bothWays(t, run)
			} else {
				run(t, dialFrames)
			}
		})
	}
}

// TestChunksThatWait has as many messages, each in a frame, while nobody asks for them: what is kept of
// them is what they are.
func TestChunksThatWait(t *testing.T) {
	bothWays(t, func(t *testing.T, dial func(*testing.T, *testServer, ...http2.Setting) *frames) {
		store := &blockingStore{Store: &cachetest.Memory{}, key: cachetest.Key("a"), release: make(chan struct{})}
		s := startServer(t, setup{store: store})
		checkAbuse(t, s, 64<<20, func(t *testing.T, meanwhile func()) {
			release := sync.OnceFunc(func() { close(store.release) })
			defer release()
			conn := dial(t, s)
			id := conn.call()
			conn.send(id, grpcFrame(t, header(keyA)), 16<<10, false)
			empty := grpcFrame(t, chunk(nil))
			conn.wait("it is known how much may wait", func() bool { return conn.settings[http2.SettingInitialWindowSize] > 0 })
			many := min(100_000, (int(conn.settings[http2.SettingInitialWindowSize])-100)/len(empty))
			conn.send(id, bytes.Repeat(empty, many), len(empty), false)
			conn.ping()
			meanwhile()
			release()
			conn.send(id, grpcFrame(t, chunk(artifactA)), 16<<10, true)
			conn.wantStatus(id, codes.OK, "", "")
		})
	})
}

// TestFramesOutOfPlace has frames that may not be where they are.
func TestFramesOutOfPlace(t *testing.T) {
	request := func(conn *frames) uint32 { return conn.mustOpen(false, "PUT", "/v1/artifacts/"+keyA) }
	cases := []struct {
		name   string
		send   func(conn *frames)
		reset  http2.ErrCode // of the first stream
		goAway http2.ErrCode // 0 if the connection goes on
	}{
		{"data before a header", func(conn *frames) { conn.framer.WriteData(1, false, artifactA[:100]) }, 0, http2.ErrCodeProtocol},
		{"data on the connection", func(conn *frames) { conn.framer.WriteData(0, false, artifactA[:100]) }, 0, http2.ErrCodeProtocol},
		{"reset before a header", func(conn *frames) { conn.framer.WriteRSTStream(1, http2.ErrCodeCancel) }, 0, http2.ErrCodeProtocol},
		{"header of an even stream", func(conn *frames) {
			conn.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 2, BlockFragment: conn.header("GET", "/healthz"), EndHeaders: true})
		}, 0, http2.ErrCodeProtocol},
		{"continuation of nothing", func(conn *frames) { conn.framer.WriteContinuation(1, true, nil) }, 0, http2.ErrCodeProtocol},
		{"data amid a header", func(conn *frames) {
			conn.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: conn.header("GET", "/healthz")})
			conn.framer.WriteData(1, false, nil)
		}, 0, http2.ErrCodeProtocol},
		{"header that is no HPACK", func(conn *frames) {
			conn.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte("\xFF\xFF\xFF\xFF\xFF\xFF"), EndHeaders: true})
		}, 0, http2.ErrCodeCompression},
		{"a frame over the limit", func(conn *frames) { io.WriteString(conn.Conn, "\xFF\xFF\xFF\x00\x00\x00\x00\x00\x01") }, 0, http2.ErrCodeFrameSize},
		{"a push", func(conn *frames) {
			conn.framer.WritePushPromise(http2.PushPromiseParam{StreamID: request(conn), PromiseID: 2, BlockFragment: conn.header("GET", "/"), EndHeaders: true})
		}, 0, http2.ErrCodeProtocol},
		{"header twice", func(conn *frames) {
			id := request(conn)
			conn.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: conn.header("PUT", "/v1/artifacts/"+keyA), EndHeaders: true})
		}, http2.ErrCodeProtocol, 0},
		{"data over the declared size", func(conn *frames) {
			id := conn.mustOpen(false, "PUT", "/v1/artifacts/"+keyA, "content-length", "10")
			conn.framer.WriteData(id, false, artifactA[:100])
		}, http2.ErrCodeProtocol, 0},
		{"a window update of nothing", func(conn *frames) { conn.framer.WriteWindowUpdate(request(conn), 0) }, http2.ErrCodeProtocol, 0},
		{"a stream that depends on itself", func(conn *frames) {
			conn.framer.WritePriority(1, http2.PriorityParam{StreamDep: 1})
		}, http2.ErrCodeProtocol, 0},
	}
	s := startServer(t, setup{})
	checkAbuse(t, s, 32<<20, func(t *testing.T, meanwhile func()) {
		for _, test := range cases {
			// Not a subtest, for the connection is to stay: net/http keeps one that it gave up for a second.
			conn := dialFrames(t, s)
			test.send(conn)
			if test.goAway != 0 {
				conn.wantGoAway(test.goAway)
			} else {
				conn.wantReset(1, test.reset)
				conn.want(conn.mustOpen(true, "GET", "/healthz"), "200", `{"status":"ok"}`)
			}
			if t.Failed() {
				t.Fatalf("that was %s", test.name)
			}
		}
		meanwhile()
	})
}

// TestDataOverTheWindow has an upload that takes no heed of how much the server has room for.
func TestDataOverTheWindow(t *testing.T) {
	store := &blockingStore{Store: &cachetest.Memory{}, key: cachetest.Key("a"), release: make(chan struct{})}
	s := startServer(t, setup{store: store})
	checkAbuse(t, s, 32<<20, func(t *testing.T, meanwhile func()) {
		defer close(store.release)
		conn := dialFrames(t, s)
		conn.mustOpen(false, "HEAD", "/v1/artifacts/"+keyA) // which does not read its body
		data := make([]byte, 16<<10)
		for range 4 << 20 / len(data) {
			conn.write(func() error { return conn.framer.WriteData(1, false, data) })
		}
		conn.wantReset(1, http2.ErrCodeFlowControl)
		meanwhile()
	})
}

// TestPingsThatNobodyReads has a client that asks for answers all the time, and does not read them.
func TestPingsThatNobodyReads(t *testing.T) {
	s := startServer(t, setup{sendBuffer: 64 << 10})
	checkAbuse(t, s, 32<<20, func(t *testing.T, meanwhile func()) {
		conn := dial(t, s)
		framer := http2.NewFramer(conn, nil)
		conn.send(http2.ClientPreface)
		framer.WriteSettings()
		var pings bytes.Buffer
		for range 1_000 {
			http2.NewFramer(&pings, nil).WritePing(false, [8]byte{})
		}
		meanwhile()
		conn.sendUntilCut(pings.String())
	})
}

// TestTinyFrames has calls whose messages come a byte to a frame, each of which costs gRPC some 50 bytes. The
// server closes the connection before they cost much.
func TestTinyFrames(t *testing.T) {
	s := startServer(t, setup{})
	checkAbuse(t, s, 32<<20, func(t *testing.T, meanwhile func()) {
		const calls, size = 4, 4 << 20
		conn := dialNative(t, s)
		var round bytes.Buffer // a byte for each call
		for range calls {
			id := conn.call()
			conn.send(id, binary.BigEndian.AppendUint32([]byte{0}, size), 5, false)
			conn.wait("all of the message may come", func() bool { return conn.windows[id] > size/2 })
			http2.NewFramer(&round, nil).WriteData(id, false, []byte{1})
		}
		meanwhile()
		part := bytes.Repeat(round.Bytes(), 1<<10)
		for sent := 0; sent < size-1<<10; sent += 1 << 10 { // the messages do not end
			if conn.write(func() error { _, err := conn.Write(part); return err }) != nil {
				return
			}
		}
		conn.ping()
		t.Errorf("the server took %d bytes, each in a frame", calls*size)
	})
}
