package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

// gcOffline runs gc on a directory, and checks what it prints: its output is matched by a regular expression.
func gcOffline(t *testing.T, dir, wantStdout, wantStderr string, args ...string) {
	t.Helper()
	status, stdout, stderr := polykit(t, append([]string{"gc", "--storage-dir", dir}, args...)...)
	if status != 0 || !regexp.MustCompile(`\A`+wantStdout+`\z`).MatchString(stdout) || stderr != wantStderr {
		t.Errorf("gc %s: exit status %d,\n%s\n%s\nwant\n%s\n%s", args, status, stdout, stderr, wantStdout, wantStderr)
	}
}

const gcHead = `PACKAGE +TASK +ARTIFACTS +ON DISK +REASON\n`

// A directory that no server uses is gone through first, and what is removed takes several parts.
func TestGCOfflineOfMany(t *testing.T) {
	t.Parallel()
	dir, source := t.TempDir(), files{}
	for n := range collectPart + 50 {
		source[fmt.Sprintf("ab/00/ab%030x.zst", n)] = []byte("x")
	}
	source.write(t, dir)
	artifacts := filepath.Join(dir, "ab")
	before := treeOf(t, artifacts)
	gcOffline(t, dir, "", "nothing to remove\n")
	gcOffline(t, dir, "", "nothing to remove\n", "--max-age=87600h")
	gcOffline(t, dir, "", "nothing to remove\n", "--keep-last=2") // since nobody knows their tasks
	gcOffline(t, dir, gcHead+`- +- +1,050 +[\d.]+ MiB +max-age\ntotal +1,050 +[\d.]+ MiB\n`, "", "--max-age=24h", "--dry-run")
	checkTree(t, artifacts, before)
	gcOffline(t, dir, gcHead+`- +- +1,050 +[\d.]+ MiB +max-age\ntotal +1,050 +[\d.]+ MiB\n`, "", "--max-age=24h")
	if left := storedIn(t, dir); len(left) > 0 {
		t.Errorf("%d artifacts are left", len(left))
	}
}

// Each limit of the policy removes what it says, for the reason that it is.
func TestGCOffline(t *testing.T) {
	t.Parallel()
	source := files{}
	for n := range 6 {
		key := numbered(t, n)
		source.addServers(key, cachetest.Sound(key, nil))
	}
	from, dir := t.TempDir(), t.TempDir()
	source.write(t, from)
	if status, stdout, stderr := polykit(t, "import", from, "--storage-dir", dir); status != 0 {
		t.Fatalf("import: exit status %d, %s, %s", status, stdout, stderr)
	}
	left := func(want int) {
		t.Helper()
		if got := storedIn(t, dir); len(got) != want {
			t.Errorf("%d artifacts are left, want %d", len(got), want)
		}
	}
	gcOffline(t, dir, gcHead+`web +build +2 +[\d.]+ KiB +keep-last\ntotal +2 +[\d.]+ KiB\n`, "", "--keep-last=4")
	left(4)
	gcOffline(t, dir, gcHead+`web +build +4 +[\d.]+ KiB +max-storage\ntotal +4 +[\d.]+ KiB\n`, "", "--max-storage=1", "--dry-run")
	gcOffline(t, dir, gcHead+`web +build +4 +[\d.]+ KiB +min-free\ntotal +4 +[\d.]+ KiB\n`, "", "--min-free=100%", "--dry-run")
	left(4)
	gcOffline(t, dir, gcHead+`web +build +4 +[\d.]+ KiB +max-storage\ntotal +4 +[\d.]+ KiB\n`, "", "--max-storage=0.0000001%")
	left(0)
	gcOffline(t, dir, `\{"removals":\[\],"more":false\}\n`, "", "--min-free=100%", "--json")
}

// What is beside artifacts counts as well.
func TestGCOfflineCountsAll(t *testing.T) {
	t.Parallel()
	key, source := numbered(t, 1), files{}
	source.addServers(key, cachetest.Sound(key, nil))
	dir := t.TempDir()
	source.write(t, dir)
	if err := os.Mkdir(filepath.Join(dir, ".polykit-cache"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".polykit-cache", "other"), make([]byte, 8<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	gcOffline(t, dir, "", "nothing to remove\n", "--max-storage=16MiB")
	gcOffline(t, dir, gcHead+`- +- +1 +[\d.]+ KiB +max-storage\ntotal +1 +[\d.]+ KiB\n`, "", "--max-storage=8MiB")
}

func TestGCOfflineNeedsTheDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	startServerIn(t, dir, io.Discard)
	none, empty := filepath.Join(t.TempDir(), "none"), t.TempDir()
	old := filepath.Join(empty, "tmp", "dear") // as an upload that was cut short would be
	if err := os.MkdirAll(old, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(old, longAgo, longAgo); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir:   `polykit-cache: storage directory .* is in use by another server: stop that one first, .*\n`,
		none:  `polykit-cache: stat .*none: no such file or directory\n`,
		empty: `polykit-cache: .* is not a storage directory: no server has used it, and it has no artifacts\n`,
		file:  `polykit-cache: .*file is not a directory\n`,
	} {
		status, stdout, stderr := polykit(t, "gc", "--storage-dir", path)
		if status != 1 || stdout != "" || !regexp.MustCompile(`\A`+want+`\z`).MatchString(stderr) {
			t.Errorf("exit status %d, %q, %q", status, stdout, stderr)
		}
	}
	if _, err := os.Lstat(none); err == nil {
		t.Error("the directory was made")
	}
	if _, err := os.Lstat(old); err != nil {
		t.Errorf("something was removed: %v", err)
	}
}

// failingCollector removes a part and then fails.
type failingCollector struct {
	part client.Collected
	err  error
}

func (f *failingCollector) CollectGarbage(context.Context, *client.CollectRequest) (*client.Collected, error) {
	part := &client.Collected{Removals: f.part.GetRemovals(), More: true}
	if !f.part.GetMore() {
		return part, f.err
	}
	f.part.More = false
	return part, nil
}

// What was removed before a failure is said, and that it may not be all.
func TestGCSaysWhatItRemovedBeforeAFailure(t *testing.T) {
	t.Parallel()
	var stdout bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&stdout)
	cmd.SetErr(&bytes.Buffer{})
	cmd.SetContext(t.Context())
	f := &failingCollector{err: context.Canceled}
	f.part.More = true
	f.part.Removals = []*client.Removal{{PackageName: "web", TaskName: "build", Reason: client.ReasonMinFree, ArtifactCount: 3, DiskSize: 1024}}
	err := (&gcFlags{}).collect(cmd, f, nil)
	if want := "interrupted; more may be removed than was printed"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	want := `PACKAGE  TASK   ARTIFACTS  ON DISK  REASON
web      build  6          2.0 KiB  min-free
total           6          2.0 KiB
`
	if stdout.String() != want {
		t.Errorf("printed\n%s\nwant\n%s", &stdout, want)
	}
}
