package retention_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/retention"
)

// rig is a store on a directory of the test, with its index and a collector.
type rig struct {
	*retention.Collector
	store *disk.Store
	index *index.Index
	dir   string
}

func newRig(t *testing.T, policy retention.Policy) rig {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	r := rig{dir: t.TempDir()}
	var err error
	if r.store, err = disk.Open(disk.Config{Dir: r.dir, Verifier: artifact.NewVerifier(artifact.DefaultLimits), Log: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.store.Close() })
	if r.index, err = index.Open(index.Config{Dir: r.store.OwnDir(), Log: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.index.Close() })
	r.Collector = retention.New(r.index, r.store, policy, log)
	r.store.Manage(r.index, r.Limits())
	return r
}

// put stores an artifact of a task, of about size bytes.
func (r rig) put(ctx context.Context, name, taskName string, size int) error {
	return put(ctx, r.store, name, taskName, size)
}

func put(ctx context.Context, store cache.Store, name, taskName string, size int) error {
	key := cachetest.Key(name)
	content := cachetest.Random(key, size)
	upload, err := store.Create(ctx, key, int64(len(content)))
	if err != nil {
		return err
	}
	defer upload.Abort()
	if _, err := upload.Write(content); err != nil {
		return err
	}
	_, err = upload.Commit(ctx, artifact.Info{
		Key: key, Hash: artifact.Digest{1}, Size: int64(len(content)), FileCount: 1,
		Metadata: artifact.Metadata{PackageName: "p", TaskName: taskName, CreatedAt: time.Unix(1, 0).UTC()},
	})
	return err
}

func (r rig) mustPut(t *testing.T, name, taskName string, size int) {
	t.Helper()
	if err := r.put(t.Context(), name, taskName, size); err != nil {
		t.Fatal(err)
	}
}

// stored returns which of some names are stored.
func (r rig) stored(t *testing.T, names ...string) string {
	t.Helper()
	var found []string
	for _, name := range names {
		_, err := r.store.Stat(t.Context(), cachetest.Key(name))
		switch {
		case err == nil:
			found = append(found, name)
		case !errors.Is(err, cache.ErrNotFound):
			t.Error(err)
		}
	}
	return strings.Join(found, " ")
}

// sums returns removals without their bytes.
func sums(removals []retention.Removal) string {
	var all []string
	for _, r := range removals {
		if r.DiskSize < r.Artifacts*4096 {
			all = append(all, fmt.Sprintf("only %d bytes", r.DiskSize))
		}
		all = append(all, fmt.Sprintf("%d of %s for %s", r.Artifacts, r.TaskName, r.Reason))
	}
	return strings.Join(all, ", ")
}

// backdate makes an artifact one that was stored, and used, some time ago, as far as the store and the index know.
func (r rig) backdate(t *testing.T, name string, by time.Duration) {
	t.Helper()
	key := cachetest.Key(name)
	digits := key.String()
	at := time.Now().Add(-by)
	if err := os.Chtimes(filepath.Join(r.dir, digits[:2], digits[2:4], digits+".zst"), time.Time{}, at); err != nil {
		t.Fatal(err)
	}
	r.index.Removed(key.In(artifact.DefaultScope), 0)
	r.index.Stored(cache.Stored{Info: artifact.Info{
		Key: key, Hash: artifact.Digest{1}, Size: 100, Metadata: artifact.Metadata{PackageName: "p", TaskName: "old"}, StoredAt: at,
	}, DiskSize: 8192})
}

func (r rig) plan(t *testing.T, policy retention.Policy) string {
	t.Helper()
	removals, err := r.Plan(t.Context(), policy)
	if err != nil {
		t.Fatal(err)
	}
	return sums(removals)
}

func (r rig) collect(t *testing.T, policy retention.Policy) string {
	t.Helper()
	removals, more, err := r.Collect(t.Context(), policy, 1000)
	if err != nil || more {
		t.Fatal(more, err)
	}
	return sums(removals)
}

// TestPolicies plans and collects: what was planned is removed, and nothing else.
func TestPolicies(t *testing.T) {
	names := []string{"a", "b", "c", "d", "e"}
	for _, test := range []struct {
		name    string
		policy  retention.Policy
		prepare func(t *testing.T, r rig)
		removed string
		left    string
	}{
		{"nothing to do", retention.Policy{MaxAge: time.Hour, KeepLast: 5, MaxStorage: 1 << 40, MinFree: 1}, nil, "", "a b c d e"},
		{"no policy", retention.Policy{}, nil, "", "a b c d e"},
		{"age", retention.Policy{MaxAge: time.Hour}, func(t *testing.T, r rig) {
			r.backdate(t, "b", 2*time.Hour)
			r.backdate(t, "c", 50*time.Minute)
		}, "1 of old for max-age", "a c d e"},
		{"age of what was used", retention.Policy{MaxAge: time.Hour}, func(t *testing.T, r rig) {
			r.backdate(t, "b", 2*time.Hour)
			r.backdate(t, "c", 2*time.Hour)
			r.index.Used(cachetest.Key("c").In(artifact.DefaultScope))
		}, "1 of old for max-age", "a c d e"},
		{"the last ones", retention.Policy{KeepLast: 2}, nil, "3 of build for keep-last", "d e"},
		{"age, then the last ones", retention.Policy{MaxAge: time.Hour, KeepLast: 3}, func(t *testing.T, r rig) {
			r.backdate(t, "e", 2*time.Hour)
		}, "1 of build for keep-last, 1 of old for max-age", "b c d"},
		{"pinned", retention.Policy{KeepLast: 1}, func(t *testing.T, r rig) {
			if err := r.store.Pin(t.Context(), cachetest.Key("a"), true); err != nil {
				t.Error(err)
			}
		}, "3 of build for keep-last", "a e"},
		{"pinned and unpinned", retention.Policy{KeepLast: 1}, func(t *testing.T, r rig) {
			for _, pinned := range []bool{true, false} {
				if err := r.store.Pin(t.Context(), cachetest.Key("a"), pinned); err != nil {
					t.Error(err)
				}
			}
		}, "4 of build for keep-last", "e"},
		{"the last ones, then free space", retention.Policy{KeepLast: 2, MinFree: 1 << 60}, nil, "3 of build for keep-last, 2 of build for min-free", ""},
		{"free space", retention.Policy{MinFree: 1 << 60}, nil, "5 of build for min-free", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, retention.Policy{})
			for _, name := range names {
				r.mustPut(t, name, "build", 100)
			}
			if test.prepare != nil {
				test.prepare(t, r)
			}
			for range 2 { // planning changes nothing
				if got := r.plan(t, test.policy); got != test.removed {
					t.Errorf("planned: %s; want: %s", got, test.removed)
				}
			}
			if got := r.collect(t, test.policy); got != test.removed {
				t.Errorf("removed: %s; want: %s", got, test.removed)
			}
			if got := r.stored(t, names...); got != test.left {
				t.Errorf("left are %s, want %s", got, test.left)
			}
			if got := r.collect(t, test.policy); got != "" {
				t.Errorf("removed once more: %s", got)
			}
		})
	}
}

// TestLeastRecentlyUsed evicts by size: what was used longest ago goes first.
func TestLeastRecentlyUsed(t *testing.T) {
	r := newRig(t, retention.Policy{})
	r.store.Measure()
	for _, name := range []string{"a", "b", "c", "d"} {
		r.mustPut(t, name, "build", 1<<20)
	}
	r.index.Hit(cachetest.Key("a").In(artifact.DefaultScope))
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"a c d", "a d", "a", ""} {
		usage, err := r.store.Usage()
		if err != nil {
			t.Fatal(err)
		}
		if got := r.collect(t, retention.Policy{MaxStorage: usage.Used - 1}); got != "1 of build for max-storage" {
			t.Errorf("removed: %s", got)
		}
		if got := r.stored(t, "a", "b", "c", "d"); got != want {
			t.Errorf("left are %s, want %s", got, want)
		}
	}
}

// TestStaleIndex collects by an index that is wrong: nothing is removed that should not be.
func TestStaleIndex(t *testing.T) {
	r := newRig(t, retention.Policy{})
	for _, name := range []string{"pinned", "replaced", "gone"} {
		r.mustPut(t, name, "build", 100)
	}
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.store.Manage(deaf{}, disk.Limits{}) // so that the index does not learn of it
	if err := r.store.Pin(t.Context(), cachetest.Key("pinned"), true); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"replaced", "gone"} {
		if _, err := r.store.Remove(t.Context(), cachetest.Key(name)); err != nil {
			t.Fatal(err)
		}
	}
	r.mustPut(t, "replaced", "build", 200)
	if got := r.collect(t, retention.Policy{MaxAge: 1}); got != "" {
		t.Errorf("removed: %s", got)
	}
	if got := r.stored(t, "pinned", "replaced", "gone"); got != "pinned replaced" {
		t.Errorf("left are %s", got)
	}
	// Now it knows.
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	entries, _, err := r.index.List(t.Context(), index.Query{Order: index.ByUsedAt, Limit: 10})
	if err != nil || len(entries) != 2 || !entries[0].Pinned || entries[0].Key != cachetest.Key("pinned") || entries[1].Key != cachetest.Key("replaced") ||
		!entries[1].UsedAt.Equal(entries[1].StoredAt) {
		t.Errorf("the index knows %+v, %v", entries, err)
	}
}

// deaf is an observer that hears nothing.
type deaf struct{ cache.Observer }

func (deaf) Stored(cache.Stored)          {}
func (deaf) Found(cache.Stored)           {}
func (deaf) Pinned(artifact.Name, bool)   {}
func (deaf) Removed(artifact.Name, int64) {}

// TestLimitHolds uploads far more than there is room for, from 16 clients at once and beside downloads,
// and watches the directory: it never takes more than the limit, every upload succeeds, and every
// download is whole.
func TestLimitHolds(t *testing.T) {
	const (
		limit     = 16 << 20
		uploaders = 16
		uploads   = 15 // of each
		largest   = 500 << 10
	)
	r := newRig(t, retention.Policy{MaxStorage: limit})
	ctx, stop := context.WithCancel(t.Context())
	var background sync.WaitGroup
	defer func() {
		stop()
		background.Wait()
	}()
	background.Go(func() { r.index.Run(ctx, r.store) })
	background.Go(func() { r.Run(ctx) })

	var most, watched atomic.Int64
	watching, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watching)
		var before map[string]int64
		for {
			now := filesBelow(r.dir)
			most.Store(max(most.Load(), inBoth(before, now)))
			watched.Add(1)
			before = now
			select {
			case <-done:
				return
			default:
			}
		}
	}()
	var uploading sync.WaitGroup
	for i := range uploaders {
		uploading.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(i)))
			for n := range uploads {
				name := fmt.Sprint(i, " ", n)
				if err := r.put(ctx, name, fmt.Sprint("task ", i%4), random.IntN(largest)); err != nil {
					t.Errorf("upload %s: %v", name, err)
					return
				}
				file, info, err := r.store.Open(ctx, cachetest.Key(name))
				if errors.Is(err, cache.ErrNotFound) {
					continue // others needed the room
				}
				if err != nil {
					t.Error(err)
					return
				}
				// It may be evicted meanwhile, and is whole all the same.
				if size, err := io.Copy(io.Discard, file); err != nil || size != info.Size {
					t.Errorf("downloaded %d of %d bytes, %v", size, info.Size, err)
				}
				file.Close()
			}
		})
	}
	uploading.Wait()
	close(done)
	<-watching
	if most.Load() > limit || most.Load() < limit/2 {
		t.Errorf("the directory had %d bytes at most, and the limit is %d", most.Load(), limit)
	}
	if watched.Load() < 10 {
		t.Errorf("the directory was looked at only %d times", watched.Load())
	}
	stats, err := r.index.Stats(t.Context(), 10)
	if err != nil || stats.Usage.Stored != uploaders*uploads || stats.Usage.Evicted == 0 || stats.Total.Artifacts+stats.Usage.Evicted != uploaders*uploads {
		t.Errorf("statistics are %+v, %v", stats, err)
	}
}

// filesBelow returns what each file in a directory takes on the disk, by its inode and name.
func filesBelow(dir string) map[string]int64 {
	found := map[string]int64{}
	inodes := map[any]bool{}
	filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return nil // it is gone
		}
		if stat, err := entry.Info(); err == nil {
			if inode, blocks, ok := onDisk(stat); ok && !inodes[inode] { // one that has two names counts once
				inodes[inode] = true
				found[fmt.Sprint(inode, " ", path)] = blocks
			}
		}
		return nil
	})
	return found
}

// inBoth sums up the files that were there in two walks, one right behind the other: these were there at
// one moment, between the walks, which can't be said of all that one walk finds.
func inBoth(before, now map[string]int64) (size int64) {
	for file, blocks := range now {
		size += min(blocks, before[file])
	}
	return size
}

// TestNoRoom uploads what can't have room, however much is evicted.
func TestNoRoom(t *testing.T) {
	const limit = 8 << 20
	r := newRig(t, retention.Policy{MaxStorage: limit})
	r.mustPut(t, "kept", "build", 100)
	for _, size := range []int{limit, 2 * limit} {
		if err := r.put(t.Context(), "large", "build", size); !errors.Is(err, cache.ErrNoSpace) {
			t.Errorf("an upload of %d bytes returned %v, want %v", size, err, cache.ErrNoSpace)
		}
		if got := r.stored(t, "kept"); got != "kept" {
			t.Error("an upload that can never have room evicted others")
		}
	}
	for i := range 3 { // all pinned: nothing can go
		r.mustPut(t, fmt.Sprint(i), "build", 1<<20)
		if err := r.store.Pin(t.Context(), cachetest.Key(fmt.Sprint(i)), true); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.put(t.Context(), "large", "build", 4<<20); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("an upload beside pinned artifacts returned %v, want %v", err, cache.ErrNoSpace)
	}
	if got := r.stored(t, "0", "1", "2"); got != "0 1 2" {
		t.Errorf("left are %s", got)
	}
}

func TestQuarantineIsEmptied(t *testing.T) {
	r := newRig(t, retention.Policy{QuarantineMaxAge: time.Hour})
	quarantine := filepath.Join(r.store.OwnDir(), "quarantine")
	for i, name := range []string{"old", "new"} {
		r.mustPut(t, name, "build", 100)
		_, info, err := r.store.Open(t.Context(), cachetest.Key(name))
		if err == nil {
			err = r.store.Quarantine(t.Context(), info, errors.New("damaged, for this test"))
		}
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			continue
		}
		entries, err := os.ReadDir(quarantine)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			past := time.Now().Add(-2 * time.Hour)
			if err := os.Chtimes(filepath.Join(quarantine, entry.Name()), past, past); err != nil {
				t.Fatal(err)
			}
		}
	}
	if found, err := r.store.Quarantined(); err != nil || len(found) != 2 {
		t.Fatal(found, err)
	}
	if got := r.collect(t, retention.Policy{}); got != "" {
		t.Errorf("removed: %s", got)
	}
	freed, err := r.store.EmptyQuarantine(time.Now().Add(-time.Hour), 0)
	if err != nil || freed < 8192 {
		t.Errorf("EmptyQuarantine returned %d, %v", freed, err)
	}
	found, err := r.store.Quarantined()
	if err != nil || len(found) != 1 || found[0].Key != cachetest.Key("new") || found[0].Reason != "damaged, for this test" || found[0].Size < 100 {
		t.Errorf("in quarantine are %+v, %v", found, err)
	}
	if entries, err := os.ReadDir(quarantine); err != nil || len(entries) != 2 {
		t.Errorf("its files are %v, %v", entries, err)
	}
	// Where room lacks, what is in quarantine goes before anything that is stored.
	r.mustPut(t, "kept", "build", 100)
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	usage, err := r.store.Usage()
	if err != nil {
		t.Fatal(err)
	}
	policy := retention.Policy{MaxStorage: usage.Used - 1}
	if got := r.plan(t, policy); got != "" {
		t.Errorf("planned: %s", got)
	}
	if got := r.collect(t, policy); got != "" {
		t.Errorf("removed: %s", got)
	}
	if found, err := r.store.Quarantined(); err != nil || len(found) != 0 || r.stored(t, "kept") != "kept" {
		t.Errorf("in quarantine are %+v, %v", found, err)
	}
}

// TestUnremovable has an artifact that can't be removed: others go instead.
func TestUnremovable(t *testing.T) {
	r := newRig(t, retention.Policy{})
	for _, name := range []string{"stuck", "b", "c"} {
		r.mustPut(t, name, "build", 100)
	}
	stuck := stuckStore{r.store, cachetest.Key("stuck")}
	c := retention.New(r.index, stuck, retention.Policy{}, slog.New(slog.DiscardHandler))
	removals, more, err := c.Collect(t.Context(), retention.Policy{MinFree: 1 << 60}, 1000)
	if got := sums(removals); got != "2 of build for min-free" || more || !errors.Is(err, errStuck) {
		t.Errorf("removed: %s, %t, %v", got, more, err)
	}
	if got := r.stored(t, "stuck", "b", "c"); got != "stuck" {
		t.Errorf("left are %s", got)
	}
	if _, more, err := c.Collect(t.Context(), retention.Policy{MinFree: 1 << 60}, 1); more || !errors.Is(err, errStuck) {
		t.Errorf("where nothing else is left: %t, %v", more, err)
	}
}

var errStuck = errors.New("stuck, for this test")

// stuckStore can't remove one of its artifacts.
type stuckStore struct {
	*disk.Store
	key artifact.Key
}

func (s stuckStore) Evict(ctx context.Context, name artifact.Name, storedAt time.Time) (int64, error) {
	if name.Key == s.key {
		return 0, errStuck
	}
	return s.Store.Evict(ctx, name, storedAt)
}

// TestUsedMeanwhile uses an artifact when it is about to go: it stays.
func TestUsedMeanwhile(t *testing.T) {
	r := newRig(t, retention.Policy{})
	for _, name := range []string{"a", "b", "c"} {
		r.mustPut(t, name, "build", 100)
	}
	c := retention.New(r.index, usingStore{r.store, func() { r.index.Hit(cachetest.Key("c").In(artifact.DefaultScope)) }}, retention.Policy{}, slog.New(slog.DiscardHandler))
	removals, _, err := c.Collect(t.Context(), retention.Policy{MinFree: 1 << 60}, 1000)
	if got := sums(removals); got != "2 of build for min-free" || err != nil {
		t.Errorf("removed: %s, %v", got, err)
	}
	if got := r.stored(t, "a", "b", "c"); got != "c" {
		t.Errorf("left are %s", got)
	}
}

// usingStore does something before it removes an artifact.
type usingStore struct {
	*disk.Store
	before func()
}

func (s usingStore) Evict(ctx context.Context, name artifact.Name, storedAt time.Time) (int64, error) {
	s.before()
	return s.Store.Evict(ctx, name, storedAt)
}
