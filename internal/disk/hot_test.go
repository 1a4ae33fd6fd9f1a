package disk_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
)

const hotSize = 1 << 20

// inMemory says whether an artifact is served from memory.
func (r rig) inMemory(t *testing.T) bool {
	t.Helper()
	file, _, err := r.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	_, isFile := file.(*os.File)
	return !isFile
}

// TestHot serves an artifact from memory for as long as its file is the one that was read.
func TestHot(t *testing.T) {
	other := cachetest.Random(key, len(content)-100)
	for name, test := range map[string]struct {
		do          func(t *testing.T, r rig)
		want        []byte // nil if the artifact is gone
		inspections int
	}{
		"nothing":             {func(t *testing.T, r rig) {}, content, 0},
		"the memo is removed": {func(t *testing.T, r rig) { removeAll(t, r.path(jsonName)) }, content, 0},
		"removed":             {func(t *testing.T, r rig) { removeAll(t, r.path(zstName)) }, nil, 0},
		"removed and uploaded": {func(t *testing.T, r rig) {
			removeAll(t, r.path(zstName))
			r.put(t, key, other)
		}, other, 0},
		"replaced by the same bytes": {func(t *testing.T, r rig) {
			at := lstat(t, r.path(zstName)).ModTime()
			removeAll(t, r.path(zstName))
			write(t, r.path(zstName), content)
			modified(t, r.path(zstName), at)
		}, content, 0},
		"replaced by other bytes of the same size": {func(t *testing.T, r rig) {
			write(t, r.path(zstName)+".new", bytes.Repeat([]byte{1}, len(content)))
			if err := os.Rename(r.path(zstName)+".new", r.path(zstName)); err != nil {
				t.Fatal(err)
			}
		}, nil, 0},
		"changed in place": {func(t *testing.T, r rig) {
			write(t, r.path(zstName), bytes.Repeat([]byte{1}, len(content)))
			modified(t, r.path(zstName), time.Unix(1, 0))
		}, nil, 0},
		"touched": {func(t *testing.T, r rig) { modified(t, r.path(zstName), time.Unix(1, 0)) }, content, 1},
		"cut short": {func(t *testing.T, r rig) {
			at := lstat(t, r.path(zstName)).ModTime()
			if err := os.Truncate(r.path(zstName), 100); err != nil {
				t.Fatal(err)
			}
			modified(t, r.path(zstName), at)
		}, nil, 0},
		"made a link to what it was": {func(t *testing.T, r rig) {
			if err := errors.Join(os.Rename(r.path(zstName), r.path("away")), os.Symlink(r.path("away"), r.path(zstName))); err != nil {
				t.Fatal(err)
			}
		}, nil, 0},
		"quarantined": {func(t *testing.T, r rig) {
			info, err := r.Stat(t.Context(), key)
			if err := errors.Join(err, r.store.Quarantine(t.Context(), info, errors.New("test"))); err != nil {
				t.Fatal(err)
			}
		}, nil, 0},
		"a directory": {func(t *testing.T, r rig) {
			removeAll(t, r.path(zstName))
			mkdir(t, r.path(zstName))
		}, nil, 0},
		"a lost shard": {func(t *testing.T, r rig) { removeAll(t, r.path("01")) }, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := openWith(t, disk.Config{Dir: t.TempDir(), HotSize: hotSize})
			r.put(t, key, content)
			for range 2 {
				if !r.inMemory(t) {
					t.Fatal("a small artifact that was read is not in memory")
				}
			}
			test.do(t, r)
			if test.want == nil {
				if _, err := r.Stat(t.Context(), key); !errors.Is(err, cache.ErrNotFound) {
					t.Errorf("Stat returned %v", err)
				}
				r.lacks(t, key)
				return
			}
			r.serves(t, key, test.want)
			if n := r.log.inspections(); n != test.inspections {
				t.Errorf("the artifact was verified %d times, want %d", n, test.inspections)
			}
			if !r.inMemory(t) {
				t.Error("the artifact is not in memory again")
			}
		})
	}
}

// TestHotBounds holds what is kept to its bound.
func TestHotBounds(t *testing.T) {
	t.Run("large artifacts stay on the disk", func(t *testing.T) {
		r := openWith(t, disk.Config{Dir: t.TempDir(), HotSize: 64 << 20})
		large := cachetest.Random(key, 64<<10)
		r.put(t, key, large)
		if r.inMemory(t) {
			t.Error("an artifact of more than 64 KiB is in memory")
		}
		removeAll(t, r.path(jsonName))
		r.serves(t, key, large)
		if n := r.log.inspections(); n != 0 {
			t.Errorf("what is known of it was not kept: it was verified %d times", n)
		}
		kept := r.store.Kept(key)
		r.serves(t, key, large)
		if r.store.Kept(key) != kept {
			t.Error("what was kept already was kept once more")
		}
	})
	t.Run("nothing is kept", func(t *testing.T) {
		r := open(t, t.TempDir())
		r.put(t, key, content)
		if r.inMemory(t) {
			t.Error("the artifact is in memory")
		}
		if n, size := r.store.Hot(); n != 0 || size != 0 {
			t.Errorf("%d artifacts of %d bytes are kept", n, size)
		}
	})
	t.Run("what was not used for the longest goes", func(t *testing.T) {
		const most = 256 << 10 // of artifacts that count as some 7 KiB
		r := openWith(t, disk.Config{Dir: t.TempDir(), HotSize: most})
		r.put(t, key, content)
		var readers sync.WaitGroup
		for reader := range 4 {
			readers.Go(func() {
				for n := range 100 {
					k := cachetest.Key(fmt.Sprint(reader, n))
					r.put(t, k, cachetest.Random(k, 5000))
					if got, _, err := r.get(t, k); err != nil || !bytes.Equal(got, cachetest.Random(k, 5000)) {
						t.Errorf("Get returned %d bytes, %v", len(got), err)
					}
					if !r.inMemory(t) { // used each time
						t.Error("the artifact that is used the most is not in memory")
					}
					if _, size := r.store.Hot(); size > most {
						t.Errorf("%d bytes are kept; the most is %d", size, most)
					}
				}
			})
		}
		readers.Wait()
		artifacts, size := r.store.Hot()
		if artifacts < 20 || artifacts > most/5000 || size < most/2 {
			t.Errorf("%d artifacts of %d bytes are kept", artifacts, size)
		}
	})
	t.Run("long texts count", func(t *testing.T) {
		const most = 256 << 10
		r := openWith(t, disk.Config{Dir: t.TempDir(), HotSize: most})
		for n := range 100 {
			k := cachetest.Key(fmt.Sprint(n))
			metadata := strings.Replace(string(cachetest.Metadata(k)[512:]), "npm run build", strings.Repeat("x", 9<<10), 1)
			metadata = strings.TrimRight(metadata, "\x00")
			r.put(t, k, cachetest.Compress(cachetest.Tar(cachetest.File("metadata.json", metadata), cachetest.Manifest(nil, 0))))
			if _, err := r.Stat(t.Context(), k); err != nil {
				t.Fatal(err)
			}
		}
		if artifacts, size := r.store.Hot(); artifacts < 10 || artifacts > most/(9<<10) || size > most {
			t.Errorf("%d artifacts of %d bytes are kept", artifacts, size)
		}
	})
}
