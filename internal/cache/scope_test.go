package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

var pr7, pr8 = cachetest.Scope("pr-7"), cachetest.Scope("pr-8")

// in returns the rig as somebody sees it who writes to a scope and reads from others, too.
func (r rig) in(own artifact.Scope, others ...artifact.Scope) rig {
	r.Cache = r.In(own, others...)
	return r
}

// found returns what is read under key, and of which scope, by all ways of asking, or their error.
func (r rig) found(t *testing.T) (string, artifact.Scope, error) {
	t.Helper()
	file, info, err := r.Get(t.Context(), key)
	stat, statErr := r.Stat(t.Context(), key)
	files, filesErr := r.Files(t.Context(), key)
	missing, missErr := r.Missing(t.Context(), []artifact.Key{key})
	if statErr != err || filesErr != err || stat != info || missErr != nil || (len(missing) == 0) != (err == nil) {
		t.Errorf("Get returned %v, %v; Stat %v, %v; Files %v, %v; and Missing %v, %v", info, err, stat, statErr, files, filesErr, missing, missErr)
	}
	if err != nil {
		return "", artifact.Scope{}, err
	}
	defer file.Close()
	content, err := io.ReadAll(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(content) > 0 && files[0].Size != info.UncompressedSize {
		t.Errorf("Files returned %v of %v", files, info)
	}
	return string(content), info.Scope, nil
}

// of returns an artifact for key that differs from those of other names.
func of(name string) []byte { return cachetest.Sound(key, map[string]string{"stdout.txt": name}) }

// TestPoisoning has a pull request upload an artifact under the key that the main branch uses next.
func TestPoisoning(t *testing.T) {
	onBoth(t, func(t *testing.T, r rig) {
		main, evil, other := r.in(artifact.DefaultScope), r.in(pr7, artifact.DefaultScope), r.in(pr8, artifact.DefaultScope)
		evil.put(t, of("poison"))
		for who, r := range map[string]rig{"main": main, "another pull request": other} {
			if _, _, err := r.found(t); err != cache.ErrNotFound {
				t.Errorf("%s finds %v", who, err)
			}
		}
		main.put(t, of("main"))
		for who, test := range map[string]struct {
			rig
			content []byte
			scope   artifact.Scope
		}{
			"main":                 {main, of("main"), artifact.DefaultScope},
			"another pull request": {other, of("main"), artifact.DefaultScope},
			"the pull request":     {evil, of("poison"), pr7},
		} {
			if content, scope, err := test.found(t); content != string(test.content) || scope != test.scope || err != nil {
				t.Errorf("%s finds %d bytes in %s, %v", who, len(content), scope, err)
			}
		}

		// Each scope has its first write.
		for who, r := range map[string]rig{"main": main, "the pull request": evil} {
			if _, err := r.Put(t.Context(), key, cache.UnknownSize, unread{t}); err != cache.ErrExists {
				t.Errorf("another Put of %s returned %v", who, err)
			}
		}
		other.put(t, of("other"))
		if content, scope, err := other.found(t); content != string(of("other")) || scope != pr8 || err != nil {
			t.Errorf("another pull request finds %d bytes in %s, %v", len(content), scope, err)
		}

		// What is removed, is from the own scope only.
		if err := other.Delete(t.Context(), key); err != nil {
			t.Error(err)
		}
		if err := other.Delete(t.Context(), key); err != cache.ErrNotFound {
			t.Errorf("Delete of what only main has returned %v", err)
		}
		if err := other.Pin(t.Context(), key, true); err != cache.ErrNotFound {
			t.Errorf("Pin of what only main has returned %v", err)
		}
		if content, scope, err := other.found(t); content != string(of("main")) || scope != artifact.DefaultScope || err != nil {
			t.Errorf("then another pull request finds %d bytes in %s, %v", len(content), scope, err)
		}
	})
}

// TestPutAsksItsScopeOnly proves that an upload has nothing to do with what other scopes have.
func TestPutAsksItsScopeOnly(t *testing.T) {
	r := newMemory()
	r.put(t, of("main"))
	asked := &askedStore{Memory: r.memory, asked: map[artifact.Scope]int{}}
	c := cache.New(asked, artifact.NewVerifier(artifact.DefaultLimits), cache.Config{MaxSize: maxSize}).In(pr7, artifact.DefaultScope, pr8)
	content := of("pull request")
	if _, err := c.Put(t.Context(), key, int64(len(content)), bytes.NewReader(content)); err != nil {
		t.Error(err)
	}
	if _, err := c.Put(t.Context(), key, int64(len(content)), unread{t}); err != cache.ErrExists {
		t.Errorf("the second Put returned %v", err)
	}
	if fmt.Sprint(asked.asked) != fmt.Sprint(map[artifact.Scope]int{pr7: 1}) {
		t.Errorf("stores of %v were asked for", asked.asked)
	}
	if asked.base > 0 {
		t.Errorf("the default scope was asked %d times", asked.base)
	}
}

// askedStore counts for which scopes it is asked, other than to be read from, and how often it is asked itself.
type askedStore struct {
	*cachetest.Memory
	asked map[artifact.Scope]int
	base  int
}

func (s *askedStore) In(scope artifact.Scope) cache.Store {
	if scope == pr8 {
		return nil // which can't be asked anything
	}
	s.asked[scope]++
	return s.Memory.In(scope)
}

func (s *askedStore) Stat(ctx context.Context, key artifact.Key) (artifact.Info, error) {
	s.base++
	return s.Memory.Stat(ctx, key)
}

func (s *askedStore) Open(ctx context.Context, key artifact.Key) (io.ReadSeekCloser, artifact.Info, error) {
	s.base++
	return s.Memory.Open(ctx, key)
}

func (s *askedStore) Create(ctx context.Context, key artifact.Key, size int64) (cache.Upload, error) {
	s.base++
	return s.Memory.Create(ctx, key, size)
}

// TestReadOrder reads from several scopes, in their order, and each once.
func TestReadOrder(t *testing.T) {
	onBoth(t, func(t *testing.T, r rig) {
		scopes := []artifact.Scope{artifact.DefaultScope, pr7, pr8}
		for i := range scopes {
			for _, scope := range scopes {
				r.in(scope).Delete(t.Context(), key)
			}
			for _, scope := range scopes[i:] {
				r.in(scope).put(t, of(scope.String()))
			}
			if content, scope, err := r.in(scopes[0], scopes[1], scopes[0], scopes[2], scopes[1]).found(t); content != string(of(scopes[i].String())) || scope != scopes[i] || err != nil {
				t.Errorf("with %s found %d bytes in %s, %v", scopes[i:], len(content), scope, err)
			}
		}
	})
}

// TestDamagedInOneScope reads on in the next scope where what is in the first is damaged.
func TestDamagedInOneScope(t *testing.T) {
	r := newMemory()
	reader := r.in(pr7, artifact.DefaultScope)
	reader.put(t, of("pull request"))
	r.put(t, of("main"))
	r.memory.In(pr7).(*cachetest.Memory).Damage(key, of("damaged"))
	files, err := reader.Files(t.Context(), key)
	if err != nil || len(files) != 1 || files[0].Size != int64(len("main")) {
		t.Errorf("Files returned %v, %v", files, err)
	}
	if reasons := r.memory.Quarantined(); len(reasons) != 1 {
		t.Errorf("quarantined for %v", reasons)
	}
	if content, scope, err := reader.found(t); content != string(of("main")) || scope != artifact.DefaultScope || err != nil {
		t.Errorf("found %d bytes in %s, %v", len(content), scope, err)
	}

	// Trouble in the store is no miss, so nobody reads on.
	r.memory.Fail(cachetest.Faults{Open: errDisk, Stat: errDisk})
	if _, _, err := reader.Get(t.Context(), key); err != errDisk {
		t.Errorf("Get returned %v, want %v", err, errDisk)
	}
}

// listener is an observer that writes down what it is told by a Cache.
type listener struct {
	cache.Observer
	mu     sync.Mutex
	events []string
}

func (l *listener) note(what string, name any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, strings.ReplaceAll(fmt.Sprint(what, " ", name), key.String(), "KEY"))
}

func (l *listener) Hit(name artifact.Name)  { l.note("hit", name) }
func (l *listener) Used(name artifact.Name) { l.note("used", name) }
func (l *listener) Missed(key artifact.Key, scopes []artifact.Scope) {
	l.note("missed", fmt.Sprint(key, " in ", scopes))
}

func TestObserverOfScopes(t *testing.T) {
	l := &listener{}
	memory := new(cachetest.Memory)
	c := cache.New(memory, artifact.NewVerifier(artifact.DefaultLimits), cache.Config{MaxSize: maxSize, Observer: l})
	reader := c.In(pr7, artifact.DefaultScope)
	get := func(c *cache.Cache) {
		if file, _, err := c.Get(t.Context(), key); err == nil {
			file.Close()
		}
	}
	put := func(c *cache.Cache) {
		if _, err := c.Put(t.Context(), key, cache.UnknownSize, bytes.NewReader(of("x"))); err != nil {
			t.Error(err)
		}
	}
	get(reader)
	put(c)
	get(reader)
	reader.Stat(t.Context(), key)
	put(reader)
	get(reader)
	reader.Stat(t.Context(), key)
	reader.Missing(t.Context(), []artifact.Key{key})
	if _, err := c.Promote(t.Context(), pr7, pr8, key); err != nil {
		t.Error(err)
	}
	c.Promote(t.Context(), pr7, pr8, key)
	want := []string{"missed KEY in [pr-7 default]", "hit KEY", "used KEY", "hit pr-7/KEY", "used pr-7/KEY", "used pr-7/KEY", "used pr-8/KEY"}
	if !slices.Equal(l.events, want) {
		t.Errorf("told %q, want %q", l.events, want)
	}
}

func TestPromote(t *testing.T) {
	onBoth(t, func(t *testing.T, r rig) {
		if _, err := r.Promote(t.Context(), pr7, artifact.DefaultScope, key); err != cache.ErrNotFound {
			t.Errorf("Promote of a miss returned %v", err)
		}
		there := r.in(pr7).put(t, of("built"))
		for _, view := range []rig{r, r.in(pr8, pr7)} { // whatever scopes it is of
			info, err := view.Promote(t.Context(), pr7, artifact.DefaultScope, key)
			if err != nil || info.Scope != artifact.DefaultScope || info.Hash != there.Hash || info.Manifest != there.Manifest {
				t.Errorf("Promote returned %+v, %v of %+v", info, err, there)
			}
			if content, scope, err := r.found(t); content != string(of("built")) || scope != artifact.DefaultScope || err != nil {
				t.Errorf("then found %d bytes in %s, %v", len(content), scope, err)
			}
			if _, err := view.Promote(t.Context(), pr7, artifact.DefaultScope, key); err != cache.ErrExists {
				t.Errorf("again, Promote returned %v", err)
			}
			if err := r.in(artifact.DefaultScope).Delete(t.Context(), key); err != nil {
				t.Error(err)
			}
		}
		if content, scope, err := r.in(pr7).found(t); content != string(of("built")) || scope != pr7 || err != nil {
			t.Errorf("where it came from there are %d bytes in %s, %v", len(content), scope, err)
		}
	})
	r := newMemory()
	r.memory.Fail(cachetest.Faults{Promote: errDisk})
	if _, err := r.Promote(t.Context(), pr7, pr8, key); !errors.Is(err, errDisk) {
		t.Errorf("Promote returned %v, want %v", err, errDisk)
	}
}
