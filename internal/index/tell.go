package index

import (
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// This file is what an index is told. Nothing here waits for the disk, and nothing fails.

var _ cache.Observer = (*Index)(nil)

// Stored implements cache.Observer.
func (x *Index) Stored(stored cache.Stored) {
	x.mu.Lock()
	defer x.mu.Unlock()
	misses, _ := x.misses.Peek(stored.Name())
	x.misses.Remove(stored.Name())
	x.count(Usage{Stored: 1})
	x.more += stored.DiskSize
	x.add(change{kind: changeStored, stored: stored, misses: misses})
}

// Found implements cache.Observer.
func (x *Index) Found(stored cache.Stored) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.add(change{kind: changeFound, stored: stored})
}

// Pinned implements cache.Observer.
func (x *Index) Pinned(name artifact.Name, pinned bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.add(change{kind: changePinned, stored: cache.Stored{Info: infoOf(name), Pinned: pinned}})
}

// Removed implements cache.Observer.
func (x *Index) Removed(name artifact.Name, diskSize int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.more -= diskSize
	x.remove(name)
}

// remove adds that an artifact is gone. x.mu is held.
func (x *Index) remove(name artifact.Name) {
	delete(x.uses, name)
	x.add(change{kind: changeRemoved, stored: cache.Stored{Info: infoOf(name)}})
}

// Evicted counts an artifact that the retention policy removed, which took diskSize bytes. That it was
// removed the index is told by the store.
func (x *Index) Evicted(e Entry, diskSize int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.count(Usage{Evicted: 1, EvictedDiskSize: diskSize})
	e.DiskSize = diskSize
	x.add(change{kind: changeEvicted, stored: e.Stored})
}

// Compared counts a pair of artifacts of one key in two scopes, which have the same files or not.
func (x *Index) Compared(same bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if same {
		x.count(Usage{Agreed: 1})
	} else {
		x.count(Usage{Differed: 1})
	}
}

// Hit implements cache.Observer.
func (x *Index) Hit(name artifact.Name) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.count(Usage{Hits: 1})
	x.used(name, 1)
}

// Used implements cache.Observer.
func (x *Index) Used(name artifact.Name) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.used(name, 0)
}

// Missed implements cache.Observer. The miss is of the task whose artifact is uploaded to the first scope then.
func (x *Index) Missed(key artifact.Key, scopes []artifact.Scope) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.count(Usage{Misses: 1})
	missed := key.In(scopes[0])
	n, _ := x.misses.Get(missed)
	x.misses.Add(missed, n+1)
	for _, scope := range scopes {
		x.doubt(key.In(scope))
	}
}

// doubt has an artifact looked up that the index may be wrong about. x.mu is held.
func (x *Index) doubt(name artifact.Name) {
	if len(x.doubts) < maxDoubts {
		x.doubts[name] = true
	}
}

// infoOf returns that nothing is known of an artifact but its name.
func infoOf(name artifact.Name) artifact.Info {
	return artifact.Info{Scope: name.Scope, Key: name.Key}
}

// InUse says whether an artifact was used later than the index has written.
func (x *Index) InUse(name artifact.Name) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.uses[name] != nil
}

// used notes a use. x.mu is held.
func (x *Index) used(name artifact.Name, hits int64) {
	u := x.uses[name]
	if u == nil {
		if len(x.uses) >= x.maxPending {
			return
		}
		u = &use{}
		x.uses[name] = u
	}
	u.at = time.Now().UnixNano()
	u.hits += hits
}

// count counts. x.mu is held.
func (x *Index) count(usage Usage) {
	x.counted.add(usage)
	x.sinceStart.add(usage)
}

// add adds a change. x.mu is held.
func (x *Index) add(c change) {
	x.changes++
	if len(x.pending) >= x.maxPending {
		x.forgot = true
		return
	}
	x.pending = append(x.pending, c)
	if len(x.pending) == flushSize {
		tell(x.full)
	}
}
