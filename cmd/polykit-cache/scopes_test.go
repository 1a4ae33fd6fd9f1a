package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/polykit/polykit-cache/internal/cachetest"
)

// scopePathOf is where a server has the artifacts of a scope.
func scopePathOf(dir, scope string) string {
	return filepath.Join(dir, ".polykit-cache/scopes", scope)
}

// Commands that work on a directory work on all scopes in it.
func TestOfflineCommandsKnowScopes(t *testing.T) {
	t.Parallel()
	from, into := t.TempDir(), t.TempDir()
	one, two := numbered(t, 1), numbered(t, 2)
	ours, theirs, others := cachetest.Random(one, 100), cachetest.Random(one, 200), cachetest.Random(two, 300)
	seven, eight := files{}, files{}
	seven.addServers(one, theirs)
	seven.addServers(two, others)
	eight.addServers(one, theirs[:50]) // damaged
	eight["foreign"] = []byte("foreign")
	seven.write(t, scopePathOf(from, "pr-7"))
	eight.write(t, scopePathOf(from, "pr-8"))
	files{"aa/bb/no-artifact.zst": []byte("no scope can be called so")}.write(t, scopePathOf(from, "PR-9"))
	is := regexp.QuoteMeta(from) + " is a server's storage directory"
	dry := func(to string, n, existed int) {
		t.Helper()
		imports(t, 0, summaryOf(is, "to import", n, existed, 0, 1), "", from, "--storage-dir", to, "--dry-run")
	}
	dry(into, 3, 0) // though nothing is in the default scope
	imports(t, 1, summaryOf(is, "imported", 2, 0, 1, 1), "(?s)refused  .*pr-8.*", from, "--storage-dir", into)
	checkStored(t, into, map[string][]byte{})
	want := map[string][]byte{one.String(): theirs, two.String(): others}
	checkStored(t, scopePathOf(into, "pr-7"), want)

	source := files{}
	source.addServers(one, ours)
	source.write(t, from)
	dry(into, 2, 2)
	imports(t, 1, summaryOf(is, "imported", 1, 2, 1, 1), "(?s)refused  .*pr-8.*", from, "--storage-dir", into)
	checkStored(t, into, map[string][]byte{one.String(): ours})
	checkStored(t, scopePathOf(into, "pr-7"), want)

	// In place, what nobody verified.
	imports(t, 1, summaryOf(".*", "verified", 3, 0, 1, 1), "(?s)refused  .*pr-8.*moved to quarantine.*", from, "--storage-dir", from)
	checkStored(t, scopePathOf(from, "pr-7"), want)
	if left, err := filepath.Glob(scopePathOf(from, "pr-8") + "/*/*/*.zst"); len(left) > 0 || err != nil {
		t.Errorf("left in pr-8 are %s, %v", left, err)
	}
	if moved, err := filepath.Glob(filepath.Join(from, ".polykit-cache/quarantine/pr-8@"+one.String()+"*.zst")); len(moved) != 1 || err != nil {
		t.Errorf("in quarantine are %s, %v", moved, err)
	}

	// verify of a key reads all that have it, and of all also what is damaged in a scope.
	verify := func(wantStatus int, wantStdout string, args ...string) {
		t.Helper()
		status, stdout, stderr := polykit(t, append([]string{"verify", "--storage-dir", into}, args...)...)
		if status != wantStatus || !regexp.MustCompile(`\A`+wantStdout+`\z`).MatchString(stdout) {
			t.Errorf("verify %s: exit status %d,\n%s%s\nwant\n%s", args, status, stdout, stderr, wantStdout)
		}
	}
	verify(0, `(sound .*\n){2}`, one.String())
	verify(0, fmt.Sprintf(`\{"path":"\.polykit-cache/scopes/pr-7/02/00/%[1]s\.zst","scope":"pr-7","key":"%[1]s","size":%d,"state":"sound"\}\n`, two, len(others)), two.String(), "--json")
	damaged := filepath.Join(scopePathOf(into, "pr-7"), two.String()[:2], two.String()[2:4], two.String()+".zst")
	if err := os.WriteFile(damaged, []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	verify(1, `damaged .*pr-7/02/00/.*\(repaired\)\n`, "--quiet", "--repair")
	verify(0, "", "--quiet")

	// gc removes from a scope, and the scope when it is empty.
	gcOffline(t, into, gcHead+`web +build +1 +[\d.]+ KiB +max-age\ntotal .*\n`, "", "--scope-retention=pr-7:max-age=1ns")
	checkStored(t, into, map[string][]byte{one.String(): ours})
	if _, err := os.Stat(scopePathOf(into, "pr-7")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory of an empty scope: %v", err)
	}
}
