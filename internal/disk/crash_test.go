package disk_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// childVariable is set, to a storage directory, in a process that a test started as its second half.
const childVariable = "POLYKIT_CACHE_TEST_DIR"

// child returns the command that runs a test in another process, as the half that finds dir in
// childVariable.
func child(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), executable, "-test.run=^"+t.Name()+"$")
	command.Env = append(os.Environ(), childVariable+"="+dir)
	command.Stderr = os.Stderr
	return command
}

// start starts a child, and returns what it writes to its standard output, by lines.
func start(t *testing.T, command *exec.Cmd) *bufio.Scanner {
	t.Helper()
	stdout, err := command.StdoutPipe()
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	return bufio.NewScanner(stdout)
}

// kill kills a child in the middle of what it does.
func kill(t *testing.T, command *exec.Cmd) {
	t.Helper()
	if err := command.Process.Kill(); err != nil {
		t.Fatal(err)
	}
}

func TestLockDiesWithItsProcess(t *testing.T) {
	if dir := os.Getenv(childVariable); dir != "" {
		open(t, dir)
		fmt.Println("opened")
		io.Copy(io.Discard, os.Stdin) // until it is killed, or its parent is
		return
	}
	dir := t.TempDir()
	command := child(t, dir)
	stdin, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	lines := start(t, command)
	if !lines.Scan() || lines.Text() != "opened" {
		t.Fatalf("the other process wrote %q", lines.Text())
	}
	if _, err := tryOpen(dir); err == nil || !strings.Contains(err.Error(), "in use by another server") {
		t.Errorf("Open while another process uses the directory returned %v", err)
	}
	kill(t, command)
	command.Wait()
	r := open(t, dir)
	r.lacks(t, key)
}

// TestKill kills a process that uploads, again and again. What it acknowledged is there, byte for
// byte; what it did not is there as a whole, or not at all.
func TestKill(t *testing.T) {
	const rounds = 10
	if dir := os.Getenv(childVariable); dir != "" {
		r := open(t, dir)
		var uploads sync.WaitGroup
		for uploader := range 4 {
			uploads.Go(func() {
				for i := 0; ; i++ {
					key := cachetest.Key(fmt.Sprint(os.Getpid(), uploader, i))
					size := i * 7919 % 200_000
					scope := artifact.DefaultScope
					if uploader%2 == 1 {
						scope = cachetest.Scope(fmt.Sprint("pr-", i%20))
					}
					info := r.in(scope).put(t, key, cachetest.Random(key, size))
					os.Stdout.WriteString(fmt.Sprintln(scope, key, size, info.Hash))
				}
			})
		}
		uploads.Wait()
	}
	dir := t.TempDir()
	acknowledged := map[artifact.Name]int{} // sizes
	cutShort := 0
	for round := range rounds {
		command := child(t, dir)
		lines := start(t, command)
		for n := 0; lines.Scan(); n++ {
			var scope, digits, hash string
			var size int
			if _, err := fmt.Sscan(lines.Text(), &scope, &digits, &size, &hash); err != nil || len(hash) != 64 {
				t.Fatalf("the other process wrote %q", lines.Text())
			}
			key := keyOf(digits)
			acknowledged[key.In(cachetest.Scope(scope))] = size
			if want := fmt.Sprintf("%x", sha256.Sum256(cachetest.Random(key, size))); hash != want {
				t.Errorf("%s was acknowledged with the hash %s, want %s", key, hash, want)
			}
			if n == 3*round {
				kill(t, command)
			}
		}
		command.Wait()
		cutShort += len(list(t, filepath.Join(dir, "tmp")))

		r, err := tryOpen(dir)
		if err != nil {
			t.Fatal("Open:", err)
		}
		r.tmpIsEmpty(t)
		for name, size := range acknowledged {
			if got, _, err := r.in(name.Scope).get(t, name.Key); err != nil || !bytes.Equal(got, cachetest.Random(name.Key, size)) {
				t.Errorf("%s was acknowledged, but Get returned %d bytes, %v", name, len(got), err)
			}
		}
		if n := r.log.inspections(); n != 0 {
			t.Errorf("%d of the acknowledged artifacts had lost their memos", n)
		}
		if err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if digits, ok := strings.CutSuffix(entry.Name(), ".zst"); ok && err == nil {
				scope := artifact.DefaultScope
				if in, below := strings.CutPrefix(path, r.path(scopesName)+"/"); below {
					scope = cachetest.Scope(in[:strings.IndexByte(in, '/')])
				}
				if _, err := r.in(scope).Files(t.Context(), keyOf(digits)); err != nil {
					t.Errorf("%s was stored in part: %v", path, err)
				}
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		if err := r.store.Close(); err != nil {
			t.Error("Close:", err)
		}
	}
	if len(acknowledged) < rounds*rounds || cutShort == 0 {
		t.Errorf("%d uploads were acknowledged and %d cut short: this tested little", len(acknowledged), cutShort)
	}
	t.Logf("%d uploads were acknowledged and %d cut short", len(acknowledged), cutShort)
}
