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
	misses, _ := x.misses.Peek(stored.Key)
	x.misses.Remove(stored.Key)
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
func (x *Index) Pinned(key artifact.Key, pinned bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.add(change{kind: changePinned, stored: cache.Stored{Info: artifact.Info{Key: key}, Pinned: pinned}})
}

// Removed implements cache.Observer.
func (x *Index) Removed(key artifact.Key, diskSize int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.more -= diskSize
	x.remove(key)
}

// remove adds that an artifact is gone. x.mu is held.
func (x *Index) remove(key artifact.Key) {
	delete(x.uses, key)
	x.add(change{kind: changeRemoved, stored: cache.Stored{Info: artifact.Info{Key: key}}})
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

// Hit implements cache.Observer.
func (x *Index) Hit(key artifact.Key) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.count(Usage{Hits: 1})
	x.used(key, 1)
}

// Used implements cache.Observer.
func (x *Index) Used(key artifact.Key) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.used(key, 0)
}

// Missed implements cache.Observer.
func (x *Index) Missed(key artifact.Key) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.count(Usage{Misses: 1})
	n, _ := x.misses.Get(key)
	x.misses.Add(key, n+1)
	x.doubt(key)
}

// doubt has a key looked up that the index may be wrong about. x.mu is held.
func (x *Index) doubt(key artifact.Key) {
	if len(x.doubts) < maxDoubts {
		x.doubts[key] = true
	}
}

// InUse says whether an artifact was used later than the index has written.
func (x *Index) InUse(key artifact.Key) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.uses[key] != nil
}

// used notes a use. x.mu is held.
func (x *Index) used(key artifact.Key, hits int64) {
	u := x.uses[key]
	if u == nil {
		if len(x.uses) >= x.maxPending {
			return
		}
		u = &use{}
		x.uses[key] = u
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
