package disk_test

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
)

// witness is an observer that writes down what it is told.
type witness struct {
	mu     sync.Mutex
	events []string
	last   map[artifact.Name]cache.Stored
}

// note notes what happened to an artifact, by its scope, if that is not the default one, and four digits.
func (w *witness) note(event string, name artifact.Name) {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := strings.TrimSuffix(name.String(), name.Key.String()[4:])
	w.events = append(w.events, event+" "+text)
}

func (w *witness) keep(event string, s cache.Stored) {
	w.note(event, s.Name())
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.last == nil {
		w.last = map[artifact.Name]cache.Stored{}
	}
	w.last[s.Name()] = s
}

func (w *witness) Stored(s cache.Stored) { w.keep("stored", s) }
func (w *witness) Found(s cache.Stored)  { w.keep("found", s) }
func (w *witness) Removed(name artifact.Name, _ int64) {
	w.note("removed", name)
}
func (w *witness) Pinned(name artifact.Name, pinned bool) {
	w.note(fmt.Sprintf("pinned %t", pinned), name)
}
func (w *witness) Hit(artifact.Name)                     {}
func (w *witness) Missed(artifact.Key, []artifact.Scope) {}
func (w *witness) Used(artifact.Name)                    {}

// since returns what was told since it was asked last.
func (w *witness) since() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	events := strings.Join(w.events, ", ")
	w.events = nil
	return events
}

// observed opens a store with a witness.
func observed(t *testing.T, dir string, limits disk.Limits) (rig, *witness) {
	t.Helper()
	r, w := open(t, dir), &witness{}
	r.store.Manage(w, limits)
	return r, w
}

func TestObserver(t *testing.T) {
	r, w := observed(t, t.TempDir(), disk.Limits{})
	info := r.put(t, key, content)
	told := func(what, want string) {
		t.Helper()
		if got := w.since(); got != want {
			t.Errorf("%s: told %q, want %q", what, got, want)
		}
	}
	told("an upload", "stored 0123")
	if got := w.last[key.In(artifact.DefaultScope)]; got.Info != info || got.DiskSize < info.Size+4096 || got.Pinned {
		t.Errorf("told of %+v, want %+v", got, info)
	}
	looked, found, _ := r.store.Look(key.In(artifact.DefaultScope))
	if !found || looked != w.last[key.In(artifact.DefaultScope)] {
		t.Errorf("Look returns %+v, %t, want %+v", looked, found, w.last[key.In(artifact.DefaultScope)])
	}
	for _, pinned := range []bool{true, true, false} {
		if err := r.store.Pin(t.Context(), key, pinned); err != nil {
			t.Fatal(err)
		}
	}
	told("two pins and their end", "pinned true 0123, pinned false 0123")

	removeAll(t, r.path(jsonName))
	if looked, found, _ := r.store.Look(key.In(artifact.DefaultScope)); !found || looked.Verified() || looked.Size != info.Size {
		t.Errorf("without a memo, Look returns %+v, %t", looked, found)
	}
	r.serves(t, key, content)
	told("a memo that is made anew", "found 0123")
	if w.last[key.In(artifact.DefaultScope)].Info != info {
		t.Errorf("told of %+v, want %+v", w.last[key.In(artifact.DefaultScope)], info)
	}

	write(t, r.path(zstName), []byte("damaged"))
	r.lacks(t, key)
	told("a damaged artifact, and an upload after that", "removed 0123, stored 0123")
	size, err := r.store.Remove(t.Context(), key)
	if err != nil || size < 2*4096 { // of what lacks uploaded

		t.Errorf("Remove returned %d, %v", size, err)
	}
	told("a removal", "removed 0123")
	for _, gone := range []string{zstName, jsonName, "01/23"} {
		if _, err := os.Lstat(r.path(gone)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there after the removal: %v", gone, err)
		}
	}
	if _, found, _ := r.store.Look(key.In(artifact.DefaultScope)); found {
		t.Error("Look finds what was removed")
	}
	upload, info := r.upload(t, key, content)
	upload.Abort()
	upload.Commit(t.Context(), info)
	told("an upload that came to nothing", "")
}

// TestPinIsKept looks whether a pin outlives what happens to the files.
func TestPinIsKept(t *testing.T) {
	dir := t.TempDir()
	r, _ := observed(t, dir, disk.Limits{})
	info := r.put(t, key, content)
	if err := r.store.Pin(t.Context(), key, true); err != nil {
		t.Fatal(err)
	}
	pinned := func(when string, want bool) {
		t.Helper()
		if looked, _, _ := r.store.Look(key.In(artifact.DefaultScope)); looked.Pinned != want || looked.Info != info {
			t.Errorf("%s: Look returns %+v, want it pinned: %t", when, looked, want)
		}
	}
	pinned("at once", true)
	if _, err := r.store.Evict(t.Context(), key.In(artifact.DefaultScope), info.StoredAt); !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("Evict of a pinned artifact returned %v, want %v", err, cache.ErrNotFound)
	}
	r.store.Close()
	r, _ = observed(t, dir, disk.Limits{})
	pinned("after a restart", true)
	r.serves(t, key, content)

	// What is known of it was in memory only.
	removeAll(t, r.path(jsonName))
	if err := r.store.Pin(t.Context(), key, true); err != nil {
		t.Fatal(err)
	}
	pinned("without a memo before", true)

	// What is known of it is stale, as after a reboot of a server that does not sync.
	at := info.StoredAt.Add(time.Second)
	modified(t, r.path(zstName), at)
	if looked, _, _ := r.store.Look(key.In(artifact.DefaultScope)); !looked.Pinned {
		t.Error("Look does not return the pin of a stale memo")
	}
	r.serves(t, key, content)
	info.StoredAt = lstat(t, r.path(zstName)).ModTime()
	pinned("verified anew", true)

	if _, err := r.store.Remove(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	info = r.put(t, key, content)
	pinned("of another artifact", false)
	if err := r.store.Pin(t.Context(), keyOf("ffff"+digits[4:]), true); !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("Pin of a miss returned %v", err)
	}
}

// TestPinBesideVerification pins and removes an artifact while somebody verifies it.
func TestPinBesideVerification(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{})
	info := r.put(t, key, content)
	if err := r.store.Pin(t.Context(), key, true); err != nil {
		t.Fatal(err)
	}
	if pinned, err := r.store.RenewMemo(info); err != nil || !pinned {
		t.Errorf("a memo that is written anew says pinned %t, %v", pinned, err)
	}
	if looked, _, _ := r.store.Look(key.In(artifact.DefaultScope)); !looked.Pinned || looked.Info != info {
		t.Errorf("then Look returns %+v", looked)
	}
	if _, err := r.store.Remove(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if pinned, err := r.store.RenewMemo(info); err != nil || pinned {
		t.Errorf("of what was removed: pinned %t, %v", pinned, err)
	}
	if _, err := os.Lstat(r.path(jsonName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was removed has a memo again: %v", err)
	}
}

// TestEvictDamagedPin evicts an artifact whose memo says that it is pinned, but is damaged: nobody goes by it.
func TestEvictDamagedPin(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{})
	info := r.put(t, key, content)
	text, err := os.ReadFile(r.path(jsonName))
	if err != nil {
		t.Fatal(err)
	}
	write(t, r.path(jsonName), []byte(strings.Replace(string(text), `"checksum"`, `"pinned":true,"checksum"`, 1)))
	if looked, found, _ := r.store.Look(key.In(artifact.DefaultScope)); !found || looked.Pinned {
		t.Errorf("Look returns %+v, %t", looked, found)
	}
	if _, err := r.store.Evict(t.Context(), key.In(artifact.DefaultScope), info.StoredAt); err != nil {
		t.Error(err)
	}
}

// TestHugeUpload declares more bytes than can be counted.
func TestHugeUpload(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{MaxStorage: 1 << 30, Stored: func() int64 { return 0 }})
	upload, err := r.store.Create(t.Context(), key, math.MaxInt64)
	if !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Create returned %v, want %v", err, cache.ErrNoSpace)
	}
	if err == nil {
		upload.Abort()
	}
}

func TestEvict(t *testing.T) {
	r, w := observed(t, t.TempDir(), disk.Limits{})
	info := r.put(t, key, content)
	w.since()
	if _, err := r.store.Evict(t.Context(), key.In(artifact.DefaultScope), info.StoredAt.Add(1)); !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("Evict of another artifact returned %v", err)
	}
	r.serves(t, key, content)
	if size, err := r.store.Evict(t.Context(), key.In(artifact.DefaultScope), info.StoredAt); err != nil || size < info.Size {
		t.Errorf("Evict returned %d, %v", size, err)
	}
	if got := w.since(); got != "removed 0123" {
		t.Errorf("told %q", got)
	}
	r.lacks(t, key)
}

func TestWalk(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{})
	want := map[artifact.Key]cache.File{}
	for i := range 20 {
		key := keyOf(fmt.Sprintf("%02x%02x%060x", i%3, i%5, i))
		info := r.put(t, key, cachetest.Random(key, 100))
		looked, _, _ := r.store.Look(key.In(artifact.DefaultScope))
		want[key] = cache.File{Key: key, Size: info.Size, DiskSize: looked.DiskSize, StoredAt: info.StoredAt.UnixNano()}
	}
	for _, foreign := range []string{"00/00/notes.txt", "00/00/" + digits + ".zst", "00/x/y", "00/file", "0g/00/x", "01/00/0100.zst"} {
		write(t, r.path(foreign), []byte("foreign"))
	}
	mkdir(t, r.path("00/00/00001"+strings.Repeat("0", 59)+".zst"))
	found := 0
	for i := range 256 {
		if err := r.store.Walk(artifact.DefaultScope, fmt.Sprintf("%02x", i), func(files []cache.File) error {
			for _, file := range files {
				found++
				if file != want[file.Key] {
					t.Errorf("found %+v, want %+v", file, want[file.Key])
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	if found != len(want) {
		t.Errorf("found %d artifacts, want %d", found, len(want))
	}
	if err := r.store.Walk(artifact.DefaultScope, "00", func([]cache.File) error { return io.ErrUnexpectedEOF }); err != io.ErrUnexpectedEOF {
		t.Errorf("Walk returned %v, not the visitor's error", err)
	}
}

// TestLimits holds a store to a limit that nobody makes room for.
func TestLimits(t *testing.T) {
	dir := t.TempDir()
	var stored int64
	w := &witness{}
	r := open(t, dir)
	r.store.Measure()
	usage, err := r.store.Usage()
	if err != nil {
		t.Fatal(err)
	}
	const room = 100 << 10
	low := 0
	r.store.Manage(w, disk.Limits{
		MaxStorage: usage.Used + room,
		Stored:     func() int64 { return stored },
		LowShare:   4,
		Low:        func() { low++ },
	})
	first, err := r.store.Create(t.Context(), key, 40<<10)
	if err != nil || low != 0 {
		t.Fatal(err, low)
	}
	second, err := r.store.Create(t.Context(), key, 20<<10)
	if err != nil || low != 1 {
		t.Fatal(err, low)
	}
	// What is promised is taken, written or not.
	if _, err := r.store.Create(t.Context(), key, 20<<10); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Create returned %v, want %v", err, cache.ErrNoSpace)
	}
	if _, err := first.Write(make([]byte, 40<<10)); err != nil {
		t.Error(err)
	}
	if _, err := r.store.Create(t.Context(), key, 20<<10); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Create returned %v, want %v", err, cache.ErrNoSpace)
	}
	if _, err := second.Write(make([]byte, 60<<10)); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("more than was declared: Write returned %v, want %v", err, cache.ErrNoSpace)
	}
	if promised := r.store.Promised(); promised != 20<<10+2*(12<<10) { // and what each may take beside its bytes
		t.Errorf("%d bytes are set aside for what is not written", promised)
	}
	first.Abort()
	first.Abort()
	second.Abort()
	if promised := r.store.Promised(); promised != 0 {
		t.Errorf("%d bytes are set aside for nobody", promised)
	}
	after, err := r.store.Usage()
	if err != nil || after.Used != usage.Used || after.Room != min(room, after.Free) {
		t.Errorf("usage is %+v, %v, want %d used and room for %d", after, err, usage.Used, room)
	}
	stored = room
	if _, err := r.store.Create(t.Context(), key, 1); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("with so much stored, Create returned %v, want %v", err, cache.ErrNoSpace)
	}
}

func TestMinFree(t *testing.T) {
	const least = 1 << 30
	r, _ := observed(t, t.TempDir(), disk.Limits{MinFree: least})
	if usage, err := r.store.Usage(); err != nil || usage.Room != usage.Free-least {
		t.Errorf("usage is %+v, %v", usage, err)
	}
	r.put(t, key, content)
	if promised := r.store.Promised(); promised != 0 {
		t.Errorf("after an upload %d bytes are set aside", promised)
	}
}

func TestCapacity(t *testing.T) {
	const most = math.MaxInt64
	for _, test := range []struct{ used, room, want int64 }{
		{10, 90, 100},
		{110, -10, 100},
		{10, -90, 0},
		{10, most, most},
		{-4096, most, most},
		{-4096, 100, 100}, // what was removed before it was counted
	} {
		if got := (disk.Usage{Used: test.used, Room: test.room}).Capacity(); got != test.want {
			t.Errorf("with %d used and room for %d: %d, want %d", test.used, test.room, got, test.want)
		}
	}
}

// TestDirectoriesAreCounted stores and removes again and again: directories that come and go leave nothing behind.
func TestDirectoriesAreCounted(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{Stored: func() int64 { return 0 }})
	var before int64
	for i := range 3 {
		r.put(t, key, content)
		if _, err := r.store.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		usage, err := r.store.Usage()
		if err != nil || i > 0 && usage.Used != before {
			t.Errorf("%d bytes are used, and %d were before, %v", usage.Used, before, err)
		}
		before = usage.Used
	}
}

// TestMeasure counts what is neither an artifact nor an upload, also while it changes.
func TestMeasure(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{Stored: func() int64 { return 0 }})
	used := func() int64 {
		t.Helper()
		usage, err := r.store.Usage()
		if err != nil {
			t.Fatal(err)
		}
		return usage.Used
	}
	r.store.Measure()
	var infos []artifact.Info
	for i := range 5 {
		key := keyOf(fmt.Sprintf("%02x%02x%060x", i%2, i, i))
		infos = append(infos, r.put(t, key, cachetest.Random(key, 100)))
	}
	if err := r.store.Quarantine(t.Context(), infos[0], errors.New("damaged, for this test")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.Remove(t.Context(), infos[1].Key); err != nil {
		t.Fatal(err)
	}
	counted := used()
	r.store.Measure()
	// The quarantine's own directories are not counted before.
	if measured := used(); measured < counted || measured > counted+4*4096 {
		t.Errorf("counted %d bytes, and measured %d", counted, measured)
	}
}

func TestQuarantined(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{})
	if found, err := r.store.Quarantined(); err != nil || found != nil {
		t.Errorf("an empty quarantine has %+v, %v", found, err)
	}
	info := r.put(t, key, content)
	info.StoredAt = time.Now().Add(-1000 * time.Hour).Truncate(time.Second) // which is not when it was moved
	modified(t, r.path(zstName), info.StoredAt)
	if err := r.store.Quarantine(t.Context(), info, errors.New("first")); err != nil {
		t.Fatal(err)
	}
	info = r.put(t, key, content)
	if err := r.store.Quarantine(t.Context(), info, errors.New("second")); err != nil {
		t.Fatal(err)
	}
	write(t, r.path(".polykit-cache/quarantine/notes.md"), []byte("somebody's"))
	found, err := r.store.Quarantined()
	if err != nil || len(found) != 3 {
		t.Fatal(found, err)
	}
	for _, q := range found {
		want := disk.Quarantined{Name: q.Name, Key: key, Size: info.Size, DiskSize: q.DiskSize, Reason: q.Reason, At: q.At}
		if q.Name == "notes.md" {
			want.Key, want.Size = artifact.Key{}, int64(len("somebody's"))
		} else if q.Reason != "first" && q.Reason != "second" {
			t.Errorf("the reason is %q", q.Reason)
		}
		if q.Key == key && q.DiskSize < q.Size+4096 { // with the file that says why
			t.Errorf("%s takes %d bytes", q.Name, q.DiskSize)
		}
		if q != want || q.DiskSize < q.Size || time.Since(q.At) > time.Hour {
			t.Errorf("in quarantine is %+v, want %+v", q, want)
		}
	}
	if !slices.IsSortedFunc(found, func(a, b disk.Quarantined) int { return b.At.Compare(a.At) }) {
		t.Errorf("not the newest first: %+v", found)
	}
	if _, err := r.store.EmptyQuarantine(time.Now().Add(time.Hour), 0); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(filepath.Join(r.dir, ".polykit-cache", "quarantine")); err != nil || len(entries) != 0 {
		t.Errorf("after it was emptied it has %v, %v", entries, err)
	}
}
