package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

// eachProxy runs a test with each proxy.
func eachProxy(t *testing.T, test func(t *testing.T, proxy reverseProxy)) {
	t.Parallel()
	for _, proxy := range reverseProxies {
		t.Run(proxy.name, func(t *testing.T) {
			t.Parallel()
			test(t, proxy)
		})
	}
}

// carriers returns how artifacts go up and down through a proxy, by protocol.
func (p *proxied) carriers(t *testing.T) map[string]carrier {
	return map[string]carrier{
		"HTTP1": restCarrier(p.rest), "HTTP2": {p.http2(t).put, p.http2(t).get},
		"HTTP1 chunked": {func(ctx context.Context, key artifact.Key, _ int64, body io.Reader) error {
			return p.rest.Put(ctx, key, client.UnknownSize, body)
		}, restCarrier(p.rest).get},
		"gRPC": {p.grpc.Put, func(ctx context.Context, key artifact.Key) (io.ReadCloser, error) {
			download, err := p.grpc.Get(ctx, key, 0, artifact.Digest{})
			return bodyOf(download), err
		}},
	}
}

type carrier struct {
	put func(context.Context, artifact.Key, int64, io.Reader) error
	get func(context.Context, artifact.Key) (io.ReadCloser, error)
}

func restCarrier(rest *client.REST) carrier {
	return carrier{rest.Put, func(ctx context.Context, key artifact.Key) (io.ReadCloser, error) {
		download, err := rest.Get(ctx, key, 0, artifact.Digest{})
		return bodyOf(download), err
	}}
}

// TestProxy uploads and downloads large artifacts through each proxy, over each protocol and below a prefix.
func TestProxy(t *testing.T) {
	eachProxy(t, func(t *testing.T, proxy reverseProxy) {
		p := newProxied(t, proxy, "")
		carriers := p.carriers(t)
		below, _ := p.dial(t, p.base+prefix)
		carriers["prefix"] = restCarrier(below)
		large := proxiedSize
		if proxy.name != "nginx" { // which is the one that buffers, and writes to files what is large, if it may
			large = 16 * mebi
		}
		sizes := map[string]int{"HTTP1": large, "HTTP2": large, "gRPC": large, "HTTP1 chunked": 8 * mebi, "prefix": 8 * mebi}
		for name, c := range carriers {
			key := cachetest.Key(name)
			content := cachetest.Random(key, sizes[name])
			if err := c.put(t.Context(), key, int64(len(content)), bytes.NewReader(content)); err != nil {
				t.Errorf("%s: upload: %v", name, err)
				continue
			}
			body, err := c.get(t.Context(), key)
			if err != nil {
				t.Errorf("%s: download: %v", name, err)
				continue
			}
			got, err := io.ReadAll(body)
			body.Close()
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("%s: downloaded %d bytes, %v; want the %d that were uploaded", name, len(got), err, len(content))
			}
		}

		// A part of one, and its headers alone.
		key := cachetest.Key("HTTP1")
		content := cachetest.Random(key, large)
		for _, base := range []string{p.base, p.base + prefix} {
			for _, c := range []struct {
				method, span string
				status       int
				length       int64
				body         []byte
			}{
				{http.MethodHead, "", 200, int64(len(content)), nil},
				{http.MethodGet, "bytes=1000000-1000099", 206, 100, content[1000000:1000100]},
			} {
				request, err := http.NewRequestWithContext(t.Context(), c.method, base+"/v1/artifacts/"+key.String(), nil)
				check(t, err)
				if c.span != "" {
					request.Header.Set("Range", c.span)
				}
				response, err := p.http2(t).transport.RoundTrip(request)
				check(t, err)
				body, err := io.ReadAll(response.Body)
				response.Body.Close()
				hash := response.Header.Get("X-Artifact-Hash")
				if response.StatusCode != c.status || response.ContentLength != c.length || !bytes.Equal(body, c.body) || err != nil ||
					hash == "" || response.Header.Get("ETag") != `"`+hash+`"` || response.Header.Get("Accept-Ranges") != "bytes" {
					t.Errorf("%s %s %s: %s with %d bytes, %v, %v", c.method, base, c.span, response.Status, len(body), response.Header, err)
				}
			}
		}
	})
}

// TestProxyRefusal proves that clients which are still sending a large body read through each proxy why it
// was refused.
func TestProxyRefusal(t *testing.T) {
	eachProxy(t, func(t *testing.T, proxy reverseProxy) {
		if _, err := exec.LookPath("curl"); err != nil {
			skip(t, "curl is not installed")
		}
		open := newProxied(t, proxy, "")
		policy := filepath.Join(t.TempDir(), "auth.yaml")
		check(t, os.WriteFile(policy, []byte("anonymous: {role: reader}\n"), 0o600))
		closed := newProxied(t, proxy, "", "--auth-file", policy)
		stored := cachetest.Key("stored")
		sound := cachetest.Sound(stored, nil)
		check(t, open.rest.Put(t.Context(), stored, int64(len(sound)), bytes.NewReader(sound)))
		file := filepath.Join(t.TempDir(), "body")
		check(t, os.WriteFile(file, nil, 0o600))

		for _, c := range []struct {
			name     string
			server   *proxied
			key      string
			size     int64 // declared
			status   int
			code     codes.Code
			sentence string
		}{
			{"bad key", open, "not-a-key", proxiedSize, 400, codes.InvalidArgument, "32 to 128"},
			{"no credential", closed, cachetest.Key("new").String(), proxiedSize, 401, codes.Unauthenticated, ""},
			{"exists", open, stored.String(), proxiedSize, 409, codes.AlreadyExists, "already"},
			{"too large", open, cachetest.Key("large").String(), proxiedLimit + 1, 413, codes.ResourceExhausted, "65"},
		} {
			check(t, os.Truncate(file, c.size))
			for _, options := range [][]string{
				{"--http1.1"}, {"--http1.1", "-H", "Expect:"}, {"--http1.1", "-H", "Expect:", "-H", "Transfer-Encoding: chunked"}, {"--http2"},
			} {
				if !proxy.reads || c.status == 413 && len(options) > 3 { // the size is not known, so what the body is not is found first
					continue
				}
				args := append([]string{"-sS", "--cacert", c.server.ca, "-w", " %{http_code}", "-T", file, c.server.base + "/v1/artifacts/" + c.key}, options...)
				for range 3 {
					output, err := exec.Command("curl", args...).CombinedOutput()
					if err != nil || !strings.HasPrefix(string(output), `{"error":"`) || !strings.Contains(string(output), c.sentence) || !strings.HasSuffix(string(output), fmt.Sprint("} ", c.status)) {
						t.Errorf("%s: curl %v: %v, %s", c.name, options, err, output)
					}
				}
			}
			if c.key == "not-a-key" { // what a client of gRPC of its own would send
				continue
			}
			key, err := artifact.ParseKey(c.key)
			check(t, err)
			for range 3 {
				err := c.server.grpc.Put(t.Context(), key, c.size, io.LimitReader(endless{}, c.size))
				refusal, ok := errors.AsType[*client.Error](err)
				if !ok || refusal.Code != c.code || refusal.Reason == "" || !strings.Contains(refusal.Sentence, c.sentence) {
					t.Errorf("%s: gRPC: %v", c.name, err)
				}
			}
		}
	})
}

// endless reads zeros.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestProxyAbort leaves uploads and downloads through each proxy midway, and checks that the server keeps
// nothing of them.
func TestProxyAbort(t *testing.T) {
	eachProxy(t, func(t *testing.T, proxy reverseProxy) {
		p := newProxied(t, proxy, "")
		stored := cachetest.Key("stored")
		content := cachetest.Random(stored, flightDownload)
		check(t, p.rest.Put(t.Context(), stored, int64(len(content)), bytes.NewReader(content)))
		uploads := func() (sizes []int64) {
			entries, _ := os.ReadDir(filepath.Join(p.dir, "tmp"))
			for _, entry := range entries {
				if info, err := entry.Info(); err == nil {
					sizes = append(sizes, info.Size())
				}
			}
			return sizes
		}
		opened := func() []string { return (&traced{cmd: p.Cmd}).openBelow(t, p.dir) }
		idle := len(opened())
		for name, c := range p.carriers(t) {
			key := cachetest.Key(name)
			content := cachetest.Random(key, 6*mebi)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				ended <- c.put(ctx, key, int64(len(content)), io.MultiReader(bytes.NewReader(content[:4*mebi]), waiter(ctx.Done())))
			}()
			waitUntil(t, "the server has some of the upload over "+name, func() bool {
				sizes := uploads()
				return len(sizes) == 1 && sizes[0] > mebi
			})
			cancel()
			if err := <-ended; err == nil {
				t.Errorf("%s: the upload succeeded", name)
			}
			waitUntil(t, "the server has nothing of the upload over "+name, func() bool { return len(uploads()) == 0 })
			check(t, c.put(t.Context(), key, int64(len(content)), bytes.NewReader(content))) // the key is free

			ctx, cancel = context.WithCancel(t.Context())
			body, err := c.get(ctx, stored)
			check(t, err)
			if _, err := io.CopyN(io.Discard, body, mebi); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, "the server is in the middle of the download over "+name, func() bool { return len(opened()) > idle })
			cancel()
			body.Close()
			waitUntil(t, "the server has left the download over "+name, func() bool { return len(opened()) <= idle })
		}
	})
}

// TestProxySlow uploads through each proxy for longer than the proxy waits for anything, and then stalls for
// longer than the server waits, which is what the client must be told.
func TestProxySlow(t *testing.T) {
	eachProxy(t, func(t *testing.T, proxy reverseProxy) {
		const timeout = 2 * time.Second
		p := newProxied(t, proxy, timeout.String())
		type result struct {
			name string
			err  error
		}
		ended := make(chan result)
		carriers := p.carriers(t)
		for name, c := range carriers {
			key := cachetest.Key(name)
			content := cachetest.Random(key, mebi)
			go func() {
				ended <- result{name, c.put(t.Context(), key, int64(len(content)), newSlowReader(content, 2*timeout))}
			}()
		}
		for range carriers {
			if r := <-ended; r.err != nil {
				t.Errorf("%s: %v", r.name, r.err)
			}
		}
	})
}

// slowReader reads content in pieces, each after a pause.
type slowReader struct {
	content []byte
	piece   int
	pause   time.Duration
}

// newSlowReader returns a reader that takes some time for all.
func newSlowReader(content []byte, whole time.Duration) *slowReader {
	const pieces = 40
	return &slowReader{content, len(content)/pieces + 1, whole / pieces}
}

func (s *slowReader) Read(p []byte) (int, error) {
	if len(s.content) == 0 {
		return 0, io.EOF
	}
	time.Sleep(s.pause) // being slow is what is tested
	n := copy(p, s.content[:min(len(s.content), s.piece)])
	s.content = s.content[n:]
	return n, nil
}

// TestProxyStall stalls in the middle of uploads through each proxy: it is the server that tells the client
// so, and not the proxy.
func TestProxyStall(t *testing.T) {
	eachProxy(t, func(t *testing.T, proxy reverseProxy) {
		p := newProxied(t, proxy, "", "--stall-timeout=500ms", "--queue-timeout=400ms")
		for name, c := range p.carriers(t) {
			key := cachetest.Key(name)
			content := cachetest.Random(key, mebi)
			body, rest := io.Pipe() // whose Read ends when who reads closes it
			go rest.Write(content[:1000])
			err := c.put(t.Context(), key, int64(len(content)), body)
			body.Close()
			refusal, ok := errors.AsType[*client.Error](err)
			if name == "HTTP2" && (err == nil || err.Error() != "408 Request Timeout") || name != "HTTP2" && (!ok || refusal.Sentence == "" || refusal.Status != 408 && refusal.Code != codes.DeadlineExceeded) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// TestProxyHeaders looks at what each proxy says of a client to the server behind it.
func TestProxyHeaders(t *testing.T) {
	eachProxy(t, func(t *testing.T, proxy reverseProxy) {
		type seen struct {
			header http.Header
			host   string
			http   int // version
			conn   string
		}
		requests := make(chan seen, 1)
		backend := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests <- seen{r.Header, r.Host, r.ProtoMajor, r.RemoteAddr}
			w.WriteHeader(http.StatusTeapot)
		}))
		backend.Config.Protocols = &http.Protocols{}
		backend.Config.Protocols.SetHTTP1(true)
		backend.Config.Protocols.SetUnencryptedHTTP2(true)
		backend.Start()
		defer backend.Close()
		certs, authority := t.TempDir(), cachetest.NewAuthority("authority")
		authority.Write(t, certs, "proxy")
		address := proxy.start(t, certs, backend.Listener.Addr().String(), "")
		protocols := &http.Protocols{}
		protocols.SetHTTP2(true)
		transport := &http.Transport{Protocols: protocols, TLSClientConfig: &tls.Config{RootCAs: authority.Pool()}}
		defer transport.CloseIdleConnections()
		ids, conns := map[string]bool{}, map[string]bool{}
		for _, path := range []string{"/v1/artifacts/x", prefix + "/v1/artifacts/x", "/polykit.cache.v1.ArtifactService/StatArtifact", "/grpc.health.v1.Health/Check"} {
			for _, id := range []string{"", "given-by-the-client"} {
				request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+address+path, nil)
				check(t, err)
				request.Header.Set("Authorization", "Bearer token")
				request.Header.Set("Polykit-Cache-Scope", "default")
				if id != "" {
					request.Header.Set("X-Request-Id", id)
				}
				version := 1
				if strings.HasPrefix(path, "/polykit") || strings.HasPrefix(path, "/grpc") {
					version = 2
					request.Header.Set("Content-Type", "application/grpc")
				}
				response, err := transport.RoundTrip(request)
				check(t, err)
				response.Body.Close()
				got := <-requests
				for name, want := range map[string]string{"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "https", "Authorization": "Bearer token", "Polykit-Cache-Scope": "default"} {
					if got.header.Get(name) != want {
						t.Errorf("%s: %s is %q, want %q", path, name, got.header.Get(name), want)
					}
				}
				if got.http != version {
					t.Errorf("%s: passed on over HTTP/%d, want %d", path, got.http, version)
				}
				if version == 1 {
					conns[got.conn] = true
				}
				if host, _, _ := strings.Cut(got.host, ":"); host != "127.0.0.1" {
					t.Errorf("%s: Host is %q", path, got.host)
				}
				gotID := got.header.Get("X-Request-Id")
				if id != "" && gotID != id || len(gotID) < 16 || id == "" && ids[gotID] {
					t.Errorf("%s: X-Request-Id is %q where the client sent %q", path, gotID, id)
				}
				ids[gotID] = true
			}
		}
		if len(conns) > 2 { // one more below the prefix
			t.Errorf("the proxy made %d connections for 4 requests over REST, one after the other", len(conns))
		}
	})
}
