package disk

import (
	"path/filepath"
	"slices"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// maxOtherDirs is how many directories of other scopes than the default one are known to be durable, about 4 MB. What
// was forgotten costs an upload as many syncs as the first one in the directory.
const maxOtherDirs = 16_384

// durableShards knows which directories this process has made durable: of the default scope by the numbers of their
// digits, and of all others together those that were uploaded to last.
type durableShards struct {
	mu     sync.Mutex
	outers [1 << 8]bool
	inners [shardCount]bool
	others *simplelru.LRU[string, struct{}] // by their paths in the storage directory; nil before the first
}

// has says whether the directory of a shard of the default scope is durable, and the one that it is in.
func (d *durableShards) has(shard int) (outer, inner bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.outers[shard>>8], d.inners[shard]
}

// add says that both are.
func (d *durableShards) add(shard int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.outers[shard>>8], d.inners[shard] = true, true
}

// lacking returns those of the directories on the way to a shard of another scope that are not known to be durable.
func (d *durableShards) lacking(way []string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.others == nil {
		return way
	}
	if _, known := d.others.Get(way[len(way)-1]); known { // when it became durable, those before it were
		return nil
	}
	return slices.DeleteFunc(slices.Clone(way), func(path string) bool {
		_, known := d.others.Get(path)
		return known
	})
}

// addWay says that all directories on a way are.
func (d *durableShards) addWay(way []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.others == nil {
		var err error
		if d.others, err = simplelru.NewLRU[string, struct{}](maxOtherDirs, nil); err != nil {
			panic(err) // its only error is of a size that is not positive
		}
	}
	for _, path := range way {
		d.others.Add(path, struct{}{})
	}
}

// forget makes the next upload to a shard of a store look at all directories on its way again.
func (d *durableShards) forget(s *Store, shard string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.scope == artifact.DefaultScope {
		number := shardNumber(shard)
		d.outers[number>>8], d.inners[number] = false, false
		return
	}
	if d.others != nil {
		for _, path := range s.way(shard) {
			d.others.Remove(path)
		}
	}
}

// makeWay makes the directories on the way to a shard of another scope than the default one, and their names durable.
// They are made before the first is synced, which takes long.
func (s *Store) makeWay(key artifact.Key) error {
	way := s.way(shard(key))
	lacking := s.shards.lacking(way)
	for _, path := range lacking {
		if err := s.makeDir(key, path); err != nil {
			return err
		}
	}
	for _, path := range lacking {
		if err := s.syncDir(filepath.Dir(filepath.Join(s.dir, path))); err != nil {
			return err
		}
	}
	if len(lacking) > 0 {
		s.shards.addWay(way)
	}
	return nil
}
