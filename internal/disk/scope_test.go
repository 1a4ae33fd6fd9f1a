package disk_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
)

var pr8 = cachetest.Scope("pr-8")

const (
	scopesName = ".polykit-cache/scopes"
	pr7Name    = scopesName + "/pr-7"
)

// in returns the rig in a scope.
func (r rig) in(scope artifact.Scope) rig {
	r.Cache, r.store = r.In(scope), r.store.In(scope).(*disk.Store)
	return r
}

// scopes returns the scopes that have a directory.
func (r rig) scopes(t *testing.T) string {
	t.Helper()
	scopes, err := r.store.Scopes()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(scopes)
}

// TestScopeLayout looks where the artifacts of a scope are, what the observer is told of them, and what is left of the
// scope when they are gone.
func TestScopeLayout(t *testing.T) {
	r, w := observed(t, t.TempDir(), disk.Limits{})
	r.put(t, key, content)
	memo := read(t, r.path(jsonName))
	pr := r.in(pr7)
	other := keyOf("01ff" + digits[4:])
	info := pr.put(t, key, content)
	pr.put(t, other, cachetest.Random(other, 100))
	for _, name := range []string{zstName, jsonName} {
		if !bytes.Equal(read(t, r.path(pr7Name+"/"+name))[:40], read(t, r.path(name))[:40]) {
			t.Errorf("the %s is not where it belongs", name)
		}
	}
	if got := r.scopes(t); got != "[default pr-7]" {
		t.Errorf("there are the scopes %s", got)
	}
	if looked, found, err := r.store.Look(key.In(pr7)); !found || err != nil || looked.Info != info {
		t.Errorf("Look returns %+v, %t, %v, want %+v", looked, found, err, info)
	}
	if err := pr.store.Pin(t.Context(), key, true); err != nil {
		t.Fatal(err)
	}
	if looked, _, err := r.store.Look(key.In(artifact.DefaultScope)); looked.Pinned || err != nil {
		t.Errorf("a pin in a scope is one in another: %+v, %v", looked, err)
	}

	// A restart goes by the memos.
	r.store.Close()
	r = open(t, r.dir)
	r.store.Manage(w, disk.Limits{})
	pr = r.in(pr7)
	pr.serves(t, key, content)
	if n := r.log.inspections(); n != 0 {
		t.Errorf("%d artifacts had to be verified again", n)
	}

	for _, key := range []artifact.Key{other, key} {
		if _, err := pr.store.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if exists(t, r.path(pr7Name)) || r.scopes(t) != "[default]" {
		t.Errorf("of an empty scope is left %v", tree(t, r.path(scopesName)))
	}
	r.serves(t, key, content)
	if !bytes.Equal(read(t, r.path(jsonName)), memo) {
		t.Error("the memo of another scope is not what it was")
	}
	want := "stored 0123, stored pr-7/0123, stored pr-7/01ff, pinned true pr-7/0123, removed pr-7/01ff, removed pr-7/0123"
	if got := w.since(); got != want {
		t.Errorf("told %q, want %q", got, want)
	}
	pr.lacks(t, key)
}

// TestScopeNames has things among the scopes that are none.
func TestScopeNames(t *testing.T) {
	r := open(t, t.TempDir())
	r.in(pr8).put(t, key, content)
	for _, name := range []string{"default", "UPPER", ".hidden", "with space", "trailing.", strings.Repeat("x", 64)} {
		mkdir(t, r.path(scopesName+"/"+name))
	}
	write(t, r.path(scopesName+"/file"), nil)
	mkdir(t, r.path(pr7Name))
	if got := r.scopes(t); got != "[default pr-7 pr-8]" {
		t.Errorf("there are the scopes %s", got)
	}
	r.lacks(t, key)
	peeked, err := disk.Peek(disk.Config{Dir: r.dir})
	if err != nil {
		t.Fatal(err)
	}
	if scopes, err := peeked.Scopes(); err != nil || len(scopes) != 3 {
		t.Errorf("Peek sees %v, %v", scopes, err)
	}
	if _, found, err := peeked.Look(key.In(pr8)); !found || err != nil {
		t.Errorf("Peek sees the artifact: %t, %v", found, err)
	}
}

// TestHotScopes keeps artifacts of one key in memory.
func TestHotScopes(t *testing.T) {
	r := openWith(t, disk.Config{Dir: t.TempDir(), HotSize: 1 << 20})
	for _, scope := range []artifact.Scope{artifact.DefaultScope, pr7, pr8} {
		r.in(scope).put(t, key, cachetest.Sound(key, map[string]string{"stdout.txt": scope.String()}))
	}
	for range 3 {
		for _, scope := range []artifact.Scope{artifact.DefaultScope, pr7, pr8} {
			r.in(scope).serves(t, key, cachetest.Sound(key, map[string]string{"stdout.txt": scope.String()}))
		}
	}
	if n, _ := r.store.Hot(); n != 3 {
		t.Errorf("%d artifacts are kept, want 3", n)
	}
}

func TestQuarantineOfScope(t *testing.T) {
	r, w := observed(t, t.TempDir(), disk.Limits{})
	pr := r.in(pr7)
	r.put(t, key, content)
	pr.put(t, key, content)
	w.since()
	write(t, r.path(pr7Name+"/"+zstName), []byte("damaged"))
	if _, _, err := pr.get(t, key); err != cache.ErrNotFound {
		t.Errorf("Get returned %v", err)
	}
	if got := w.since(); got != "removed pr-7/0123" {
		t.Errorf("told %q", got)
	}
	if exists(t, r.path(pr7Name)) {
		t.Errorf("left is %v", tree(t, r.path(scopesName)))
	}
	found, err := r.store.Quarantined()
	if err != nil || len(found) != 1 || found[0].Scope != pr7 || found[0].Key != key || !strings.HasPrefix(found[0].Name, "pr-7@"+digits+"-") ||
		found[0].Reason == "" || found[0].Size != int64(len("damaged")) {
		t.Errorf("in quarantine is %+v, %v", found, err)
	}
	r.serves(t, key, content)
	pr.lacks(t, key)
	info, err := r.Stat(t.Context(), key)
	if err := errors.Join(err, r.store.Quarantine(t.Context(), info, errors.New("damaged"))); err != nil {
		t.Fatal(err)
	}
	scopes := map[artifact.Scope]int{}
	found, _ = r.store.Quarantined()
	for _, q := range found {
		scopes[q.Scope]++
	}
	if scopes[pr7] != 1 || scopes[artifact.DefaultScope] != 1 {
		t.Errorf("in quarantine is %+v", found)
	}
	if _, err := r.store.EmptyQuarantine(time.Now().Add(time.Hour), 0); err != nil || len(list(t, r.path(".polykit-cache/quarantine"))) != 0 {
		t.Errorf("emptied, it has %q, %v", list(t, r.path(".polykit-cache/quarantine")), err)
	}
}

// TestInTheWayOfScope has a file wherever a scope needs a directory.
func TestInTheWayOfScope(t *testing.T) {
	for _, name := range []string{".polykit-cache", scopesName, pr7Name, pr7Name + "/01", pr7Name + "/01/23"} {
		for what, put := range map[string]func(t *testing.T, path string){
			"a file":         func(t *testing.T, path string) { write(t, path, []byte("in the way")) },
			"a broken link":  func(t *testing.T, path string) { mkdir(t, filepath.Dir(path)); os.Symlink("nowhere", path) },
			"an empty place": func(t *testing.T, path string) { mkdir(t, filepath.Dir(path)) },
		} {
			t.Run(what+" at "+name, func(t *testing.T) {
				r := open(t, t.TempDir())
				put(t, r.path(name))
				errs := make([]error, 8)
				pr := r.in(pr7)
				cachetest.Together(len(errs), func(i int) {
					key := keyOf(fmt.Sprintf("%02x", i%2) + digits[2:])
					if i%4 < 2 {
						key = keyOf(digits[:60] + fmt.Sprintf("%04x", i))
					}
					content := cachetest.Random(key, 100)
					_, errs[i] = pr.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content))
				})
				if err := errors.Join(slices.DeleteFunc(errs, func(err error) bool { return err == cache.ErrExists })...); err != nil {
					t.Error(err)
				}
				for i := range errs {
					if _, _, err := pr.get(t, keyOf(digits[:60]+fmt.Sprintf("%04x", i))); i%4 < 2 && err != nil {
						t.Error(err)
					}
				}
				pr.lacks(t, keyOf("0123ffff"+digits[8:]))
			})
		}
	}
}

// TestScopeRemovedBehindItsBack removes directories that uploads rely on.
func TestScopeRemovedBehindItsBack(t *testing.T) {
	r := open(t, t.TempDir())
	pr := r.in(pr7)
	for _, name := range []string{pr7Name + "/01/23", pr7Name + "/01", pr7Name, scopesName, ".polykit-cache"} {
		pr.put(t, key, content)
		removeAll(t, r.path(name))
		pr.lacks(t, key)
		if _, err := pr.store.Remove(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
}

// TestVerifyScopes looks whether Verify and the scrub look at all scopes.
func TestVerifyScopes(t *testing.T) {
	r := open(t, t.TempDir())
	pr, other := r.in(pr7), keyOf("ffff"+digits[4:])
	r.put(t, key, content)
	pr.put(t, key, content)
	pr.put(t, other, cachetest.Random(other, 100))
	r.in(pr8).put(t, key, content)
	change(t, r.path(pr7Name+"/"+zstName), flipBit)
	removeAll(t, r.path(scopesName+"/pr-8/"+jsonName))
	write(t, r.path(pr7Name+"/notes.txt"), nil)
	write(t, r.path(pr7Name+"/tmp/file"), nil)
	write(t, r.path(pr7Name+"/01/23/"+other.String()+".zst"), nil)
	r.store.Close()

	states := func(config disk.VerifyConfig) string {
		t.Helper()
		config.Dir = r.dir
		var all []string
		for path, f := range verify(t, config) {
			path = strings.ReplaceAll(strings.ReplaceAll(path, digits, "KEY"), other.String(), "OTHER")
			all = append(all, fmt.Sprint(path, " ", f.Scope, " ", f.State, " ", f.Repaired))
		}
		slices.Sort(all)
		return strings.Join(all, "\n")
	}
	want := `.polykit-cache/scopes/pr-7/01/23/KEY.zst pr-7 damaged %[1]t
.polykit-cache/scopes/pr-7/01/23/OTHER.zst pr-7 foreign false
.polykit-cache/scopes/pr-7/ff/ff/OTHER.zst pr-7 sound false
.polykit-cache/scopes/pr-7/notes.txt pr-7 foreign false
.polykit-cache/scopes/pr-7/tmp pr-7 foreign false
.polykit-cache/scopes/pr-8/01/23/KEY.zst pr-8 memo %[1]t
01/23/KEY.zst default sound false`
	if got := states(disk.VerifyConfig{}); got != fmt.Sprintf(want, false) {
		t.Errorf("found\n%s", got)
	}
	if got := states(disk.VerifyConfig{Keys: []artifact.Key{key, keyOf("eeee" + digits[4:])}}); got != `.polykit-cache/scopes/pr-7/01/23/KEY.zst pr-7 damaged false
.polykit-cache/scopes/pr-8/01/23/KEY.zst pr-8 memo false
01/23/KEY.zst default sound false
ee/ee/eeee`+digits[4:]+`.zst default missing false` {
		t.Errorf("of some keys found\n%s", got)
	}
	if got := states(disk.VerifyConfig{Repair: true}); got != fmt.Sprintf(want, true) {
		t.Errorf("repaired\n%s", got)
	}
	r = open(t, r.dir)
	r.serves(t, key, content)
	r.in(pr8).serves(t, key, content)
	r.in(pr7).lacks(t, key)
}

// TestScrubScopes damages artifacts in scopes. Each is found when its part of the interval has passed, and after a
// restart no scope is left out.
func TestScrubScopes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, t.TempDir())
		quarter, behind, half := keyAt(0.25), keyOf("40ff"+digits[4:]), keyAt(0.5)
		scopes := []artifact.Scope{artifact.DefaultScope, pr7, pr8}
		for _, scope := range scopes {
			for _, key := range []artifact.Key{quarter, half} {
				r.in(scope).put(t, key, cachetest.Random(key, 100))
			}
		}
		r.in(pr7).put(t, behind, cachetest.Random(behind, 100)) // what others have before it is not to be passed over for it
		path := func(scope artifact.Scope, key artifact.Key) string {
			return filepath.Join(r.dir, ".polykit-cache/scopes", scope.String(), key.String()[:2], key.String()[2:4], key.String()+".zst")
		}
		change(t, path(pr7, quarter), flipBit)
		change(t, path(pr8, quarter), flipBit)
		change(t, path(pr8, half), flipBit)
		// What a crash leaves, and what somebody else does.
		mkdir(t, r.path(scopesName+"/empty"))
		mkdir(t, r.path(scopesName+"/outer/aa"))
		mkdir(t, r.path(scopesName+"/inner/aa/bb"))
		write(t, r.path(scopesName+"/kept/notes.txt"), nil)

		stop := r.scrub(t, disk.ScrubConfig{Interval: month, Rate: 1 << 30})
		found := func(when string, want ...string) {
			t.Helper()
			quarantined, err := r.store.Quarantined()
			var got []string
			for _, q := range quarantined {
				got = append(got, q.Scope.String()+" "+q.Key.String()[:4])
			}
			slices.Sort(got)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%s in quarantine: %q, %v, want %q", when, got, err, want)
			}
		}
		found("at first")
		time.Sleep(month / 4)
		synctest.Wait()
		found("after a quarter", "pr-7 4000", "pr-8 4000")
		stop()
		r.store.Close()
		r = open(t, r.dir)
		r.scrub(t, disk.ScrubConfig{Interval: month, Rate: 1 << 30})
		time.Sleep(month / 4)
		synctest.Wait()
		found("after a half", "pr-7 4000", "pr-8 4000", "pr-8 8000")
		time.Sleep(month / 2)
		synctest.Wait()
		if got := list(t, r.path(scopesName)); !slices.Equal(got, []string{"kept/", "pr-7/"}) {
			t.Errorf("after the pass there are %q", got)
		}
		r.in(pr7).serves(t, half, cachetest.Random(half, 100))
		r.in(cachetest.Scope("inner")).lacks(t, keyOf("aabb"+digits[4:]))
	})
}

// TestWalkScope walks through a scope as a whole.
func TestWalkScope(t *testing.T) {
	r := open(t, t.TempDir())
	r.put(t, key, content)
	var want []string
	for i := range 10 {
		key := keyOf(fmt.Sprintf("%02x%02x%060x", i%3, i%5, i))
		r.in(pr7).put(t, key, cachetest.Random(key, 100))
		want = append(want, key.String())
	}
	write(t, r.path(pr7Name+"/00/notes.txt"), nil)
	walk := func(outer string) (got []string) {
		t.Helper()
		if err := r.store.Walk(pr7, outer, func(files []cache.File) error {
			for _, file := range files {
				got = append(got, file.Key.String())
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		return got
	}
	slices.Sort(want)
	if got := walk(""); !slices.Equal(got, want) {
		t.Errorf("Walk visits %q, want %q", got, want)
	}
	if got := walk("01"); !slices.Equal(got, slices.DeleteFunc(want, func(key string) bool { return key[:2] != "01" })) {
		t.Errorf("Walk of a part visits %q", got)
	}
	if err := r.store.Walk(pr8, "", func([]cache.File) error { t.Error("visited what is not there"); return nil }); err != nil {
		t.Error(err)
	}
	stop := errors.New("stop")
	visits := 0
	if err := r.store.Walk(pr7, "", func([]cache.File) error { visits++; return stop }); err != stop || visits != 1 {
		t.Errorf("Walk returned %v after %d visits", err, visits)
	}
}

// TestEvictFromScope evicts from any scope.
func TestEvictFromScope(t *testing.T) {
	r := open(t, t.TempDir())
	info := r.in(pr7).put(t, key, content)
	r.put(t, key, content)
	if _, err := r.store.Evict(t.Context(), key.In(artifact.DefaultScope), info.StoredAt); !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("Evict by the time of another scope's returned %v", err)
	}
	if _, err := r.store.Evict(t.Context(), key.In(pr7), info.StoredAt); err != nil {
		t.Error(err)
	}
	r.serves(t, key, content)
	r.in(pr7).lacks(t, key)
}

// TestMeasureScopes counts the directories of scopes, as they come and go and anew.
func TestMeasureScopes(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{Stored: func() int64 { return 0 }})
	used := func() int64 {
		t.Helper()
		usage, err := r.store.Usage()
		if err != nil {
			t.Fatal(err)
		}
		return usage.Used
	}
	mkdir(t, r.path(scopesName))
	r.store.Measure()
	before := used()
	for i := range 5 {
		key := keyOf(fmt.Sprintf("%02x%02x%060x", i, i, i))
		r.in(cachetest.Scope(fmt.Sprint("pr-", i%2))).put(t, key, cachetest.Random(key, 100))
	}
	directory := lstat(t, r.path(scopesName+"/pr-0/00/00"))
	counted := used() - before
	if want := 12 * disk.BlocksOf(directory); counted != want {
		t.Errorf("12 directories are counted as %d, want %d", counted, want)
	}
	r.store.Close()
	again, _ := observed(t, r.dir, disk.Limits{Stored: func() int64 { return 0 }})
	again.store.Measure()
	r = again
	if measured := used() - before; measured != counted {
		t.Errorf("counted %d bytes, and measured %d", counted, measured)
	}
	for i := range 5 {
		key := keyOf(fmt.Sprintf("%02x%02x%060x", i, i, i))
		if _, err := r.store.In(cachetest.Scope(fmt.Sprint("pr-", i%2))).Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if left := used() - before; left != 0 {
		t.Errorf("of what is gone %d bytes are counted", left)
	}
}

// TestManyScopes uploads to more directories than are remembered to be durable.
func TestManyScopes(t *testing.T) {
	r := openWith(t, disk.Config{Dir: t.TempDir(), Durability: disk.DurabilityNone})
	_, info, err := artifact.NewVerifier(artifact.DefaultLimits).Inspect(t.Context(), bytes.NewReader(content), key)
	if err != nil {
		t.Fatal(err)
	}
	const scopes = 5500 // of 3 directories each
	for i := range scopes + 1 {
		store := r.store.In(cachetest.Scope(fmt.Sprint("pr-", i%scopes)))
		if i == scopes {
			if _, err := store.Remove(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		upload, err := store.Create(t.Context(), key, info.Size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := upload.Write(content); err != nil {
			t.Fatal(err)
		}
		if _, err := upload.Commit(t.Context(), info); err != nil {
			t.Fatal(err)
		}
		upload.Abort()
	}
	if n := r.store.DurableDirs(); n != 16_384 {
		t.Errorf("%d directories are remembered", n)
	}
	if stored, err := r.store.Scopes(); err != nil || len(stored) != scopes+1 {
		t.Errorf("there are %d scopes, %v", len(stored), err)
	}
}

// TestPromotion looks at the files of what is promoted.
func TestPromotion(t *testing.T) {
	dir := t.TempDir()
	r, w := observed(t, dir, disk.Limits{})
	pr := r.in(pr7)
	there := pr.put(t, key, content)
	if err := pr.store.Pin(t.Context(), key, true); err != nil {
		t.Fatal(err)
	}
	w.since()
	here, err := r.Promote(t.Context(), pr7, artifact.DefaultScope, key)
	if err != nil {
		t.Fatal(err)
	}
	if got := w.since(); got != "stored 0123" || w.last[here.Name()].Info != here || w.last[here.Name()].Pinned {
		t.Errorf("told %q, %+v", got, w.last[here.Name()])
	}
	if !os.SameFile(lstat(t, r.path(zstName)), lstat(t, r.path(pr7Name+"/"+zstName))) {
		t.Error("the bytes were copied")
	}
	r.tmpIsEmpty(t)
	r.store.Close()
	r = open(t, dir)
	pr = r.in(pr7)
	for scope, want := range map[rig]artifact.Info{r: here, pr: there} {
		scope.serves(t, key, content)
		if stat, err := scope.Stat(t.Context(), key); err != nil || stat != want {
			t.Errorf("after a restart there is %+v, %v, want %+v", stat, err, want)
		}
	}
	if n := r.log.inspections(); n != 0 {
		t.Errorf("%d artifacts had to be verified again", n)
	}
	if looked, _, _ := r.store.Look(key.In(artifact.DefaultScope)); looked.Pinned {
		t.Error("the pin was promoted as well")
	}

	// What is damaged is so in both, and each finds out by itself.
	change(t, r.path(zstName), flipBit)
	for _, scope := range []rig{r, pr} {
		if _, err := scope.Files(t.Context(), key); err != cache.ErrNotFound {
			t.Errorf("Files of what is damaged returned %v", err)
		}
	}
	r.lacks(t, key)
	pr.lacks(t, key)
}

// TestPromoteUnverified promotes what nobody has looked at yet.
func TestPromoteUnverified(t *testing.T) {
	r := open(t, t.TempDir())
	write(t, r.path(pr7Name+"/"+zstName), content)
	info, err := r.Promote(t.Context(), pr7, artifact.DefaultScope, key)
	if err != nil || info.Manifest != manifestOf(t, content) {
		t.Errorf("Promote returned %+v, %v", info, err)
	}
	r.serves(t, key, content)
	if n := r.log.inspections(); n != 1 {
		t.Errorf("it was verified %d times", n)
	}
	write(t, r.path(scopesName+"/pr-8/"+zstName), content[:500])
	other := cachetest.Scope("other")
	if _, err := r.Promote(t.Context(), pr8, other, key); err != cache.ErrNotFound {
		t.Errorf("Promote of what is cut short returned %v", err)
	}
	if exists(t, r.path(scopesName+"/pr-8")) || exists(t, r.path(scopesName+"/other")) {
		t.Error("there is a scope with nothing in it")
	}
	r.tmpIsEmpty(t)
}

// TestPromoteNoSpace promotes what there is no room for.
func TestPromoteNoSpace(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{})
	r.in(pr7).put(t, key, content)
	r.store.Measure()
	usage, err := r.store.Usage()
	if err != nil {
		t.Fatal(err)
	}
	r.store.Manage(&witness{}, disk.Limits{MaxStorage: usage.Used + int64(len(content))})
	if _, err := r.Promote(t.Context(), pr7, pr8, key); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Promote returned %v, want %v", err, cache.ErrNoSpace)
	}
	if after, err := r.store.Usage(); err != nil || after.Used != usage.Used {
		t.Errorf("%d bytes are used, %v, and were %d", after.Used, err, usage.Used)
	}
	r.tmpIsEmpty(t)
	if exists(t, r.path(scopesName+"/pr-8")) {
		t.Error("there is a scope with nothing in it")
	}
}

// TestPromoteWhileReplaced promotes what is removed and uploaded again all the time, each time another one.
func TestPromoteWhileReplaced(t *testing.T) {
	r := openWith(t, disk.Config{Dir: t.TempDir(), Durability: disk.DurabilityNone})
	pr := r.in(pr7)
	var replacing sync.WaitGroup
	// It is there until somebody is about to promote it, or else hardly any promotion would find it.
	done, begins := make(chan struct{}), make(chan struct{})
	contents := make([][]byte, 10)
	for i := range contents {
		contents[i] = cachetest.Sound(key, map[string]string{"stdout.txt": fmt.Sprint(i)}) // of one size
	}
	replacing.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			content := contents[i%len(contents)]
			if _, err := pr.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content)); err != nil {
				t.Error("Put:", err)
			}
			select {
			case <-begins:
			case <-done:
			}
			if _, err := pr.store.Remove(t.Context(), key); err != nil {
				t.Error("Remove:", err)
			}
		}
	})
	promoted := 0
	for promoted < 500 {
		select {
		case begins <- struct{}{}:
		default: // it is being replaced
		}
		info, err := r.Promote(t.Context(), pr7, artifact.DefaultScope, key)
		if errors.Is(err, cache.ErrNotFound) {
			continue
		}
		if err != nil {
			t.Error("Promote:", err)
			break
		}
		promoted++
		got, now, err := r.get(t, key)
		if err != nil || now.Hash != info.Hash || !slices.ContainsFunc(contents, func(c []byte) bool { return bytes.Equal(c, got) }) {
			t.Errorf("promoted was %+v, and there is %+v, %v", info, now, err)
		}
		if _, err := r.store.Remove(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
	close(done)
	replacing.Wait()
	r.tmpIsEmpty(t)
}

// TestInspectScopes reads artifacts of one key without a memo, sound and not, at the same time: what is found of one
// is nothing to the others.
func TestInspectScopes(t *testing.T) {
	large := cachetest.Random(key, 1<<20)
	for range 20 {
		r := open(t, t.TempDir())
		write(t, r.path(zstName), large)
		write(t, r.path(pr7Name+"/"+zstName), large[:len(large)-1])
		cachetest.Together(8, func(i int) {
			scope, want := artifact.DefaultScope, error(nil)
			if i%2 == 1 {
				scope, want = pr7, cache.ErrNotFound
			}
			if _, err := r.in(scope).Stat(t.Context(), key); err != want {
				t.Errorf("in %s, Stat returned %v, want %v", scope, err, want)
			}
		})
		r.store.Close()
	}
}
