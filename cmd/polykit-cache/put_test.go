package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

func TestPutOfWhatIsRefusedIsNotSent(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		server := startServer(t, largeArtifact(t, 1))
		path := filepath.Join(t.TempDir(), "large")
		file, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := file.Truncate(512 * mebi); err != nil {
			t.Fatal(err)
		}
		most := 1024 // the question
		if grpc {
			most = 2 * mebi // what HTTP/2's flow control lets pass while the answer comes
		}
		var sent []byte
		for range 5 { // a server that is too busy to answer within a second gets more
			proxy := newCutter(t, leg{server: server})
			status, stdout, stderr := polykit(t, "put", testKey, path, "--server="+proxy.url(), fmt.Sprint("--grpc=", grpc))
			want := "polykit-cache: the server has an artifact under " + testKey + " already, and an artifact never changes once it is stored\n"
			if status != 4 || stdout != "" || stderr != want {
				t.Errorf("exit status %d, %q, %q", status, stdout, stderr)
			}
			if _, sent = proxy.passed(); len(sent) <= most {
				return
			}
		}
		t.Errorf("%d bytes were sent, want at most %d", len(sent), most)
	})
}

// newPut returns a put under a key.
func newPut(t *testing.T, server, digits string, grpc bool) *put {
	t.Helper()
	g := newGet(t, server, grpc, "")
	key, err := artifact.ParseKey(digits)
	if err != nil {
		t.Fatal(err)
	}
	return &put{server: g.server, key: key, progress: g.progress}
}

// Standard input may have nothing to say for long. Neither an answer nor an interruption must wait
// for it.
func TestPutOfSilentStandardInput(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		server := "http://" + startServer(t, largeArtifact(t, 1))
		stdin, silent := io.Pipe()
		defer silent.Close()

		_, err := newPut(t, server, testKey, grpc).run(t.Context(), "-", stdin)
		if !errors.Is(err, client.ErrExists) {
			t.Errorf("error %v, want %v", err, client.ErrExists)
		}

		stdin, silent = io.Pipe()
		defer silent.Close()
		ctx, interrupt := context.WithCancel(t.Context())
		go func() {
			silent.Write([]byte("a")) // returns when it was read: the upload is under way
			interrupt()
		}()
		_, err = newPut(t, server, "1"+testKey, grpc).run(ctx, "-", stdin)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want %v", err, context.Canceled)
		}
	})
}

func TestPutOfAFileThatFails(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		p := newPut(t, "http://"+startServer(t), testKey, grpc)
		broken := errors.New("the disk is broken")
		if _, err := p.run(t.Context(), "-", io.MultiReader(strings.NewReader("("), failingReader{broken})); err != broken {
			t.Errorf("error %v, want %v", err, broken)
		}
		for _, content := range []string{"shorter", "longer than ten"} {
			_, err := p.upload(t.Context(), 10, strings.NewReader(content))
			want := "what was to be sent had 10 bytes, and has another size now: did something write to it?"
			if err == nil || err.Error() != want {
				t.Errorf("%s: error %v, want %s", content, err, want)
			}
		}
	})
}

type failingReader struct{ err error }

func (f failingReader) Read([]byte) (int, error) { return 0, f.err }
