package disk_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
)

// The artifact that most tests are about.
const (
	digits   = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	zstName  = "01/23/" + digits + ".zst"
	jsonName = "01/23/" + digits + ".json"
)

var (
	key     = keyOf(digits)
	pr7     = cachetest.Scope("pr-7")
	content = cachetest.Random(key, 5000)
)

func keyOf(digits string) artifact.Key {
	key, err := artifact.ParseKey(digits)
	if err != nil {
		panic(err)
	}
	return key
}

// rig is a store on a directory, in front of it a cache, and what the store logged.
type rig struct {
	*cache.Cache
	store *disk.Store
	dir   string
	log   *logbook
}

// open opens a store on a directory until the end of the test.
func open(t *testing.T, dir string) rig {
	t.Helper()
	return openWith(t, disk.Config{Dir: dir})
}

func openWith(t *testing.T, config disk.Config) rig {
	t.Helper()
	r, err := tryOpenWith(config)
	if err != nil {
		t.Fatal("Open:", err)
	}
	t.Cleanup(func() { r.store.Close() })
	return r
}

func tryOpen(dir string) (rig, error) { return tryOpenWith(disk.Config{Dir: dir}) }

// tryOpenWith opens a store whose verifier and log are the test's.
func tryOpenWith(config disk.Config) (rig, error) {
	log := new(logbook)
	config.Verifier = artifact.NewVerifier(artifact.DefaultLimits)
	config.Log = slog.New(slog.NewTextHandler(log, nil))
	store, err := disk.Open(config)
	return rig{cache.New(store, config.Verifier, cache.Config{MaxSize: 1 << 30}), store, config.Dir, log}, err
}

// logbook keeps what is logged.
type logbook struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// inspections returns how many times an artifact was verified for the lack of its memo.
func (l *logbook) inspections() int {
	return strings.Count(l.String(), `msg="verified a stored artifact`)
}

func (r rig) path(name string) string { return filepath.Join(r.dir, filepath.FromSlash(name)) }

func (r rig) put(t *testing.T, key artifact.Key, content []byte) artifact.Info {
	t.Helper()
	info, err := r.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content))
	if err != nil {
		t.Fatal("Put:", err)
	}
	return info
}

// upload returns an upload that can be committed, and what is known of it. It is aborted in the end.
func (r rig) upload(t *testing.T, key artifact.Key, content []byte) (cache.Upload, artifact.Info) {
	t.Helper()
	_, info, err := artifact.NewVerifier(artifact.DefaultLimits).Inspect(context.Background(), bytes.NewReader(content), key)
	if err != nil {
		t.Fatal("Inspect:", err)
	}
	upload, err := r.store.Create(t.Context(), key, info.Size)
	if err != nil {
		t.Fatal("Create:", err)
	}
	t.Cleanup(upload.Abort)
	if _, err := upload.Write(content); err != nil {
		t.Fatal("Write:", err)
	}
	return upload, info
}

// manifestOf returns the digest of an artifact's manifest.
func manifestOf(t *testing.T, content []byte) artifact.Digest {
	t.Helper()
	contents, err := artifact.NewVerifier(artifact.DefaultLimits).Verify(bytes.NewReader(content), key)
	if err != nil {
		t.Fatal("Verify:", err)
	}
	return contents.Manifest()
}

// get returns the bytes that are stored under key, or the error of Get. It is an error if they
// disagree with what is known of them.
func (r rig) get(t *testing.T, key artifact.Key) ([]byte, artifact.Info, error) {
	file, info, err := r.Get(t.Context(), key)
	if err != nil {
		return nil, info, err
	}
	got, err := io.ReadAll(file)
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, info, err
	}
	if info.Hash != sha256.Sum256(got) || info.Size != int64(len(got)) || info.Key != key {
		err = fmt.Errorf("%d bytes with SHA-256 %x are said to be %d with %s", len(got), sha256.Sum256(got), info.Size, info.Hash)
	}
	return got, info, err
}

// serves makes sure that content is stored under key, by all ways of asking.
func (r rig) serves(t *testing.T, key artifact.Key, content []byte) {
	t.Helper()
	got, info, err := r.get(t, key)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("Get returned %d bytes, %v, want the %d that were uploaded", len(got), err, len(content))
	}
	if stat, err := r.Stat(t.Context(), key); err != nil || stat != info {
		t.Errorf("Stat returned %+v, %v, but Get %+v", stat, err, info)
	}
	if _, err := r.Files(t.Context(), key); err != nil {
		t.Errorf("Files returned %v", err)
	}
	if _, err := r.Put(t.Context(), key, cache.UnknownSize, bytes.NewReader(content)); err != cache.ErrExists {
		t.Errorf("Put returned %v, want %v", err, cache.ErrExists)
	}
	r.tmpIsEmpty(t)
}

// lacks makes sure that nothing is stored under key, by all ways of asking, and that it can be uploaded.
func (r rig) lacks(t *testing.T, key artifact.Key) {
	t.Helper()
	if _, _, err := r.get(t, key); err != cache.ErrNotFound {
		t.Errorf("Get returned %v, want %v", err, cache.ErrNotFound)
	}
	if _, err := r.Stat(t.Context(), key); err != cache.ErrNotFound {
		t.Errorf("Stat returned %v, want %v", err, cache.ErrNotFound)
	}
	if _, err := r.Files(t.Context(), key); err != cache.ErrNotFound {
		t.Errorf("Files returned %v, want %v", err, cache.ErrNotFound)
	}
	content := cachetest.Sound(key, map[string]string{"stdout.txt": "uploaded after the miss"})
	r.put(t, key, content)
	r.serves(t, key, content)
}

func (r rig) tmpIsEmpty(t *testing.T) {
	t.Helper()
	if left := list(t, r.path("tmp")); len(left) != 0 {
		t.Errorf("left in tmp/: %q", left)
	}
}

// quarantined returns what is in quarantine, without the unique parts of the names.
func (r rig) quarantined(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	dir := r.path(".polykit-cache/quarantine")
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return found
	}
	for _, name := range list(t, dir) {
		name = strings.TrimSuffix(name, "/")
		before, unique, ok := strings.Cut(name, "-")
		if len(unique) < 26 || !ok {
			t.Fatalf("the name %q in quarantine is not unique", name)
		}
		short := before + unique[26:]
		if _, twice := found[short]; twice {
			t.Errorf("%s is in quarantine twice", short)
		}
		found[short] = "not a file that can be read"
		if stat := lstat(t, filepath.Join(dir, name)); stat.Mode().IsRegular() && stat.Mode().Perm() != 0 {
			found[short] = string(read(t, filepath.Join(dir, name)))
		}
	}
	return found
}

// list returns the names in a directory, of directories with a slash behind them.
func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, entry := range entries {
		name := entry.Name()
		if entry.IsDir() {
			name += "/"
		}
		names = append(names, name)
	}
	return names
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func write(t *testing.T, path string, p []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, p, 0o644)); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
}

func removeAll(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

func lstat(t *testing.T, path string) fs.FileInfo {
	t.Helper()
	stat, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return stat
}

// modified sets when a file was modified.
func modified(t *testing.T, path string, at time.Time) {
	t.Helper()
	if err := os.Chtimes(path, time.Time{}, at); err != nil {
		t.Fatal(err)
	}
}

func TestContract(t *testing.T) {
	for name, hotSize := range map[string]int64{"nothing kept in memory": 0, "small artifacts kept": 1 << 20} {
		for _, scope := range []artifact.Scope{artifact.DefaultScope, pr7} {
			t.Run(name+", "+scope.String(), func(t *testing.T) {
				cachetest.TestStore(t, func(t *testing.T) cache.Store {
					r := openWith(t, disk.Config{Dir: t.TempDir(), HotSize: hotSize})
					t.Cleanup(func() {
						r.tmpIsEmpty(t)
						if log := r.log.String(); strings.Contains(log, `msg="could not`) {
							t.Errorf("the store could not do something:\n%s", log)
						}
					})
					return r.store.In(scope)
				})
			})
		}
	}
}

func TestLayout(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "there", "yet")
	r := open(t, dir)
	r.put(t, key, content)

	reference := filepath.Join(t.TempDir(), "reference")
	if err := os.Mkdir(reference, 0o777); err != nil {
		t.Fatal(err)
	}
	umask := 0o777 &^ lstat(t, reference).Mode().Perm()
	found := map[string]string{}
	if err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		found[filepath.ToSlash(name)] = lstat(t, path).Mode().String()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		".":                   (fs.ModeDir | 0o755&^umask).String(),
		"01":                  (fs.ModeDir | 0o755&^umask).String(),
		"01/23":               (fs.ModeDir | 0o755&^umask).String(),
		zstName:               (0o644 &^ umask).String(),
		jsonName:              (0o644 &^ umask).String(),
		"tmp":                 (fs.ModeDir | 0o755&^umask).String(),
		".polykit-cache.lock": found[".polykit-cache.lock"],
	}
	if fmt.Sprint(found) != fmt.Sprint(want) {
		t.Errorf("on disk there are\n%v, want\n%v", found, want)
	}

	if !bytes.Equal(read(t, r.path(zstName)), content) {
		t.Error("the .zst is not what was uploaded")
	}
	memo := sealed(fmt.Sprintf(`{"hash":"%x","size":%d,"created_at":1700000000,"cache_key_hash":"%s",`+
		`"verified_by":1,"modified_at":%d,"uncompressed_size":5000,"file_count":1,`+
		`"package_name":"web","task_name":"build","command":"npm run build","manifest":"%s"}`,
		sha256.Sum256(content), len(content), digits, lstat(t, r.path(zstName)).ModTime().UnixNano(), manifestOf(t, content)))
	if got := string(read(t, r.path(jsonName))); got != memo {
		t.Errorf("the .json is\n%s, want\n%s", got, memo)
	}
}

// sealed returns a memo with the checksum that belongs to its other members.
func sealed(memo string) string {
	memo, _, _ = strings.Cut(strings.TrimSuffix(memo, "}"), `,"checksum":`)
	sum := sha256.Sum256([]byte(memo + "}"))
	return fmt.Sprintf(`%s,"checksum":"%x"}`, memo, sum[:8])
}

func TestDirectoryHasOneServer(t *testing.T) {
	dir := t.TempDir()
	first := open(t, dir)
	upload, info := first.upload(t, key, content)
	want := "storage directory " + dir + " is in use by another server: stop that one first, or give this one a directory of its own"
	for range 2 {
		if _, err := tryOpen(dir); err == nil || err.Error() != want {
			t.Fatalf("the second Open returned %v, want %s", err, want)
		}
	}
	// The one that was refused swept nothing.
	if _, err := upload.Commit(t.Context(), info); err != nil {
		t.Error("Commit:", err)
	}
	if err := first.store.Close(); err != nil {
		t.Error("Close:", err)
	}
	second := open(t, dir)
	second.serves(t, key, content)
}

func TestOpenFails(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "file"), nil)
	write(t, filepath.Join(dir, "storage", "tmp"), nil)
	for name, message := range map[string]string{
		"file":       filepath.Join(dir, "file"),
		"file/below": filepath.Join(dir, "file"),
		"storage":    filepath.Join(dir, "storage", "tmp"),
	} {
		r, err := tryOpen(filepath.Join(dir, filepath.FromSlash(name)))
		if err == nil {
			r.store.Close()
		}
		if err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("Open of %s returned %v, want an error that names %s", name, err, message)
		}
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	tmp := filepath.Join(dir, "tmp")
	for name, age := range map[string]time.Duration{
		digits + "-NEW.part": 0,
		digits + "-OLD.part": 1000 * time.Hour,
		"rust-new":           0,
		"rust-23h":           23 * time.Hour,
		"rust-25h":           25 * time.Hour,
		"rust-future":        -time.Hour,
		".part":              0,
		"apartment":          0,
	} {
		write(t, filepath.Join(tmp, name), []byte("cut short"))
		modified(t, filepath.Join(tmp, name), time.Now().Add(-age))
	}
	for name, age := range map[string]time.Duration{"dir-new": 0, "dir-25h": 25 * time.Hour} {
		write(t, filepath.Join(tmp, name, "file"), nil)
		modified(t, filepath.Join(tmp, name), time.Now().Add(-age))
	}
	open(t, dir)
	want := []string{"apartment", "dir-new/", "rust-23h", "rust-future", "rust-new"}
	if left := list(t, tmp); !slices.Equal(left, want) {
		t.Errorf("left in tmp/: %q, want %q", left, want)
	}
}

func TestSweepAfterCrash(t *testing.T) {
	r := open(t, t.TempDir())
	upload, info := r.upload(t, key, content)
	if left := list(t, r.path("tmp")); len(left) != 1 {
		t.Fatalf("in tmp/ there are %q, want one file", left)
	}
	r.store.Close()
	next := open(t, r.dir)
	next.tmpIsEmpty(t)

	// The upload was swept away: it fails, and does no harm.
	if _, err := upload.Commit(t.Context(), info); err == nil {
		t.Error("the upload was committed")
	}
	upload.Abort()
	next.lacks(t, key)
}

// firstAsk is whatever is asked first of an artifact that needs attention.
type firstAsk struct {
	name string
	// ask returns the error.
	ask func(t *testing.T, r rig) error
}

var firstAsks = []firstAsk{
	{"Get", func(t *testing.T, r rig) error { _, _, err := r.get(t, key); return err }},
	{"Stat", func(t *testing.T, r rig) error { _, err := r.Stat(t.Context(), key); return err }},
	{"Files", func(t *testing.T, r rig) error { _, err := r.Files(t.Context(), key); return err }},
}

// TestFound opens a directory in which an artifact is whole, but what is known of it is not as this
// package leaves it: it was the Rust server, a crash, or a hand. The artifact is served, and its memo
// made anew, once.
func TestFound(t *testing.T) {
	full := func(hash string, size, modifiedAt int64, keyHash string, verifiedBy int) string {
		return sealed(fmt.Sprintf(`{"hash":"%s","size":%d,"created_at":1700000000,"cache_key_hash":"%s","verified_by":%d,"modified_at":%d,`+
			`"uncompressed_size":77,"file_count":77,"package_name":"wrong","task_name":"wrong","command":"wrong"}`,
			hash, size, keyHash, verifiedBy, modifiedAt))
	}
	hash := fmt.Sprintf("%x", sha256.Sum256(content))
	size := int64(len(content))
	stored := time.Date(2025, 3, 4, 5, 6, 7, 123456789, time.UTC)
	at := stored.UnixNano()
	rust := fmt.Sprintf(`{"hash":"%s","size":%d,"created_at":1700000000,"cache_key_hash":"%s"}`, hash, size, digits)
	for _, test := range append([]foundTest{
		{name: "the Rust server's", memo: rust},
		{name: "the Rust server's, with members to come", memo: strings.Replace(rust, "{", `{"to_come":[{"a":null}],`, 1)},
		{name: "the Rust server's, wrong in everything", memo: `{"hash":"00","size":1,"created_at":1,"cache_key_hash":"00"}`},
		{name: "missing", make: func(*testing.T, string) {}},
		{name: "empty", memo: "", make: func(t *testing.T, path string) { write(t, path, nil) }},
		{name: "torn", memo: full(hash, size, at, digits, 1)[:150]},
		{name: "torn at the end", memo: strings.TrimSuffix(full(hash, size, at, digits, 1), "}")},
		{name: "zeros", memo: strings.Repeat("\x00", 400)},
		{name: "garbage", memo: "\x89PNG\r\n"},
		{name: "not an object", memo: "[]"},
		{name: "null", memo: "null"},
		{name: "of wrong types", memo: `{"hash":1,"size":"1"}`},
		{name: "two of them", memo: full(hash, size, at, digits, 1) + full(hash, size, at, digits, 1)},
		{name: "too long", memo: strings.Replace(full(hash, size, at, digits, 1), "{", "{"+strings.Repeat(" ", 8<<20), 1)},
		{name: "hash is no hash", memo: full("", size, at, digits, 1)},
		{name: "hash is upper-case", memo: full(strings.ToUpper(hash), size, at, digits, 1)},
		{name: "another size", memo: full(hash, size+1, at, digits, 1)},
		{name: "another time", memo: full(hash, size, at+1, digits, 1)},
		{name: "another key", memo: full(hash, size, at, digits[1:]+"0", 1)},
		{name: "another digit in the hash", memo: strings.Replace(full(hash, size, at, digits, 1), hash[:8], "00000000", 1)},
		{name: "another name", memo: strings.Replace(full(hash, size, at, digits, 1), `"package_name":"w`, `"package_name":"v`, 1)},
		{name: "no checksum", memo: strings.Split(full(hash, size, at, digits, 1), `,"checksum"`)[0] + "}"},
		{name: "an empty checksum", memo: strings.Split(full(hash, size, at, digits, 1), `"checksum"`)[0] + `"checksum":""}`},
		{name: "rules of the past", memo: full(hash, size, at, digits, 0)},
		{name: "rules of the future", memo: full(hash, size, at, digits, 2)},
		{name: "a directory", make: mkdir, aside: true},
		{name: "a directory with something in it", make: func(t *testing.T, path string) { write(t, filepath.Join(path, "file"), nil) }, aside: true},
	}, specialMemos...) {
		for _, first := range append(firstAsks, firstAsk{"Put", func(t *testing.T, r rig) error {
			if _, err := r.Put(t.Context(), key, -1, bytes.NewReader(content)); err != cache.ErrExists {
				return fmt.Errorf("Put returned %w, want %w", err, cache.ErrExists)
			}
			return nil
		}}) {
			t.Run(test.name+", "+first.name, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				zst, memo := filepath.Join(dir, filepath.FromSlash(zstName)), filepath.Join(dir, filepath.FromSlash(jsonName))
				write(t, zst, content)
				modified(t, zst, stored)
				if test.make != nil {
					test.make(t, memo)
				} else {
					write(t, memo, []byte(test.memo))
				}
				r := open(t, dir)
				if err := first.ask(t, r); err != nil {
					t.Error(err)
				}
				r.serves(t, key, content)
				got, err := r.Stat(t.Context(), key)
				want := artifact.Info{Key: key, Hash: sha256.Sum256(content), Size: size, UncompressedSize: 5000, FileCount: 1,
					Manifest: manifestOf(t, content), Metadata: artifact.Metadata{
						PackageName: "web", TaskName: "build", Command: "npm run build", CreatedAt: time.Unix(1700000000, 0).UTC()}}
				if !got.StoredAt.Equal(stored) {
					t.Errorf("stored at %v, want %v", got.StoredAt, stored)
				}
				if got.StoredAt = want.StoredAt; err != nil || got != want {
					t.Errorf("Stat returned %+v, %v, want %+v", got, err, want)
				}
				if n := r.log.inspections(); n != 1 {
					t.Errorf("the artifact was verified %d times, want once", n)
				}
				var healed struct {
					ModifiedAt int64 `json:"modified_at"`
				}
				if err := json.Unmarshal(read(t, memo), &healed); err != nil || healed.ModifiedAt != at || !lstat(t, memo).Mode().IsRegular() {
					t.Errorf("the memo was not made anew: %s", read(t, memo))
				}
				aside := map[string]string{}
				if test.aside {
					aside = map[string]string{digits + ".json": "not a file that can be read", digits + ".txt": "a directory where a memo belongs\n"}
				}
				if found := r.quarantined(t); fmt.Sprint(found) != fmt.Sprint(aside) {
					t.Errorf("in quarantine are %q, want %q", found, aside)
				}
			})
		}
	}
}

type foundTest struct {
	name  string
	memo  string
	make  func(t *testing.T, path string) // instead of memo
	aside bool                            // it must be in quarantine then
}

// TestMemoIsGoneBy is TestFound's twin: with a memo that is whole nothing is verified.
func TestMemoIsGoneBy(t *testing.T) {
	for name, edit := range map[string]func(string) string{
		"as it was written": func(memo string) string { return memo },
		"with members to come": func(memo string) string {
			return strings.Replace(memo, "{", `{"to_come":[{"a":null}],"scope":"main",`, 1)
		},
		"in another form": func(memo string) string { return "\n" + strings.ReplaceAll(memo, ",", " ,\n\t") + "\n" },
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, t.TempDir())
			r.put(t, key, content)
			memo := edit(string(read(t, r.path(jsonName))))
			write(t, r.path(jsonName), []byte(memo))
			r.store.Close()
			r = open(t, r.dir)
			r.serves(t, key, content)
			if n := r.log.inspections(); n != 0 {
				t.Errorf("the artifact was verified %d times", n)
			}
			if got := string(read(t, r.path(jsonName))); got != memo {
				t.Errorf("the memo was made anew: %s", got)
			}
		})
	}
}

func TestMemoWithoutArtifact(t *testing.T) {
	for _, first := range firstAsks {
		t.Run(first.name, func(t *testing.T) {
			r := open(t, t.TempDir())
			r.put(t, key, content)
			if err := os.Remove(r.path(zstName)); err != nil {
				t.Fatal(err)
			}
			if err := first.ask(t, r); err != cache.ErrNotFound {
				t.Errorf("%s returned %v, want %v", first.name, err, cache.ErrNotFound)
			}
			r.lacks(t, key)
		})
	}
}

// TestDamaged damages what is stored. It is a miss, is moved into quarantine as it is, and its key can
// be uploaded again.
func TestDamaged(t *testing.T) {
	regular := func(damage func() []byte) func(t *testing.T, path string) {
		return func(t *testing.T, path string) { write(t, path, damage()) }
	}
	for _, test := range append([]damagedTest{
		{"truncated", regular(func() []byte { return content[:2000] }), "the zstd stream ends in the middle of a frame"},
		{"truncated by a byte", regular(func() []byte { return content[:len(content)-1] }), "the zstd stream ends in the middle of a frame"},
		{"emptied", regular(func() []byte { return nil }), "the zstd stream is empty"},
		{"zeroed", regular(func() []byte { return make([]byte, len(content)) }), "the zstd stream does not begin with a zstd frame"},
		{"extended", regular(func() []byte { return append(slices.Clone(content), 0) }), "the zstd stream has bytes behind its last frame"},
		{"a flipped bit", regular(func() []byte {
			flipped := slices.Clone(content)
			flipped[len(flipped)-1500] ^= 1
			return flipped
		}), `"outputs/data.bin" has SHA-256 `},
		{"another key's", regular(func() []byte { return cachetest.Random(cachetest.Key("other"), 5000) }), "metadata.json names the cache key "},
		{"a directory", func(t *testing.T, path string) { removeAll(t, path); mkdir(t, path) }, "not a regular file"},
		{"a directory with something in it", func(t *testing.T, path string) {
			removeAll(t, path)
			write(t, filepath.Join(path, "file"), nil)
		}, "not a regular file"},
	}, specialArtifacts...) {
		for _, first := range append(firstAsks, firstAsk{"Put", func(t *testing.T, r rig) error {
			_, err := r.Put(t.Context(), key, -1, strings.NewReader("unsound"))
			if _, unsound := errors.AsType[*artifact.UnsoundError](err); unsound { // so the key was free
				return cache.ErrNotFound
			}
			return err
		}}) {
			for _, memo := range []string{"with its memo", "without its memo"} {
				if memo == "without its memo" && first.name != "Get" {
					continue
				}
				t.Run(test.name+", "+memo+", "+first.name, func(t *testing.T) {
					t.Parallel()
					r := open(t, t.TempDir())
					r.put(t, key, content)
					test.damage(t, r.path(zstName))
					damaged := "not a file that can be read"
					if lstat(t, r.path(zstName)).Mode().IsRegular() {
						damaged = string(read(t, r.path(zstName)))
						modified(t, r.path(zstName), time.Now().Add(time.Hour)) // or else the clock may not have ticked since
					}
					if memo == "without its memo" {
						removeAll(t, r.path(jsonName))
					}
					for range 2 {
						if err := first.ask(t, r); err != cache.ErrNotFound {
							t.Errorf("%s returned %v, want %v", first.name, err, cache.ErrNotFound)
						}
					}
					if left := list(t, r.path("01/23")); len(left) != 0 {
						t.Errorf("left in the shard: %q", left)
					}
					r.lacks(t, key)
					found := r.quarantined(t)
					if len(found) != 2 || found[digits+".zst"] != damaged || !strings.HasPrefix(found[digits+".txt"], test.reason) || !strings.HasSuffix(found[digits+".txt"], "\n") {
						t.Errorf("in quarantine are %.200q, want what was damaged, and the reason %q", found, test.reason)
					}
				})
			}
		}
	}
}

type damagedTest struct {
	name   string
	damage func(t *testing.T, path string)
	reason string // or how it begins
}

// TestCreateDoesNotVerify begins an upload of an artifact that is stored without a memo, while the upload
// itself takes all room for verifications: to verify what is stored would be to wait for itself.
func TestCreateDoesNotVerify(t *testing.T) {
	r := open(t, t.TempDir())
	info := r.put(t, key, content)
	removeAll(t, r.path(jsonName))
	r.store.Close()

	limits := artifact.DefaultLimits
	limits.ManifestSize, limits.Files = 1<<20, 1000
	limits.Memory = limits.LeastMemory() // for one at a time
	limits.QueueTimeout = time.Nanosecond
	verifier := artifact.NewVerifier(limits)
	store, err := disk.Open(disk.Config{Dir: r.dir, Verifier: verifier, Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	_, release, err := verifier.Admit(t.Context(), bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	upload, err := store.Create(t.Context(), key, info.Size)
	if err != nil {
		t.Fatal("Create:", err)
	}
	defer upload.Abort()
	if _, err := upload.Write(content); err != nil {
		t.Fatal("Write:", err)
	}
	if _, err := upload.Commit(t.Context(), info); !errors.Is(err, cache.ErrExists) {
		t.Errorf("Commit returned %v, want %v", err, cache.ErrExists)
	}
}

// TestCutShortBeforeCommit writes to an upload's file what a file system that loses bytes would leave.
func TestCutShortBeforeCommit(t *testing.T) {
	r := open(t, t.TempDir())
	upload, info := r.upload(t, key, content)
	for _, name := range list(t, r.path("tmp")) {
		write(t, r.path("tmp/"+name), content[:len(content)-1])
	}
	if _, err := upload.Commit(t.Context(), info); err == nil {
		t.Error("Commit of a file that lacks a byte returned no error")
	}
	upload.Abort()
	r.tmpIsEmpty(t)
	r.lacks(t, key)
}

// TestDamagedBehindItsMemo pins a limit: a GET does not read what it serves, so a bit that flips
// without the file's size or time changing is found only by verifying all of the artifact again.
func TestDamagedBehindItsMemo(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, r rig){
		"a flipped bit": func(t *testing.T, r rig) {
			at := lstat(t, r.path(zstName)).ModTime()
			flipped := slices.Clone(content)
			flipped[len(flipped)-1500] ^= 1
			write(t, r.path(zstName), flipped)
			modified(t, r.path(zstName), at)
		},
		"another hash": func(t *testing.T, r rig) {
			memo := strings.Replace(string(read(t, r.path(jsonName))), fmt.Sprintf("%x", sha256.Sum256(content)), strings.Repeat("0", 64), 1)
			write(t, r.path(jsonName), []byte(sealed(memo)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, t.TempDir())
			r.put(t, key, content)
			damage(t, r)
			if file, info, err := r.Get(t.Context(), key); err != nil || info.Size != int64(len(content)) {
				t.Errorf("Get returned %+v, %v", info, err)
			} else {
				file.Close()
			}
			if _, err := r.Files(t.Context(), key); err != cache.ErrNotFound {
				t.Errorf("Files returned %v, want %v", err, cache.ErrNotFound)
			}
			if len(r.quarantined(t)) != 2 {
				t.Errorf("in quarantine: %q", r.quarantined(t))
			}
			r.lacks(t, key)
		})
	}
}

func TestQuarantineMayBeDeleted(t *testing.T) {
	r := open(t, t.TempDir())
	for range 3 {
		info := r.put(t, key, content)
		if err := r.store.Quarantine(t.Context(), info, errors.New("damaged")); err != nil {
			t.Fatal("Quarantine:", err)
		}
		if found := r.quarantined(t); len(found) != 2 || found[digits+".txt"] != "damaged\n" {
			t.Errorf("in quarantine: %.200q", found)
		}
		removeAll(t, r.path(".polykit-cache"))
	}
	r.lacks(t, key)
}

// TestShardRemoved empties the store behind its back, as people do.
func TestShardRemoved(t *testing.T) {
	for _, name := range []string{"01", "01/23"} {
		for _, shard := range []string{"0123", "0145"} { // one that was there, and one that never was
			t.Run(name+" before an upload into "+shard, func(t *testing.T) {
				r := open(t, t.TempDir())
				r.put(t, key, content)
				removeAll(t, r.path(name))
				r.lacks(t, key)

				other := keyOf(shard + strings.Repeat("f", 60))
				content := cachetest.Random(other, 1000)
				upload, info := r.upload(t, other, content)
				removeAll(t, r.path(name))
				if _, err := upload.Commit(t.Context(), info); err != nil {
					t.Fatal("Commit:", err)
				}
				r.serves(t, other, content)
				r.lacks(t, key)
			})
		}
	}
}

// TestShardInTheWay puts files where the directories of a shard must be. Looking for an artifact does
// not touch them; an upload moves them out of its way.
func TestShardInTheWay(t *testing.T) {
	for _, test := range []struct{ name, base string }{{"01", "01"}, {"01/23", "23"}} {
		for _, when := range []string{"before the start", "while running"} {
			t.Run(test.name+" "+when, func(t *testing.T) {
				dir := t.TempDir()
				path := filepath.Join(dir, filepath.FromSlash(test.name))
				var r rig
				if when == "while running" {
					r = open(t, dir)
					r.put(t, key, content)
					removeAll(t, path)
					write(t, path, []byte("somebody's"))
				} else {
					write(t, path, []byte("somebody's"))
					r = open(t, dir)
				}
				for _, first := range firstAsks {
					if err := first.ask(t, r); err != cache.ErrNotFound {
						t.Errorf("%s returned %v, want %v", first.name, err, cache.ErrNotFound)
					}
				}
				if got := string(read(t, path)); got != "somebody's" {
					t.Errorf("the file in the way is %q now", got)
				}
				// Many uploads at once move it once, and not each other's directories.
				uploads, infos := make([]cache.Upload, 16), make([]artifact.Info, 16)
				for i := range uploads {
					key := keyOf("0123" + fmt.Sprintf("%028x", i))
					uploads[i], infos[i] = r.upload(t, key, cachetest.Random(key, 100))
				}
				cachetest.Together(len(uploads), func(i int) {
					if _, err := uploads[i].Commit(t.Context(), infos[i]); err != nil {
						t.Error("Commit:", err)
					}
				})
				for _, info := range infos {
					r.serves(t, info.Key, cachetest.Random(info.Key, 100))
				}
				r.lacks(t, key)
				want := map[string]string{test.base: "somebody's", test.base + ".txt": path + " must be a directory\n"}
				if found := r.quarantined(t); fmt.Sprint(found) != fmt.Sprint(want) {
					t.Errorf("in quarantine are %q, want %q", found, want)
				}
			})
		}
	}
}

// TestManyAskAtOnce lets many ask for an artifact that needs attention: it gets it once, and all get
// the same answer.
func TestManyAskAtOnce(t *testing.T) {
	const many, rounds = 256, 10
	r := open(t, t.TempDir())
	for round := range rounds {
		found, damaged := cachetest.Key(fmt.Sprint("found ", round)), cachetest.Key(fmt.Sprint("damaged ", round))
		content := cachetest.Random(found, 1000)
		for _, key := range []artifact.Key{found, damaged} {
			digits := key.String()
			write(t, filepath.Join(r.dir, digits[:2], digits[2:4], digits+".zst"), content)
		}
		cachetest.Together(many, func(i int) {
			if i%2 == 0 {
				if _, err := r.Stat(t.Context(), found); err != nil {
					t.Error("Stat:", err)
				}
			}
			if got, _, err := r.get(t, found); err != nil || !bytes.Equal(got, content) {
				t.Errorf("Get returned %d bytes, %v", len(got), err)
			}
			if _, _, err := r.get(t, damaged); err != cache.ErrNotFound {
				t.Errorf("Get of the damaged one returned %v, want %v", err, cache.ErrNotFound)
			}
		})
		if n := r.log.inspections(); n != round+1 {
			t.Fatalf("%d artifacts were verified %d times, want once each", round+1, n)
		}
	}
	if n := len(r.quarantined(t)); n != 2*rounds {
		t.Errorf("in quarantine are %d files, want %d artifacts and their reasons", n, rounds)
	}
}

// TestNeverLies uploads, removes and reads one key at once, with artifacts of one size and with memos
// that vanish. Whoever gets an artifact gets one that is whole and is what it is said to be.
func TestNeverLies(t *testing.T) {
	r := open(t, t.TempDir())
	artifacts := make([][]byte, 16)
	known := map[artifact.Digest]bool{}
	for i := range artifacts {
		text := fmt.Sprintf("artifact %2d", i)
		manifest := cachetest.Manifest(map[string]string{"stdout.txt": fmt.Sprintf("%x", sha256.Sum256([]byte(text)))}, len(text))
		artifacts[i] = cachetest.Store(cachetest.Tar(cachetest.Metadata(key), manifest, cachetest.File("outputs/stdout.txt", text)))
		if len(artifacts[i]) != len(artifacts[0]) {
			t.Fatal("the test is wrong: the artifacts must be of one size")
		}
		known[sha256.Sum256(artifacts[i])] = true
	}
	var uploaded, served atomic.Int64
	var uploading, others sync.WaitGroup
	done := make(chan struct{})
	again := func() bool {
		select {
		case <-done:
			return false
		default:
			return !t.Failed()
		}
	}
	for i := range 4 {
		uploading.Go(func() {
			for round := 0; uploaded.Load() < 30 && !t.Failed(); round++ {
				_, err := r.Put(t.Context(), key, -1, bytes.NewReader(artifacts[(4*round+i)%len(artifacts)]))
				if err == nil {
					uploaded.Add(1)
				} else if !errors.Is(err, cache.ErrExists) {
					t.Error("Put:", err)
				}
			}
		})
	}
	for range 3 {
		others.Go(func() {
			for again() {
				_, info, err := r.get(t, key)
				if err == nil && known[info.Hash] {
					served.Add(1)
				} else if !errors.Is(err, cache.ErrNotFound) {
					t.Errorf("Get returned %+v, %v", info, err)
				}
			}
		})
	}
	others.Go(func() { // finds it damaged
		for again() {
			info, err := r.Stat(t.Context(), key)
			if err == nil {
				err = r.store.Quarantine(t.Context(), info, errors.New("damaged"))
			}
			if err != nil && !errors.Is(err, cache.ErrNotFound) {
				t.Error("Stat or Quarantine:", err)
			}
		}
	})
	others.Go(func() { // loses memos
		for again() {
			os.Remove(r.path(jsonName))
		}
	})
	uploading.Wait()
	close(done)
	others.Wait()
	if uploaded.Load() < 2 || served.Load() < 2 {
		t.Errorf("only %d artifacts were uploaded and %d served: this tested nothing", uploaded.Load(), served.Load())
	}
	t.Logf("%d uploaded, %d served, %d verified", uploaded.Load(), served.Load(), r.log.inspections())
	r.tmpIsEmpty(t)
}

func TestCheck(t *testing.T) {
	r := open(t, t.TempDir())
	if err := r.Ready(t.Context()); err != nil {
		t.Error("Check of a healthy store:", err)
	}
	r.tmpIsEmpty(t)
	removeAll(t, r.path("tmp"))
	if err := os.Symlink("tmp", r.path("tmp")); err != nil { // leads nowhere, and is left to whoever made it
		t.Fatal(err)
	}
	err := r.Ready(t.Context())
	if err == nil || !strings.HasPrefix(err.Error(), "storage directory can't be written: ") || !strings.Contains(err.Error(), r.path("tmp")) {
		t.Errorf("Check without tmp/ returned %v", err)
	}
	if _, err := r.Put(t.Context(), key, -1, bytes.NewReader(content)); err == nil {
		t.Error("Put without tmp/ succeeded")
	}
	if err := os.Remove(r.path("tmp")); err != nil {
		t.Fatal(err)
	}
	if err := r.Ready(t.Context()); err != nil {
		t.Error("Check of a store that was mended:", err)
	}
	r.lacks(t, key)
}

// TestTmpRemoved takes tmp/ away from a store that is used.
func TestTmpRemoved(t *testing.T) {
	for name, remove := range map[string]func(t *testing.T, r rig){
		"removed":     func(t *testing.T, r rig) { removeAll(t, r.path("tmp")) },
		"all removed": func(t *testing.T, r rig) { removeAll(t, r.dir) },
		"a file is there": func(t *testing.T, r rig) {
			removeAll(t, r.path("tmp"))
			write(t, r.path("tmp"), []byte("somebody's"))
		},
		"a link to nowhere is there": func(t *testing.T, r rig) {
			removeAll(t, r.path("tmp"))
			if err := os.Symlink("nowhere", r.path("tmp")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		for _, first := range append(firstAsks, firstAsk{"Check", func(t *testing.T, r rig) error {
			if err := r.Ready(t.Context()); err != nil {
				t.Error("Check:", err)
			}
			return cache.ErrNotFound
		}}) {
			t.Run(name+", "+first.name, func(t *testing.T) {
				r := open(t, t.TempDir())
				remove(t, r)
				if err := first.ask(t, r); err != cache.ErrNotFound {
					t.Errorf("%s returned %v, want %v", first.name, err, cache.ErrNotFound)
				}
				r.lacks(t, key)
				want := map[string]string{}
				if name == "a file is there" {
					want = map[string]string{"tmp": "somebody's", "tmp.txt": r.path("tmp") + " must be a directory\n"}
				} else if name == "a link to nowhere is there" {
					want = map[string]string{"tmp": "not a file that can be read", "tmp.txt": r.path("tmp") + " must be a directory\n"}
				}
				if found := r.quarantined(t); fmt.Sprint(found) != fmt.Sprint(want) {
					t.Errorf("in quarantine are %q, want %q", found, want)
				}
			})
		}
	}

	// An upload in progress is lost with it, and does no harm.
	r := open(t, t.TempDir())
	upload, info := r.upload(t, key, content)
	removeAll(t, r.path("tmp"))
	if _, err := upload.Commit(t.Context(), info); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Commit returned %v, want %v", err, fs.ErrNotExist)
	}
	upload.Abort()
	r.lacks(t, key)
}

// TestPanicWhileVerifying proves that a panic ends only the requests that wait for the inspection.
func TestPanicWhileVerifying(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, filepath.FromSlash(zstName)), content)
	store, err := disk.Open(disk.Config{Dir: dir, Log: slog.New(slog.DiscardHandler)}) // without a Verifier
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	for range 2 {
		if _, _, err := store.Open(t.Context(), key); err == nil || !strings.Contains(err.Error(), "panic: ") || !strings.Contains(err.Error(), "Inspect") {
			t.Errorf("Open returned %v; want the panic and where it was", err)
		}
	}
	store.Close()
	r := open(t, dir)
	r.serves(t, key, content)
}
