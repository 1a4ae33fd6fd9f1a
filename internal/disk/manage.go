package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// This file is what an operator, the index and retention need of a store: to look, to remove, to pin.

// outerLocks has a lock for each of the directories that hold shards. It is held from the look at what is
// to be moved or removed until that is done and told, and from the last look at what was stored until that
// is told, so that nobody moves what somebody else just put there, and events come in their order.
type outerLocks [256]sync.Mutex

// of returns the lock of what lies in a directory, of which name begins with the two digits.
func (l *outerLocks) of(name string) *sync.Mutex {
	const digits = "0123456789abcdef"
	return &l[strings.IndexByte(digits, name[0])<<4|strings.IndexByte(digits, name[1])]
}

// Remove implements cache.Store.
func (s *Store) Remove(_ context.Context, key artifact.Key) (diskSize int64, err error) {
	return s.remove(key, func(fs.FileInfo) error { return nil })
}

// Evict is Remove of an artifact of any scope that was stored at a time, to the nanoseconds that the index counts, and
// is not pinned. Any other is ErrNotFound, too.
func (s *Store) Evict(_ context.Context, name artifact.Name, storedAt time.Time) (diskSize int64, err error) {
	s, key := s.in(name.Scope), name.Key
	return s.remove(key, func(stat fs.FileInfo) error {
		if stat.ModTime().UnixNano() != storedAt.UnixNano() {
			return cache.ErrNotFound
		}
		switch m, err := s.loadMemo(key); {
		case err == nil && m.pins():
			return cache.ErrNotFound
		case errors.Is(translate(err), cache.ErrOverloaded): // it may be pinned
			return fmt.Errorf("look whether artifact %s is pinned: %w", key, err)
		}
		return nil
	})
}

// remove removes an artifact, unless meant returns an error of its file.
func (s *Store) remove(key artifact.Key, meant func(fs.FileInfo) error) (diskSize int64, err error) {
	if diskSize, err = s.removeFiles(key, meant); err == nil {
		s.removeEmpty(shard(key))
	}
	return diskSize, err
}

func (s *Store) removeFiles(key artifact.Key, meant func(fs.FileInfo) error) (diskSize int64, err error) {
	lock := s.aside.of(key.String())
	lock.Lock()
	defer lock.Unlock()
	path := s.artifactPath(key)
	var stat fs.FileInfo
	if err := s.inShard(key, func() (err error) {
		stat, err = os.Lstat(path)
		return err
	}); err != nil {
		if errors.Is(err, fs.ErrNotExist) || noDir(err) {
			return 0, cache.ErrNotFound
		}
		return 0, err
	}
	if !stat.Mode().IsRegular() {
		return 0, cache.ErrNotFound
	}
	if err := meant(stat); err != nil {
		return 0, err
	}
	diskSize = s.diskSize(key, stat)
	os.Remove(s.memoPath(key)) // while it can't be a new artifact's
	if err := s.inShard(key, func() error { return os.Remove(path) }); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("remove artifact %s: %w", key, err)
	}
	s.observer.Removed(key.In(s.scope), diskSize)
	return diskSize, nil
}

// Pin implements cache.Store. The memo bears the mark, so that it is there as long as the artifact.
func (s *Store) Pin(ctx context.Context, key artifact.Key, pinned bool) error {
	if _, err := s.Stat(ctx, key); err != nil {
		return err
	}
	lack, err := s.pin(key, pinned)
	if lack != nil { // what was known was in memory only
		if _, err := s.inspect(ctx, key, lack); err != nil {
			return err
		}
		if lack, err = s.pin(key, pinned); lack != nil {
			return cache.ErrNotFound // it was removed meanwhile
		}
	}
	return err
}

// pin marks a memo, or returns what it lacks.
func (s *Store) pin(key artifact.Key, pinned bool) (lack, err error) {
	lock := s.aside.of(key.String())
	lock.Lock()
	defer lock.Unlock()
	stat, err := os.Lstat(s.artifactPath(key))
	if err != nil {
		return err, nil
	}
	m, lack := s.loadMemo(key)
	if lack == nil {
		_, lack = m.info(key.In(s.scope), stat)
	}
	if lack != nil || m.Pinned == pinned {
		return lack, nil
	}
	m.Pinned = pinned
	if err := s.putMemo(key, m, true); err != nil {
		return nil, err
	}
	s.observer.Pinned(key.In(s.scope), pinned)
	return nil, nil
}

// Look returns what is known of an artifact of any scope without reading it, and false if none is stored. An error says
// that nobody can tell.
func (s *Store) Look(name artifact.Name) (cache.Stored, bool, error) {
	s, key := s.in(name.Scope), name.Key
	var stat fs.FileInfo
	err := s.inShard(key, func() (err error) {
		stat, err = os.Lstat(s.artifactPath(key))
		return err
	})
	switch {
	case errors.Is(err, fs.ErrNotExist) || noDir(err):
		return cache.Stored{}, false, nil
	case err != nil:
		return cache.Stored{}, false, err
	case !stat.Mode().IsRegular():
		return cache.Stored{}, false, nil
	}
	stored := cache.Stored{Info: artifact.Info{Scope: s.scope, Key: key, Size: stat.Size(), StoredAt: stat.ModTime()}, DiskSize: s.diskSize(key, stat)}
	if m, err := s.loadMemo(key); err == nil {
		stored.Pinned = m.pins()
		if info, lack := m.info(name, stat); lack == nil {
			stored.Info = info
		}
	}
	return stored, true, nil
}

// Walk calls visit for the artifacts of each shard of a scope whose names begin with the two digits outer, or of all of
// them if it is empty. What can't be read is left out, and told in the end.
func (s *Store) Walk(scope artifact.Scope, outer string, visit func([]cache.File) error) error {
	s = s.in(scope)
	if outer != "" {
		return s.walkOuter(outer, visit)
	}
	outers, _, err := s.shardsIn("")
	if errors.Is(err, fs.ErrNotExist) || noDir(err) {
		return nil
	}
	for _, outer := range outers {
		var stop error
		unread := s.walkOuter(outer, func(files []cache.File) error {
			stop = visit(files)
			return stop
		})
		if stop != nil {
			return stop
		}
		err = errors.Join(err, unread)
	}
	return err
}

func (s *Store) walkOuter(outer string, visit func([]cache.File) error) error {
	shards, _, err := s.shardsIn(outer)
	if errors.Is(err, fs.ErrPermission) && s.mendDirs(s.root, filepath.Join(s.root, outer)) {
		shards, _, err = s.shardsIn(outer)
	}
	if errors.Is(err, fs.ErrNotExist) || noDir(err) {
		return nil
	}
	for _, shard := range shards {
		files, unread := s.filesIn(shard)
		if errors.Is(unread, fs.ErrPermission) && s.mendDirs(filepath.Join(s.root, outer), filepath.Join(s.root, shard)) {
			files, unread = s.filesIn(shard)
		}
		if unread != nil && !errors.Is(unread, fs.ErrNotExist) {
			err = errors.Join(err, unread)
		}
		if stop := visit(files); stop != nil {
			return stop
		}
	}
	return err
}

// filesIn returns the artifacts in a shard.
func (s *Store) filesIn(shard string) ([]cache.File, error) {
	entries, err := os.ReadDir(filepath.Join(s.root, shard))
	if err != nil {
		return nil, err
	}
	var files []cache.File
	for _, entry := range entries {
		digits, isArtifact := strings.CutSuffix(entry.Name(), ".zst")
		if !isArtifact {
			continue
		}
		key, ok := keyIn(shard, digits)
		if !ok {
			continue
		}
		stat, err := entry.Info()
		if err != nil || !stat.Mode().IsRegular() { // it is gone, or was never an artifact
			continue
		}
		files = append(files, cache.File{Key: key, Size: stat.Size(), DiskSize: s.diskSize(key, stat), StoredAt: stat.ModTime().UnixNano()})
	}
	return files, nil
}

// unobserved is a cache.Observer that nobody listens to.
type unobserved struct{}

func (unobserved) Stored(cache.Stored)                   {}
func (unobserved) Found(cache.Stored)                    {}
func (unobserved) Pinned(artifact.Name, bool)            {}
func (unobserved) Removed(artifact.Name, int64)          {}
func (unobserved) Hit(artifact.Name)                     {}
func (unobserved) Missed(artifact.Key, []artifact.Scope) {}
func (unobserved) Used(artifact.Name)                    {}
