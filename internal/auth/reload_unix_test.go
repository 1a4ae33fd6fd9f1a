//go:build unix

package auth_test

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/polykit/polykit-cache/internal/auth"
)

// pipeOf makes a pipe at path out of which text comes, to whoever reads it first.
func pipeOf(t *testing.T, path, text string) {
	t.Helper()
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	var writing sync.WaitGroup
	writing.Go(func() { os.WriteFile(path, []byte(text), 0o600) })
	t.Cleanup(func() {
		reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // or the writer would wait for ever
		if err != nil {
			t.Fatal(err)
		}
		writing.Wait()
		reader.Close()
	})
}

// A pipe is not taken for a file, even if the right thing comes out of it: the next time nothing would, and the server
// would wait for it, at its start, at its end and whenever the file is to be read again.
func TestPipeIsNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "auth.yaml")
	pipeOf(t, path, only("a"))
	if _, err := auth.New(auth.Config{File: path, Log: newLog()}); err == nil || !strings.Contains(err.Error(), "is no file but a directory, a pipe or a device") {
		t.Errorf("New returned %v", err)
	}

	w := startWorld(t)
	mustMatch(t, w.as(t, ciToken), "token ci")
	if err := os.Remove(w.file); err != nil {
		t.Fatal(err)
	}
	pipeOf(t, w.file, only("a"))
	look := w.Watch()
	for range 2 {
		look()
	}
	mustMatch(t, w.as(t, ciToken), "token ci")
	if text := w.log.String(); strings.Count(text, "is no file but") != 1 {
		t.Errorf("the log is %s", text)
	}
}

// The keys of an issuer are no pipe either.
func TestPipeIsNoKeysFile(t *testing.T) {
	dir := t.TempDir()
	pipeOf(t, filepath.Join(dir, "keys.json"), `{"keys": []}`)
	path := filepath.Join(dir, "auth.yaml")
	write(t, path, "issuers:\n  - {name: i, url: https://i.example, audience: a, keys_file: keys.json}\n")
	if _, err := auth.New(auth.Config{File: path, Log: newLog()}); err == nil || !strings.Contains(err.Error(), "is no file but a directory, a pipe or a device") {
		t.Errorf("New returned %v", err)
	}
}
