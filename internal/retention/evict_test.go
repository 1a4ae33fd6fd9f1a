package retention_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	_ "modernc.org/sqlite"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/retention"
)

// This file is about evictions that meet an obstacle.

// TestManyUnremovable has more artifacts that can't be removed than are removed at a time, and all of them were not
// used the longest: others go instead.
func TestManyUnremovable(t *testing.T) {
	r := newRig(t, retention.Policy{})
	const n = 520
	stuck := stuckNames{r.store, map[artifact.Name]bool{}}
	for i := range n {
		r.mustPut(t, fmt.Sprint(i), "build", 100)
		stuck.names[cachetest.Key(fmt.Sprint(i)).In(artifact.DefaultScope)] = true
	}
	r.mustPut(t, "other", "build", 100)
	var log bytes.Buffer
	c := retention.New(r.index, stuck, retention.Policy{}, slog.New(slog.NewTextHandler(&log, nil)))
	removals, more, err := c.Collect(t.Context(), retention.Policy{MinFree: 1 << 60}, 500)
	if got := sums(removals); got != "1 of build for min-free" || more || !errors.Is(err, errStuck) {
		t.Errorf("removed: %s, %t, %v", got, more, err)
	}
	if lines := strings.Count(log.String(), "\n"); lines != 1 || !strings.Contains(log.String(), fmt.Sprint("artifacts=", n)) {
		t.Errorf("logged\n%s", &log)
	}
	// It is an error also if no room lacks.
	if removals, _, err := c.Collect(t.Context(), retention.Policy{MaxAge: 1}, 500); removals != nil || !errors.Is(err, errStuck) {
		t.Errorf("by age: %v, %v", removals, err)
	}
}

// stuckNames can't remove some artifacts.
type stuckNames struct {
	*disk.Store
	names map[artifact.Name]bool
}

func (s stuckNames) Evict(ctx context.Context, name artifact.Name, storedAt time.Time) (int64, error) {
	if s.names[name] {
		return 0, errStuck
	}
	return s.Store.Evict(ctx, name, storedAt)
}

// TestUnwritableIndex evicts by an index that can't be written any more, and so has rows of all that is gone.
func TestUnwritableIndex(t *testing.T) {
	const n, size = 600, 8 << 10
	r := newRig(t, retention.Policy{MaxStorage: 40 << 20})
	r.store.Measure()
	for i := range n {
		r.mustPut(t, fmt.Sprint(i), "build", size)
	}
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	blockIndex(t, r)
	// Each needs what several took.
	for i := range 13 {
		if err := r.put(t.Context(), fmt.Sprint("large ", i), "build", 3<<20); err != nil {
			t.Fatalf("upload %d: %v", i, err)
		}
	}
	if got := r.stored(t, "0", "599", "large 12"); got != "large 12" {
		t.Errorf("left are %s", got)
	}
}

// blockIndex lets the index write nothing once something is removed.
func blockIndex(t *testing.T, r rig) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(r.store.OwnDir(), index.FileName))
	if err == nil {
		_, err = db.ExecContext(t.Context(), "CREATE TRIGGER blocked BEFORE DELETE ON artifacts BEGIN SELECT RAISE(FAIL, 'blocked, for this test'); END")
		err = errors.Join(err, db.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestPlanOfBoth plans and collects what is too old and what is beyond the last ones of one task.
func TestPlanOfBoth(t *testing.T) {
	r := newRig(t, retention.Policy{})
	names := []string{"a", "b", "c", "d", "e"}
	for _, name := range names {
		r.mustPut(t, name, "build", 100)
	}
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	last, err := r.store.Stat(t.Context(), cachetest.Key("e"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names[:4] { // of e, which was stored last, nobody made use since
		r.index.Used(cachetest.Key(name).In(artifact.DefaultScope))
	}
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	policy := retention.Policy{MaxAge: time.Since(last.StoredAt) - time.Nanosecond, KeepLast: 3}
	for time.Since(last.StoredAt) <= policy.MaxAge { // the clock may not have moved
	}
	removals, more, err := r.Collect(t.Context(), policy, 1000)
	if got := sums(removals); err != nil || more || !strings.Contains(got, "1 of build for keep-last") || !strings.Contains(got, "1 of build for max-age") {
		t.Errorf("removed: %s, %t, %v", got, more, err)
	}
	if got := r.stored(t, names...); got != "b c d" {
		t.Errorf("left are %s", got)
	}
}

// TestFuture evicts what was used in the future, as a clock said that was wrong, when its turn comes.
func TestFuture(t *testing.T) {
	r := newRig(t, retention.Policy{})
	for _, name := range []string{"future", "b", "c"} {
		r.mustPut(t, name, "build", 1<<20)
	}
	r.backdate(t, "future", -1000*time.Hour)
	if got := r.collect(t, retention.Policy{MinFree: 1}); got != "" { // which is when it is noticed
		t.Errorf("removed: %s", got)
	}
	r.index.Hit(cachetest.Key("b").In(artifact.DefaultScope))
	r.index.Hit(cachetest.Key("c").In(artifact.DefaultScope))
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := r.collect(t, retention.Policy{MaxAge: time.Nanosecond}); !strings.Contains(got, "1 of old for max-age") {
		t.Errorf("removed: %s", got)
	}
}

// tidied is a store whose collector stops before each time that it tidies.
type tidied struct {
	*disk.Store
	usage    func() disk.Usage // what it says, unless it is nil
	begins   chan struct{}
	proceeds chan struct{}
}

func (s tidied) EmptyQuarantine(before time.Time, atLeast int64) (int64, error) {
	if !before.IsZero() { // as the one that tidies calls it
		s.begins <- struct{}{}
		<-s.proceeds
	}
	return s.Store.EmptyQuarantine(before, atLeast)
}

func (s tidied) Usage() (disk.Usage, error) {
	if s.usage != nil {
		return s.usage(), nil
	}
	return s.Store.Usage()
}

// tidy has a collector tidy as many times as there are checks, each of which is called when that is done.
func (r rig) tidy(t *testing.T, policy retention.Policy, usage func() disk.Usage, log io.Writer, checks ...func()) {
	t.Helper()
	store := tidied{r.store, usage, make(chan struct{}), make(chan struct{})}
	policy.QuarantineMaxAge = 24 * time.Hour
	c := retention.New(r.index, store, policy, slog.New(slog.NewTextHandler(log, nil)))
	ctx, stop := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		c.Run(ctx)
	}()
	<-store.begins
	for _, check := range checks {
		store.proceeds <- struct{}{}
		c.Limits().Low() // so that it begins once more
		<-store.begins
		check()
	}
	stop()
	store.proceeds <- struct{}{}
	<-ran
}

// TestNothingToEvict has a server that says that there is no room and nothing to evict, once each time that it gets so.
func TestNothingToEvict(t *testing.T) {
	r := newRig(t, retention.Policy{})
	var log bytes.Buffer
	room := int64(-1)
	said := func(want int, next int64) func() {
		return func() {
			if n := strings.Count(log.String(), "there is too little room"); n != want {
				t.Errorf("it was said %d times, want %d:\n%s", n, want, &log)
			}
			room = next
		}
	}
	usage := func() disk.Usage { return disk.Usage{Used: 1 << 20, Size: 1 << 40, Free: room + 1, Room: room} }
	r.tidy(t, retention.Policy{MinFree: 1}, usage, &log, said(1, -1), said(1, 1<<30), said(1, -1), said(2, -1))
}

// TestMargin has a cache on a disk that others fill: the room that is made ahead is in proportion to what the cache
// has, not to the disk.
func TestMargin(t *testing.T) {
	r := newRig(t, retention.Policy{})
	for _, name := range []string{"a", "b"} {
		r.mustPut(t, name, "build", 1<<20)
	}
	room := int64(1 << 30) // a thousandth of the disk
	usage := func() disk.Usage { return disk.Usage{Used: 10 << 20, Size: 1 << 40, Free: room + 1, Room: room} }
	var log bytes.Buffer
	r.tidy(t, retention.Policy{MinFree: 1}, usage, &log, func() {
		if got := r.stored(t, "a", "b"); got != "a b" || log.Len() > 0 {
			t.Errorf("left are %s; %s", got, &log)
		}
		room = 100 << 10 // less than a hundredth of what the cache may take
	}, func() {
		if got := r.stored(t, "a", "b"); got != "" {
			t.Errorf("left are %s", got)
		}
	})
}

// TestTidy has a collector remove, by itself, more than it does at a time: until there is a fiftieth of room, and what
// is too old. It knows what is there beside artifacts.
func TestTidy(t *testing.T) {
	const n, beside = 530, 4 << 20
	r := newRig(t, retention.Policy{})
	if err := os.WriteFile(filepath.Join(r.store.OwnDir(), "other"), make([]byte, beside), 0o644); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		r.mustPut(t, fmt.Sprint(i), "build", 100)
	}
	_, info, err := r.store.Open(t.Context(), cachetest.Key("0"))
	if err == nil {
		err = r.store.Quarantine(t.Context(), info, errors.New("damaged, for this test"))
	}
	if err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-25 * time.Hour)
	found, err := filepath.Glob(filepath.Join(r.store.OwnDir(), "quarantine", "*"))
	if err != nil || len(found) != 2 {
		t.Fatal(found, err)
	}
	for _, path := range found {
		if err := os.Chtimes(path, past, past); err != nil {
			t.Fatal(err)
		}
	}
	r.tidy(t, retention.Policy{MaxAge: 1}, nil, io.Discard, func() {
		if got := r.stored(t, "1", fmt.Sprint(n-1)); got != "" {
			t.Errorf("left are %s", got)
		}
		if left, err := r.store.Quarantined(); err != nil || len(left) > 0 {
			t.Errorf("in quarantine are %v, %v", left, err)
		}
		if usage, err := r.store.Usage(); err != nil || usage.Used-r.index.DiskSize() < beside {
			t.Errorf("used are %d bytes, of which %d for the index, %v", usage.Used, r.index.DiskSize(), err)
		}
	})
	// Room is made ahead.
	for i := range 40 {
		r.mustPut(t, fmt.Sprint(i), "build", 100<<10)
	}
	usage, err := r.store.Usage()
	if err != nil {
		t.Fatal(err)
	}
	limit := usage.Used + usage.Used/200 // of which less than a hundredth is left
	r.tidy(t, retention.Policy{MaxStorage: limit}, nil, io.Discard, func() {
		usage, err := r.store.Usage()
		if room := limit - usage.Used; err != nil || room < limit/50 || room > limit/50+200<<10 {
			t.Errorf("there is room for %d bytes of %d, %v", room, limit, err)
		}
	})
}

// TestFullDisk is on a disk that others filled, of which nothing must be free: nothing is evicted for that.
func TestFullDisk(t *testing.T) {
	r := newRig(t, retention.Policy{})
	r.mustPut(t, "a", "build", 1<<20)
	full := fixedStore{r.store, disk.Usage{Used: 10 << 20, Size: 1 << 40, Free: -4096, Room: -4096}}
	c := retention.New(r.index, full, retention.Policy{MaxStorage: 1 << 30}, slog.New(slog.DiscardHandler))
	if removals, more, err := c.Collect(t.Context(), c.Policy(), 500); removals != nil || more || err != nil {
		t.Errorf("removed: %v, %t, %v", removals, more, err)
	}
	if err := c.Limits().MakeRoom(t.Context(), 4096); err == nil {
		t.Error("there is room")
	}
	if got := r.stored(t, "a"); got != "a" {
		t.Errorf("left are %s", got)
	}
}

// fixedStore is on a disk that is used as it says, whatever happens.
type fixedStore struct {
	*disk.Store
	usage disk.Usage
}

func (s fixedStore) Usage() (disk.Usage, error) { return s.usage, nil }

// TestPlanWithoutFileSystem plans on a file system that does not tell what is free.
func TestPlanWithoutFileSystem(t *testing.T) {
	r := newRig(t, retention.Policy{})
	for _, name := range []string{"a", "b", "c"} {
		r.mustPut(t, name, "build", 1<<20)
	}
	const most = 1<<63 - 1
	unknown := fixedStore{r.store, disk.Usage{Used: 10 << 20, Size: most, Free: most, Room: most}}
	c := retention.New(r.index, unknown, retention.Policy{}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	removals, err := c.Plan(t.Context(), retention.Policy{MaxStorage: 9 << 20, MinFree: 1})
	if got := sums(removals); err != nil || got != "1 of build for max-storage" {
		t.Errorf("planned: %s, %v", got, err)
	}
}
