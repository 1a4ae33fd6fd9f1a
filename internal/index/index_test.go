package index_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	_ "modernc.org/sqlite"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/index"
)

// rig is an index in a directory of the test.
type rig struct {
	*index.Index
	dir string
	log *bytes.Buffer
}

// open opens an index, which is closed when the test ends, unless it was before.
func open(t *testing.T, dir string) rig {
	t.Helper()
	r := rig{dir: dir, log: &bytes.Buffer{}}
	var err error
	if r.Index, err = index.Open(index.Config{Dir: dir, Log: slog.New(slog.NewTextHandler(r.log, nil))}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// stored returns an artifact of a task, that was stored at a time.
func stored(name, packageName, taskName string, size int64, at time.Time) cache.Stored {
	return cache.Stored{
		Info: artifact.Info{
			Key:              cachetest.Key(name),
			Hash:             artifact.Digest([]byte(fmt.Sprintf("%-32s", name))),
			Size:             size,
			UncompressedSize: 3 * size,
			FileCount:        2,
			Metadata:         artifact.Metadata{PackageName: packageName, TaskName: taskName, Command: "make " + name, CreatedAt: time.Unix(1_700_000_000, 0).UTC()},
			StoredAt:         at,
		},
		DiskSize: (size+4095)/4096*4096 + 4096,
	}
}

var start = time.Unix(1_750_000_000, 123)

// flush flushes, or ends the test.
func (r rig) flush(t *testing.T) {
	t.Helper()
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// list lists all that a query asks for, in pages of two, and returns the names that cachetest made keys of.
func (r rig) list(t *testing.T, q index.Query, names ...string) []string {
	t.Helper()
	byKey := map[artifact.Key]string{}
	for _, name := range names {
		byKey[cachetest.Key(name)] = name
	}
	q.Limit = 2
	var found []string
	for {
		entries, next, err := r.List(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) > q.Limit || len(entries) < q.Limit && next != "" {
			t.Fatalf("a page has %d entries and the cursor %q", len(entries), next)
		}
		for _, e := range entries {
			found = append(found, byKey[e.Key])
		}
		if next == "" {
			return found
		}
		q.After = next
	}
}

// all returns all entries by name.
func (r rig) all(t *testing.T) map[artifact.Name]index.Entry {
	t.Helper()
	entries, next, err := r.List(t.Context(), index.Query{Limit: 1 << 20})
	if err != nil || next != "" {
		t.Fatal(next, err)
	}
	found := map[artifact.Name]index.Entry{}
	for _, e := range entries {
		found[e.Name()] = e
	}
	return found
}

func (r rig) stats(t *testing.T) index.Stats {
	t.Helper()
	stats, err := r.Stats(t.Context(), 100)
	if err != nil {
		t.Fatal(err)
	}
	return stats
}

func TestToldAndListed(t *testing.T) {
	r := open(t, t.TempDir())
	a := stored("a", "web", "build", 100, start)
	r.Stored(a)
	r.flush(t)
	for _, when := range []string{"at once", "after a restart"} {
		e, found := r.all(t)[a.Name()]
		if !found || e.Stored != a || !e.UsedAt.Equal(start) || e.Uses != 0 {
			t.Errorf("%s there is %+v (%t), want %+v, never used", when, e, found, a)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r = open(t, r.dir)
	}
	before := time.Now()
	r.Hit(a.Name())
	r.Hit(a.Name())
	r.Used(a.Name())
	r.Pinned(a.Name(), true)
	r.flush(t)
	e := r.all(t)[a.Name()]
	if e.Uses != 2 || !e.Pinned || e.UsedAt.Before(before) || e.UsedAt.After(time.Now()) {
		t.Errorf("after two downloads and a pin there is %+v", e)
	}
	// It was verified anew: what is known of it changes, what happened with it does not.
	again := a
	again.TaskName, again.Size, again.Pinned = "test", 200, true
	r.Found(again)
	r.flush(t)
	if got := r.all(t)[a.Name()]; got.Stored != again || got.Uses != 2 || !got.UsedAt.Equal(e.UsedAt) {
		t.Errorf("found anew, there is %+v, want %+v with the uses of %+v", got, again, e)
	}
	// It is another artifact: nothing is left of the old one.
	r.Removed(a.Name(), a.DiskSize)
	r.Stored(a)
	r.flush(t)
	if got := r.all(t)[a.Name()]; got.Stored != a || got.Uses != 0 || !got.UsedAt.Equal(start) {
		t.Errorf("stored anew, there is %+v, want %+v, never used", got, a)
	}
	r.Removed(a.Name(), a.DiskSize)
	r.flush(t)
	if all := r.all(t); len(all) > 0 {
		t.Errorf("after it was removed there is %+v", all)
	}
}

// TestUnverified is about what another server left behind.
func TestUnverified(t *testing.T) {
	r := open(t, t.TempDir())
	bare := cache.Stored{Info: artifact.Info{Key: cachetest.Key("a"), Size: 10, StoredAt: start}, DiskSize: 4096}
	r.Found(bare)
	r.flush(t)
	if e := r.all(t)[bare.Name()]; e.Stored != bare || e.Verified() {
		t.Errorf("there is %+v, want %+v", e, bare)
	}
}

func TestList(t *testing.T) {
	r := open(t, t.TempDir())
	names := []string{"a", "b", "c", "d", "e", "f", "g"}
	for i, name := range names {
		s := stored(name, []string{"web", "api"}[i%2], []string{"build", "test", "lint"}[i%3], int64(100*(7-i)), start.Add(time.Duration(i)*time.Hour))
		s.Pinned = i == 3
		r.Stored(s)
	}
	r.flush(t)
	at := func(hours int) time.Time { return start.Add(time.Duration(hours) * time.Hour) }
	no, yes, most := false, true, int64(300)
	digits := cachetest.Key("e").String()
	prefix := digits[:4+strings.IndexByte(digits[4:], 'f')] // behind which comes the last digit that there is
	for _, test := range []struct {
		name  string
		query index.Query
		want  string
	}{
		{"all", index.Query{}, "a b c d e f g"},
		{"the newest first", index.Query{Descending: true}, "g f e d c b a"},
		{"by size", index.Query{Order: index.BySize}, "g f e d c b a"},
		{"of a package", index.Query{Filter: index.Filter{PackageName: "web"}}, "a c e g"},
		{"of a task", index.Query{Filter: index.Filter{TaskName: "build"}}, "a d g"},
		{"of both", index.Query{Filter: index.Filter{PackageName: "web", TaskName: "build"}, Descending: true}, "g a"},
		{"of a package that is not", index.Query{Filter: index.Filter{PackageName: "we"}}, ""},
		{"of a key", index.Query{Filter: index.Filter{KeyPrefix: prefix}}, "e"},
		{"of a size", index.Query{Filter: index.Filter{MinSize: 200, MaxSize: &most}}, "e f"},
		{"of a time", index.Query{Filter: index.Filter{StoredAfter: at(2), StoredBefore: at(5)}}, "c d e"},
		{"used at a time", index.Query{Filter: index.Filter{UsedAfter: at(5), UsedBefore: at(7)}}, "f g"},
		{"pinned", index.Query{Filter: index.Filter{Pinned: &yes}}, "d"},
		{"not pinned", index.Query{Filter: index.Filter{Pinned: &no}}, "a b c e f g"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := strings.Join(r.list(t, test.query, names...), " "); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
	byKey := slices.SortedFunc(slices.Values(names), func(a, b string) int {
		return strings.Compare(cachetest.Key(a).String(), cachetest.Key(b).String())
	})
	if got := r.list(t, index.Query{Order: index.ByKey}, names...); !slices.Equal(got, byKey) {
		t.Errorf("by key: got %q, want %q", got, byKey)
	}
	r.Hit(cachetest.Key("b").In(artifact.DefaultScope))
	r.flush(t)
	if got := strings.Join(r.list(t, index.Query{Order: index.ByUsedAt}, names...), " "); got != "a c d e f g b" {
		t.Errorf("by last use: got %q", got)
	}
}

// TestListOfEquals lists many that are equal by the order: each comes once.
func TestListOfEquals(t *testing.T) {
	r := open(t, t.TempDir())
	var names []string
	for i := range 11 {
		names = append(names, fmt.Sprint(i))
		r.Stored(stored(names[i], "p", "t", 5, start))
	}
	r.flush(t)
	for _, order := range []index.Order{index.ByStoredAt, index.ByUsedAt, index.BySize} {
		for _, descending := range []bool{false, true} {
			got := r.list(t, index.Query{Order: order, Descending: descending}, names...)
			if slices.Sort(got); len(slices.Compact(got)) != len(names) {
				t.Errorf("by %s, descending %t: got %q", order, descending, got)
			}
		}
	}
}

func TestCursors(t *testing.T) {
	r := open(t, t.TempDir())
	for i := range 5 {
		r.Stored(stored(fmt.Sprint(i), "p", "t", 5, start))
	}
	r.flush(t)
	query := index.Query{Limit: 2}
	_, next, err := r.List(t.Context(), query)
	if err != nil {
		t.Fatal(err)
	}
	for name, q := range map[string]index.Query{
		"not base64":       {Limit: 2, After: "!"},
		"not JSON":         {Limit: 2, After: "e30x"},
		"empty":            {Limit: 2, After: "e30"},
		"of another order": {Limit: 2, After: next, Order: index.BySize},
		"of another way":   {Limit: 2, After: next, Descending: true},
		"of another list":  {Limit: 2, After: next, Filter: index.Filter{TaskName: "t"}},
	} {
		if _, _, err := r.List(t.Context(), q); !errors.Is(err, index.ErrInvalidCursor) {
			t.Errorf("%s: %v, want %v", name, err, index.ErrInvalidCursor)
		}
	}
	if _, _, err := r.List(t.Context(), index.Query{Limit: 3, After: next}); err != nil {
		t.Errorf("with another limit: %v", err)
	}
}

func TestStats(t *testing.T) {
	r := open(t, t.TempDir())
	a, b, c := stored("a", "web", "build", 5000, start), stored("b", "web", "build", 100, start), stored("c", "api", "test", 100, start)
	r.Missed(a.Key, []artifact.Scope{artifact.DefaultScope})
	r.Missed(a.Key, []artifact.Scope{artifact.DefaultScope})
	r.Missed(cachetest.Key("never stored"), []artifact.Scope{artifact.DefaultScope})
	for _, s := range []cache.Stored{a, b, c} {
		r.Stored(s)
	}
	r.Hit(a.Name())
	r.Hit(c.Name())
	r.Used(b.Name())
	entry := r.all(t)[b.Name()]
	r.Removed(b.Name(), b.DiskSize)
	r.Evicted(entry, b.DiskSize)
	for _, same := range []bool{true, false, false} {
		r.Compared(same)
	}
	want := index.Stats{
		Total: index.Sums{Artifacts: 2, Size: 5100, UncompressedSize: 15300, DiskSize: a.DiskSize + c.DiskSize},
		Usage: index.Usage{Hits: 2, Misses: 3, Stored: 3, Evicted: 1, EvictedDiskSize: b.DiskSize, Agreed: 1, Differed: 2},
		Tasks: []index.TaskStats{
			{"web", "build", index.Sums{Artifacts: 1, Size: 5000, UncompressedSize: 15000, DiskSize: a.DiskSize},
				index.Usage{Hits: 1, Misses: 2, Stored: 2, Evicted: 1, EvictedDiskSize: b.DiskSize}},
			{"api", "test", index.Sums{Artifacts: 1, Size: 100, UncompressedSize: 300, DiskSize: c.DiskSize}, index.Usage{Hits: 1, Stored: 1}},
		},
		TaskCount: 2,
	}
	want.SinceStart = want.Usage
	check := func(when string) {
		t.Helper()
		got := r.stats(t)
		got.StartedAt = time.Time{}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s there is\n%+v, want\n%+v", when, got, want)
		}
	}
	check("at once")
	if got, want := r.DiskSize(), a.DiskSize+c.DiskSize; got < want || got > want+4<<20 {
		t.Errorf("DiskSize is %d, want %d and what the index takes", got, want)
	}
	r.Close()
	r = open(t, r.dir)
	want.SinceStart = index.Usage{}
	check("after a restart")
	if limited, err := r.Stats(t.Context(), 1); err != nil || len(limited.Tasks) != 1 || limited.TaskCount != 2 {
		t.Errorf("limited to one task there is %+v, %v", limited, err)
	}
}

// directory is a Source whose files are in memory.
type directory struct {
	mu    sync.Mutex
	files map[artifact.Name]cache.Stored
	// walking is called for each outer directory before it is read, looking before each look.
	walking func(outer string)
	looking func(artifact.Name)
}

func (d *directory) Scopes() ([]artifact.Scope, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	scopes := map[artifact.Scope]bool{artifact.DefaultScope: true}
	for name := range d.files {
		scopes[name.Scope] = true
	}
	return slices.Collect(maps.Keys(scopes)), nil
}

func (d *directory) Walk(scope artifact.Scope, outer string, visit func([]cache.File) error) error {
	if d.walking != nil {
		d.walking(outer)
	}
	d.mu.Lock()
	var files []cache.File
	for name, s := range d.files {
		if name.Scope == scope && strings.HasPrefix(name.Key.String(), outer) {
			files = append(files, cache.File{Key: name.Key, Size: s.Size, DiskSize: s.DiskSize, StoredAt: s.StoredAt.UnixNano()})
		}
	}
	d.mu.Unlock()
	return visit(files)
}

func (d *directory) Look(name artifact.Name) (cache.Stored, bool, error) {
	d.mu.Lock()
	s, found := d.files[name]
	d.mu.Unlock()
	if d.looking != nil {
		d.looking(name)
	}
	return s, found, nil
}

func (d *directory) set(s cache.Stored) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.files[s.Name()] = s
}

func (d *directory) remove(name artifact.Name) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.files, name)
}

func directoryOf(all ...cache.Stored) *directory {
	d := &directory{files: map[artifact.Name]cache.Stored{}}
	for _, s := range all {
		d.set(s)
	}
	return d
}

// agrees fails the test if the index does not know exactly what is in a directory.
func (r rig) agrees(t *testing.T, d *directory) {
	t.Helper()
	r.flush(t)
	got := map[artifact.Name]cache.Stored{}
	for name, e := range r.all(t) {
		got[name] = e.Stored
	}
	if !maps.Equal(got, d.files) {
		t.Errorf("the index knows\n%+v, and the directory has\n%+v", got, d.files)
	}
}

func TestReconcile(t *testing.T) {
	r := open(t, t.TempDir())
	if r.Complete() {
		t.Error("an index that was just made knows everything")
	}
	same, changed, gone, added := stored("same", "p", "t", 5, start), stored("changed", "p", "t", 5, start), stored("gone", "p", "t", 5, start), stored("added", "p", "t", 5, start)
	unverified := cache.Stored{Info: artifact.Info{Key: cachetest.Key("unverified"), Size: 5, StoredAt: start}, DiskSize: 4096}
	for _, s := range []cache.Stored{same, changed, gone} {
		r.Stored(s)
	}
	r.Found(unverified)
	changed.Size, changed.StoredAt = 6, start.Add(time.Hour)
	d := directoryOf(same, changed, added, unverified)
	steps := 0
	n, err := r.Reconcile(t.Context(), d, func(done, of int) {
		if steps++; done != steps || of != 256 {
			t.Errorf("step %d is %d of %d", steps, done, of)
		}
	})
	if err != nil || n != 3 || steps != 256 || !r.Complete() {
		t.Errorf("Reconcile returned %d, %v after %d steps; the index is complete: %t", n, err, steps, r.Complete())
	}
	r.agrees(t, d)
	if n, err := r.Reconcile(t.Context(), d, nil); err != nil || n != 0 {
		t.Errorf("once more, Reconcile returned %d, %v", n, err)
	}
}

// TestReconcileBesideChanges stores and removes artifacts at the worst moments of a reconciliation.
func TestReconcileBesideChanges(t *testing.T) {
	comes, goes, replaced := stored("comes", "p", "t", 5, start), stored("goes", "p", "t", 5, start), stored("replaced", "p", "t", 5, start)
	other := replaced
	other.Size, other.StoredAt = 7, start.Add(time.Hour)
	for _, when := range []string{"before the directory is read", "after the look at it"} {
		t.Run(when, func(t *testing.T) {
			r := open(t, t.TempDir())
			d := directoryOf(goes, replaced)
			change := func(name artifact.Name) {
				switch {
				case name == comes.Name() && !r.has(d, comes):
					d.set(comes)
					r.Stored(comes)
				case name == goes.Name() && r.has(d, goes):
					d.remove(name)
					r.Removed(name, goes.DiskSize)
				case name == replaced.Name() && !r.has(d, other):
					d.remove(name)
					r.Removed(name, replaced.DiskSize)
					d.set(other)
					r.Stored(other)
				}
				// What was told is written before the reconciliation tells what it saw.
				if err := r.Flush(context.Background()); err != nil {
					t.Error(err)
				}
			}
			if when == "after the look at it" {
				d.set(comes)
				r.Stored(comes)
				d.looking = change
			} else {
				d.walking = func(outer string) {
					for _, s := range []cache.Stored{comes, goes, replaced} {
						if strings.HasPrefix(s.Key.String(), outer) {
							change(s.Name())
						}
					}
				}
			}
			if _, err := r.Reconcile(t.Context(), d, nil); err != nil {
				t.Fatal(err)
			}
			r.agrees(t, d)
		})
	}
}

func (r rig) has(d *directory, s cache.Stored) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.files[s.Name()] == s
}

// TestRun leaves the index to itself, after it was not closed.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	crashed := open(t, dir)
	crashed.Stored(stored("known", "p", "t", 5, start))
	crashed.flush(t)
	d := directoryOf(stored("known", "p", "t", 5, start), stored("added", "p", "t", 5, start))

	r := open(t, copyOf(t, dir)) // as a killed process leaves it
	if r.Complete() {
		t.Error("after a crash the index counts as complete")
	}
	ctx, stop := context.WithCancel(t.Context())
	ran := make(chan struct{})
	reconciled := make(chan struct{})
	d.walking = func(outer string) {
		if outer == "ff" {
			close(reconciled)
		}
	}
	go func() {
		defer close(ran)
		r.Run(ctx, d)
	}()
	<-reconciled
	stop()
	<-ran
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}

	// After a stop in good order nothing is read.
	d.walking = func(string) { t.Error("the directory was read") }
	last := open(t, r.dir)
	ctx, stop = context.WithCancel(t.Context())
	stop()
	last.Run(ctx, d)
	if complete := last.Complete(); complete {
		last.agrees(t, d)
	}
}

// copyOf copies the files of an index that is open.
func copyOf(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

func TestDamaged(t *testing.T) {
	known := stored("known", "p", "t", 5, start)
	for name, damage := range map[string]func(t *testing.T, path string){
		"no database":   func(t *testing.T, path string) { write(t, path, []byte(strings.Repeat("no database ", 1000))) },
		"empty":         func(t *testing.T, path string) { write(t, path, nil) },
		"cut":           func(t *testing.T, path string) { cut(t, path) },
		"zeros":         func(t *testing.T, path string) { write(t, path, make([]byte, 100_000)) },
		"removed":       func(t *testing.T, path string) { os.Remove(path) },
		"a row is gone": func(t *testing.T, path string) { execute(t, path, "DELETE FROM state") },
		"a directory":   func(t *testing.T, path string) { os.Remove(path); os.MkdirAll(filepath.Join(path, "x"), 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, t.TempDir())
			r.Stored(known)
			d := directoryOf(known)
			if _, err := r.Reconcile(t.Context(), d, nil); err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			damage(t, filepath.Join(r.dir, index.FileName))
			r = open(t, r.dir)
			if r.Complete() {
				t.Error("a damaged index counts as complete")
			}
			if _, err := r.Reconcile(t.Context(), d, nil); err != nil {
				t.Fatal(err)
			}
			r.agrees(t, d)
		})
	}
}

// TestDamagedMeanwhile damages a database that is open.
func TestDamagedMeanwhile(t *testing.T) {
	r := open(t, t.TempDir())
	d := directoryOf()
	for i := range 500 {
		s := stored(fmt.Sprint(i), "p", "t", 5, start)
		d.set(s)
		r.Stored(s)
	}
	if _, err := r.Reconcile(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	execute(t, filepath.Join(r.dir, index.FileName), "PRAGMA wal_checkpoint(TRUNCATE)")
	damagePages(t, filepath.Join(r.dir, index.FileName))
	size := r.DiskSize()
	for i := range 500 { // whatever page is needed
		r.Hit(cachetest.Key(fmt.Sprint(i)).In(artifact.DefaultScope))
	}
	r.flush(t)
	if r.Complete() {
		t.Fatal("the damage was not noticed")
	}
	if got := r.DiskSize(); got < size/2 {
		t.Errorf("while the index is rebuilt, DiskSize is %d, and was %d", got, size)
	}
	if _, err := r.Reconcile(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	r.agrees(t, d)
}

func TestNewer(t *testing.T) {
	r := open(t, t.TempDir())
	r.Close()
	path := filepath.Join(r.dir, index.FileName)
	execute(t, path, "PRAGMA user_version = 99")
	_, err := index.Open(index.Config{Dir: r.dir, Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, index.ErrNewer) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "99") {
		t.Errorf("Open returned %v", err)
	}
}

// TestUnwritable tells an index what it can't write: nothing is lost that it can keep.
func TestUnwritable(t *testing.T) {
	r := open(t, t.TempDir())
	locked, err := sql.Open("sqlite", filepath.Join(r.dir, index.FileName))
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Close()
	locked.SetMaxOpenConns(1)
	for _, statement := range []string{"BEGIN IMMEDIATE"} {
		if _, err := locked.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	a := stored("a", "p", "t", 5, start)
	r.Stored(a)
	r.Hit(a.Name())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Flush(ctx); err == nil {
		t.Error("Flush succeeded")
	}
	if got := r.DiskSize(); got < a.DiskSize {
		t.Errorf("DiskSize is %d", got)
	}
	if _, err := locked.Exec("ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	r.flush(t)
	if e := r.all(t)[a.Name()]; e.Stored != a || e.Uses != 1 {
		t.Errorf("there is %+v", e)
	}
}

// TestForgets tells an index more than it keeps: it is not complete then.
func TestForgets(t *testing.T) {
	r := open(t, t.TempDir())
	r.SetLimits(500, 500, 500)
	d := directoryOf()
	if _, err := r.Reconcile(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	const many = 501
	for i := range many {
		s := stored(fmt.Sprint(i), "p", "t", 5, start)
		d.set(s)
		r.Stored(s)
	}
	r.flush(t)
	if r.Complete() {
		t.Error("the index counts as complete")
	}
	if _, err := r.Reconcile(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	r.agrees(t, d)
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
}

func cut(t *testing.T, path string) {
	t.Helper()
	stat, err := os.Stat(path)
	if err == nil {
		err = os.Truncate(path, stat.Size()/2)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// damagePages overwrites all pages but the first one.
func damagePages(t *testing.T, path string) {
	t.Helper()
	stat, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteAt(bytes.Repeat([]byte{0xAA}, int(stat.Size())-4096), 4096); err != nil {
		t.Fatal(err)
	}
}

// execute executes a statement on a database that may be open.
func execute(t *testing.T, path, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err == nil {
		_, err = db.Exec(statement)
		err = errors.Join(err, db.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestDoubts uses what has no row, and misses what has one: the index looks at them.
func TestDoubts(t *testing.T) {
	r := open(t, t.TempDir())
	gone, added := stored("gone", "p", "t", 5, start), stored("added", "p", "t", 5, start)
	r.Stored(gone)
	d := directoryOf(gone)
	if _, err := r.Reconcile(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	d.remove(gone.Name())
	d.set(added)
	r.Missed(gone.Key, []artifact.Scope{cachetest.Scope("pr-7"), artifact.DefaultScope})
	r.Missed(cachetest.Key("never stored"), []artifact.Scope{artifact.DefaultScope})
	r.Hit(added.Name())

	ctx, stop := context.WithCancel(t.Context())
	ran := make(chan struct{})
	looked := make(chan artifact.Name, 100)
	d.looking = func(name artifact.Name) { looked <- name }
	go func() {
		defer close(ran)
		r.Run(ctx, d)
	}()
	left := map[artifact.Name]int{gone.Name(): 2, added.Name(): 2} // once for what it is, and once to tell
	for len(left) > 0 {
		key := <-looked
		if left[key]--; left[key] <= 0 {
			delete(left, key)
		}
	}
	stop()
	<-ran
	r.agrees(t, d)
}

// TestManyUses uses more than is written at a time.
func TestManyUses(t *testing.T) {
	r := open(t, t.TempDir())
	const many = 45
	r.SetLimits(1000, 20, 1000)
	for i := range many {
		r.Stored(stored(fmt.Sprint(i), "p", "t", 5, start))
	}
	r.flush(t)
	for i := range many {
		r.Hit(cachetest.Key(fmt.Sprint(i)).In(artifact.DefaultScope))
	}
	used := func() (n int) {
		for e, err := range r.Candidates(t.Context(), index.Candidacy{}) { // which writes nothing
			if err != nil {
				t.Fatal(err)
			}
			if n += int(e.Uses); (e.Uses > 0) == r.InUse(e.Name()) {
				t.Fatalf("%+v is written: %t", e, !r.InUse(e.Name()))
			}
		}
		return n
	}
	for _, want := range []int{20, 40} {
		r.flush(t)
		if got := used(); got != want {
			t.Errorf("%d uses are written, want %d", got, want)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, r.dir)
	if got := used(); got != many {
		t.Errorf("after the end %d uses are written, want %d", got, many)
	}
	if stats := r.stats(t); stats.Usage.Hits != many || stats.Tasks[0].Usage.Hits != many {
		t.Errorf("statistics are %+v", stats)
	}
}

// TestManyTasks stores artifacts of ever new tasks: what is remembered of those that are gone is bounded.
func TestManyTasks(t *testing.T) {
	r := open(t, t.TempDir())
	kept := stored("kept", "p", "kept", 5, start)
	const many = 110
	r.SetLimits(1000, 1000, 100)
	r.Stored(kept)
	for i := range many {
		s := stored(fmt.Sprint(i), "p", fmt.Sprint("task ", i), 5, start)
		r.Stored(s)
		r.Removed(s.Name(), s.DiskSize)
	}
	r.flush(t)
	stats := r.stats(t)
	if stats.TaskCount > 101 || stats.TaskCount < 90 || stats.Usage.Stored != many+1 || stats.Total.Artifacts != 1 || stats.Tasks[0].TaskName != "kept" {
		t.Errorf("statistics are of %d tasks: %+v, %+v", stats.TaskCount, stats.Usage, stats.Tasks[0])
	}
}
