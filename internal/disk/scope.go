package disk

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// This file is what makes a scope of a directory.

// scopesDir is where the directories of scopes are, in the server's own.
const scopesDir = "scopes"

// newStore returns the store of the default scope.
func newStore(d *directory) *Store { return &Store{directory: d, root: d.dir} }

// In implements cache.Store.
func (s *Store) In(scope artifact.Scope) cache.Store { return s.in(scope) }

func (s *Store) in(scope artifact.Scope) *Store {
	if scope == s.scope {
		return s
	}
	return &Store{s.directory, scope, filepath.Join(s.dir, scopePath(scope))}
}

// scopePath is the path of the root of a scope in the storage directory; it is empty for the default one.
func scopePath(scope artifact.Scope) string {
	if scope == artifact.DefaultScope {
		return ""
	}
	return filepath.Join(ownDir, scopesDir, scope.String())
}

// relative is a path in the root of the scope, relative to the storage directory.
func (s *Store) relative(path ...string) string {
	return filepath.Join(scopePath(s.scope), filepath.Join(path...))
}

// way returns the directories on the way to a shard, relative to the storage directory, of which each is in the one
// before it.
func (s *Store) way(inner string) []string {
	way := []string{s.relative(filepath.Dir(inner)), s.relative(inner)}
	if s.scope == artifact.DefaultScope {
		return way
	}
	return append([]string{ownDir, filepath.Join(ownDir, scopesDir), scopePath(s.scope)}, way...)
}

// Scopes returns the scopes that have a directory, in ascending order, and the default one before them. One whose last
// artifact is just being removed may be among them.
func (s *Store) Scopes() ([]artifact.Scope, error) {
	scopes := []artifact.Scope{artifact.DefaultScope}
	entries, err := os.ReadDir(filepath.Join(s.dir, ownDir, scopesDir))
	if errors.Is(err, fs.ErrNotExist) || noDir(err) {
		return scopes, nil
	}
	for _, entry := range entries {
		scope, invalid := artifact.ParseScope(entry.Name())
		if invalid == nil && scope != artifact.DefaultScope && (entry.IsDir() || isDir(filepath.Join(s.dir, scopePath(scope)))) {
			scopes = append(scopes, scope)
		}
	}
	return scopes, err
}

// stores returns the store of each scope.
func (s *Store) stores() ([]*Store, error) {
	scopes, err := s.Scopes()
	stores := make([]*Store, len(scopes))
	for i, scope := range scopes {
		stores[i] = s.in(scope)
	}
	return stores, err
}

// removeEmpty removes the directory of a shard if nothing is in it: there may be 65,536 of them, each with a block of its
// own. Of other scopes than the default one, of which there is no end, it removes whatever is empty then. The caller
// must not hold one of the aside locks: who puts something into a scope may wait for one.
func (s *Store) removeEmpty(shard string) {
	if s.scope != artifact.DefaultScope {
		s.emptying.Lock()
		defer s.emptying.Unlock()
	}
	inner := filepath.Join(s.root, shard)
	if !s.removeDir(inner) {
		return
	}
	if s.scope != artifact.DefaultScope && s.removeDir(filepath.Dir(inner)) {
		s.removeDir(s.root)
	}
	s.shards.forget(s, shard)
}

// removeEmptyScopes removes the directories of scopes in which nothing is, as a crash leaves them after they were made,
// and who removes files behind the server's back.
func (s *Store) removeEmptyScopes(ctx context.Context) {
	stores, err := s.stores()
	if err != nil {
		s.log.Error("could not look for empty scopes", "error", err)
	}
	for _, store := range stores[1:] {
		outers, _, _ := store.shardsIn("")
		if len(outers) == 0 {
			outers = []string{"00"} // as good as any, to get to the one that it would be in
		}
		for _, outer := range outers {
			shards, _, _ := store.shardsIn(outer)
			if len(shards) == 0 {
				shards = []string{filepath.Join(outer, "00")}
			}
			for _, shard := range shards {
				store.removeEmpty(shard)
			}
			if ctx.Err() != nil {
				return
			}
		}
	}
}

// removeDir removes a directory if nothing is in it, and says whether there is none any more.
func (s *Store) removeDir(path string) bool {
	stat, err := os.Lstat(path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	if !stat.IsDir() || os.Remove(path) != nil {
		return false
	}
	s.space.dirs(s.scope).Add(-blocks(stat))
	return true
}

// Promote implements cache.Store. The file gets a name in this scope too, and so takes no more of the disk, though it
// counts in both. A time that is the other scope's as well says when it was stored.
func (s *Store) Promote(ctx context.Context, key artifact.Key, from artifact.Scope) (artifact.Info, error) {
	if _, err := s.Stat(ctx, key); !errors.Is(err, cache.ErrNotFound) {
		if err == nil {
			err = cache.ErrExists
		}
		return artifact.Info{}, err
	}
	source := s.in(from)
	info, err := source.Stat(ctx, key)
	if err != nil {
		return artifact.Info{}, err
	}
	size := info.Size + uploadOverhead
	if err := s.space.promise(ctx, size); err != nil {
		return artifact.Info{}, translate(err)
	}
	u := &upload{ctx: ctx, store: s, key: key, reserved: size, promised: size, promoted: true}
	defer u.Abort()
	for {
		if u.file, err = source.linkTmp(key); err != nil {
			return artifact.Info{}, translate(err)
		}
		stat, err := u.file.Stat()
		if err != nil {
			return artifact.Info{}, translate(err)
		}
		if stat.Mode().IsRegular() && stat.Size() == info.Size && stat.ModTime().Equal(info.StoredAt) {
			return u.Commit(ctx, info)
		}
		// It was replaced between the two looks at it: look again.
		u.discard()
		if info, err = source.Stat(ctx, key); err != nil {
			return artifact.Info{}, err
		}
	}
}

// linkTmp gives the file of an artifact a second name in tmp/, where it can't be replaced, and opens it.
func (s *Store) linkTmp(key artifact.Key) (*os.File, error) {
	path := s.tmpPath(key)
	link := func() error {
		return s.inShard(key, func() error { return os.Link(s.artifactPath(key), path) })
	}
	err := link()
	if errors.Is(err, fs.ErrNotExist) || noDir(err) {
		if _, gone := os.Lstat(s.artifactPath(key)); gone != nil {
			return nil, cache.ErrNotFound
		}
	}
	if err != nil && s.mendTmp(err) {
		err = link()
	}
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR|openFlags, 0) // where it is not for writing, it can't be synced on any system
	if err != nil {
		os.Remove(path)
	}
	return file, err
}

// scopeMark stands between a scope and the rest of a name in quarantine. It is neither in the name of a scope nor in
// that of a file that is moved.
const scopeMark = "@"

func (s *Store) quarantinePrefix() string {
	if s.scope == artifact.DefaultScope {
		return ""
	}
	return s.scope.String() + scopeMark
}

// cutScope returns the scope that a name in quarantine begins with, and the rest.
func cutScope(name string) (artifact.Scope, string) {
	if before, after, marked := strings.Cut(name, scopeMark); marked {
		if scope, err := artifact.ParseScope(before); err == nil {
			return scope, after
		}
	}
	return artifact.DefaultScope, name
}
