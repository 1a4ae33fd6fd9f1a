package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// numbered returns a key. Those of greater numbers, up to 255, come later in a directory.
func numbered(t *testing.T, n int) artifact.Key {
	t.Helper()
	key, err := artifact.ParseKey(fmt.Sprintf("%02x%030x", n, n))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// files are the contents of files by their paths, with slashes.
type files map[string][]byte

// addServers adds an artifact as the Rust server stores it: with a memo of four members.
func (f files) addServers(key artifact.Key, content []byte) {
	f.addServersAs(key.String(), content)
}

// addServersAs is addServers under the digits as they were sent.
func (f files) addServersAs(digits string, content []byte) {
	path := digits[:2] + "/" + digits[2:4] + "/" + digits
	f[path+".zst"] = content
	f[path+".json"] = fmt.Appendf(nil, `{"hash":"%s","size":%d,"created_at":1700000000,"cache_key_hash":"%s"}`, sha(content), len(content), digits)
}

// addClients adds an artifact as a Polykit client stores it.
func (f files) addClients(space string, key artifact.Key, content []byte) {
	f["remote/"+space+"/"+key.String()[:2]+"/"+key.String()[2:]+".zst"] = content
}

// longAgo is when files in a source were written.
var longAgo = time.Date(2020, 1, 2, 3, 4, 5, 6000, time.UTC)

// write writes the files into a directory.
func (f files) write(t *testing.T, dir string) {
	t.Helper()
	for path, content := range f {
		path = filepath.Join(dir, filepath.FromSlash(path))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, longAgo, longAgo); err != nil {
			t.Fatal(err)
		}
	}
}

// treeOf says what is in a directory: of each file its mode, size, time and hash, by its path.
func treeOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		stat, err := entry.Info()
		if err != nil {
			return err
		}
		is := fmt.Sprint(stat.Mode(), " ", stat.Size(), " ", stat.ModTime())
		if stat.Mode().IsRegular() {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			is += " " + sha(content)
		}
		tree[path] = is
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// checkTree checks that nothing in a directory is other than it was.
func checkTree(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	got := treeOf(t, dir)
	for path, is := range got {
		if is != want[path] {
			t.Errorf("%s is %q, and was %q", path, is, want[path])
		}
	}
	for path, was := range want {
		if got[path] == "" {
			t.Errorf("%s is gone, and was %q", path, was)
		}
	}
}

// storedIn returns the contents of the artifacts in a storage directory, by their keys.
func storedIn(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	paths, err := filepath.Glob(filepath.Join(dir, "??", "??", "*.zst"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found[strings.TrimSuffix(filepath.Base(path), ".zst")] = content
	}
	return found
}

// checkStored checks which artifacts are in a storage directory, and that verify finds all of them sound.
func checkStored(t *testing.T, dir string, want map[string][]byte) {
	t.Helper()
	if got := storedIn(t, dir); !maps.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("stored are %s, want %s", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
	if status, stdout, stderr := polykit(t, "verify", "--storage-dir", dir, "--quiet"); status != 0 || stdout != "" {
		t.Errorf("verify: exit status %d, %s, %s", status, stdout, stderr)
	}
}

// imports runs import, and checks what it says: each line of its output and of what it refused is matched by a
// regular expression.
func imports(t *testing.T, wantStatus int, wantStdout, wantStderr string, args ...string) {
	t.Helper()
	status, stdout, stderr := polykit(t, append([]string{"import"}, args...)...)
	if status != wantStatus {
		t.Errorf("exit status %d, want %d", status, wantStatus)
	}
	if !regexp.MustCompile(`\A` + wantStdout + `\z`).MatchString(stdout) {
		t.Errorf("standard output is\n%s\nwant\n%s", stdout, wantStdout)
	}
	if !regexp.MustCompile(`\A` + wantStderr + `\z`).MatchString(stderr) {
		t.Errorf("standard error is\n%s\nwant\n%s", stderr, wantStderr)
	}
}

func summaryOf(first string, taken string, n, existed, refused, foreign int) string {
	const size = `  [0-9.]+ [KM]?i?B\n`
	artifacts := func(n int) string {
		if n == 1 {
			return "1 artifact *"
		}
		return fmt.Sprint(n, " artifacts *")
	}
	noun := " files"
	if foreign == 1 {
		noun = " file"
	}
	return first + `\n` +
		taken + ` +` + artifacts(n) + size +
		`there already +` + artifacts(existed) + size +
		`refused +` + artifacts(refused) + size +
		`foreign +` + fmt.Sprint(foreign, noun) + `\n`
}

func TestImportOfAServersDirectory(t *testing.T) {
	t.Parallel()
	sound, source, want := files{}, files{}, map[string][]byte{}
	for n := range 20 {
		key := numbered(t, n)
		content := cachetest.Sound(key, map[string]string{"stdout.txt": fmt.Sprint(n)})
		sound.addServers(key, content)
		want[key.String()] = content
	}
	upper := numbered(t, 0xab)
	want[upper.String()] = cachetest.Sound(upper, nil)
	sound.addServersAs(strings.ToUpper(upper.String()), want[upper.String()])
	maps.Copy(source, sound)
	damaged := numbered(t, 30)
	source.addServers(damaged, cachetest.Sound(damaged, map[string]string{"stdout.txt": "x"})[:100])
	other := numbered(t, 31)
	source.addServers(other, cachetest.Sound(damaged, nil))
	large := numbered(t, 32)
	source.addServers(large, cachetest.Random(large, 64<<10))
	source["tmp/upload"] = []byte("of no artifact yet")
	source["README"] = []byte("foreign")
	source["00/00/foreign.zst"] = []byte("foreign")
	source["00/01/"+numbered(t, 0).String()+".zst"] = []byte("in the wrong shard")
	source["zz/00/x.zst"] = []byte("the whole directory is foreign")
	source["00/00/00000000000000000000000000000009.json"] = []byte("a memo without an artifact is none that is missed")
	dir, into := t.TempDir(), filepath.Join(t.TempDir(), "new")
	source.write(t, dir)
	// A link to a sound artifact, and one to a directory of them.
	linked := filepath.Join(dir, "00", "00", "00000000000000000000000000000007.zst")
	if err := os.Symlink(filepath.Join(dir, "00", "00", numbered(t, 0).String()+".zst"), linked); err != nil {
		skip(t, "no symbolic links: %v", err) // not everybody may on Windows
	}
	if err := os.Symlink("00", filepath.Join(dir, "ff")); err != nil {
		t.Fatal(err)
	}
	before := treeOf(t, dir)
	flags := []string{dir, "--storage-dir", into, "--max-size", "32KiB"}
	first := regexp.QuoteMeta(dir) + " is a server's storage directory"
	path := func(key artifact.Key) string {
		digits := key.String()
		return regexp.QuoteMeta(filepath.Join(dir, digits[:2], digits[2:4], digits+".zst"))
	}

	imports(t, 1, summaryOf(first, "to import", 23, 0, 1, 6),
		"refused  "+path(large)+`  has 6\d+ bytes, more than --max-size, 32768\n`+
			"polykit-cache: 1 artifact was refused; it is said above why\n", append(flags, "--dry-run")...)
	checkTree(t, dir, before)
	if _, err := os.Lstat(into); err == nil {
		t.Error("a dry run made the storage directory")
	}

	began := time.Now()
	refused := `(refused  ` + path(damaged) + `  .*\n|refused  ` + path(other) + `  .* names the cache key .*\n|refused  ` + path(large) + `  .*artifact too large: the limit is 32 KiB \(32768 bytes\)\n){3}` +
		"polykit-cache: 3 artifacts were refused; it is said above why\n"
	imports(t, 1, summaryOf(first, "imported", 21, 0, 3, 6), refused, flags...)
	checkTree(t, dir, before)
	checkStored(t, into, want)
	for key := range want {
		stat, err := os.Stat(filepath.Join(into, key[:2], key[2:4], key+".zst"))
		if err != nil || stat.ModTime().Before(began.Add(-time.Minute)) {
			t.Errorf("%s: stored %v, %v", key, stat.ModTime(), err)
		}
	}

	// What is there already is not read again, nor stored.
	after := treeOf(t, filepath.Join(into, "00"))
	imports(t, 1, summaryOf(first, "to import", 2, 21, 1, 6), "(?s).*", append(flags, "--dry-run")...)
	imports(t, 1, summaryOf(first, "imported", 0, 21, 3, 6), refused, flags...)
	checkTree(t, filepath.Join(into, "00"), after)

	// A server knows all at once, with packages and tasks.
	server := "--server=http://" + startServerIn(t, into, io.Discard)
	status, stdout, stderr := polykit(t, "stats", server)
	if !strings.Contains(stdout, "artifacts   21 of 1 package and task\n") || status != 0 || stderr != "" {
		t.Errorf("stats: exit status %d, %s, %s", status, stdout, stderr)
	}
	// And no other import may use its directory.
	imports(t, 1, first+`\n`, `polykit-cache: storage directory .* is in use by another server: .*\n`, flags...)
}

func TestImportOfAClientsCache(t *testing.T) {
	t.Parallel()
	source, want := files{}, map[string][]byte{}
	for n := range 5 {
		key := cachetest.Key(fmt.Sprint(n))
		want[key.String()] = cachetest.Sound(key, map[string]string{"stdout.txt": fmt.Sprint(n)})
		source.addClients("0123456789abcdef", key, want[key.String()])
	}
	same, other := cachetest.Key("0"), cachetest.Key("other")
	source.addClients("fedcba9876543210", same, want[same.String()])
	source.addClients("fedcba9876543210", other, cachetest.Sound(same, nil)) // under a key that is not its own
	source["remote/README"] = []byte("foreign")
	source["remote/0123456789abcdef/x"] = []byte("foreign")
	source["remote/0123456789abcdef/"+same.String()[:2]+"/"+same.String()[2:]+".json"] = []byte("foreign")
	source["local/x"] = []byte("is not looked at")
	source["00/00/x.zst"] = []byte("is not looked at")
	dir, into := t.TempDir(), t.TempDir()
	source.write(t, dir)
	before, empty := treeOf(t, dir), treeOf(t, into)
	first := regexp.QuoteMeta(dir) + " is a Polykit client's cache"
	flags := []string{dir, "--storage-dir", into}

	imports(t, 0, summaryOf(first, "to import", 7, 0, 0, 3), "", append(flags, "--dry-run")...)
	checkTree(t, into, empty)
	refused := "refused  " + regexp.QuoteMeta(filepath.Join(dir, "remote", "fedcba9876543210", other.String()[:2], other.String()[2:]+".zst")) + "  .* names the cache key .*\n" +
		"polykit-cache: 1 artifact was refused; it is said above why\n"
	imports(t, 1, summaryOf(first, "imported", 5, 1, 1, 3), refused, flags...)
	imports(t, 1, summaryOf(first, "imported", 0, 6, 1, 3), refused, flags...)
	checkStored(t, into, want)
	checkTree(t, dir, before)
}

// A directory that the Rust server wrote becomes this server's, and nothing in it is copied.
func TestImportInPlace(t *testing.T) {
	t.Parallel()
	source, want := files{}, map[string][]byte{}
	for n := range 10 {
		key := numbered(t, n)
		want[key.String()] = cachetest.Sound(key, map[string]string{"stdout.txt": fmt.Sprint(n)})
		source.addServers(key, want[key.String()])
	}
	damaged := numbered(t, 20)
	source.addServers(damaged, cachetest.Sound(damaged, map[string]string{"stdout.txt": "x"})[:100])
	manyFiles := numbered(t, 21)
	want[manyFiles.String()] = cachetest.Sound(manyFiles, map[string]string{"a": "", "b": "", "c": ""})
	source.addServers(manyFiles, want[manyFiles.String()])
	source["README"] = []byte("foreign")
	upper := strings.ToUpper(numbered(t, 0xcd).String())
	source.addServersAs(upper, []byte("is not what a server looks for"))
	dir, elsewhere := t.TempDir(), t.TempDir()
	source.write(t, dir)
	// Somebody moved a part to another disk.
	if err := os.Rename(filepath.Join(dir, "03"), filepath.Join(elsewhere, "03")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(elsewhere, "03"), filepath.Join(dir, "03")); err != nil {
		skip(t, "no symbolic links: %v", err)
	}
	before := treeOf(t, dir)
	first := regexp.QuoteMeta(dir) + " is the storage directory itself"
	flags := []string{dir, "--storage-dir", dir, "--max-files", "2"}
	artifacts := func() map[string]string {
		tree := treeOf(t, dir)
		maps.DeleteFunc(tree, func(path, _ string) bool {
			return filepath.Ext(path) != ".zst" || strings.Contains(path, ".polykit-cache")
		})
		return tree
	}
	wantArtifacts := artifacts()

	imports(t, 0, summaryOf(first, "to verify", 12, 0, 0, 2), "", append(flags, "--dry-run")...)
	checkTree(t, dir, before)
	path := func(key artifact.Key) string {
		digits := key.String()
		return filepath.Join(dir, digits[:2], digits[2:4], digits+".zst")
	}
	left := "refused  " + regexp.QuoteMeta(path(manyFiles)) + `  .* files.* \(left where it is\)\n`
	refused := func(lines string, n string) string {
		return lines + "polykit-cache: " + n + " refused; it is said above why\n"
	}
	imports(t, 1, summaryOf(first, "verified", 10, 0, 2, 2),
		refused(`(?:refused  `+regexp.QuoteMeta(path(damaged))+`  .* \(moved to quarantine\)\n|`+left+`){2}`, "2 artifacts were"), flags...)
	delete(wantArtifacts, path(damaged))
	if got := artifacts(); !maps.Equal(got, wantArtifacts) {
		t.Errorf("artifacts are %s, want %s", got, wantArtifacts)
	}
	imports(t, 0, summaryOf(first, "to verify", 1, 10, 0, 2), "", append(flags, "--dry-run")...)
	imports(t, 1, summaryOf(first, "verified", 0, 10, 1, 2), refused(left, "1 artifact was"), flags...)
	imports(t, 0, summaryOf(first, "verified", 1, 10, 0, 2), "", dir, "--storage-dir", dir)

	// What was stored long ago was used long ago, and is known by its package and task.
	status, stdout, stderr := polykit(t, "gc", "--storage-dir", dir, "--max-age", "24h", "--dry-run")
	if want := regexp.MustCompile(`\nweb +build +11 +.* max-age\ntotal +11 `); !want.MatchString(stdout) || status != 0 || stderr != "" {
		t.Errorf("gc: exit status %d, %s, %s", status, stdout, stderr)
	}
}

// Who interrupts an import gets what was in progress, and the rest the next time.
func TestImportIsContinued(t *testing.T) {
	t.Parallel()
	// As many damaged artifacts as are imported at once stand in the middle. The first refusal interrupts:
	// what is behind begins only after one of them has ended.
	atOnce := runtime.GOMAXPROCS(0)
	source, want := files{}, map[string][]byte{}
	n := 0
	add := func(count int, sound bool) {
		for range count {
			key := numbered(t, n)
			content := cachetest.Sound(key, map[string]string{"stdout.txt": fmt.Sprint(n)})
			if sound {
				want[key.String()] = content
			} else {
				content = content[:100]
			}
			source.addServers(key, content)
			n++
		}
	}
	add(atOnce, true)
	add(atOnce, false)
	add(10, true)
	dir, into := t.TempDir(), t.TempDir()
	source.write(t, dir)

	ctx, interrupt := context.WithCancel(t.Context())
	var stdout bytes.Buffer
	stderr := &interrupting{on: "refused  ", interrupt: interrupt}
	status := run(ctx, []string{"import", dir, "--storage-dir", into}, &stdout, stderr)
	if text := stderr.String(); status != 1 || !strings.HasSuffix(text, "\npolykit-cache: interrupted; run this again to continue\n") {
		t.Errorf("exit status %d, %s", status, text)
	}
	first := storedIn(t, into)
	if len(first) < 1 || len(first) > atOnce {
		t.Errorf("%d artifacts are stored, want 1 to %d", len(first), atOnce)
	}
	for key, content := range first {
		if !bytes.Equal(content, want[key]) {
			t.Errorf("%s is stored with other bytes", key)
		}
	}
	if !regexp.MustCompile(fmt.Sprintf(`imported +%d artifacts? `, len(first))).MatchString(stdout.String()) {
		t.Errorf("%d artifacts are stored, but it says\n%s", len(first), &stdout)
	}

	is := regexp.QuoteMeta(dir) + " is a server's storage directory"
	imports(t, 1, summaryOf(is, "imported", len(want)-len(first), len(first), atOnce, 0), "(?s).*", dir, "--storage-dir", into)
	checkStored(t, into, want)
}

// interrupting interrupts when a text is written to it.
type interrupting struct {
	bytes.Buffer
	on        string
	interrupt func()
}

func (i *interrupting) Write(p []byte) (int, error) {
	if strings.Contains(string(p), i.on) {
		i.interrupt()
	}
	return i.Buffer.Write(p)
}

// Without room an import stops, evicts nothing, and can be continued.
func TestImportStopsWithoutRoom(t *testing.T) {
	t.Parallel()
	source, want := files{}, map[string][]byte{}
	for n := range 12 {
		key := numbered(t, n)
		want[key.String()] = cachetest.Random(key, mebi)
		source.addServers(key, want[key.String()])
	}
	dir, into := t.TempDir(), t.TempDir()
	source.write(t, dir)
	status, _, stderr := polykit(t, "import", dir, "--storage-dir", into, "--max-storage", "10MiB")
	first := storedIn(t, into)
	if status != 1 || !strings.HasPrefix(stderr, "polykit-cache: there is no room for more: ") || len(first) == 0 || len(first) == len(want) {
		t.Errorf("exit status %d, %s; %d artifacts are stored", status, stderr, len(first))
	}
	is := regexp.QuoteMeta(dir) + " is a server's storage directory"
	imports(t, 0, summaryOf(is, "imported", len(want)-len(first), len(first), 0, 0), "", dir, "--storage-dir", into)
	checkStored(t, into, want)
}

// An artifact that is stored under the key but not sound does not keep a sound one out.
func TestImportReplacesWhatIsDamaged(t *testing.T) {
	t.Parallel()
	key := numbered(t, 1)
	content := cachetest.Sound(key, nil)
	source, damaged := files{}, files{}
	source.addServers(key, content)
	damaged.addServers(key, content[:50])
	dir, into := t.TempDir(), t.TempDir()
	source.write(t, dir)
	damaged.write(t, into)
	imports(t, 0, summaryOf(".*", "imported", 1, 0, 0, 0), "", dir, "--storage-dir", into)
	checkStored(t, into, map[string][]byte{key.String(): content})
}
