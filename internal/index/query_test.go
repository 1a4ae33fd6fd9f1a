package index_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/index"
)

func TestCandidates(t *testing.T) {
	r := open(t, t.TempDir())
	names := []string{"a", "b", "c", "d", "e", "f"}
	for i, name := range names {
		s := stored(name, "p", []string{"build", "test"}[i%2], 5, start.Add(time.Duration(i)*time.Hour))
		s.Pinned = name == "b"
		r.Stored(s)
	}
	r.flush(t)
	for _, test := range []struct {
		name string
		of   index.Candidacy
		want string
	}{
		{"all but the pinned one", index.Candidacy{}, "acdef"},
		{"beyond the last one that was used lately", index.Candidacy{UsedSince: start.Add(3 * time.Hour), BeyondLast: 1}, "d"},
		{"not used lately", index.Candidacy{UsedBefore: start.Add(3 * time.Hour)}, "ac"},
		{"used lately", index.Candidacy{UsedSince: start.Add(3 * time.Hour)}, "def"},
		{"beyond the last one", index.Candidacy{BeyondLast: 1}, "acd"},
		{"beyond the last two, where the pinned one counts", index.Candidacy{BeyondLast: 2}, "a"},
		{"not beyond the last two", index.Candidacy{Without: []index.Candidacy{{BeyondLast: 2}}}, "cdef"},
		{"beyond three of three", index.Candidacy{BeyondLast: 3}, ""},
	} {
		got := r.candidates(t, test.of, names...)
		if got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
	}
}

// TestCandidatesOfNewer has newer artifacts that go, or stay, for another reason.
func TestCandidatesOfNewer(t *testing.T) {
	r := open(t, t.TempDir())
	names := []string{"a", "b", "c", "d"}
	for i, name := range names { // those that were stored later were used earlier
		s := stored(name, "p", "build", 5, start.Add(time.Duration(i)*time.Hour))
		s.Pinned = name == "c"
		r.Stored(s)
	}
	for _, name := range names[:2] {
		r.Used(cachetest.Key(name).In(artifact.DefaultScope))
	}
	r.flush(t)
	since := index.Candidacy{UsedSince: start.Add(24 * time.Hour), BeyondLast: 1} // d was not, but c is pinned
	if got := r.candidates(t, since, names...); got != "ab" {
		t.Errorf("beyond the last one are %q", got)
	}
	since.BeyondLast = 2
	if got := r.candidates(t, since, names...); got != "a" {
		t.Errorf("beyond the last two are %q", got)
	}
	without := index.Candidacy{UsedSince: since.UsedSince, Without: []index.Candidacy{since}}
	if got := r.candidates(t, without, names...); got != "b" {
		t.Errorf("not beyond the last two are %q", got)
	}
}

// candidates returns the candidates, by the names that cachetest made keys of.
func (r rig) candidates(t *testing.T, of index.Candidacy, names ...string) string {
	t.Helper()
	byKey := map[artifact.Key]string{}
	for _, name := range names {
		byKey[cachetest.Key(name)] = name
	}
	var got string
	for e, err := range r.Candidates(t.Context(), of) {
		if err != nil {
			t.Fatal(err)
		}
		got += byKey[e.Key]
	}
	return got
}

// TestManyCandidates reads more candidates than at a time, also those that were used at the same moment, while they go.
func TestManyCandidates(t *testing.T) {
	r := open(t, t.TempDir())
	const n = 1600
	want := map[artifact.Key]bool{}
	for i := range n {
		s := stored(fmt.Sprint(i), "p", "t", 5, start.Add(time.Duration(i/700)*time.Hour))
		r.Stored(s)
		want[s.Key] = true
	}
	r.flush(t)
	var last time.Time
	for e, err := range r.Candidates(t.Context(), index.Candidacy{}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.UsedAt.Before(last) || !want[e.Key] {
			t.Fatalf("%s comes again, or not in its order", e.Key)
		}
		last = e.UsedAt
		delete(want, e.Key)
		r.Removed(e.Name(), e.DiskSize)
	}
	if len(want) > 0 {
		t.Errorf("%d of %d are missing", len(want), n)
	}
}

// TestCorrectUses has artifacts that were used in the future, as a clock said that was wrong.
func TestCorrectUses(t *testing.T) {
	r := open(t, t.TempDir())
	future := time.Now().Add(1000 * time.Hour)
	r.Stored(stored("future", "p", "t", 5, future))
	r.Stored(stored("past", "p", "t", 5, start))
	r.flush(t)
	before := time.Now()
	if err := r.CorrectUses(t.Context()); err != nil {
		t.Fatal(err)
	}
	all := r.all(t)
	if e := all[cachetest.Key("future").In(artifact.DefaultScope)]; e.UsedAt.Before(before) || e.UsedAt.After(time.Now()) || !e.StoredAt.Equal(future) {
		t.Errorf("there is %+v", e)
	}
	if e := all[cachetest.Key("past").In(artifact.DefaultScope)]; !e.UsedAt.Equal(start) {
		t.Errorf("there is %+v", e)
	}
}

// TestListOfLongTexts lists artifacts whose names and commands are long: each page has fewer, and each artifact comes
// once. Of statistics there is only so much.
func TestListOfLongTexts(t *testing.T) {
	r := open(t, t.TempDir())
	var names []string
	for i := range 5 {
		names = append(names, fmt.Sprint(i))
		s := stored(names[i], strings.Repeat("p", 400<<10)+names[i], "t", 5, start.Add(time.Duration(i)))
		if i == 3 { // too long for any page
			s.Command = strings.Repeat("c", 2<<20)
		}
		r.Stored(s)
	}
	r.flush(t)
	var pages []int
	found := map[artifact.Key]bool{}
	for q := (index.Query{Limit: 1000}); ; {
		entries, next, err := r.List(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, len(entries))
		for _, e := range entries {
			found[e.Key] = true
		}
		if q.After = next; next == "" {
			break
		}
	}
	if fmt.Sprint(pages) != "[2 1 1 1]" || len(found) != len(names) {
		t.Errorf("pages have %d artifacts, and there are %d", pages, len(found))
	}
	if stats := r.stats(t); len(stats.Tasks) != 2 || stats.TaskCount != 5 {
		t.Errorf("there are statistics of %d tasks of %d", len(stats.Tasks), stats.TaskCount)
	}
}

// TestGroups sums up what a filter matches: what takes most comes first.
func TestGroups(t *testing.T) {
	r := open(t, t.TempDir())
	small, large, other := stored("small", "p", "small", 5, start), stored("large", "p", "large", 1<<20, start), stored("other", "q", "t", 5, start)
	for _, s := range []cache.Stored{small, large, other} {
		r.Stored(s)
	}
	got, err := r.Groups(t.Context(), index.Filter{PackageName: "p"})
	want := []index.Group{{"p", "large", 1, large.DiskSize}, {"p", "small", 1, small.DiskSize}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("there are %+v, %v, want %+v", got, err, want)
	}
}

// TestToldAgain tells the index again of keys that it was told of before: nothing that was counted counts twice.
func TestToldAgain(t *testing.T) {
	r := open(t, t.TempDir())
	r.SetLimits(5, 1000, 1000)
	a := stored("a", "p", "t", 5, start)
	for range 2 {
		r.Missed(a.Key, []artifact.Scope{artifact.DefaultScope})
		r.Stored(a)
		r.Hit(a.Name())
		r.Removed(a.Name(), a.DiskSize) // with which the uses go that nobody wrote
		if r.InUse(a.Name()) {
			t.Error("what was removed is in use")
		}
		r.Stored(a)
		r.flush(t)
	}
	if stats := r.stats(t); stats.Tasks[0].Usage != (index.Usage{Misses: 2, Stored: 4}) || stats.Usage != (index.Usage{Hits: 2, Misses: 2, Stored: 4}) {
		t.Errorf("statistics are %+v", stats)
	}
	// There are bounds for what was told.
	inUse := 0
	for i := range 20 {
		r.Used(cachetest.Key(fmt.Sprint(i)).In(artifact.DefaultScope))
	}
	for i := range 20 {
		if r.InUse(cachetest.Key(fmt.Sprint(i)).In(artifact.DefaultScope)) {
			inUse++
		}
	}
	for i := range 3000 {
		r.Missed(cachetest.Key(fmt.Sprint(i)), []artifact.Scope{artifact.DefaultScope})
	}
	if inUse != 5 || r.Doubts() != 1000 {
		t.Errorf("%d uses and %d doubts are kept", inUse, r.Doubts())
	}
}

// TestRemovedMeanwhile has the database removed while it is open: the next one begins, with what is told then.
func TestRemovedMeanwhile(t *testing.T) {
	r := open(t, t.TempDir())
	r.Stored(stored("a", "p", "t", 5, start))
	r.flush(t)
	if err := os.Remove(filepath.Join(r.dir, index.FileName)); err != nil {
		t.Fatal(err)
	}
	b := stored("b", "p", "t", 5, start)
	r.Stored(b)
	r.flush(t)
	if r.Complete() {
		t.Error("it counts as complete")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, r.dir)
	if all := r.all(t); len(all) != 1 || all[b.Name()].Stored != b {
		t.Errorf("after a restart there is %+v", all)
	}
}
