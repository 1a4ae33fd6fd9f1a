package retention_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/retention"
)

// storedIn returns which of some artifacts are stored in some scopes.
func (r rig) storedIn(t *testing.T, scopes []string, names ...string) string {
	t.Helper()
	var found []string
	for _, scope := range scopes {
		for _, name := range names {
			_, err := r.store.In(cachetest.Scope(scope)).Stat(t.Context(), cachetest.Key(name))
			if err == nil {
				found = append(found, scope+"/"+name)
			} else if !errors.Is(err, cache.ErrNotFound) {
				t.Error(err)
			}
		}
	}
	return strings.Join(found, " ")
}

// age makes the index take an artifact for one that was used last some time ago.
func (r rig) age(t *testing.T, name artifact.Name, by time.Duration) {
	t.Helper()
	stored, found, err := r.store.Look(name)
	if err != nil || !found {
		t.Fatal(found, err)
	}
	path := filepath.Join(r.dir, ".polykit-cache/scopes", name.Scope.String(), name.Key.String()[:2], name.Key.String()[2:4], name.Key.String()+".zst")
	if name.Scope == artifact.DefaultScope {
		path = filepath.Join(r.dir, name.Key.String()[:2], name.Key.String()[2:4], name.Key.String()+".zst")
	}
	stored.StoredAt = time.Now().Add(-by)
	if err := os.Chtimes(path, time.Time{}, stored.StoredAt); err != nil {
		t.Fatal(err)
	}
	r.index.Removed(name, 0)
	r.index.Stored(stored)
}

// TestScopePolicies has 3 artifacts of a task in each of several scopes, the older the smaller their number.
func TestScopePolicies(t *testing.T) {
	scopes := []string{"default", "nightly", "pr-7", "pr-8"}
	const hour = time.Hour
	all := "default/0 default/1 default/2 nightly/0 nightly/1 nightly/2 pr-7/0 pr-7/1 pr-7/2 pr-8/0 pr-8/1 pr-8/2"
	without := func(names ...string) string {
		left := all
		for _, name := range names {
			left = strings.Replace(left+" ", name+" ", "", 1)
			left = strings.TrimSuffix(left, " ")
		}
		return left
	}
	for _, test := range []struct {
		name    string
		policy  retention.Policy
		left    string
		removes string
	}{
		{"nothing", retention.Policy{}, all, ""},
		{"the last of a pattern", retention.Policy{Scopes: []retention.ScopePolicy{{Pattern: "pr-*", KeepLast: 1}}},
			without("pr-7/0", "pr-7/1", "pr-8/0", "pr-8/1"), "4 of build for keep-last"},
		{"all but one of a pattern", retention.Policy{Scopes: []retention.ScopePolicy{{Pattern: "pr-*", KeepLast: 1}, {Pattern: "pr-8"}}},
			without("pr-7/0", "pr-7/1"), "2 of build for keep-last"},
		{"the longest pattern", retention.Policy{Scopes: []retention.ScopePolicy{{Pattern: "*", KeepLast: 2}, {Pattern: "pr-*", KeepLast: 1}, {Pattern: "p*"}}},
			without("default/0", "nightly/0", "pr-7/0", "pr-7/1", "pr-8/0", "pr-8/1"), "6 of build for keep-last"},
		{"the stricter one counts", retention.Policy{KeepLast: 2, Scopes: []retention.ScopePolicy{{Pattern: "pr-7", KeepLast: 3}, {Pattern: "pr-8", KeepLast: 1}}},
			without("default/0", "nightly/0", "pr-7/0", "pr-8/0", "pr-8/1"), "5 of build for keep-last"},
		{"the default scope by its name", retention.Policy{Scopes: []retention.ScopePolicy{{Pattern: "default", KeepLast: 1}}},
			without("default/0", "default/1"), "2 of build for keep-last"},
		{"the age in a scope", retention.Policy{Scopes: []retention.ScopePolicy{{Pattern: "pr-*", MaxAge: 90 * time.Minute}}},
			without("pr-7/0", "pr-7/1", "pr-8/0", "pr-8/1"), "4 of build for max-age"},
		{"the age in all, and less in some", retention.Policy{MaxAge: 150 * time.Minute, Scopes: []retention.ScopePolicy{{Pattern: "pr-7", MaxAge: 30 * time.Minute}, {Pattern: "pr-8", MaxAge: 900 * time.Hour}}},
			without("default/0", "nightly/0", "pr-7/0", "pr-7/1", "pr-7/2", "pr-8/0"), "6 of build for max-age"},
		{"both", retention.Policy{Scopes: []retention.ScopePolicy{{Pattern: "pr-*", MaxAge: 150 * time.Minute, KeepLast: 1}}},
			without("pr-7/0", "pr-7/1", "pr-8/0", "pr-8/1"), "2 of build for keep-last, 2 of build for max-age"},
		{"all of a scope", retention.Policy{Scopes: []retention.ScopePolicy{{Pattern: "pr-7", MaxAge: time.Minute}, {Pattern: "pr-9*", MaxAge: 1}, {Pattern: "r-7*", MaxAge: 1}}},
			without("pr-7/0", "pr-7/1", "pr-7/2"), "3 of build for max-age"},
		{"and then what does not fit", retention.Policy{MaxStorage: 1, Scopes: []retention.ScopePolicy{{Pattern: "pr-*", MaxAge: 150 * time.Minute, KeepLast: 1}}},
			"", "2 of build for keep-last, 2 of build for max-age, 8 of build for max-storage"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, retention.Policy{})
			for _, scope := range scopes {
				for i := range 3 {
					name := fmt.Sprint(i)
					in := cachetest.Scope(scope)
					if err := put(t.Context(), r.store.In(in), name, "build", 100); err != nil {
						t.Fatal(err)
					}
					r.age(t, cachetest.Key(name).In(in), time.Duration(3-i)*hour)
				}
			}
			removes := func(removals []retention.Removal, err error) {
				t.Helper()
				got := strings.Split(sums(removals), ", ")
				for _, want := range strings.Split(test.removes, ", ") {
					found := false
					for i := range got {
						if found = got[i] == want; found {
							got = append(got[:i], got[i+1:]...)
							break
						}
					}
					if !found {
						t.Errorf("%q is not among the removals %s", want, sums(removals))
					}
				}
				if len(got) > 0 || err != nil {
					t.Errorf("removes %s, %v, want %s", sums(removals), err, test.removes)
				}
			}
			removes(r.Plan(t.Context(), test.policy))
			if got := r.storedIn(t, scopes, "0", "1", "2"); got != all {
				t.Errorf("after the plan there are %s", got)
			}
			removals, more, err := r.Collect(t.Context(), test.policy, 100)
			removes(removals, err)
			if got := r.storedIn(t, scopes, "0", "1", "2"); got != test.left || more {
				t.Errorf("left are\n%s (more: %t), want\n%s", got, more, test.left)
			}
			for _, scope := range scopes[1:] {
				_, err := os.Stat(filepath.Join(r.dir, ".polykit-cache/scopes", scope))
				if gone := errors.Is(err, fs.ErrNotExist); gone == strings.Contains(test.left, scope+"/") {
					t.Errorf("the directory of %s is gone: %t", scope, gone)
				}
			}
		})
	}
}
