package cachetest

import (
	"errors"
	"fmt"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// This file is the part of the contract that is about scopes.

// in returns the test in another scope.
func (t *storeTest) in(scope string) *storeTest {
	return &storeTest{T: t.T, ctx: t.ctx, store: t.store.In(Scope(scope))}
}

// scopes has artifacts of one key in several scopes: nothing that happens in one is seen in another.
func (t *storeTest) scopes() {
	names := []string{"default", "a", "a.b", "a-b", "b"}
	samples := map[string]sample{}
	infos := map[string]artifact.Info{}
	for i, name := range names {
		in := t.in(name)
		in.lacks(Key("a"))
		samples[name] = sampleOf(Key("a"), fmt.Sprint("content ", i)) // of one size
		infos[name] = in.put(samples[name])
		if infos[name].Scope != Scope(name) {
			t.Errorf("Commit in %s returned the scope %s", name, infos[name].Scope)
		}
	}
	for _, name := range names {
		t.in(name).serves(samples[name], infos[name])
		t.in("b").in(name).serves(samples[name], infos[name])
	}
	_, err := t.in("a").store.Remove(t.ctx, Key("a"))
	t.noError("Remove", err)
	t.noError("Quarantine", t.in("a-b").store.Quarantine(t.ctx, infos["a-b"], errDamaged))
	t.noError("Pin", t.in("b").store.Pin(t.ctx, Key("a"), true))
	for _, name := range names {
		if in := t.in(name); name == "a" || name == "a-b" {
			in.lacks(Key("a"))
		} else {
			in.serves(samples[name], infos[name])
		}
	}
	t.in("c").lacks(Key("a"))
}

func (t *storeTest) promote() {
	a, other := sampleOf(Key("a"), "content of a"), sampleOf(Key("a"), "another one")
	if _, err := t.store.Promote(t.ctx, Key("a"), Scope("pr-8")); !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("Promote of a miss returned %v, want %v", err, cache.ErrNotFound)
	}
	from := t.in("pr-8")
	there := from.put(a)
	here, err := t.store.Promote(t.ctx, Key("a"), Scope("pr-8"))
	t.noError("Promote", err)
	t.serves(a, here)
	from.serves(a, there)
	want := there
	want.Scope = here.Scope
	if here.Scope == there.Scope || !same(here, want) {
		t.Errorf("Promote returned %+v of %+v", here, there)
	}
	for _, scope := range []artifact.Scope{Scope("pr-8"), here.Scope, Scope("pr-9")} {
		if _, err := t.store.Promote(t.ctx, Key("a"), scope); !errors.Is(err, cache.ErrExists) {
			t.Errorf("Promote from %s to where one is returned %v, want %v", scope, err, cache.ErrExists)
		}
	}
	upload, err := t.store.Create(t.ctx, Key("a"), 1)
	if !errors.Is(err, cache.ErrExists) {
		t.Errorf("Create of what was promoted returned %v, want %v", err, cache.ErrExists)
	}
	if err == nil {
		upload.Abort()
	}

	// Neither of the two needs the other.
	_, err = from.store.Remove(t.ctx, Key("a"))
	t.noError("Remove", err)
	from.lacks(Key("a"))
	t.serves(a, here)
	info := from.put(other)
	t.serves(a, here)
	t.noError("Quarantine", t.store.Quarantine(t.ctx, here, errDamaged))
	t.lacks(Key("a"))
	from.serves(other, info)
	here, err = t.store.Promote(t.ctx, Key("a"), Scope("pr-8"))
	t.noError("Promote", err)
	t.serves(other, here)
}
