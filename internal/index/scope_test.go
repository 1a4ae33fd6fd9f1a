package index_test

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
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

// downgrades bring a database to the schema of a version from that of the one behind it.
var downgrades = []string{
	3: "DROP TABLE scope_tasks; DROP TRIGGER scope_task_inserted; DROP TRIGGER scope_task_deleted; DROP TRIGGER scope_task_updated",
	2: "ALTER TABLE state DROP COLUMN agreed; ALTER TABLE state DROP COLUMN differed",
	1: "DROP TABLE scopes; DROP TRIGGER scoped_inserted; DROP TRIGGER scoped_deleted; DROP TRIGGER scoped_updated",
}

// TestMigrate opens indexes as each version before made them.
func TestMigrate(t *testing.T) {
	for version := 1; version < len(downgrades); version++ {
		r := open(t, t.TempDir())
		ours := stored("a", "p", "t", 5, start)
		r.Stored(ours)
		if version > 1 { // there were no scopes before
			r.Stored(in("pr-6", stored("b", "p", "u", 6, start)))
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(r.dir, index.FileName)
		for to := len(downgrades) - 1; to >= version; to-- {
			execute(t, path, downgrades[to])
		}
		execute(t, path, fmt.Sprintf("PRAGMA user_version = %d", version))
		r = open(t, r.dir)
		r.Stored(in("pr-7", ours))
		r.flush(t)
		want := map[bool]string{true: "default: 1 of 5 on 8192, pr-7: 1 of 5 on 8192", false: "default: 1 of 5 on 8192, pr-6: 1 of 6 on 8192, pr-7: 1 of 5 on 8192"}[version == 1]
		if got := r.scopeSums(t); got != want {
			t.Errorf("from version %d there is %s, want %s", version, got, want)
		}
		r.scopeStatsAgree(t, "default", "pr-6", "pr-7")
	}
}

// scopeStatsAgree holds the statistics of each set of some scopes to what is listed of them.
func (r rig) scopeStatsAgree(t *testing.T, names ...string) {
	t.Helper()
	all := r.all(t)
	for set := range 1 << len(names) {
		scopes := []artifact.Scope{}
		for i, name := range names {
			if set>>i&1 == 1 {
				scopes = append(scopes, cachetest.Scope(name))
			}
		}
		want := map[[2]string]index.Sums{}
		for name, e := range all {
			if slices.Contains(scopes, name.Scope) {
				for _, task := range [][2]string{{e.PackageName, e.TaskName}, {}} { // the latter is for all
					s := want[task]
					want[task] = index.Sums{Artifacts: s.Artifacts + 1, Size: s.Size + e.Size, UncompressedSize: s.UncompressedSize + e.UncompressedSize, DiskSize: s.DiskSize + e.DiskSize}
				}
			}
		}
		stats, err := r.ScopeStats(t.Context(), scopes, 100)
		if err != nil {
			t.Fatal(err)
		}
		got := map[[2]string]index.Sums{}
		for _, task := range stats.Tasks {
			got[[2]string{task.PackageName, task.TaskName}] = task.Sums
			if (task.Usage != index.Usage{}) {
				t.Errorf("of %v it is told what happened: %+v", scopes, task)
			}
		}
		if len(scopes) > 0 && stats.Total.Artifacts > 0 {
			got[[2]string{}] = stats.Total
		}
		if !maps.Equal(got, want) || stats.TaskCount != int64(len(stats.Tasks)) || (stats.Usage != index.Usage{}) || (stats.SinceStart != index.Usage{}) {
			t.Errorf("of %v there is %+v, want %+v", scopes, stats, want)
		}
		if !slices.IsSortedFunc(stats.Tasks, func(a, b index.TaskStats) int { return cmp.Compare(b.DiskSize, a.DiskSize) }) {
			t.Errorf("of %v not the largest tasks come first: %+v", scopes, stats.Tasks)
		}
	}
}

// TestScopeStats stores, changes and removes artifacts in scopes at random.
func TestScopeStats(t *testing.T) {
	r := open(t, t.TempDir())
	random := rand.New(rand.NewPCG(1, 2))
	scopes := []string{"default", "pr-7", "pr-8"}
	for range 20 {
		for range 40 {
			scope, task := scopes[random.IntN(len(scopes))], fmt.Sprint(random.IntN(4))
			s := in(scope, stored(fmt.Sprint(random.IntN(9)), "p", task, int64(random.IntN(20_000)), start))
			switch random.IntN(4) {
			case 0:
				r.Removed(s.Name(), s.DiskSize)
			case 1:
				r.Found(s)
			default:
				r.Stored(s)
			}
			r.Hit(s.Name())
		}
		r.flush(t)
		r.scopeStatsAgree(t, scopes...)
	}
	full, err := r.ScopeStats(t.Context(), []artifact.Scope{artifact.DefaultScope}, 100)
	if err != nil {
		t.Fatal(err)
	}
	limited, err := r.ScopeStats(t.Context(), []artifact.Scope{artifact.DefaultScope}, 1)
	if err != nil || len(full.Tasks) < 2 || len(limited.Tasks) != 1 || limited.Tasks[0] != full.Tasks[0] || limited.TaskCount != full.TaskCount || limited.Total != full.Total {
		t.Errorf("limited to one task there is %+v, %v, and else %+v", limited, err, full)
	}
}
