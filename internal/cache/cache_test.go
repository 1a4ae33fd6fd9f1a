package cache_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
)

var (
	key   = cachetest.Key("cache_test")
	other = cachetest.Key("another key")

	errReset    = errors.New("connection reset by peer")
	errDisk     = errors.New("input/output error")
	errNotFound = cache.ErrNotFound
)

const maxSize = 1 << 20

// rig is a cache, and what a test must be able to say about its store.
type rig struct {
	*cache.Cache
	memory *cachetest.Memory // or nil
	dir    string            // or empty
}

// newMemory returns a cache in memory, whose store can be made to fail.
func newMemory() rig {
	memory := new(cachetest.Memory)
	return rig{Cache: newCache(memory), memory: memory}
}

func newDisk(t *testing.T) rig {
	dir := t.TempDir()
	store, err := disk.Open(disk.Config{Dir: dir, Verifier: artifact.NewVerifier(artifact.DefaultLimits), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return rig{Cache: newCache(store), dir: dir}
}

func newCache(store cache.Store) *cache.Cache {
	return cache.New(store, artifact.NewVerifier(artifact.DefaultLimits), cache.Config{MaxSize: maxSize})
}

// onBoth runs a test on a cache in memory and on one on disk.
func onBoth(t *testing.T, test func(t *testing.T, r rig)) {
	t.Run("memory", func(t *testing.T) { test(t, newMemory()) })
	t.Run("disk", func(t *testing.T) { test(t, newDisk(t)) })
}

// idle makes sure that no upload and no file is left open.
func (r rig) idle(t *testing.T) {
	t.Helper()
	if r.memory != nil {
		if uploads, files := r.memory.InUse(); uploads != 0 || files != 0 {
			t.Errorf("%d uploads and %d files were left open", uploads, files)
		}
		return
	}
	left, err := os.ReadDir(filepath.Join(r.dir, "tmp"))
	if err != nil || len(left) != 0 {
		t.Errorf("left in tmp/: %v, %v", left, err)
	}
}

// lacks makes sure that nothing is stored under key, and that it can be uploaded.
func (r rig) lacks(t *testing.T) {
	t.Helper()
	r.idle(t)
	if file, _, err := r.Get(t.Context(), key); err != errNotFound {
		t.Errorf("Get returned %v, %v, want %v", file, err, errNotFound)
	}
	if _, err := r.Stat(t.Context(), key); err != errNotFound {
		t.Errorf("Stat returned %v, want %v", err, errNotFound)
	}
	if r.memory != nil {
		r.memory.Fail(cachetest.Faults{})
	}
	content := cachetest.Random(key, 1000)
	if _, err := r.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content)); err != nil {
		t.Errorf("the key can't be uploaded afterwards: %v", err)
	}
	r.holds(t, content)
}

// holds makes sure that content is stored under key.
func (r rig) holds(t *testing.T, content []byte) {
	t.Helper()
	file, info, err := r.Get(t.Context(), key)
	if err != nil {
		t.Fatal("Get:", err)
	}
	got, err := io.ReadAll(file)
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal("read:", err)
	}
	if !bytes.Equal(got, content) || info.Hash != sha256.Sum256(content) || info.Size != int64(len(content)) {
		t.Errorf("Get returned %d bytes and %+v for %d bytes with SHA-256 %x", len(got), info, len(content), sha256.Sum256(content))
	}
	r.idle(t)
}

func (r rig) put(t *testing.T, content []byte) artifact.Info {
	t.Helper()
	info, err := r.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content))
	if err != nil {
		t.Fatal("Put:", err)
	}
	return info
}

// body is an upload's body in steps: each Read takes one.
type body []step

type step struct {
	p   []byte
	err error
	do  func()
}

func (b *body) Read(p []byte) (int, error) {
	if len(*b) == 0 {
		return 0, io.EOF
	}
	s := &(*b)[0]
	if s.do != nil {
		s.do()
		s.do = nil
	}
	n := copy(p, s.p)
	if s.p = s.p[n:]; len(s.p) > 0 {
		return n, nil
	}
	err := s.err
	*b = (*b)[1:]
	return n, err
}

// unread is a body that must not be read.
type unread struct{ *testing.T }

func (u unread) Read([]byte) (int, error) {
	u.Error("the body was read")
	return 0, io.EOF
}

func TestPutAndGet(t *testing.T) {
	onBoth(t, func(t *testing.T, r rig) {
		files := map[string]string{"stdout.txt": "built\n", "dist/app.js": "export {}", "stderr.txt": ""}
		content := cachetest.Sound(key, files)
		before := time.Now()
		info := r.put(t, content)
		if info.StoredAt.Before(before) || info.StoredAt.After(time.Now()) {
			t.Errorf("stored at %v, which is not now", info.StoredAt)
		}
		want := artifact.Info{
			Key:              key,
			Hash:             sha256.Sum256(content),
			Size:             int64(len(content)),
			Manifest:         cachetest.ManifestDigest(files),
			UncompressedSize: 15,
			FileCount:        3,
			Metadata: artifact.Metadata{
				PackageName: "web",
				TaskName:    "build",
				Command:     "npm run build",
				CreatedAt:   time.Date(2023, 11, 14, 22, 13, 20, 0, time.UTC),
			},
			StoredAt: info.StoredAt,
		}
		if info != want {
			t.Errorf("Put returned %+v, want %+v", info, want)
		}
		r.holds(t, content)
		if stat, err := r.Stat(t.Context(), key); err != nil || stat != want {
			t.Errorf("Stat returned %+v, %v, want %+v", stat, err, want)
		}
		if _, err := r.Stat(t.Context(), other); err != errNotFound {
			t.Errorf("Stat of another key returned %v, want %v", err, errNotFound)
		}
	})
}

// TestPutRefusesUnread is about what is known before a byte of the body is read.
func TestPutRefusesUnread(t *testing.T) {
	onBoth(t, func(t *testing.T, r rig) {
		_, err := r.Put(t.Context(), key, maxSize+1, unread{t})
		wantError(t, err, cache.ErrTooLarge, "artifact too large: the limit is 1.0 MiB (1048576 bytes)")
		r.lacks(t) // and so stores one there

		for _, size := range []int64{maxSize + 1, maxSize, 1, 0, cache.UnknownSize} {
			_, err = r.Put(t.Context(), key, size, unread{t})
			wantError(t, err, cache.ErrExists, "artifact already exists")
			r.idle(t)
		}
	})
	t.Run("fault", func(t *testing.T) {
		r := newMemory()
		r.memory.Fail(cachetest.Faults{Create: errDisk})
		if _, err := r.Put(t.Context(), key, 1, unread{t}); err != errDisk {
			t.Errorf("Put returned %v, want %v", err, errDisk)
		}
		r.lacks(t)
	})
}

func TestPutLimitsSize(t *testing.T) {
	content := cachetest.Random(key, 5000)
	size := int64(len(content))
	for _, test := range []struct {
		name     string
		limit    int64
		declared int64
		want     error
	}{
		{"declared, at the limit", size, size, nil},
		{"not declared, at the limit", size, cache.UnknownSize, nil},
		{"declared, over the limit", size - 1, size, cache.ErrTooLarge},
		{"not declared, over the limit", size - 1, cache.UnknownSize, cache.ErrTooLarge},
		{"declared too small, over the limit", size - 1, size - 1, cache.ErrTooLarge},
		{"not declared, far over the limit", 1, cache.UnknownSize, cache.ErrTooLarge},
	} {
		for name, read := range map[string]func(io.Reader) io.Reader{
			"at once":         func(r io.Reader) io.Reader { return r },
			"byte by byte":    func(r io.Reader) io.Reader { return oneByte{r} },
			"with the end":    func(r io.Reader) io.Reader { return &body{{p: content, err: io.EOF}} },
			"before the end":  func(r io.Reader) io.Reader { return &body{{p: content}, {err: io.EOF}} },
			"with empty ones": func(r io.Reader) io.Reader { return &body{{}, {p: content[:9]}, {}, {p: content[9:]}, {}} },
		} {
			t.Run(test.name+", "+name, func(t *testing.T) {
				memory := new(cachetest.Memory)
				c := cache.New(memory, artifact.NewVerifier(artifact.DefaultLimits), cache.Config{MaxSize: test.limit})
				_, err := c.Put(t.Context(), key, test.declared, read(bytes.NewReader(content)))
				if !errors.Is(err, test.want) {
					t.Errorf("Put returned %v, want %v", err, test.want)
				}
				r := rig{Cache: newCache(memory), memory: memory}
				if test.want == nil {
					r.holds(t, content)
				} else {
					r.lacks(t)
				}
			})
		}
	}
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

// TestPutReportsFirstFault mixes the faults of the client, the store and the artifact. Whichever came
// first is reported.
func TestPutReportsFirstFault(t *testing.T) {
	// Each part is a frame of its own, so that what is wrong with it is found before the next one is read.
	var (
		rest   = cachetest.Store(cachetest.Tar(cachetest.Manifest(map[string]string{}, 0)))
		sound  = cachetest.Store(cachetest.Metadata(key))
		broken = cachetest.Store(cachetest.Metadata(other))
		long   = make([]byte, maxSize)
		size   = int64(len(sound))
		total  = int64(len(sound) + len(rest))
	)
	const (
		aborted  = "upload aborted: connection reset by peer"
		disk     = "input/output error"
		mismatch = "upload has another size than was declared: "
		tooLarge = "artifact too large: the limit is 1.0 MiB (1048576 bytes)"
	)
	unsound := `metadata.json names the cache key "` + other.String() + `", not the key ` + key.String() + ` that the artifact is for`
	never := func() { t.Error("the body was read after the fault") }
	for _, test := range []struct {
		name       string
		declared   int64
		body       body
		write      error // of the store …
		writeAfter int64 // … after so many bytes
		want       error
		message    string
	}{
		{name: "the client at once", declared: -1, body: body{{err: errReset}}, want: errReset, message: aborted},
		{name: "the client in the middle", declared: -1, body: body{{p: sound}, {err: errReset}, {do: never}}, want: errReset, message: aborted},
		{name: "the client at the end", declared: -1, body: body{{p: sound}, {p: rest}, {err: errReset}}, want: errReset, message: aborted},
		{name: "the client with the last bytes", declared: -1, body: body{{p: sound}, {p: rest, err: errReset}}, want: errReset, message: aborted},
		{name: "the client in a frame", declared: -1, body: body{{p: sound[:20]}, {err: io.ErrUnexpectedEOF}}, want: io.ErrUnexpectedEOF,
			message: "upload aborted: unexpected EOF"},
		{name: "the client's context", declared: -1, body: body{{p: sound}, {err: context.Canceled}}, want: context.Canceled,
			message: "upload aborted: context canceled"},
		{name: "the client before a broken part", declared: -1, body: body{{p: sound, err: errReset}, {p: broken, do: never}}, want: errReset, message: aborted},
		{name: "the client behind a broken part", declared: -1, body: body{{p: broken}, {err: errReset, do: never}}, message: unsound},
		{name: "the client with a broken part", declared: -1, body: body{{p: broken, err: errReset}}, message: unsound},
		{name: "the artifact", declared: -1, body: body{{p: broken}, {p: rest, do: never}}, message: unsound},
		{name: "the artifact, at the end", declared: -1, body: body{{p: sound}}, message: "the tar archive ends without its two zero blocks"},

		{name: "the store at once", declared: -1, body: body{{p: sound}, {do: never}}, write: errDisk, want: errDisk, message: disk},
		{name: "the store in the middle", declared: -1, body: body{{p: sound}, {p: rest}, {do: never}}, write: errDisk, writeAfter: size, want: errDisk, message: disk},
		{name: "the store has no room", declared: -1, body: body{{p: sound}}, write: cache.ErrNoSpace, want: cache.ErrNoSpace, message: "no space left for the artifact"},
		{name: "the store before a broken part", declared: -1, body: body{{p: sound}, {p: broken}}, write: errDisk, writeAfter: size - 1, want: errDisk, message: disk},
		{name: "the store in a broken part", declared: -1, body: body{{p: broken}}, write: errDisk, writeAfter: size - 1, want: errDisk, message: disk},
		{name: "the store behind a broken part", declared: -1, body: body{{p: broken}, {p: rest, do: never}}, write: errDisk, writeAfter: size, message: unsound},
		{name: "the store, then the client", declared: -1, body: body{{p: sound, err: errReset}}, write: errDisk, want: errDisk, message: disk},
		{name: "the client, then the store", declared: -1, body: body{{p: sound}, {err: errReset}}, write: errDisk, writeAfter: size, want: errReset, message: aborted},
		{name: "all three, the artifact first", declared: -1, body: body{{p: broken, err: errReset}}, write: errDisk, writeAfter: size, message: unsound},

		{name: "too large behind a broken part", declared: -1, body: body{{p: broken}, {p: long, do: never}}, message: unsound},
		{name: "too large before the client", declared: -1, body: body{{p: sound}, {p: frame(long)}, {err: errReset}}, want: cache.ErrTooLarge, message: tooLarge},
		{name: "too large before the store", declared: -1, body: body{{p: sound}, {p: frame(long)}}, write: errDisk, writeAfter: maxSize, want: cache.ErrTooLarge, message: tooLarge},
		{name: "too large behind the store", declared: -1, body: body{{p: sound}, {p: frame(long)}}, write: errDisk, writeAfter: maxSize / 2, want: errDisk, message: disk},

		{name: "shorter than declared", declared: 2000, body: body{{p: sound}}, want: cache.ErrSizeMismatch, message: mismatch + fmt.Sprintf("%d bytes, not 2000", size)},
		{name: "shorter than declared, the end with the last bytes", declared: 2000, body: body{{p: sound, err: io.EOF}}, want: cache.ErrSizeMismatch,
			message: mismatch + fmt.Sprintf("%d bytes, not 2000", size)},
		{name: "shorter than declared, yet complete", declared: 5000, body: body{{p: sound}, {p: rest}}, want: cache.ErrSizeMismatch, message: mismatch + fmt.Sprintf("%d bytes, not 5000", total)},
		{name: "longer than declared", declared: total - 1, body: body{{p: sound}, {p: rest}}, want: cache.ErrSizeMismatch, message: mismatch + fmt.Sprintf("%d bytes, not %d", total, total-1)},
		{name: "declared empty", declared: 0, body: body{{p: sound}, {p: rest}}, want: cache.ErrSizeMismatch, message: mismatch + fmt.Sprintf("%d bytes, not 0", total)},
		{name: "shorter than declared and broken", declared: 5000, body: body{{p: broken, err: io.EOF}}, message: unsound},
		{name: "shorter than declared, for the client hung up", declared: 5000, body: body{{p: sound}, {err: errReset}}, want: errReset, message: aborted},
		{name: "empty", declared: 0, body: body{}, message: "the zstd stream is empty"},
	} {
		t.Run(test.name, func(t *testing.T) {
			put := func(t *testing.T, r rig) {
				// A copy, since Read shortens the steps.
				body := slices.Clone(test.body)
				_, err := r.Put(t.Context(), key, test.declared, &body)
				if test.want == nil {
					if _, ok := errors.AsType[*artifact.UnsoundError](err); !ok || err.Error() != test.message {
						t.Errorf("Put returned %v, want the UnsoundError %s", err, test.message)
					}
				} else {
					wantError(t, err, test.want, test.message)
				}
				isAborted := strings.HasPrefix(test.message, "upload aborted: ")
				if errors.Is(err, cache.ErrUploadAborted) != isAborted {
					t.Errorf("Put returned %v; that it is %v is %v, want %v", err, cache.ErrUploadAborted, !isAborted, isAborted)
				}
				r.lacks(t)
			}
			t.Run("memory", func(t *testing.T) {
				r := newMemory()
				r.memory.Fail(cachetest.Faults{Write: test.write, WriteAfter: test.writeAfter})
				put(t, r)
			})
			if test.write == nil {
				t.Run("disk", func(t *testing.T) { put(t, newDisk(t)) })
			}
		})
	}
}

// frame returns an archive's entry for a file of p, as a frame of its own.
func frame(p []byte) []byte {
	return cachetest.Store(cachetest.File("outputs/data.bin", string(p)))
}

func wantError(t *testing.T, err, want error, message string) {
	t.Helper()
	if !errors.Is(err, want) || err.Error() != message {
		t.Errorf("the error is %v, want %s, which is %v", err, message, want)
	}
}

func TestPutUnsound(t *testing.T) {
	r := newMemory()
	for _, test := range cachetest.UnsoundArtifacts(key) {
		if len(test.Artifact) > maxSize {
			continue
		}
		_, err := r.Put(t.Context(), key, int64(len(test.Artifact)), bytes.NewReader(test.Artifact))
		if unsound, ok := errors.AsType[*artifact.UnsoundError](err); !ok || unsound.Rule != test.Rule || unsound.Error() != test.Message {
			t.Errorf("%s: Put returned %v, want %s", test.Name, err, test.Message)
		}
		r.idle(t)
	}
	r.lacks(t)
}

func TestPutPassesCommitOn(t *testing.T) {
	content := cachetest.Random(key, 1000)
	t.Run("failed", func(t *testing.T) {
		r := newMemory()
		r.memory.Fail(cachetest.Faults{Commit: errDisk})
		if _, err := r.Put(t.Context(), key, -1, bytes.NewReader(content)); err != errDisk {
			t.Errorf("Put returned %v, want %v", err, errDisk)
		}
		r.lacks(t)
	})
	t.Run("failed but happened", func(t *testing.T) {
		r := newMemory()
		r.memory.Fail(cachetest.Faults{Commit: errDisk, CommitHappens: true})
		if _, err := r.Put(t.Context(), key, -1, bytes.NewReader(content)); err != errDisk {
			t.Errorf("Put returned %v, want %v", err, errDisk)
		}
		r.memory.Fail(cachetest.Faults{})
		r.holds(t, content)
		if _, err := r.Put(t.Context(), key, -1, unread{t}); err != cache.ErrExists {
			t.Errorf("the next attempt returned %v, want %v", err, cache.ErrExists)
		}
	})
	t.Run("somebody was faster", func(t *testing.T) {
		onBoth(t, func(t *testing.T, r rig) {
			winner := cachetest.Sound(key, map[string]string{"stdout.txt": "winner"})
			overtake := func() { r.put(t, winner) }
			_, err := r.Put(t.Context(), key, -1, &body{{p: content}, {err: io.EOF, do: overtake}})
			wantError(t, err, cache.ErrExists, "artifact already exists")
			r.holds(t, winner)
		})
	})
}

func TestGetPassesFaultsOn(t *testing.T) {
	r := newMemory()
	r.put(t, cachetest.Random(key, 1000))
	r.memory.Fail(cachetest.Faults{Open: errDisk, Stat: errReset, Check: cache.ErrNoSpace})
	if _, _, err := r.Get(t.Context(), key); err != errDisk {
		t.Errorf("Get returned %v, want %v", err, errDisk)
	}
	if _, err := r.Files(t.Context(), key); err != errDisk {
		t.Errorf("Files returned %v, want %v", err, errDisk)
	}
	if _, err := r.Stat(t.Context(), key); err != errReset {
		t.Errorf("Stat returned %v, want %v", err, errReset)
	}
	if err := r.Ready(t.Context()); err != cache.ErrNoSpace {
		t.Errorf("Ready returned %v, want %v", err, cache.ErrNoSpace)
	}
	r.memory.Fail(cachetest.Faults{})
	if err := r.Ready(t.Context()); err != nil {
		t.Errorf("Ready returned %v", err)
	}
}

func TestFiles(t *testing.T) {
	onBoth(t, func(t *testing.T, r rig) {
		if _, err := r.Files(t.Context(), key); err != errNotFound {
			t.Errorf("Files of what is not stored returned %v, want %v", err, errNotFound)
		}
		content := cachetest.Sound(key, map[string]string{"stdout.txt": "built\n", "dist/b": "bb", "dist/a": "", "dist-2": "x"})
		r.put(t, content)
		files, err := r.Files(t.Context(), key)
		want := []artifact.File{
			{Path: "dist-2", Hash: sha256.Sum256([]byte("x")), Size: 1},
			{Path: "dist/a", Hash: sha256.Sum256(nil), Size: 0},
			{Path: "dist/b", Hash: sha256.Sum256([]byte("bb")), Size: 2},
			{Path: "stdout.txt", Hash: sha256.Sum256([]byte("built\n")), Size: 6},
		}
		if err != nil || !reflect.DeepEqual(files, want) {
			t.Errorf("Files returned %v, %v, want %v", files, err, want)
		}
		r.holds(t, content)
	})
}

// TestFilesOfDamaged is about what verification finds, or does not, and what becomes of the artifact.
func TestFilesOfDamaged(t *testing.T) {
	content := cachetest.Random(key, 1000)
	flipped := slices.Clone(content)
	flipped[len(flipped)-1100] ^= 1 // behind the file there are 24 bytes of padding and 1024 of the archive's end
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, test := range []struct {
		name        string
		ctx         context.Context
		stored      []byte
		faults      cachetest.Faults
		want        error
		quarantined string // the reason
	}{
		{name: "a flipped bit", stored: flipped, want: errNotFound, quarantined: `"outputs/data.bin" has SHA-256 `},
		{name: "cut short", stored: content[:500], want: errNotFound, quarantined: "the zstd stream ends in the middle of a frame"},
		{name: "emptied", stored: nil, want: errNotFound, quarantined: "the zstd stream is empty"},
		{name: "extended", stored: append(slices.Clone(content), 0), want: errNotFound, quarantined: "the zstd stream has bytes behind its last frame"},
		{name: "for another key", stored: cachetest.Random(other, 1000), want: errNotFound, quarantined: "metadata.json names the cache key "},
		{name: "sound, but not what was uploaded", stored: cachetest.Sound(key, nil), want: errNotFound, quarantined: "the stored artifact has SHA-256 "},
		{name: "shorter than is known", faults: cachetest.Faults{Read: io.EOF, ReadAfter: 500}, want: errNotFound,
			quarantined: "the zstd stream ends in the middle of a frame"},
		{name: "not readable", faults: cachetest.Faults{Read: errDisk, ReadAfter: 500}, want: errDisk},
		{name: "not readable at all", faults: cachetest.Faults{Read: errDisk}, want: errDisk},
		{name: "canceled", ctx: canceled, want: context.Canceled},
		{name: "damaged, but canceled", ctx: canceled, stored: flipped, want: context.Canceled},
		{name: "can't be moved", stored: flipped, faults: cachetest.Faults{Quarantine: errDisk}, want: errDisk},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newMemory()
			r.put(t, content)
			if test.stored != nil || test.name == "emptied" {
				r.memory.Damage(key, test.stored)
			}
			r.memory.Fail(test.faults)
			ctx := test.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			if files, err := r.Files(ctx, key); err != test.want {
				t.Errorf("Files returned %v, %v, want %v", files, err, test.want)
			}
			r.idle(t)
			r.memory.Fail(cachetest.Faults{})
			reasons := r.memory.Quarantined()
			if test.quarantined != "" {
				if len(reasons) != 1 || !strings.HasPrefix(reasons[0].Error(), test.quarantined) {
					t.Errorf("quarantined for %v, want %q", reasons, test.quarantined)
				}
				r.lacks(t)
				return
			}
			if len(reasons) != 0 {
				t.Errorf("quarantined for %v", reasons)
			}
			if _, err := r.Stat(t.Context(), key); err != nil {
				t.Errorf("Stat returned %v", err)
			}
		})
	}
}

// TestFilesOverLimits lowers the limits under what is stored, which is no damage.
func TestFilesOverLimits(t *testing.T) {
	r := newMemory()
	content := cachetest.Random(key, 10_000)
	r.put(t, content)
	limits := artifact.DefaultLimits
	limits.UnpackedSize = 5000
	strict := cache.New(r.memory, artifact.NewVerifier(limits), cache.Config{MaxSize: maxSize})
	_, err := strict.Files(t.Context(), key)
	if unsound, ok := errors.AsType[*artifact.UnsoundError](err); !ok || unsound.Rule != artifact.RuleLimit {
		t.Errorf("Files returned %v, want an UnsoundError for a limit", err)
	}
	if reasons := r.memory.Quarantined(); len(reasons) != 0 {
		t.Errorf("quarantined for %v", reasons)
	}
	r.holds(t, content)
}

// TestFilesOnDisk damages what is on the disk behind the store's back.
func TestFilesOnDisk(t *testing.T) {
	r := newDisk(t)
	content := cachetest.Random(key, 1000)
	r.put(t, content)
	digits := key.String()
	path := filepath.Join(r.dir, digits[:2], digits[2:4], digits+".zst")
	stat, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	content[len(content)/2] ^= 1
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, time.Time{}, stat.ModTime()); err != nil { // as if the medium had done it
		t.Fatal(err)
	}
	if _, err := r.Files(t.Context(), key); err != errNotFound {
		t.Errorf("Files returned %v, want %v", err, errNotFound)
	}
	r.lacks(t)
}
