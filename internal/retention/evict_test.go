package retention_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	stuck := stuckNames{r.store, map[artifact.Key]bool{}}
	for i := range n {
		r.mustPut(t, fmt.Sprint(i), "build", 100)
		stuck.names[cachetest.Key(fmt.Sprint(i))] = true
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
	names map[artifact.Key]bool
}

func (s stuckNames) Evict(ctx context.Context, key artifact.Key, storedAt time.Time) (int64, error) {
	if s.names[key] {
		return 0, errStuck
	}
	return s.Store.Evict(ctx, key, storedAt)
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
		r.index.Used(cachetest.Key(name))
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
	r.index.Hit(cachetest.Key("b"))
	r.index.Hit(cachetest.Key("c"))
	if err := r.index.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := r.collect(t, retention.Policy{MaxAge: time.Nanosecond}); !strings.Contains(got, "1 of old for max-age") {
		t.Errorf("removed: %s", got)
	}
}

// TestNothingToEvict has a server that says once that there is no room, and nothing to evict.
func TestNothingToEvict(t *testing.T) {
	r := newRig(t, retention.Policy{})
	looked := make(chan struct{})
	var log bytes.Buffer
	c := retention.New(r.index, toldStore{r.store, looked}, retention.Policy{MinFree: 1 << 60}, slog.New(slog.NewTextHandler(&log, nil)))
	ctx, stop := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		c.Run(ctx)
	}()
	for range 3 {
		for range 2 { // when it begins, and for what it evicts
			<-looked
		}
		c.Limits().Low()
	}
	go func() {
		for range looked {
		}
	}()
	stop()
	<-ran
	close(looked)
	if n := strings.Count(log.String(), "there is too little room"); n != 1 {
		t.Errorf("it was said %d times:\n%s", n, &log)
	}
}

// toldStore tells whenever somebody looks how the disk is used.
type toldStore struct {
	*disk.Store
	looked chan<- struct{}
}

func (s toldStore) Usage() (disk.Usage, error) {
	s.looked <- struct{}{}
	return s.Store.Usage()
}

// TestMargin has a cache on a disk that others fill: the room that is made ahead is in proportion to what the cache
// has, not to the disk.
func TestMargin(t *testing.T) {
	const (
		size = 1 << 40
		free = 1 << 30 // a thousandth
	)
	r := newRig(t, retention.Policy{})
	for _, name := range []string{"a", "b"} {
		r.mustPut(t, name, "build", 1<<20)
	}
	almostFull := fixedStore{r.store, disk.Usage{Used: 10 << 20, Size: size, Free: free + 1, Room: free}}
	var log bytes.Buffer
	c := retention.New(r.index, almostFull, retention.Policy{MinFree: 1}, slog.New(slog.NewTextHandler(&log, nil)))
	ctx, stop := context.WithCancel(t.Context())
	stop()
	c.Run(ctx)
	if got := r.stored(t, "a", "b"); got != "a b" || log.Len() > 0 {
		t.Errorf("left are %s; %s", got, &log)
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
	removals, err := c.Plan(t.Context(), retention.Policy{MaxStorage: 9 << 20, MinFree: 1 << 30})
	if got := sums(removals); err != nil || got != "1 of build for max-storage" {
		t.Errorf("planned: %s, %v", got, err)
	}
}
