//go:build unix

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// startLimited starts a server that may have so many files and connections open.
func startLimited(t *testing.T, descriptors int, dir string, args ...string) *process {
	t.Helper()
	script := filepath.Join(t.TempDir(), "limited")
	text := fmt.Sprintf("#!/bin/sh\nulimit -n %d || exit\nexec polykit-cache \"$@\"\n", descriptors)
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return startProgram(t, script, dir, args...)
}

// member is one connection of a crowd.
type member struct {
	net.Conn
	in *bufio.Reader
}

func join(t *testing.T, address string) *member {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	return &member{conn, bufio.NewReader(conn)}
}

// ask sends a request, or a part of one, and returns the status of the answer.
func (m *member) ask(t *testing.T, request string) int {
	t.Helper()
	io.WriteString(m, request) // a refused one may be closed already, behind its answer
	return m.answer(t)
}

func (m *member) answer(t *testing.T) int {
	t.Helper()
	response, err := http.ReadResponse(m.in, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		t.Fatal(err)
	}
	if response.StatusCode == 503 && response.Header.Get("Retry-After") == "" {
		t.Error("503 without Retry-After")
	}
	return response.StatusCode
}

func getOf(key artifact.Key) string {
	return "GET /v1/artifacts/" + key.String() + " HTTP/1.1\r\nHost: x\r\n\r\n"
}

func putOf(key artifact.Key, size int) string {
	return fmt.Sprintf("PUT /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", key, size)
}

// TestFewDescriptors has a crowd at a server that may have 256 files and connections open.
func TestFewDescriptors(t *testing.T) {
	p := startLimited(t, 256, t.TempDir(), "--queue-timeout=1h", "--stall-timeout=2h")
	stored := cachetest.Key("stored")
	content := cachetest.Random(stored, 8<<20) // more than sockets buffer
	first := join(t, p.address)
	first.Write([]byte(putOf(stored, len(content))))
	if status := first.ask(t, string(content)); status != 201 {
		t.Fatalf("the first upload got %d", status)
	}
	first.Close()

	// More connections than there may be.
	const most = (256 - 64) / 2
	var crowd []*member
	refused := 0
	for len(crowd)+refused < 300 {
		m := join(t, p.address)
		switch status := m.ask(t, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"); status {
		case 200:
			crowd = append(crowd, m)
		case 503:
			refused++
			m.Close() // or else it would be waited for, and of such only so many are told why
		default:
			t.Errorf("a connection got %d", status)
		}
	}
	if len(crowd) != most && len(crowd) != most-1 { // where the first one is still counted
		t.Errorf("%d connections were served and %d refused; want %d and the rest", len(crowd), refused, most)
	}

	// As many uploads as there may be and more, and a download on each of the other connections.
	half := len(crowd) / 2
	small := func(i int) (artifact.Key, []byte) {
		key := cachetest.Key(fmt.Sprint("small ", i))
		return key, cachetest.Random(key, 40_000)
	}
	for i, m := range crowd[:half] {
		key, content := small(i)
		io.WriteString(m, putOf(key, len(content)))
		m.Write(content[:20_000])
	}
	for _, m := range crowd[half:] {
		io.WriteString(m, getOf(stored)) // and none is read yet
	}
	for _, m := range crowd[half:] {
		if status := m.answer(t); status != 200 {
			t.Errorf("a download got %d", status)
		}
	}
	for i, m := range crowd[:half] {
		_, content := small(i)
		m.Write(content[20_000:])
	}
	for _, m := range crowd[:half] {
		if status := m.answer(t); status != 201 {
			t.Errorf("an upload got %d", status)
		}
	}

	// Over HTTP/2 each connection may ask for far more than there are descriptors.
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, MaxConnsPerHost: 1}
	defer transport.CloseIdleConnections()
	crowd[0].Close()
	crowd = crowd[1:]
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	served, overloaded := 0, 0
	for range 240 {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.address+"/v1/artifacts/"+stored.String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := transport.RoundTrip(request)
		for served == 0 && err != nil && ctx.Err() == nil { // the server has not seen the one leave that made room
			response, err = transport.RoundTrip(request)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close() // and it is not read
		switch {
		case response.StatusCode == 200:
			served++
		case response.StatusCode == 503 && response.Header.Get("Retry-After") != "":
			overloaded++
		default:
			t.Errorf("a download over HTTP/2 got %s", response.Status)
		}
	}
	if served < 50 || overloaded == 0 {
		t.Errorf("over HTTP/2 %d downloads were served and %d refused; this tested little", served, overloaded)
	}

	// The crowd leaves, and all is well.
	cancel()
	transport.CloseIdleConnections()
	for _, m := range crowd {
		m.Close()
	}
	again, content := small(half)
	for {
		m := join(t, p.address)
		status := m.ask(t, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		if status == 503 { // the server has not seen all of them leave
			continue
		}
		io.WriteString(m, putOf(again, len(content)))
		if status := m.ask(t, string(content)); status == 503 {
			continue
		} else if status != 201 {
			t.Errorf("an upload, then, got %d", status)
		}
		if status := m.ask(t, getOf(again)); status != 200 {
			t.Errorf("a download, then, got %d", status)
		}
		break
	}
	p.Process.Signal(os.Interrupt)
	if log := p.ends(t); strings.Contains(log, "level=ERROR") {
		t.Errorf("errors were logged:\n%s", log)
	}
}

// slowVariable is set, to a number of slow connections, to have TestSlowClients measure what they
// cost others.
const slowVariable = "POLYKIT_CACHE_TEST_SLOW_CLIENTS"

// TestSlowClients has clients that send a header or a body a byte at a time, while others are served.
// How fast these are is for whoever reads the figures.
func TestSlowClients(t *testing.T) {
	slow, rounds, span := 300, 1, 200*time.Millisecond
	if text := os.Getenv(slowVariable); text != "" {
		var err error
		if slow, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
		rounds, span = 5, 5*time.Second
	}
	p := startProgram(t, "polykit-cache", t.TempDir(), "--header-timeout=1h", "--stall-timeout=30s")
	stored := cachetest.Key("stored")
	content := cachetest.Random(stored, 4000)
	m := join(t, p.address)
	io.WriteString(m, putOf(stored, len(content)))
	if status := m.ask(t, string(content)); status != 201 {
		t.Fatalf("the first upload got %d", status)
	}

	var uploads atomic.Int64
	// measure has four others upload and download for a while, and returns how often they did.
	measure := func() (n int64) {
		var done atomic.Int64
		var others sync.WaitGroup
		end := time.Now().Add(span)
		for range 4 {
			m := join(t, p.address)
			others.Go(func() {
				defer m.Close()
				for time.Now().Before(end) {
					key := cachetest.Key(fmt.Sprint("upload ", uploads.Add(1)))
					content := cachetest.Random(key, 4000)
					io.WriteString(m, putOf(key, len(content)))
					if status := m.ask(t, string(content)); status != 201 {
						t.Errorf("an upload got %d", status)
					}
					for range 5 {
						if status := m.ask(t, getOf(stored)); status != 200 {
							t.Errorf("a download got %d", status)
						}
					}
					done.Add(1)
				}
			})
		}
		others.Wait()
		return done.Load()
	}
	measure()
	var ratios []float64
	for range rounds {
		before := measure()
		leave := beSlow(t, p.address, slow)
		during := measure()
		leave()
		ratios = append(ratios, float64(during)/float64(before))
		t.Logf("%d rounds of one upload and five downloads alone, %d beside %d slow connections: %.2f", before, during, slow, ratios[len(ratios)-1])
		if during == 0 {
			t.Error("nobody else was served")
		}
	}
	slices.Sort(ratios)
	t.Logf("median %.2f", ratios[len(ratios)/2])
	p.Process.Signal(os.Interrupt)
	p.ends(t)
}

// beSlow opens connections that send a byte a second, half of them of a header and half of a body, until
// leave is called.
func beSlow(t *testing.T, address string, n int) (leave func()) {
	t.Helper()
	header := []byte("GET /v1/artifacts/" + strings.Repeat("0", 64) + " HTTP/1.1\r\nHost: x\r\nX-Slow: " + strings.Repeat("x", 1000))
	var conns []net.Conn
	var texts [][]byte
	for i := range n {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		text := header
		if i%2 == 0 {
			key := cachetest.Key(fmt.Sprint("slow ", i))
			text = cachetest.Random(key, 4000)
			io.WriteString(conn, putOf(key, len(text)))
		}
		conns, texts = append(conns, conn), append(texts, text)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var sending sync.WaitGroup
	sending.Go(func() {
		beat := time.NewTicker(time.Second / 10) // a tenth of them at a time
		defer beat.Stop()
		for at := 0; ; at++ {
			for i := at % 10; i < n; i += 10 {
				conns[i].Write(texts[i][at/10 : at/10+1])
			}
			select {
			case <-beat.C:
			case <-ctx.Done():
				return
			}
		}
	})
	return func() {
		cancel()
		sending.Wait()
		for _, conn := range conns {
			conn.Close()
		}
	}
}
