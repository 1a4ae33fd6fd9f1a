package disk

// This file mends the directories of a store that runs. People remove them, or take permissions from
// them, and a server that could not store or free a key for that would answer 500 until somebody looked
// into its log.

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// mendTmp makes tmp/ usable again, if err of creating a file in it says that it is not, and reports
// whether to try once more. Here as everywhere in this file somebody else may have mended it meanwhile.
func (s *Store) mendTmp(err error) bool {
	dir := filepath.Join(s.dir, tmpDir)
	switch {
	case errors.Is(err, fs.ErrPermission):
		s.mendDirs(s.dir, dir)
		return true
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return os.MkdirAll(dir, 0o755) == nil || s.replaceByDir(dir, &s.tmpLock) == nil
	}
	return false
}

// inShard does something in the shard of a key, and once more if permissions forbade it. Who only looks at
// the directory, and so has no lock, mends nothing.
func (s *Store) inShard(key artifact.Key, do func() error) error {
	err := do()
	if errors.Is(err, fs.ErrPermission) && s.lock != nil {
		way := []string{s.dir}
		for _, path := range s.way(shard(key)) {
			way = append(way, filepath.Join(s.dir, path))
		}
		s.mendDirs(way...)
		err = do()
	}
	return err
}

// mendDirs gives directories of the store, of which each is in the one before it, the permissions back
// without which their owner can't use them, and reports whether it did so with any. Only the owner may.
func (s *Store) mendDirs(paths ...string) bool {
	const usable = 0o700
	mended := false
	for _, path := range paths {
		stat, err := os.Lstat(path)
		if err != nil || !stat.IsDir() || stat.Mode()&usable == usable || os.Chmod(path, stat.Mode()|usable) != nil {
			continue
		}
		s.log.Warn("gave a directory permissions back that the server needs", "path", path, "had", stat.Mode())
		mended = true
	}
	return mended
}

// mendQuarantine makes the quarantine usable again if it is not, and reports whether to try once more.
// What is in the way stays beside it.
func (s *Store) mendQuarantine() bool {
	own := filepath.Join(s.dir, ownDir)
	dir := filepath.Join(own, quarantineDir)
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		var probe string
		if probe, err = os.MkdirTemp(dir, ""); err == nil {
			os.Remove(probe)
			return true
		}
	}
	if !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrExist) && !noDir(err) {
		return false
	}
	if s.mendDirs(s.dir, own, dir) {
		return true
	}
	for _, path := range []string{dir, own} {
		aside := path + "-" + rand.Text()
		if os.Rename(path, aside) == nil {
			s.log.Warn("moved what was in the way of the quarantine", "path", path, "to", aside)
			return true
		}
	}
	return false
}

// noDir says whether err means that something else is where a directory must be.
func noDir(err error) bool {
	return errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP)
}
