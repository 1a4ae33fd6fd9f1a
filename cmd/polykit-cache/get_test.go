package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

const (
	testKey = "0123456789abcdef0123456789abcdef"

	mebi = 1 << 20
	// lost is more than what a cut connection has passed on that the client could not use: parts of
	// gRPC's messages, and headers.
	lost = mebi
)

// protocols are the flags of the client for each.
var protocols = map[string]bool{"rest": false, "grpc": true}

// eachProtocol runs a test over each protocol.
func eachProtocol(t *testing.T, test func(t *testing.T, grpc bool)) {
	t.Parallel()
	for name, grpc := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, grpc)
		})
	}
}

// largeArtifact returns an artifact of a little more than 4 MiB. Another seed gives another one.
func largeArtifact(t *testing.T, seed uint64) []byte {
	t.Helper()
	content := make([]byte, 4*mebi)
	random := rand.New(rand.NewPCG(seed, 0))
	for i := range content {
		content[i] = byte(random.Uint32())
	}
	key, err := artifact.ParseKey(testKey)
	if err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	if _, err := artifact.Pack(&packed, fstest.MapFS{"content": {Data: content}}, key, artifact.Metadata{CreatedAt: time.Unix(1, 0)}); err != nil {
		t.Fatal(err)
	}
	return packed.Bytes()
}

// sha returns the SHA-256 of data in hexadecimal digits.
func sha(data []byte) string { return artifact.Digest(sha256.Sum256(data)).String() }

// startServer starts a server that stores the artifacts under testKey, and returns its address. The
// server must end with exit status 0.
func startServer(t *testing.T, stored ...[]byte) string {
	t.Helper()
	return startServerIn(t, t.TempDir(), io.Discard, stored...)
}

// startServerIn is startServer of a server that stores in dir. What it logs is written to watch too.
func startServerIn(t *testing.T, dir string, watch io.Writer, stored ...[]byte) string {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	log, logTo := io.Pipe()
	status := make(chan int, 1)
	go func() {
		to := io.MultiWriter(watch, logTo)
		status <- run(ctx, []string{"--port=0", "--storage-dir=" + dir}, to, to)
		logTo.Close()
	}()
	address, rest := readAddress(log)
	t.Cleanup(func() {
		stop()
		text := <-rest
		if got := <-status; got != 0 {
			t.Errorf("the server ended with exit status %d; its log:\n%s", got, text)
		}
	})
	if address == "" {
		t.Fatalf("the server does not listen:\n%s", <-rest)
	}
	for _, data := range stored {
		path := filepath.Join(t.TempDir(), "artifact.zst")
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		if status, _, stderr := polykit(t, "put", testKey, path, "--server=http://"+address); status != 0 {
			t.Fatalf("put: exit status %d, %s", status, stderr)
		}
	}
	return address
}

// polykit runs the command line.
func polykit(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	status = run(t.Context(), args, &out, &err)
	return status, out.String(), err.String()
}

// newGet returns a get of testKey that does not pause long.
func newGet(t *testing.T, server string, grpc bool, output string) *get {
	t.Helper()
	flags := remoteFlags{server: server, grpc: grpc}
	conn, err := flags.connect(io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	key, err := artifact.ParseKey(testKey)
	if err != nil {
		t.Fatal(err)
	}
	return &get{
		server:          conn,
		key:             key,
		output:          output,
		maxUnpackedSize: 1 << 30,
		retries:         3,
		backoff:         time.Millisecond,
		progress:        func(string, int64) *progress { return &progress{} },
	}
}

// checkFile checks the content of a file.
func checkFile(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes with SHA-256 %s, want %d with %s", path, len(got), sha(got), len(want), sha(want))
	}
}

// checkDir checks which files there are in a directory.
func checkDir(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s has %q, want %q", dir, got, want)
	}
}

func TestGetContinuesWhereTheTransferBroke(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		data := largeArtifact(t, 1)
		server := startServer(t, data)
		proxy := newCutter(t, leg{server: server, cut: 2 * mebi}, leg{server: server, cut: mebi}, leg{server: server})
		dir := t.TempDir()
		g := newGet(t, proxy.url(), grpc, filepath.Join(dir, "x.zst"))
		if _, err := g.run(t.Context(), io.Discard); err != nil {
			t.Fatal(err)
		}
		checkFile(t, filepath.Join(dir, "x.zst"), data)
		checkDir(t, dir, "x.zst")
		down, _ := proxy.passed()
		if len(down) != 3 || down[0] != 2*mebi || down[1] != mebi || down[2] > mebi+lost {
			t.Errorf("the connections passed %d bytes, want 2 MiB, 1 MiB and the rest of 4 MiB", down)
		}
	})
}

func TestGetContinuesInAnotherRun(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		data := largeArtifact(t, 1)
		server := startServer(t, data)
		dir := t.TempDir()
		output := dir + "/./x.zst"
		part := "x.zst." + sha(data)[:16] + ".part"

		proxy := newCutter(t, leg{server: server, cut: 3 * mebi})
		status, stdout, stderr := polykit(t, "get", testKey, "-o", output, "--retries=0", "--server="+proxy.url(), fmt.Sprint("--grpc=", grpc))
		if status != 1 || stdout != "" || strings.Count(stderr, "\n") != 1 ||
			!strings.Contains(stderr, "the connection to "+proxy.url()+" broke: ") ||
			!strings.HasSuffix(stderr, " are in "+filepath.Join(dir, part)+", and the same command, run again, resumes there\n") {
			t.Errorf("broken: exit status %d, %q, %q", status, stdout, stderr)
		}
		checkDir(t, dir, part)
		info, err := os.Stat(filepath.Join(dir, part))
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() < 3*mebi-lost || info.Size() >= 3*mebi {
			t.Errorf("the part file has %d bytes, want almost 3 MiB", info.Size())
		}

		proxy = newCutter(t, leg{server: server})
		status, _, stderr = polykit(t, "get", testKey, "-o", output, "--server="+proxy.url(), fmt.Sprint("--grpc=", grpc))
		if status != 0 || stderr != "" {
			t.Errorf("again: exit status %d, %q", status, stderr)
		}
		checkFile(t, output, data)
		checkDir(t, dir, "x.zst")
		down, sent := proxy.passed()
		if rest := int64(len(data)) - info.Size(); len(down) != 1 || down[0] < rest || down[0] > rest+64<<10 {
			t.Errorf("the connection passed %d bytes, want the missing %d and some headers", down, rest)
		}
		if !grpc {
			for _, header := range []string{fmt.Sprintf("Range: bytes=%d-\r\n", info.Size()), `If-Range: "` + sha(data) + `"` + "\r\n"} {
				if !bytes.Contains(sent, []byte(header)) {
					t.Errorf("the requests lack %q:\n%s", header, sent)
				}
			}
		}
	})
}

// A part file that lacks nothing but its name needs no transfer.
func TestGetHasAllBytesAlready(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		data := largeArtifact(t, 1)
		server := startServer(t, data)
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "x.zst."+sha(data)[:16]+".part"), data, 0o644); err != nil {
			t.Fatal(err)
		}
		proxy := newCutter(t, leg{server: server})
		if _, err := newGet(t, proxy.url(), grpc, filepath.Join(dir, "x.zst")).run(t.Context(), io.Discard); err != nil {
			t.Fatal(err)
		}
		checkFile(t, filepath.Join(dir, "x.zst"), data)
		checkDir(t, dir, "x.zst")
		if down, _ := proxy.passed(); len(down) != 1 || down[0] > 64<<10 {
			t.Errorf("the connection passed %d bytes, want no more than some headers", down)
		}
	})
}

// watched is a server that tells of the reads from its downloads.
type watched struct {
	remote
	before func(n int)     // a read, after n bytes, which all are written
	after  func(err error) // a read
}

func (w *watched) Get(ctx context.Context, key artifact.Key, offset int64, hash artifact.Digest) (*client.Download, error) {
	d, err := w.remote.Get(ctx, key, offset, hash)
	if err == nil {
		d.Body = &watchedBody{ReadCloser: d.Body, watched: w}
	}
	return d, err
}

type watchedBody struct {
	io.ReadCloser
	watched *watched
	n       int
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.watched.before(b.n)
	n, err := b.ReadCloser.Read(p)
	b.watched.after(err)
	b.n += n
	return n, err
}

func TestGetIsInterrupted(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		data := largeArtifact(t, 1)
		server := startServer(t, data)
		dir := t.TempDir()
		part := "x.zst." + sha(data)[:16] + ".part"

		ctx, interrupt := context.WithCancel(t.Context())
		proxy := newCutter(t, leg{server: server, cut: 2 * mebi, hold: true})
		g := newGet(t, proxy.url(), grpc, filepath.Join(dir, "x.zst"))
		g.server = &watched{g.server, func(n int) {
			if n >= mebi {
				interrupt()
			}
		}, func(error) {}}
		_, err := g.run(ctx, io.Discard)
		err = explain(g.key, err)
		if err == nil || !strings.HasPrefix(err.Error(), "interrupted; ") ||
			!strings.HasSuffix(err.Error(), " are in "+filepath.Join(dir, part)+", and the same command, run again, resumes there") {
			t.Errorf("interrupted: %v", err)
		}
		checkDir(t, dir, part)
		info, err := os.Stat(filepath.Join(dir, part))
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() < mebi || info.Size() >= 2*mebi {
			t.Errorf("the part file has %d bytes, want at least 1 MiB and less than 2 MiB", info.Size())
		}

		proxy = newCutter(t, leg{server: server})
		if _, err := newGet(t, proxy.url(), grpc, filepath.Join(dir, "x.zst")).run(t.Context(), io.Discard); err != nil {
			t.Fatal(err)
		}
		checkFile(t, filepath.Join(dir, "x.zst"), data)
		checkDir(t, dir, "x.zst")
		down, _ := proxy.passed()
		if rest := int64(len(data)) - info.Size(); len(down) != 1 || down[0] > rest+64<<10 {
			t.Errorf("the connection passed %d bytes, want the missing %d and some headers", down, rest)
		}
	})
}

func TestGetIsInterruptedInAPause(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		server := startServer(t, largeArtifact(t, 1))
		proxy := newCutter(t, leg{server: server, cut: 2 * mebi})
		ctx, interrupt := context.WithCancel(t.Context())
		g := newGet(t, proxy.url(), grpc, filepath.Join(t.TempDir(), "x.zst"))
		g.backoff = time.Hour
		g.server = &watched{g.server, func(int) {}, func(err error) {
			if err != nil {
				interrupt()
			}
		}}
		if _, err := g.run(ctx, io.Discard); err == nil || !strings.HasPrefix(err.Error(), "interrupted; ") {
			t.Errorf("error %v", err)
		}
	})
}

func TestGetOfAnArtifactThatIsReplaced(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		before, after := largeArtifact(t, 1), largeArtifact(t, 2)
		first, second := startServer(t, before), startServer(t, after)

		t.Run("in one run", func(t *testing.T) {
			dir := t.TempDir()
			proxy := newCutter(t, leg{server: first, cut: 2 * mebi}, leg{server: second})
			if _, err := newGet(t, proxy.url(), grpc, filepath.Join(dir, "x.zst")).run(t.Context(), io.Discard); err != nil {
				t.Fatal(err)
			}
			checkFile(t, filepath.Join(dir, "x.zst"), after)
			checkDir(t, dir, "x.zst")
		})

		t.Run("between two runs", func(t *testing.T) {
			dir := t.TempDir()
			g := newGet(t, newCutter(t, leg{server: first, cut: 2 * mebi}).url(), grpc, filepath.Join(dir, "x.zst"))
			g.retries = 0
			if _, err := g.run(t.Context(), io.Discard); err == nil {
				t.Fatal("a broken transfer is no error")
			}
			checkDir(t, dir, "x.zst."+sha(before)[:16]+".part")
			if _, err := newGet(t, "http://"+second, grpc, filepath.Join(dir, "x.zst")).run(t.Context(), io.Discard); err != nil {
				t.Fatal(err)
			}
			checkFile(t, filepath.Join(dir, "x.zst"), after)
			checkDir(t, dir, "x.zst")
		})

		t.Run("to standard output", func(t *testing.T) {
			proxy := newCutter(t, leg{server: first, cut: 2 * mebi}, leg{server: second})
			_, err := newGet(t, proxy.url(), grpc, "-").run(t.Context(), io.Discard)
			if err == nil || err.Error() != "the artifact was replaced on the server after a part of it was written: try again" {
				t.Errorf("error %v", err)
			}
		})

		t.Run("removed", func(t *testing.T) {
			dir := t.TempDir()
			proxy := newCutter(t, leg{server: first, cut: 2 * mebi}, leg{server: startServer(t)})
			_, err := newGet(t, proxy.url(), grpc, filepath.Join(dir, "x.zst")).run(t.Context(), io.Discard)
			if !errors.Is(err, client.ErrNotFound) {
				t.Errorf("error %v, want a miss", err)
			}
			checkDir(t, dir)
		})
	})
}

func TestGetWithADamagedPartFile(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		data := largeArtifact(t, 1)
		server := startServer(t, data)
		flipped := bytes.Clone(data[:mebi])
		flipped[1000] ^= 1
		for name, damaged := range map[string][]byte{
			"a bit flipped":     flipped,
			"longer than whole": append(bytes.Clone(data), 0),
		} {
			t.Run(name, func(t *testing.T) {
				dir := t.TempDir()
				output := filepath.Join(dir, "x.zst")
				if err := os.WriteFile(output+"."+sha(data)[:16]+".part", damaged, 0o644); err != nil {
					t.Fatal(err)
				}
				status, stdout, stderr := polykit(t, "get", testKey, "-o", output, "--server=http://"+server, fmt.Sprint("--grpc=", grpc))
				if status != 1 || stdout != "" || !strings.HasPrefix(stderr, "polykit-cache: what was downloaded has SHA-256 ") ||
					!strings.HasSuffix(stderr, ", but the server says "+sha(data)+": it was damaged on the way or here; try again\n") {
					t.Errorf("exit status %d, %q, %q", status, stdout, stderr)
				}
				checkDir(t, dir)
				if status, _, stderr := polykit(t, "get", testKey, "-o", output, "--server=http://"+server, fmt.Sprint("--grpc=", grpc)); status != 0 {
					t.Errorf("again: exit status %d, %q", status, stderr)
				}
				checkFile(t, output, data)
			})
		}
	})
}

func TestGetToStandardOutputContinues(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		data := largeArtifact(t, 1)
		server := startServer(t, data)
		proxy := newCutter(t, leg{server: server, cut: 2 * mebi}, leg{server: server})
		var stdout bytes.Buffer
		if _, err := newGet(t, proxy.url(), grpc, "-").run(t.Context(), &stdout); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(stdout.Bytes(), data) {
			t.Errorf("got %d bytes with SHA-256 %s, want %d with %s", stdout.Len(), sha(stdout.Bytes()), len(data), sha(data))
		}
	})
}

func TestGetExtractContinues(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		data := largeArtifact(t, 1)
		server := startServer(t, data)
		dir := t.TempDir()
		g := newGet(t, newCutter(t, leg{server: server, cut: 2 * mebi}).url(), grpc, "")
		g.extract, g.retries = filepath.Join(dir, "dist"), 0
		if _, err := g.run(t.Context(), io.Discard); err == nil {
			t.Fatal("a broken transfer is no error")
		}
		checkDir(t, dir, "dist."+sha(data)[:16]+".part")
		proxy := newCutter(t, leg{server: server})
		g = newGet(t, proxy.url(), grpc, "")
		g.extract = filepath.Join(dir, "dist")
		done, err := g.run(t.Context(), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if done.FileCount != 1 || done.Hash != sha(data) || done.Size != int64(len(data)) {
			t.Errorf("got %+v", done)
		}
		checkDir(t, dir, "dist")
		checkDir(t, filepath.Join(dir, "dist"), "content")
		if down, _ := proxy.passed(); len(down) != 1 || down[0] > 2*mebi+lost {
			t.Errorf("the connection passed %d bytes, want the second half of 4 MiB", down)
		}
	})
}

// Something between client and server may not know ranges, or change bytes.
func TestGetThroughOtherServers(t *testing.T) {
	t.Parallel()
	data := bytes.Repeat([]byte("not even an artifact "), 1000)
	requests := 0
	serve := func(t *testing.T, hash string) string {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/metadata") {
				fmt.Fprintf(w, `{"hash": %q, "size": "%d", "something_new": {}}`, hash, len(data))
				return
			}
			requests++
			w.Header().Set("X-Artifact-Hash", hash)
			w.Write(data)
		}))
		t.Cleanup(server.Close)
		return server.URL
	}

	t.Run("no ranges", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "x.zst."+sha(data)[:16]+".part"), data[:5000], 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := newGet(t, serve(t, sha(data)), false, filepath.Join(dir, "x.zst")).run(t.Context(), io.Discard); err != nil {
			t.Fatal(err)
		}
		checkFile(t, filepath.Join(dir, "x.zst"), data)
		checkDir(t, dir, "x.zst")
	})

	t.Run("other bytes", func(t *testing.T) {
		dir := t.TempDir()
		requests = 0
		_, err := newGet(t, serve(t, sha(nil)), false, filepath.Join(dir, "x.zst")).run(t.Context(), io.Discard)
		want := "what was downloaded has SHA-256 " + sha(data) + ", but the server says " + sha(nil) + ": it was damaged on the way or here; try again"
		if err == nil || err.Error() != want {
			t.Errorf("error %v, want %s", err, want)
		}
		checkDir(t, dir)
		if requests != 1 {
			t.Errorf("%d requests, want 1", requests)
		}
	})

	t.Run("other bytes to standard output", func(t *testing.T) {
		status, stdout, stderr := polykit(t, "get", testKey, "-o", "-", "--server="+serve(t, sha(nil)))
		if status != 1 || stdout != string(data) || !strings.HasPrefix(stderr, "polykit-cache: what was downloaded has SHA-256 ") {
			t.Errorf("exit status %d, %d bytes, %q", status, len(stdout), stderr)
		}
	})

	t.Run("not sound", func(t *testing.T) {
		dir := t.TempDir()
		g := newGet(t, serve(t, sha(data)), false, "")
		g.extract = filepath.Join(dir, "dist")
		_, err := g.run(t.Context(), io.Discard)
		if err == nil || err.Error() != "the artifact was not extracted: the zstd stream does not begin with a zstd frame" {
			t.Errorf("error %v", err)
		}
		checkDir(t, dir, "dist")
		checkDir(t, filepath.Join(dir, "dist"))
	})

	t.Run("overloaded at first", func(t *testing.T) {
		requests := 0
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if requests++; requests < 3 {
				w.WriteHeader(http.StatusServiceUnavailable)
				io.WriteString(w, `{"error": "The server is overloaded: try again later"}`)
				return
			}
			w.Header().Set("X-Artifact-Hash", sha(data))
			w.Write(data)
		}))
		defer server.Close()
		output := filepath.Join(t.TempDir(), "x.zst")
		if _, err := newGet(t, server.URL, false, output).run(t.Context(), io.Discard); err != nil {
			t.Fatal(err)
		}
		checkFile(t, output, data)
	})
}

// Over both protocols stat prints the very answer of the REST API, but for white space.
func TestStatPrintsTheServersJSON(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		server := startServer(t, largeArtifact(t, 1))
		response, err := http.Get("http://" + server + "/v1/artifacts/" + testKey + "/metadata")
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		var want bytes.Buffer
		if err := json.Compact(&want, body); err != nil {
			t.Fatal(err)
		}
		status, stdout, stderr := polykit(t, "stat", testKey, "--json", "--server=http://"+server, fmt.Sprint("--grpc=", grpc))
		if status != 0 || stdout != want.String()+"\n" || stderr != "" {
			t.Errorf("exit status %d, %q\n%s, want\n%s", status, stderr, stdout, want.String())
		}
	})
}

func TestGetIsInterruptedWhileItExtracts(t *testing.T) {
	t.Parallel()
	data := largeArtifact(t, 1)
	dir := t.TempDir()
	g := newGet(t, "http://127.0.0.1:1", false, "")
	g.extract = filepath.Join(dir, "dist")
	part := &partFile{output: g.extract}
	path := g.extract + "." + sha(data)[:16] + ".part"
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	transfer := g.transfer(part)
	if err := transfer.begin(sha256.Sum256(data), int64(len(data))); err != nil {
		t.Fatal(err)
	}
	ctx, interrupt := context.WithCancel(t.Context())
	interrupt()
	_, err := g.extractPart(ctx, transfer, part)
	if want := "interrupted; 4.0 MiB are in " + path + ", and the same command, run again, resumes there"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	checkDir(t, filepath.Join(dir, "dist"))
	checkFile(t, path, data)
}
