package index_test

import (
	"errors"
	"fmt"
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

// in returns what is stored as it is in another scope.
func in(scope string, s cache.Stored) cache.Stored {
	s.Scope = cachetest.Scope(scope)
	return s
}

// scopeSums returns what an index says of scopes, in short.
func (r rig) scopeSums(t *testing.T) string {
	t.Helper()
	scopes, err := r.Scopes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, s := range scopes {
		all = append(all, fmt.Sprintf("%s: %d of %d on %d", s.Scope, s.Artifacts, s.Size, s.DiskSize))
	}
	return strings.Join(all, ", ")
}

// TestScopes tells an index of artifacts of one key in several scopes: they have nothing to do with each other.
func TestScopes(t *testing.T) {
	r := open(t, t.TempDir())
	if got := r.scopeSums(t); got != "default: 0 of 0 on 0" {
		t.Errorf("at first there is %s", got)
	}
	ours := stored("a", "web", "build", 100, start)
	theirs, others := in("pr-7", stored("a", "web", "build", 5000, start.Add(time.Hour))), in("pr-8", stored("a", "api", "test", 7, start))
	for _, s := range []cache.Stored{ours, theirs, others, in("pr-7", stored("b", "web", "build", 1, start))} {
		r.Stored(s)
	}
	r.flush(t)
	r.Hit(theirs.Name())
	r.Used(others.Name())
	r.Pinned(ours.Name(), true)
	ours.Pinned = true
	r.flush(t)
	if r.InUse(theirs.Name()) {
		t.Error("what is written counts as in use")
	}
	r.Hit(theirs.Name())
	if !r.InUse(theirs.Name()) || r.InUse(ours.Name()) {
		t.Error("a use in one scope is not told from one in another")
	}
	r.flush(t)
	for _, want := range []struct {
		stored cache.Stored
		uses   int64
	}{{ours, 0}, {theirs, 2}, {others, 0}} {
		if e := r.all(t)[want.stored.Name()]; e.Stored != want.stored || e.Uses != want.uses {
			t.Errorf("there is %+v, want %+v, used %d times", e, want.stored, want.uses)
		}
	}
	if got := r.scopeSums(t); got != "default: 1 of 100 on 8192, pr-7: 2 of 5001 on 20480, pr-8: 1 of 7 on 8192" {
		t.Errorf("there is %s", got)
	}

	copies, err := r.Copies(t.Context(), ours.Key)
	if err != nil || len(copies) != 3 || copies[0].Stored != ours || copies[1].Stored != theirs || copies[2].Stored != others {
		t.Errorf("Copies returned %+v, %v", copies, err)
	}
	if copies, err := r.Copies(t.Context(), cachetest.Key("never stored")); err != nil || len(copies) != 0 {
		t.Errorf("Copies of a miss returned %+v, %v", copies, err)
	}

	// A size that changes, and removals.
	theirs.Size, theirs.DiskSize = 9, 4096
	r.Found(theirs)
	r.Removed(others.Name(), others.DiskSize)
	if got := r.scopeSums(t); got != "default: 1 of 100 on 8192, pr-7: 2 of 10 on 12288" {
		t.Errorf("then there is %s", got)
	}
	r.Removed(ours.Name(), ours.DiskSize)
	r.Removed(theirs.Name(), theirs.DiskSize)
	if got := r.scopeSums(t); got != "default: 0 of 0 on 0, pr-7: 1 of 1 on 8192" {
		t.Errorf("in the end there is %s", got)
	}
	if stats := r.stats(t); stats.Total.Artifacts != 1 || stats.Total.DiskSize != 8192 {
		t.Errorf("in the end there is %+v", stats.Total)
	}
}

func TestListScopes(t *testing.T) {
	r := open(t, t.TempDir())
	names := []string{"a", "b", "c", "d"}
	var all []artifact.Name
	for i, name := range names {
		for j, scope := range []string{"default", "a-1", "pr-7"} {
			s := in(scope, stored(name, "p", "t", int64(i*3+j), start.Add(time.Duration(i*3+j)*time.Hour)))
			r.Stored(s)
			all = append(all, s.Name())
		}
	}
	byKey := slices.Clone(all)
	slices.SortFunc(byKey, func(a, b artifact.Name) int {
		order := func(n artifact.Name) string {
			return strings.TrimPrefix(n.Scope.String(), "default") + "/" + n.Key.String()
		}
		return strings.Compare(order(a), order(b))
	})
	reversed := slices.Clone(byKey)
	slices.Reverse(reversed)
	of := func(names []artifact.Name, scopes ...string) []artifact.Name {
		return slices.DeleteFunc(slices.Clone(names), func(n artifact.Name) bool { return !slices.Contains(scopes, n.Scope.String()) })
	}
	theDefault, pr7 := artifact.DefaultScope, cachetest.Scope("pr-7")
	prefix := cachetest.Key("c").String()[:20]
	for _, test := range []struct {
		name  string
		query index.Query
		want  []artifact.Name
	}{
		{"all", index.Query{}, all},
		{"all by key", index.Query{Order: index.ByKey}, byKey},
		{"all by key, backwards", index.Query{Order: index.ByKey, Descending: true}, reversed},
		{"the default one", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{theDefault}}}, of(all, "default")},
		{"the default one by key", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{theDefault}}, Order: index.ByKey}, of(byKey, "default")},
		{"another", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{pr7}}}, of(all, "pr-7")},
		{"another by size", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{pr7}}, Order: index.BySize}, of(all, "pr-7")},
		{"another by key", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{pr7}}, Order: index.ByKey}, of(byKey, "pr-7")},
		{"two", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{pr7, theDefault}}}, of(all, "default", "pr-7")},
		{"two by key", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{pr7, theDefault}}, Order: index.ByKey}, of(byKey, "default", "pr-7")},
		{"none", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{}}}, nil},
		{"one that there is not", index.Query{Filter: index.Filter{Scopes: []artifact.Scope{cachetest.Scope("x")}}}, nil},
		{"a key in all", index.Query{Filter: index.Filter{KeyPrefix: prefix}}, all[6:9]},
		{"a key in two", index.Query{Filter: index.Filter{KeyPrefix: prefix, Scopes: []artifact.Scope{pr7, theDefault}}}, of(all[6:9], "default", "pr-7")},
	} {
		var got []artifact.Name
		for q := test.query; ; {
			q.Limit = 2
			entries, next, err := r.List(t.Context(), q)
			if err != nil {
				t.Fatal(test.name, err)
			}
			for _, e := range entries {
				got = append(got, e.Name())
			}
			if q.After = next; next == "" {
				break
			}
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: got\n%v, want\n%v", test.name, got, test.want)
		}
	}

	// A cursor is of one list.
	_, next, err := r.List(t.Context(), index.Query{Filter: index.Filter{Scopes: []artifact.Scope{pr7}}, Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.List(t.Context(), index.Query{After: next, Limit: 1}); !errors.Is(err, index.ErrInvalidCursor) {
		t.Errorf("the cursor of one scope's list is taken for that of all: %v", err)
	}
}

// TestCandidatesOfScopes looks whether newer artifacts in one scope push out those in another.
func TestCandidatesOfScopes(t *testing.T) {
	r := open(t, t.TempDir())
	for i := range 3 {
		for j, scope := range []string{"default", "pr-7", "pr-8"} {
			r.Stored(in(scope, stored(fmt.Sprint(i), "p", "t", 5, start.Add(time.Duration(10*j+i)*time.Hour))))
		}
	}
	r.flush(t)
	theDefault, pr7, pr8 := artifact.DefaultScope, cachetest.Scope("pr-7"), cachetest.Scope("pr-8")
	names := map[artifact.Key]string{}
	for i := range 3 {
		names[cachetest.Key(fmt.Sprint(i))] = fmt.Sprint(i)
	}
	for _, test := range []struct {
		name string
		of   index.Candidacy
		want string
	}{
		{"all", index.Candidacy{}, "default/0 default/1 default/2 pr-7/0 pr-7/1 pr-7/2 pr-8/0 pr-8/1 pr-8/2"},
		{"beyond the last one", index.Candidacy{BeyondLast: 1}, "default/0 default/1 pr-7/0 pr-7/1 pr-8/0 pr-8/1"},
		{"beyond the last two", index.Candidacy{BeyondLast: 2}, "default/0 pr-7/0 pr-8/0"},
		{"beyond the last three", index.Candidacy{BeyondLast: 3}, ""},
		{"beyond the last two in the default scope", index.Candidacy{BeyondLast: 2, Scopes: []artifact.Scope{theDefault}}, "default/0"},
		{"beyond the last two in others", index.Candidacy{BeyondLast: 2, NotScopes: []artifact.Scope{theDefault}}, "pr-7/0 pr-8/0"},
		{"beyond the last two in two", index.Candidacy{BeyondLast: 2, Scopes: []artifact.Scope{pr8, theDefault}}, "default/0 pr-8/0"},
		{"beyond the last two in all but one", index.Candidacy{BeyondLast: 2, NotScopes: []artifact.Scope{pr7}}, "default/0 pr-8/0"},
		{"of one", index.Candidacy{Scopes: []artifact.Scope{pr7}}, "pr-7/0 pr-7/1 pr-7/2"},
		{"not used lately", index.Candidacy{UsedBefore: start.Add(12 * time.Hour), NotScopes: []artifact.Scope{theDefault}}, "pr-7/0 pr-7/1"},
		{"without some", index.Candidacy{Without: []index.Candidacy{
			{UsedBefore: start.Add(12 * time.Hour), Scopes: []artifact.Scope{theDefault, pr7}},
			{BeyondLast: 1, Scopes: []artifact.Scope{pr8}, Without: []index.Candidacy{{UsedBefore: start.Add(21 * time.Hour)}}},
		}}, "pr-7/2 pr-8/0 pr-8/2"},
	} {
		var got []string
		for e, err := range r.Candidates(t.Context(), test.of) {
			if err != nil {
				t.Fatal(test.name, err)
			}
			got = append(got, e.Scope.String()+"/"+names[e.Key])
		}
		if got := strings.Join(got, " "); got != test.want {
			t.Errorf("%s: got %s, want %s", test.name, got, test.want)
		}
	}
}

// TestReconcileScopes has scopes that the index does not know, and knows others that there are not, one of them with
// more artifacts than are compared at once.
func TestReconcileScopes(t *testing.T) {
	r := open(t, t.TempDir())
	const many = 10_500
	d := directoryOf()
	for i := range many {
		s := in("many", stored(fmt.Sprint(i), "p", "t", 5, start))
		d.set(s)
		r.Found(s)
		if i%500 == 0 {
			r.flush(t)
		}
	}
	for _, scope := range []string{"default", "pr-7", "pr-8", "many"} {
		same, changed, gone := stored("same", "p", "t", 5, start), stored("changed", "p", "t", 5, start), stored("gone", "p", "t", 5, start)
		for _, s := range []cache.Stored{same, changed, gone} {
			r.Stored(in(scope, s))
		}
		changed.Size = 6
		for _, s := range []cache.Stored{same, changed, stored("added", "p", "t", 5, start)} {
			d.set(in(scope, s))
		}
	}
	r.Stored(in("vanished", stored("a", "p", "t", 5, start)))
	d.set(in("new", stored("a", "p", "t", 5, start)))
	r.flush(t)
	steps, whole := 0, 0
	d.walking = func(outer string) {
		if outer == "" {
			whole++
		}
	}
	n, err := r.Reconcile(t.Context(), d, func(done, of int) {
		if steps++; done != steps || of != 261 {
			t.Errorf("step %d is %d of %d", steps, done, of)
		}
	})
	if err != nil || n != 4*3+2 || steps != 261 || !r.Complete() {
		t.Errorf("Reconcile returned %d, %v after %d steps; the index is complete: %t", n, err, steps, r.Complete())
	}
	if whole != 4 { // all but those with many
		t.Errorf("%d scopes were compared as a whole", whole)
	}
	r.agrees(t, d)
	if n, err := r.Reconcile(t.Context(), d, nil); err != nil || n != 0 {
		t.Errorf("once more, Reconcile returned %d, %v", n, err)
	}
}

// TestMissesOfScopes counts a miss for the task whose artifact is uploaded to the scope of who missed it, and has all
// scopes looked at that it was looked for in.
func TestMissesOfScopes(t *testing.T) {
	r := open(t, t.TempDir())
	pr7 := cachetest.Scope("pr-7")
	a := stored("a", "p", "missed", 5, start)
	r.Missed(a.Key, []artifact.Scope{pr7, artifact.DefaultScope})
	r.Missed(a.Key, []artifact.Scope{pr7, artifact.DefaultScope})
	other := in("pr-8", stored("a", "p", "other", 5, start))
	r.Stored(other)
	r.Stored(in("pr-7", a))
	r.flush(t)
	stats := r.stats(t)
	if stats.Usage.Misses != 2 {
		t.Errorf("counted %+v", stats.Usage)
	}
	for _, task := range stats.Tasks {
		if want := map[string]int64{"missed": 2, "other": 0}[task.TaskName]; task.Usage.Misses != want {
			t.Errorf("of %s %d misses are counted, want %d", task.TaskName, task.Usage.Misses, want)
		}
	}
}

// TestMigrateToScopes opens an index from before there were scopes.
func TestMigrateToScopes(t *testing.T) {
	r := open(t, t.TempDir())
	ours := stored("a", "p", "t", 5, start)
	r.Stored(ours)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(r.dir, index.FileName)
	execute(t, path, `ALTER TABLE state DROP COLUMN agreed; ALTER TABLE state DROP COLUMN differed;
		DROP TABLE scopes; DROP TRIGGER scoped_inserted; DROP TRIGGER scoped_deleted; DROP TRIGGER scoped_updated; PRAGMA user_version = 1`)
	r = open(t, r.dir)
	theirs := in("pr-7", ours)
	r.Stored(theirs)
	if got := r.scopeSums(t); got != "default: 1 of 5 on 8192, pr-7: 1 of 5 on 8192" {
		t.Errorf("there is %s", got)
	}
}
