package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

const (
	// unknownSpace is the space of a file system that does not tell: a full disk is then found when it is
	// written to.
	unknownSpace = math.MaxInt64
	// blockSize is what a file takes at least on most file systems.
	blockSize = 4 << 10
	// uploadOverhead is what an upload may take beside its bytes: the rest of its last block, its memo, and
	// a new directory.
	uploadOverhead = 3 * blockSize
)

func wholeBlocks(size int64) int64 { return (size + blockSize - 1) / blockSize * blockSize }

// Limits bound what a Store takes of the disk. Artifacts are evicted by somebody else; the store refuses
// uploads that there is no room for, and says when there is little.
type Limits struct {
	// MaxStorage is the most bytes on the disk that everything in the directory may take, with uploads in
	// flight. 0 is no limit.
	MaxStorage int64
	// MinFree is the least bytes that may be free on the file system.
	MinFree int64
	// Stored returns how many bytes on the disk the artifacts take. It is needed for MaxStorage.
	Stored func() int64
	// MakeRoom makes room for size bytes, or returns an error if that can't be. It may be nil.
	MakeRoom func(ctx context.Context, size int64) error
	// Low is told, and must not block, when Usage.Room falls below a LowShare-th of Usage.Capacity. It may be
	// nil.
	Low      func()
	LowShare int64
}

// Usage is what a Store takes of the disk. All numbers are bytes.
type Usage struct {
	// Used is what everything in the directory takes, with what uploads in flight will.
	Used int64
	// Size and Free are of the file system; Free is less what uploads in flight will still write.
	Size, Free int64
	// Room is how much more uploads may take: what neither limit forbids.
	Room int64
}

// Capacity is how much everything in the directory may take, as the disk is used otherwise.
func (u Usage) Capacity() int64 {
	used := max(u.Used, 0)
	if u.Room > math.MaxInt64-used {
		return math.MaxInt64
	}
	return max(used+u.Room, 0)
}

// space accounts for what uploads in flight take, so that not all of them are promised the same space. What
// is promised is not taken from the file system, for a client could then take space for the mere promise of
// an upload.
type space struct {
	dir    string
	limits Limits
	own    atomic.Int64 // of what is neither an artifact nor an upload
	scopes atomic.Int64 // of the directories of other scopes than the default one

	measuredScopes time.Time // when these were counted

	mu       sync.Mutex
	inFlight int64 // of uploads, written or not
	promised int64 // of that, what is not written yet
}

// usage returns how the disk is used. s.mu is held.
func (s *space) usage() (Usage, error) {
	size, free, err := fileSystem(s.dir)
	if errors.Is(err, fs.ErrNotExist) { // the directory is made again when the upload is
		size, free, err = unknownSpace, unknownSpace, nil
	}
	u := Usage{Used: s.own.Load() + s.scopes.Load() + s.inFlight, Size: size, Free: free - s.promised}
	if s.limits.Stored != nil {
		u.Used += s.limits.Stored()
	}
	u.Room = u.Free - s.limits.MinFree
	if s.limits.MaxStorage > 0 {
		u.Room = min(u.Room, s.limits.MaxStorage-u.Used)
	}
	return u, err
}

// dirs counts the directories of a scope.
func (s *space) dirs(scope artifact.Scope) *atomic.Int64 {
	if scope == artifact.DefaultScope {
		return &s.own
	}
	return &s.scopes
}

// promise sets size bytes aside. If there is no room for them it has room made, and returns ENOSPC if that
// can't be.
func (s *space) promise(ctx context.Context, size int64) error {
	for {
		enough, err := s.tryPromise(size)
		if enough || err != nil {
			return err
		}
		if s.limits.MakeRoom == nil {
			return syscall.ENOSPC
		}
		if err := s.limits.MakeRoom(ctx, size); err != nil {
			return fmt.Errorf("%w: %w", cache.ErrNoSpace, err)
		}
	}
}

func (s *space) tryPromise(size int64) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	usage, err := s.usage()
	if err != nil || size > usage.Room {
		return false, err
	}
	s.inFlight += size
	s.promised += size
	if s.limits.Low != nil && usage.Room-size < usage.Capacity()/s.limits.LowShare {
		s.limits.Low()
	}
	return true, nil
}

// written says that so much of what was promised is written.
func (s *space) written(size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.promised -= size
}

// release gives back what was promised: an upload has ended, and promised bytes of it were not written.
func (s *space) release(size, promised int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inFlight -= size
	s.promised -= promised
}

// Usage returns what the store takes of the disk.
func (s *Store) Usage() (Usage, error) {
	s.space.mu.Lock()
	defer s.space.mu.Unlock()
	return s.space.usage()
}

// scopesInterval is the least time between two counts of the directories of scopes. There may be many more of them than
// of the default scope, each with little in it, and what the server does with them is counted as it happens.
const scopesInterval = time.Hour

// Measure counts anew what the store keeps beside artifacts and uploads: its directories, and what is in
// its own. It looks at every directory, and is for the background: one at a time.
func (s *Store) Measure() {
	own := s.in(artifact.DefaultScope).dirsSize() + size(filepath.Join(s.dir, tmpDir))
	scopes := filepath.Join(s.OwnDir(), scopesDir)
	filepath.WalkDir(s.OwnDir(), func(path string, _ fs.DirEntry, _ error) error {
		if !strings.HasPrefix(filepath.Base(path), indexName) { // which counts itself
			own += size(path)
		}
		if path == scopes {
			return fs.SkipDir
		}
		return nil
	})
	s.space.own.Store(own)
	if time.Since(s.space.measuredScopes) < scopesInterval {
		return
	}
	stores, err := s.stores()
	if err != nil {
		return // what is known is better than nothing
	}
	var others int64
	for _, store := range stores[1:] {
		others += store.dirsSize()
	}
	s.space.scopes.Store(others)
	s.space.measuredScopes = time.Now()
}

// size is what a file or directory takes on the disk; nothing if it is not there.
func size(path string) int64 {
	stat, err := os.Lstat(path)
	if err != nil {
		return 0
	}
	return blocks(stat)
}

// dirsSize sums up what the directories of a scope take on the disk.
func (s *Store) dirsSize() int64 {
	sum := size(s.root)
	outers, _, _ := s.shardsIn("")
	for _, outer := range outers {
		sum += size(filepath.Join(s.root, outer))
		shards, _, _ := s.shardsIn(outer)
		for _, shard := range shards {
			sum += size(filepath.Join(s.root, shard))
		}
	}
	return sum
}

// diskSize returns what the artifact whose file stat describes takes on the disk, with its memo.
func (s *Store) diskSize(key artifact.Key, stat fs.FileInfo) int64 {
	size := blocks(stat)
	memo, err := os.Lstat(s.memoPath(key))
	switch {
	case err == nil:
		size += blocks(memo)
	case !errors.Is(err, fs.ErrNotExist):
		size += blockSize // as most memos take
	}
	return size
}
