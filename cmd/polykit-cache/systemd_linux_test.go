package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/connectivity"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

// told is a socket on which servers tell a service manager how they do.
type told struct {
	*net.UnixConn
	before []string // all that came so far
}

// newTold returns such a socket; a name that begins with @ is an abstract one.
func newTold(t *testing.T, name string) *told {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	// So that a test which waits in vain says so.
	check(t, conn.SetReadDeadline(time.Now().Add(time.Minute)))
	return &told{UnixConn: conn}
}

// until waits for an assignment, or one that begins so, and returns all that came with it.
func (s *told) until(t *testing.T, want string) []string {
	t.Helper()
	buf := make([]byte, 4096)
	for {
		n, err := s.Read(buf)
		if err != nil {
			t.Fatalf("told no %s, only %q: %v", want, s.before, err)
		}
		assignments := strings.Split(string(buf[:n]), "\n")
		s.before = append(s.before, assignments...)
		for _, assignment := range assignments {
			if strings.HasPrefix(assignment, want) {
				return assignments
			}
		}
	}
}

// startService starts a server as a service manager does, in the environment and with the sockets passed. $$ in
// the environment is its process ID.
func startService(t *testing.T, dir, environment string, passed []*os.File, args ...string) *process {
	t.Helper()
	p := &process{ended: make(chan struct{})}
	p.Cmd = exec.Command("sh", append([]string{"-c", "export " + environment + `; exec polykit-cache "$@"`, "sh", "--storage-dir", dir}, args...)...)
	p.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	p.Stderr = &p.stderr
	p.ExtraFiles = passed
	var err error
	p.stdout, err = p.StdoutPipe()
	check(t, err)
	check(t, p.Start())
	t.Cleanup(func() {
		p.Process.Kill()
		<-p.ended
	})
	p.listen()
	return p
}

// onePassed passes one socket.
const onePassed = "LISTEN_PID=$$ LISTEN_FDS=1 "

// listenPassed returns a socket to pass, which stays open whatever servers do, and its address.
func listenPassed(t *testing.T) (*os.File, string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer listener.Close()
	file, err := listener.(*net.TCPListener).File()
	check(t, err)
	t.Cleanup(func() { file.Close() })
	return file, listener.Addr().String()
}

// TestServiceManagerIsTold has servers tell how they do from start to end.
func TestServiceManagerIsTold(t *testing.T) {
	t.Parallel()
	certs := t.TempDir()
	cachetest.NewAuthority("authority").Write(t, certs, "server")
	for name, test := range map[string]struct {
		socket, url string
		args        []string
	}{
		"socket in a directory": {filepath.Join(t.TempDir(), "notify"), "http://", nil},
		"abstract socket":       {fmt.Sprintf("@polykit-cache-test-%d", os.Getpid()), "http://", nil},
		"TLS": {fmt.Sprintf("@polykit-cache-test-tls-%d", os.Getpid()), "https://",
			[]string{"--tls-cert", filepath.Join(certs, "cert.pem"), "--tls-key", filepath.Join(certs, "key.pem")}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			told := newTold(t, test.socket)
			p := startService(t, t.TempDir(), "NOTIFY_SOCKET="+test.socket+" WATCHDOG_PID=$$ WATCHDOG_USEC=2000000", nil,
				append([]string{"--port=0", "--shutdown-timeout=5s"}, test.args...)...)
			if first := told.until(t, "")[0]; first != "STATUS=Opening the storage" {
				t.Errorf("the first that was told is %q", first)
			}
			told.until(t, "READY=1")
			told.until(t, "STATUS=Ready on "+test.url+p.address+"; stored: ")
			for range 3 {
				told.until(t, "WATCHDOG=1")
			}
			check(t, p.Process.Signal(syscall.SIGHUP))
			if reloading := told.until(t, "RELOADING=1"); len(reloading) != 2 || !strings.HasPrefix(reloading[1], "MONOTONIC_USEC=") {
				t.Errorf("at a reload it told %q", reloading)
			}
			told.until(t, "READY=1")
			told.until(t, "WATCHDOG=1") // and so it answers
			check(t, p.Process.Signal(syscall.SIGTERM))
			if stopping := told.until(t, "STOPPING=1"); len(stopping) != 3 || stopping[1] != "EXTEND_TIMEOUT_USEC=20000000" || !strings.HasPrefix(stopping[2], "STATUS=Stopping") {
				t.Errorf("at the end it told %q", stopping)
			}
			p.ends(t)
		})
	}
}

// TestWatchdogOfAnother starts a server whose watchdog is for another process, and one without.
func TestWatchdogOfAnother(t *testing.T) {
	t.Parallel()
	for i, environment := range []string{"WATCHDOG_PID=1 WATCHDOG_USEC=1000", ""} {
		name := fmt.Sprintf("@polykit-cache-test-%d-%d", os.Getpid(), i)
		told := newTold(t, name)
		p := startService(t, t.TempDir(), "NOTIFY_SOCKET="+name+" "+environment, nil, "--port=0")
		told.until(t, "STATUS=Ready")
		check(t, p.Process.Signal(syscall.SIGTERM))
		told.until(t, "STOPPING=1")
		p.ends(t)
		if all := strings.Join(told.before, " "); strings.Contains(all, "WATCHDOG") {
			t.Errorf("%s: it told %q", environment, all)
		}
	}
}

// TestWatchdogAsks has what the watchdog asks answer, or not, in all ways.
func TestWatchdogAsks(t *testing.T) {
	t.Parallel()
	answers := func(status string) func(net.Conn) {
		return func(conn net.Conn) {
			http.ReadRequest(bufio.NewReader(conn))
			io.WriteString(conn, "HTTP/1.1 "+status+"\r\nContent-Length: 0\r\n\r\n")
			conn.Close()
		}
	}
	for name, test := range map[string]struct {
		serve func(net.Conn) // nil if nobody accepts connections
		want  string         // in the error
	}{
		"200":             {answers("200 OK"), ""},
		"503":             {answers("503 Service Unavailable"), ""},
		"too many":        {func(conn net.Conn) { conn.Close() }, ""},
		"500":             {answers("500 Internal Server Error"), "500"},
		"nobody accepts":  {nil, "no answer within"},
		"nobody answers":  {func(net.Conn) {}, "no answer within"},
		"nobody listens":  {nil, "connection refused"},
		"server has gone": {nil, "canceled"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			check(t, err)
			defer listener.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			m := &serviceManager{watchdog: time.Minute, url: "http://" + listener.Addr().String(), probe: &http.Transport{DisableKeepAlives: true}}
			switch name {
			case "nobody accepts", "nobody answers":
				m.watchdog = 20 * time.Millisecond
			case "nobody listens":
				listener.Close()
			case "server has gone":
				cancel()
			}
			if test.serve != nil {
				go func() {
					for {
						conn, err := listener.Accept()
						if err != nil {
							return
						}
						defer conn.Close()
						test.serve(conn)
					}
				}()
			}
			if err := m.ask(ctx); (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v; want %q", err, test.want)
			}
		})
	}
}

// TestNoWatchdogWithoutAnswer has a server that does not answer, and may not say that it does.
func TestNoWatchdogWithoutAnswer(t *testing.T) {
	name := fmt.Sprintf("@polykit-cache-test-%d-silent", os.Getpid())
	told := newTold(t, name)
	t.Setenv("NOTIFY_SOCKET", name)
	listener, err := net.Listen("tcp", "127.0.0.1:0") // which nobody serves
	check(t, err)
	defer listener.Close()
	var log bytes.Buffer
	m := &serviceManager{log: slog.New(slog.NewTextHandler(&log, nil)), watchdog: 20 * time.Millisecond, url: "http://" + listener.Addr().String(), probe: &http.Transport{}}
	m.beat(t.Context())
	ready := errors.New("storage directory can't be written:\nfull")
	m.tellStatus(t.Context(), serving{ready: func(context.Context) error { return ready }, diskSize: func() int64 { return 3 << 30 }})
	told.until(t, "STATUS=NOT READY for uploads (storage directory can't be written: full) on "+m.url+"; stored: 3.0 GiB")
	if len(told.before) != 1 {
		t.Errorf("it told %q", told.before)
	}
	if !strings.Contains(log.String(), "does not answer its own health check") {
		t.Errorf("it logged %q", &log)
	}
}

// TestPassedSockets starts servers with sockets that can be served, and with others.
func TestPassedSockets(t *testing.T) {
	t.Parallel()
	socket, address := listenPassed(t)
	other, _ := listenPassed(t)
	local, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "socket")})
	check(t, err)
	defer local.Close()
	localFile, err := local.File()
	check(t, err)
	defer localFile.Close()
	_, port, err := net.SplitHostPort(address)
	check(t, err)
	for name, test := range map[string]struct {
		environment string
		passed      []*os.File
		args        []string
		refused     string // empty if the server serves
	}{
		"one":               {onePassed, []*os.File{socket}, nil, ""},
		"the same address":  {onePassed, []*os.File{socket}, []string{"--bind=localhost", "--port=" + port}, ""},
		"any port":          {onePassed, []*os.File{socket}, []string{"--port=0"}, ""},
		"of another":        {"LISTEN_PID=1 LISTEN_FDS=2", nil, []string{"--port=0"}, ""},
		"another port":      {onePassed, []*os.File{socket}, []string{"--port=8080"}, "--port is 8080, but the service manager passed a socket on " + address},
		"in environment":    {onePassed + "POLYKIT_CACHE_PORT_NUMBER=8080", []*os.File{socket}, nil, "--port is 8080, but"},
		"another interface": {onePassed, []*os.File{socket}, []string{"--bind=0.0.0.0"}, `--bind is "0.0.0.0", but the service manager passed a socket on ` + address},
		"two":               {"LISTEN_PID=$$ LISTEN_FDS=2", []*os.File{socket, other}, nil, "passed 2 sockets, and the server has one port"},
		"not TCP":           {onePassed, []*os.File{localFile}, nil, "does not listen for TCP"},
	} {
		t.Run(name, func(t *testing.T) {
			p := startService(t, t.TempDir(), test.environment, test.passed, test.args...)
			if test.refused != "" {
				<-p.ended
				if p.ProcessState.ExitCode() != exitUsage || !strings.Contains(p.stderr.String(), test.refused) {
					t.Errorf("got status %d and %q; want %d and %q", p.ProcessState.ExitCode(), &p.stderr, exitUsage, test.refused)
				}
				return
			}
			if served := p.address == address; served != (len(test.passed) > 0) {
				t.Errorf("the server listens on %s; a socket on %s was passed: %v", p.address, address, len(test.passed) > 0)
			}
			response, err := http.Get("http://" + p.address + "/readyz")
			check(t, err)
			response.Body.Close()
			if response.StatusCode != 200 {
				t.Errorf("/readyz: %s", response.Status)
			}
			check(t, p.Process.Signal(syscall.SIGTERM))
			p.ends(t)
		})
	}
}

// TestHandover ends a server on a socket that is passed to another afterwards. What comes on connections that
// are open is served, and those that are opened wait.
func TestHandover(t *testing.T) {
	t.Parallel()
	socket, address := listenPassed(t)
	dir := t.TempDir()
	p := startService(t, dir, onePassed, []*os.File{socket}, "--shutdown-timeout=1h")
	request := func(conn net.Conn) {
		_, err := fmt.Fprintf(conn, "HEAD /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\n\r\n", cachetest.Key("other"))
		check(t, err)
	}
	answer := func(conn net.Conn) (last bool) {
		t.Helper()
		response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: "HEAD"})
		check(t, err)
		if response.StatusCode != 404 {
			t.Fatalf("a miss is %s", response.Status)
		}
		return response.Close
	}
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", address)
		check(t, err)
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	var idle []net.Conn
	for range 2 {
		conn := dial()
		request(conn)
		answer(conn)
		idle = append(idle, conn)
	}
	url, err := client.ParseServer("http://" + address)
	check(t, err)
	calls, err := client.DialGRPC(url, nil)
	check(t, err)
	defer calls.Close()
	calls.Connect()
	for state := calls.GetState(); state != connectivity.Ready; state = calls.GetState() {
		calls.WaitForStateChange(t.Context(), state)
	}
	_, err = cachev1.NewArtifactServiceClient(calls).FindMissingArtifacts(t.Context(), &cachev1.FindMissingArtifactsRequest{})
	check(t, err)
	f := takeOff(t, p, dir)
	check(t, p.Process.Signal(syscall.SIGTERM))
	for last := false; !last; { // the first may come before the signal
		request(idle[0])
		last = answer(idle[0])
	}
	request(idle[1])
	if !answer(idle[1]) {
		t.Error("who sends a request while the server stops is not told to open another connection")
	}
	gone, cancel := context.WithTimeout(t.Context(), 20*time.Second) // less than --stall-timeout
	defer cancel()
	if !calls.WaitForStateChange(gone, connectivity.Ready) {
		t.Error("who makes gRPC calls is not told to open another connection")
	}
	for _, err := range f.land() {
		t.Error(err)
	}
	p.ends(t)
	waiting := dial()
	request(waiting)
	p = startService(t, dir, onePassed, []*os.File{socket})
	answer(waiting)
	check(t, p.Process.Signal(syscall.SIGTERM))
	p.ends(t)
}

// TestRestartUnderLoad restarts a server on a socket that stays, while clients use it. None sees any of that.
func TestRestartUnderLoad(t *testing.T) {
	t.Parallel()
	socket, address := listenPassed(t)
	dir := t.TempDir()
	url, err := client.ParseServer("http://" + address)
	check(t, err)
	var done atomic.Int64
	ctx, abort := context.WithCancel(t.Context()) // of requests
	var stopped atomic.Bool
	var clients sync.WaitGroup
	defer clients.Wait()
	defer abort()
	// load uploads artifacts and downloads them.
	load := func(name string, put func(artifact.Key, []byte) error, get func(artifact.Key) (io.ReadCloser, error)) {
		clients.Go(func() {
			for i := 0; !stopped.Load() && ctx.Err() == nil; i++ {
				key := cachetest.Key(fmt.Sprintf("%s %d", name, i))
				content := cachetest.Random(key, 3000)
				if err := put(key, content); err != nil {
					t.Errorf("upload %d over %s: %v", i, name, err)
					return
				}
				body, err := get(key)
				var got []byte
				if err == nil {
					got, err = io.ReadAll(body)
					body.Close()
				}
				if err != nil || !bytes.Equal(got, content) {
					t.Errorf("download %d over %s: %d bytes, %v", i, name, len(got), err)
					return
				}
				done.Add(1)
			}
		})
	}
	for i := range 3 {
		fresh := http2Client{&http.Transport{DisableKeepAlives: true}, "http://" + address + "/v1/artifacts/"}
		kept := http2Client{&http.Transport{}, fresh.url}
		t.Cleanup(kept.transport.CloseIdleConnections)
		for name, c := range map[string]http2Client{"HTTP/1.1, kept": kept, "HTTP/1.1, fresh": fresh, "HTTP/2": overHTTP2(t, address)} {
			load(fmt.Sprintf("%s %d", name, i), func(key artifact.Key, content []byte) error {
				return c.put(ctx, key, int64(len(content)), bytes.NewReader(content))
			}, func(key artifact.Key) (io.ReadCloser, error) { return c.get(ctx, key) })
		}
		c, err := client.NewGRPC(url, nil)
		check(t, err)
		t.Cleanup(func() { c.Close() })
		load(fmt.Sprintf("gRPC %d", i), func(key artifact.Key, content []byte) error {
			return c.Put(ctx, key, int64(len(content)), bytes.NewReader(content))
		}, func(key artifact.Key) (io.ReadCloser, error) {
			download, err := c.Get(ctx, key, 0, artifact.Digest{})
			return bodyOf(download), err
		})
	}
	for range 4 {
		p := startService(t, dir, onePassed, []*os.File{socket}, "--shutdown-timeout=1h")
		before := done.Load()
		waitUntil(t, "clients go on", func() bool { return done.Load() > before+50 || t.Failed() })
		check(t, p.Process.Signal(syscall.SIGTERM))
		<-p.ended
		if p.err != nil || strings.Contains(p.log, "were cut") {
			t.Fatalf("the server ended with %v:\n%s", p.err, p.log)
		}
		if t.Failed() {
			return
		}
	}
	p := startService(t, dir, onePassed, []*os.File{socket}) // for those who wait
	stopped.Store(true)
	clients.Wait()
	check(t, p.Process.Signal(syscall.SIGTERM))
	p.ends(t)
}
