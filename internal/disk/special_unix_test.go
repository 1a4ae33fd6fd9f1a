//go:build unix

package disk_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/polykit/polykit-cache/internal/cachetest"
)

// specialMemos are kinds of files that a memo can be on Unix.
var specialMemos = []foundTest{
	{name: "a named pipe", make: mkfifo},
	{name: "a symbolic link", make: func(t *testing.T, path string) { symlink(t, path, "not a memo") }},
	{name: "a symbolic link to nowhere", make: func(t *testing.T, path string) {
		if err := os.Symlink("nowhere", path); err != nil {
			t.Fatal(err)
		}
	}},
}

// specialArtifacts are kinds of files that an artifact can be on Unix.
var specialArtifacts = []damagedTest{
	{"a named pipe", func(t *testing.T, path string) { removeAll(t, path); mkfifo(t, path) }, "not a regular file"},
	{"a socket", func(t *testing.T, path string) {
		removeAll(t, path)
		dir, err := os.MkdirTemp("", "") // short, since a socket's name can't be long
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s")})
		if err != nil {
			t.Fatal(err)
		}
		listener.SetUnlinkOnClose(false)
		if err := errors.Join(listener.Close(), os.Rename(filepath.Join(dir, "s"), path)); err != nil {
			t.Fatal(err)
		}
	}, "open "},
	{"a symbolic link to nowhere", func(t *testing.T, path string) {
		removeAll(t, path)
		if err := os.Symlink("nowhere", path); err != nil {
			t.Fatal(err)
		}
	}, "open "},
	{"a symbolic link to an artifact", func(t *testing.T, path string) {
		removeAll(t, path)
		symlink(t, path, string(content))
	}, "open "},
	{"a symbolic link to a directory", func(t *testing.T, path string) {
		removeAll(t, path)
		if err := os.Symlink(t.TempDir(), path); err != nil {
			t.Fatal(err)
		}
	}, "open "},
}

func mkfifo(t *testing.T, path string) {
	if err := syscall.Mkfifo(path, 0o644); err != nil {
		t.Fatal(err)
	}
}

// symlink makes path a link to a file that holds text, and in the end must still do so.
func symlink(t *testing.T, path, text string) {
	target := filepath.Join(t.TempDir(), "target")
	write(t, target, []byte(text))
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if got := string(read(t, target)); got != text {
			t.Errorf("the target of the link was changed: %.100q", got)
		}
	})
}

// TestShardIsLink accepts a shard that somebody moved elsewhere on the same file system.
func TestShardIsLink(t *testing.T) {
	r := open(t, t.TempDir())
	mkdir(t, r.path("elsewhere/01"))
	if err := os.Symlink("elsewhere/01", r.path("01")); err != nil {
		t.Fatal(err)
	}
	r.put(t, key, content)
	r.serves(t, key, content)
	if _, err := os.Stat(r.path("elsewhere/" + zstName)); err != nil {
		t.Error(err)
	}

	// One that leads nowhere is in the way.
	if err := os.Symlink("nowhere", r.path("ff")); err != nil {
		t.Fatal(err)
	}
	other := keyOf(strings.Repeat("f", 32))
	r.put(t, other, cachetest.Random(other, 100))
	r.serves(t, other, cachetest.Random(other, 100))
}
