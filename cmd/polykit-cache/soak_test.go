//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

const (
	// soakVariable is how many uploads and downloads are aborted, instead of soakAborts, and
	// soakSeedVariable what makes them differ.
	soakVariable     = "POLYKIT_CACHE_SOAK"
	soakSeedVariable = "POLYKIT_CACHE_SOAK_SEED"
	soakAborts       = 600

	// soakGroups share connections of HTTP/2 and gRPC, on each of which soakLanes abort at once.
	soakGroups = 4
	soakLanes  = 4

	soakUpload   = 600_000
	soakDownload = 8 * mebi
	// soakHeap is how much larger the heap may be than that of a fresh server. It is 80 bytes for each of
	// 100,000 aborts.
	soakHeap = 8 * mebi
)

func init() {
	// The server, which on SIGUSR1 says what it holds.
	commands["polykit-cache-observed"] = func() {
		asked := make(chan os.Signal, 1)
		signal.Notify(asked, syscall.SIGUSR1)
		go func() {
			for range asked {
				debug.FreeOSMemory() // collects garbage first; pools need two collections
				debug.FreeOSMemory()
				var memory runtime.MemStats
				runtime.ReadMemStats(&memory)
				fmt.Fprintln(os.Stderr, "holds", runtime.NumGoroutine(), memory.HeapAlloc)
			}
		}()
		main()
	}
}

// holdings are what a server holds.
type holdings struct {
	goroutines, descriptors, uploads int
	heap, resident                   int64
}

func (h holdings) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %d temporary files, heap %.1f MiB, resident %.1f MiB",
		h.goroutines, h.descriptors, h.uploads, float64(h.heap)/mebi, float64(h.resident)/mebi)
}

// observed is a server that says what it holds.
type observed struct {
	*process
	dir string
	say *bufio.Reader // its standard error
}

// holds asks the server, which collects its garbage then.
func (o *observed) holds(t *testing.T) holdings {
	t.Helper()
	h := o.files(t)
	check(t, o.Process.Signal(syscall.SIGUSR1))
	line, err := o.say.ReadString('\n')
	check(t, err)
	if _, err := fmt.Sscanf(line, "holds %d %d\n", &h.goroutines, &h.heap); err != nil {
		t.Fatalf("the server says %q: %v", line, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", o.Process.Pid))
	check(t, err)
	_, resident, _ := strings.Cut(string(status), "VmRSS:")
	fmt.Sscan(resident, &h.resident)
	h.resident *= 1024
	return h
}

// files looks only at the files that the server holds.
func (o *observed) files(t *testing.T) holdings {
	t.Helper()
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", o.Process.Pid))
	check(t, err)
	uploads, err := os.ReadDir(filepath.Join(o.dir, "tmp"))
	check(t, err)
	return holdings{descriptors: len(descriptors), uploads: len(uploads)}
}

// settles waits until the server holds no more than before, but for a little memory.
func (o *observed) settles(t *testing.T, before holdings) holdings {
	t.Helper()
	// First its files, before it is asked: the garbage collector closes those that were forgotten.
	var now holdings
	defer func() {
		if t.Failed() {
			t.Log("it holds", now)
		}
	}()
	waitUntil(t, "the server holds no file more than "+before.String(), func() bool {
		now = o.files(t)
		return now.descriptors <= before.descriptors && now.uploads <= before.uploads
	})
	waitUntil(t, "the server holds no more than "+before.String(), func() bool {
		now = o.holds(t)
		return now.goroutines <= before.goroutines && now.heap <= before.heap+soakHeap
	})
	return now
}

// TestSoak aborts uploads and downloads over all protocols, each at a random place, and compares what
// the server holds before and after: it must be no goroutine, no descriptor, no temporary file, and no
// more memory. "make soak" aborts 100,000.
func TestSoak(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv(soakVariable))
	if err != nil {
		n = soakAborts
	}
	seed, err := strconv.ParseUint(os.Getenv(soakSeedVariable), 10, 64)
	if err != nil {
		seed = 1
	}
	dir := t.TempDir()
	read, write, err := os.Pipe()
	check(t, err)
	defer read.Close()
	o := &observed{dir: dir, say: bufio.NewReader(read)}
	o.process = startProgramTo(t, write, "polykit-cache-observed", dir, "--log-level=debug")
	write.Close()

	s := &soak{address: o.address, dir: dir, aborted: map[string]int{}, stored: cachetest.Key("stored")}
	content := cachetest.Random(s.stored, soakDownload)
	s.put(t, s.stored, content)
	fresh := o.holds(t)
	t.Log("seed", seed)
	t.Log("before:", fresh)
	start := time.Now()
	s.abort(t, n, seed)
	took := time.Since(start)
	now := o.settles(t, fresh)
	t.Log("after: ", now)
	for _, name := range slices.Sorted(maps.Keys(s.aborted)) {
		t.Logf("%6d aborts: %s", s.aborted[name], name)
	}
	t.Logf("%d aborts in %v", n, took.Round(time.Millisecond))

	// The server is as good as new.
	last := cachetest.Key("last")
	s.put(t, last, cachetest.Random(last, 1000))
	response, err := http.Get("http://" + o.address + "/v1/artifacts/" + s.stored.String())
	check(t, err)
	got, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("a download got %s and %d bytes, %v", response.Status, len(got), err)
	}
	http.DefaultClient.CloseIdleConnections()
	check(t, o.Process.Signal(syscall.SIGTERM))
	log := o.ends(t)
	uploads, downloads := 0, 0
	for line := range strings.Lines(log) {
		switch {
		case strings.Contains(line, "level=WARN"), strings.Contains(line, "level=ERROR"):
			t.Errorf("logged %s", line)
		case !strings.Contains(line, "reason=ABORTED_BY_CLIENT"):
		case strings.Contains(line, "request=\"PUT "), strings.Contains(line, "/PutArtifact"):
			uploads++
		default:
			downloads++
		}
	}
	t.Logf("the server was in the middle of %d uploads and %d downloads", uploads, downloads)
	if uploads < n/4 || downloads < n/4 {
		t.Error("that are too few for this to have tested something")
	}
	if zsts, err := filepath.Glob(filepath.Join(dir, "*/*/*.zst")); len(zsts) != 2 || err != nil {
		t.Errorf("%d artifacts are stored, %v; want the 2 whose uploads ended", len(zsts), err)
	}
}

// soak aborts uploads and downloads.
type soak struct {
	address, dir string
	stored       artifact.Key

	mu      sync.Mutex
	aborted map[string]int
}

func (s *soak) put(t *testing.T, key artifact.Key, content []byte) {
	t.Helper()
	request, err := http.NewRequest(http.MethodPut, "http://"+s.address+"/v1/artifacts/"+key.String(), bytes.NewReader(content))
	check(t, err)
	response, err := http.DefaultClient.Do(request)
	check(t, err)
	response.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if response.StatusCode != 201 {
		t.Fatalf("PUT: %s", response.Status)
	}
}

// abort aborts n uploads and downloads, and closes all connections.
func (s *soak) abort(t *testing.T, n int, seed uint64) {
	t.Helper()
	var lanes sync.WaitGroup
	var groups []*soakGroup
	left := make(chan struct{}, n)
	for range n {
		left <- struct{}{}
	}
	close(left)
	for g := range soakGroups {
		group := newSoakGroup(t, s)
		groups = append(groups, group)
		for l := range soakLanes {
			random := rand.New(rand.NewPCG(seed, uint64(g*soakLanes+l)))
			key := cachetest.Key(fmt.Sprint(seed, g, l))
			lane := &soakLane{group, random, key, cachetest.Random(key, soakUpload)}
			lanes.Go(func() {
				for range left {
					lane.abort(t)
				}
			})
		}
	}
	lanes.Wait()
	for _, group := range groups {
		group.close()
	}
}

// soakGroup is the connections that some lanes share.
type soakGroup struct {
	*soak
	http2 *http.Transport
	grpc  *grpc.ClientConn

	mu    sync.Mutex
	conns map[string][]net.Conn // that are open, by protocol
}

func newSoakGroup(t *testing.T, s *soak) *soakGroup {
	g := &soakGroup{soak: s, conns: map[string][]net.Conn{}}
	dial := func(protocol string) func(context.Context) (net.Conn, error) {
		return func(ctx context.Context) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.address)
			if err == nil {
				g.mu.Lock()
				defer g.mu.Unlock()
				g.conns[protocol] = append(g.conns[protocol], conn)
			}
			return conn, err
		}
	}
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	g.http2 = &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial("HTTP2")(ctx) }}
	var err error
	g.grpc, err = grpc.NewClient(s.address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial("gRPC")(ctx) }))
	check(t, err)
	return g
}

// cut cuts the connections of a protocol, and with them what other lanes do.
func (g *soakGroup) cut(protocol string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, conn := range g.conns[protocol] {
		conn.(*net.TCPConn).SetLinger(0) // or ports would be used up
		conn.Close()
	}
	g.conns[protocol] = nil
}

func (g *soakGroup) close() {
	g.grpc.Close()
	g.http2.CloseIdleConnections()
	g.cut("gRPC")
	g.cut("HTTP2")
}

// soakLane aborts one thing after the other.
type soakLane struct {
	*soakGroup
	random  *rand.Rand
	key     artifact.Key // of uploads
	content []byte
}

// abort aborts an upload or a download.
func (l *soakLane) abort(t *testing.T) {
	kinds := []struct {
		name string
		run  func() error
	}{
		{"upload over HTTP1", l.uploadHTTP1},
		{"upload over HTTP2", l.uploadHTTP2},
		{"upload over gRPC", l.uploadGRPC},
		{"download over HTTP1", l.downloadHTTP1},
		{"download over HTTP2", l.downloadHTTP2},
		{"download over gRPC", l.downloadGRPC},
	}
	kind := kinds[l.random.IntN(len(kinds))]
	if err := kind.run(); err != nil {
		t.Errorf("%s: %v", kind.name, err)
	}
	l.soak.mu.Lock()
	defer l.soak.mu.Unlock()
	l.aborted[kind.name]++
}

var errNotAborted = errors.New("succeeded")

// one says yes once in n times.
func (l *soakLane) one(n int) bool { return l.random.IntN(n) == 0 }

// place is where to abort what has size bytes: half of them near the beginning.
func (l *soakLane) place(size int) int {
	if l.one(2) {
		size = min(size, 4096)
	}
	return l.random.IntN(size)
}

func (l *soakLane) dial() (*net.TCPConn, error) {
	conn, err := net.Dial("tcp", l.address)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(time.Minute))
	tcp := conn.(*net.TCPConn)
	tcp.SetReadBuffer(16 << 10)
	if !l.one(8) {
		tcp.SetLinger(0) // closing resets it, and so does not use up ports
	}
	return tcp, nil
}

func (l *soakLane) uploadHTTP1() error {
	conn, err := l.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	header := fmt.Sprintf("PUT /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\n", l.key)
	if l.one(16) {
		io.WriteString(conn, header[:l.random.IntN(len(header))])
		return nil
	}
	body := l.content[:l.place(len(l.content))]
	expect := l.one(2)
	if expect {
		header += "Expect: 100-continue\r\n"
	}
	if l.one(2) {
		header += fmt.Sprintf("Content-Length: %d\r\n\r\n", len(l.content))
	} else {
		header += "Transfer-Encoding: chunked\r\n\r\n"
		body = fmt.Appendf(nil, "%x\r\n%s", len(l.content), body)
	}
	if _, err := io.WriteString(conn, header); err != nil {
		return err
	}
	if expect { // which says that the server is in the middle of it
		line, err := in.ReadString('\n')
		if line != "HTTP/1.1 100 Continue\r\n" {
			return fmt.Errorf("got %q, %w", line, err)
		}
		in.ReadString('\n')
	}
	if _, err := conn.Write(body); err != nil {
		return err
	}
	if l.one(8) { // the server is told, and answers
		conn.CloseWrite()
		if line, err := in.ReadString('\n'); line != "HTTP/1.1 400 Bad Request\r\n" {
			return fmt.Errorf("got %q, %w", line, err)
		}
	}
	return nil
}

func (l *soakLane) downloadHTTP1() error {
	conn, err := l.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\n\r\n", l.stored); err != nil {
		return err
	}
	if l.one(8) {
		return nil
	}
	_, err = io.CopyN(io.Discard, conn, int64(1+l.place(mebi)))
	return err
}

// stops is a body that ends with an error behind some bytes.
type stops struct {
	io.Reader
	at func() error
}

func (s stops) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err == io.EOF {
		err = s.at()
	}
	return n, err
}

func (l *soakLane) uploadHTTP2() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	how := l.random.IntN(16)
	body := stops{bytes.NewReader(l.content[:l.place(len(l.content))]), func() error {
		switch {
		case how == 0:
			l.cut("HTTP2")
		case how < 8:
			cancel()
		}
		return io.ErrUnexpectedEOF
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+l.address+"/v1/artifacts/"+l.key.String(), body)
	if err != nil {
		return err
	}
	if l.one(2) {
		request.ContentLength = int64(len(l.content))
	}
	response, err := l.http2.RoundTrip(request)
	if err == nil {
		response.Body.Close()
		if response.StatusCode == 201 {
			return errNotAborted
		}
	}
	return nil
}

func (l *soakLane) downloadHTTP2() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+l.address+"/v1/artifacts/"+l.stored.String(), nil)
	if err != nil {
		return err
	}
	how := l.random.IntN(16)
	if how == 1 {
		time.AfterFunc(time.Duration(l.random.IntN(2000))*time.Microsecond, cancel)
	}
	response, err := l.http2.RoundTrip(request)
	if err != nil {
		return nil // another lane cut the connection
	}
	defer response.Body.Close()
	if _, err := io.CopyN(io.Discard, response.Body, int64(l.place(2*mebi))); err != nil {
		return nil
	}
	switch {
	case how == 0:
		l.cut("HTTP2")
	case how < 8:
		cancel()
	}
	return nil
}

func (l *soakLane) uploadGRPC() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := cachev1.NewArtifactServiceClient(l.grpc).PutArtifact(ctx)
	if err != nil {
		return nil // another lane cut the connection
	}
	if l.one(16) {
		return nil
	}
	err = stream.Send(&cachev1.PutArtifactRequest{Payload: &cachev1.PutArtifactRequest_Header{Header: &cachev1.PutArtifactHeader{CacheKey: l.key.String()}}})
	chunk := 1 + l.place(256<<10)
	for part := range slices.Chunk(l.content[:l.place(len(l.content))], chunk) {
		if err != nil {
			break
		}
		err = stream.Send(&cachev1.PutArtifactRequest{Payload: &cachev1.PutArtifactRequest_Chunk{Chunk: part}})
	}
	if l.one(16) {
		l.cut("gRPC")
	}
	cancel()
	if stream.RecvMsg(&cachev1.PutArtifactResponse{}) == nil {
		return errNotAborted
	}
	return nil
}

func (l *soakLane) downloadGRPC() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if l.one(16) {
		time.AfterFunc(time.Duration(l.random.IntN(2000))*time.Microsecond, cancel)
	}
	stream, err := cachev1.NewArtifactServiceClient(l.grpc).GetArtifact(ctx, &cachev1.GetArtifactRequest{CacheKey: l.stored.String()})
	for range l.random.IntN(8) {
		if err != nil {
			return nil
		}
		_, err = stream.Recv()
	}
	if l.one(16) {
		l.cut("gRPC")
	}
	return nil
}
