package server_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/server"
)

// BenchmarkSmall asks for a small artifact again and again on one connection, and for comparison a
// server that is net/http with the same bytes in memory and nothing else.
func BenchmarkSmall(b *testing.B) {
	log := slog.New(slog.DiscardHandler)
	verifier := artifact.NewVerifier(artifact.DefaultLimits)
	store, err := disk.Open(disk.Config{Dir: b.TempDir(), Verifier: verifier, Log: log, HotSize: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	c := cache.New(store, verifier, cache.Config{MaxSize: 1 << 30})
	if _, err := c.Put(b.Context(), cachetest.Key("a"), int64(len(artifactA)), bytes.NewReader(artifactA)); err != nil {
		b.Fatal(err)
	}
	s := server.New(c, server.DefaultConfig, log)
	serve := func(listener net.Listener) {
		ctx, stop := context.WithCancel(b.Context())
		served := make(chan error, 1)
		go func() { served <- s.Serve(ctx, listener) }()
		b.Cleanup(func() {
			stop()
			if err := <-served; err != nil {
				b.Error(err)
			}
		})
	}
	bare := func(listener net.Listener) {
		h := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/zstd")
			w.Header().Set("Content-Length", strconv.Itoa(len(artifactA)))
			w.Write(artifactA)
		})}
		go h.Serve(listener)
		b.Cleanup(func() { h.Close() })
	}
	listen := func(start func(net.Listener)) string {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		start(listener)
		return listener.Addr().String()
	}
	ours := listen(serve)
	for _, bench := range []struct{ name, address, method, key string }{
		{"get", ours, "GET", keyA},
		{"head", ours, "HEAD", keyA},
		{"miss", ours, "GET", cachetest.Key("b").String()},
		{"bare", listen(bare), "GET", keyA},
	} {
		b.Run(bench.name, func(b *testing.B) {
			conn, err := net.Dial("tcp", bench.address)
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			request := []byte(bench.method + " /v1/artifacts/" + bench.key + " HTTP/1.1\r\nHost: x\r\n\r\n")
			in := bufio.NewReaderSize(conn, 64<<10)
			response, err := answerLength(conn, in, request, bench.method)
			if err != nil {
				b.Fatal(err)
			}
			buf := make([]byte, response)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := conn.Write(request); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(conn, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// answerLength returns how long the answer to a request is.
func answerLength(conn net.Conn, in *bufio.Reader, request []byte, method string) (length int, err error) {
	if _, err := conn.Write(request); err != nil {
		return 0, err
	}
	var all bytes.Buffer
	in.Reset(io.TeeReader(conn, &all))
	response, err := http.ReadResponse(in, &http.Request{Method: method})
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, response.Body)
	return all.Len(), err
}
