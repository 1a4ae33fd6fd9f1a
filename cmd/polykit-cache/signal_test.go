//go:build unix

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

// How much is in flight over each protocol.
const (
	flightUploads    = 4
	flightUploadSize = 2 * mebi
	// flightDownload is more than sockets buffer of a download that nobody reads.
	flightDownload = 24 * mebi
)

// flight is uploads and downloads in flight over HTTP/1.1, HTTP/2 and gRPC, each in the middle.
type flight struct {
	resume chan struct{} // closed to let them go on
	ended  chan error    // one for each
	n      int
	keys   []artifact.Key // of the uploads
}

// takeOff stores an artifact of which it then begins downloads, and uploads others.
func takeOff(t *testing.T, p *process, dir string) *flight {
	t.Helper()
	server, err := client.ParseServer("http://" + p.address)
	check(t, err)
	overGRPC, err := client.NewGRPC(server, nil)
	check(t, err)
	rest := client.NewREST(server, nil)
	t.Cleanup(func() {
		rest.Close()
		overGRPC.Close()
	})
	f := &flight{resume: make(chan struct{}), ended: make(chan error, 3*(flightUploads+1))}

	stored := cachetest.Key("stored")
	content := cachetest.Random(stored, flightDownload)
	check(t, rest.Put(t.Context(), stored, int64(len(content)), bytes.NewReader(content)))

	http2 := overHTTP2(t, p.address)
	for protocol, via := range map[string]struct {
		put func(context.Context, artifact.Key, int64, io.Reader) error
		get func(context.Context, artifact.Key) (io.ReadCloser, error)
	}{
		"HTTP1": {rest.Put, func(ctx context.Context, key artifact.Key) (io.ReadCloser, error) {
			download, err := rest.Get(ctx, key, 0, artifact.Digest{})
			return bodyOf(download), err
		}},
		"HTTP2": {http2.put, http2.get},
		"gRPC": {overGRPC.Put, func(ctx context.Context, key artifact.Key) (io.ReadCloser, error) {
			download, err := overGRPC.Get(ctx, key, 0, artifact.Digest{})
			return bodyOf(download), err
		}},
	} {
		for i := range flightUploads {
			name := fmt.Sprintf("upload %d over %s", i, protocol)
			key := cachetest.Key(name)
			content := cachetest.Random(key, flightUploadSize)
			f.keys = append(f.keys, key)
			f.add(name, func() error {
				half := len(content) / 2
				body := io.MultiReader(bytes.NewReader(content[:half]), waiter(f.resume), bytes.NewReader(content[half:]))
				return via.put(t.Context(), key, int64(len(content)), body)
			})
		}
		body, err := via.get(t.Context(), stored)
		check(t, err)
		f.add("download over "+protocol, func() error {
			defer body.Close()
			<-f.resume
			got, err := io.ReadAll(body)
			if err == nil && !bytes.Equal(got, content) {
				err = fmt.Errorf("got %d bytes", len(got))
			}
			return err
		})
	}
	waitUntil(t, "all uploads are in the middle", func() bool {
		entries, _ := os.ReadDir(filepath.Join(dir, "tmp"))
		n := 0
		for _, entry := range entries {
			if info, err := entry.Info(); err == nil && info.Size() >= flightUploadSize/4 {
				n++
			}
		}
		return n == 3*flightUploads
	})
	return f
}

func (f *flight) add(name string, run func() error) {
	f.n++
	go func() {
		err := run()
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		f.ended <- err
	}()
}

// land lets all go on, and returns the errors.
func (f *flight) land() []error {
	close(f.resume)
	var errs []error
	for range f.n {
		if err := <-f.ended; err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// waiter reads nothing, and ends when it is closed.
type waiter <-chan struct{}

func (w waiter) Read([]byte) (int, error) {
	<-w
	return 0, io.EOF
}

func bodyOf(download *client.Download) io.ReadCloser {
	if download == nil {
		return nil
	}
	return download.Body
}

// http2Client speaks REST over HTTP/2, which the commands do not.
type http2Client struct {
	transport *http.Transport
	url       string
}

func overHTTP2(t *testing.T, address string) http2Client {
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	t.Cleanup(transport.CloseIdleConnections)
	return http2Client{transport, "http://" + address + "/v1/artifacts/"}
}

func (c http2Client) put(ctx context.Context, key artifact.Key, size int64, body io.Reader) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, c.url+key.String(), body)
	if err != nil {
		return err
	}
	request.ContentLength = size
	response, err := c.transport.RoundTrip(request)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != 201 {
		return errors.New(response.Status)
	}
	return nil
}

func (c http2Client) get(ctx context.Context, key artifact.Key) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+key.String(), nil)
	if err != nil {
		return nil, err
	}
	response, err := c.transport.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != 200 {
		response.Body.Close()
		return nil, errors.New(response.Status)
	}
	return response.Body, nil
}

// waitUntil polls for what has no signal of its own.
func waitUntil(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// signal sends a signal and waits until the server does not listen any more.
func (p *process) signal(t *testing.T, signal os.Signal) {
	t.Helper()
	check(t, p.Process.Signal(signal))
	waitUntil(t, "the server refuses connections", func() bool {
		conn, err := net.Dial("tcp", p.address)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// TestSignal ends a server with uploads and downloads in flight over all protocols: they finish, what
// comes is refused, and the exit status is 0.
func TestSignal(t *testing.T) {
	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(signal.String(), func(t *testing.T) {
			dir := t.TempDir()
			p := startProgram(t, "polykit-cache", dir, "--shutdown-timeout=1h")
			idle, err := net.Dial("tcp", p.address)
			check(t, err)
			defer idle.Close()
			answers := bufio.NewReader(idle)
			ask := func() int {
				fmt.Fprintf(idle, "HEAD /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\n\r\n", cachetest.Key("other"))
				response, err := http.ReadResponse(answers, &http.Request{Method: "HEAD"})
				check(t, err)
				return response.StatusCode
			}
			if status := ask(); status != 404 {
				t.Errorf("before the signal a miss is %d", status)
			}
			f := takeOff(t, p, dir)
			p.signal(t, signal)
			if status := ask(); status != 503 {
				t.Errorf("after the signal a request gets %d; want 503", status)
			}
			for _, err := range f.land() {
				t.Error(err)
			}
			log := p.ends(t)
			for _, want := range []string{fmt.Sprintf("requests in flight may finish\" requests=%d ", f.n), "msg=stopped"} {
				if !strings.Contains(log, want) {
					t.Errorf("logged no %q:\n%s", want, log)
				}
			}
			f.check(t, dir, true)
		})
	}
}

// TestShutdownTimeout lets a server's time to end run out. That is no failure.
func TestShutdownTimeout(t *testing.T) {
	dir := t.TempDir()
	p := startProgram(t, "polykit-cache", dir, "--shutdown-timeout=1ms")
	f := takeOff(t, p, dir)
	p.signal(t, syscall.SIGTERM)
	log := p.ends(t)
	for _, want := range []string{fmt.Sprintf("were cut\" requests=%d\n", f.n), "msg=stopped"} {
		if !strings.Contains(log, want) {
			t.Errorf("logged no %q:\n%s", want, log)
		}
	}
	if errs := f.land(); len(errs) != f.n {
		t.Errorf("of %d requests that were cut only %d failed", f.n, len(errs))
	}
	f.check(t, dir, false)
}

// TestSecondSignal ends a server at once that waits for what is in flight.
func TestSecondSignal(t *testing.T) {
	dir := t.TempDir()
	p := startProgram(t, "polykit-cache", dir, "--shutdown-timeout=1h")
	f := takeOff(t, p, dir)
	p.signal(t, syscall.SIGTERM)
	check(t, p.Process.Signal(syscall.SIGTERM))
	<-p.ended
	exit, ok := errors.AsType[*exec.ExitError](p.err)
	if !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("the server ended with %v; want the signal", exit)
	}
	if strings.Contains(p.log, "stopped") {
		t.Errorf("it did not end at once:\n%s", p.log)
	}
	if errs := f.land(); len(errs) != f.n {
		t.Errorf("of %d requests that were cut only %d failed", f.n, len(errs))
	}
	f.check(t, dir, false)
}

// check starts a server on the directory once more, and checks which uploads it has.
func (f *flight) check(t *testing.T, dir string, stored bool) {
	t.Helper()
	p := startProgram(t, "polykit-cache", dir)
	want := 404
	if stored {
		want = 200
	}
	for _, key := range f.keys {
		response, err := http.Head("http://" + p.address + "/v1/artifacts/" + key.String())
		check(t, err)
		if response.StatusCode != want {
			t.Errorf("HEAD of an upload that was in flight: got %s; want %d", response.Status, want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	if entries, err := os.ReadDir(filepath.Join(dir, "tmp")); len(entries) != 0 || err != nil {
		t.Errorf("in tmp/ are %v, %v", entries, err)
	}
	check(t, p.Process.Signal(syscall.SIGTERM))
	p.ends(t)
}

// TestSignalDuringStart ends a server before it listens: it is in the middle of its sweep, since nobody
// reads what it logs of it, which is more than a pipe holds.
func TestSignalDuringStart(t *testing.T) {
	dir := t.TempDir()
	tmp := filepath.Join(dir, "tmp")
	check(t, os.Mkdir(tmp, 0o755))
	for i := range 2000 {
		check(t, os.WriteFile(filepath.Join(tmp, fmt.Sprintf("%0100d.part", i)), nil, 0o644))
	}
	cmd := exec.Command("polykit-cache", "--port=0", "--storage-dir", dir)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	stdout, err := cmd.StdoutPipe()
	check(t, err)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	check(t, cmd.Start())
	defer cmd.Process.Kill()
	log := bufio.NewReader(stdout)
	if line, err := log.ReadString('\n'); !strings.Contains(line, "swept") || err != nil {
		t.Fatalf("the log begins with %q, %v", line, err)
	}
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	rest, err := io.ReadAll(log)
	check(t, err)
	if err := cmd.Wait(); err != nil || stderr.Len() > 0 || !strings.HasSuffix(string(rest), "msg=stopped\n") {
		t.Errorf("the server ended with %v and %q", err, &stderr)
	}
	if entries, err := os.ReadDir(tmp); len(entries) != 0 || err != nil {
		t.Errorf("%d files are left in tmp/, %v", len(entries), err)
	}
}

// TestHangup has a server look at its certificates when it gets SIGHUP, which does not end it.
func TestHangup(t *testing.T) {
	dir := t.TempDir()
	cachetest.NewAuthority("authority").Write(t, dir, "server")
	cmd := exec.Command("polykit-cache", "--port=0", "--storage-dir", filepath.Join(dir, "store"),
		"--tls-cert", filepath.Join(dir, "cert.pem"), "--tls-key", filepath.Join(dir, "key.pem"))
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	stdout, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	defer cmd.Process.Kill()
	log := bufio.NewReader(stdout)
	until := func(text string) {
		t.Helper()
		for {
			line, err := log.ReadString('\n')
			if strings.Contains(line, text) {
				return
			}
			if err != nil {
				t.Fatalf("the log ends before %q: %v", text, err)
			}
		}
	}
	until("listening")
	check(t, cmd.Process.Signal(syscall.SIGHUP))
	until("the certificate files have not changed")
	check(t, os.Remove(filepath.Join(dir, "key.pem")))
	check(t, cmd.Process.Signal(syscall.SIGHUP))
	until("those that were loaded before stay in use")
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	until("msg=stopped")
	check(t, cmd.Wait())
}
