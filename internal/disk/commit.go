package disk

// This file is the whole of durability. An artifact gets into the store by these syscalls, in this
// order; the number in brackets is what a crash or power cut after the step leaves behind.
//
//	open(tmp/<unique>, O_CREAT|O_EXCL)   [1]
//	write                                [1]
//	utimensat(file)                      [1] its own time, to the nanosecond: what binds the memo to it
//	fsync(file)                          [1] from here on the bytes survive a power cut
//	mkdir(aa), fsync(<dir>)              [1] only for the first upload of a process into aa …
//	mkdir(aa/bb), fsync(aa)              [1] … and into aa/bb
//	link(tmp/<unique>, aa/bb/<key>.zst)  [2] the commit: EEXIST means that somebody was first
//	unlink(tmp/<unique>)                 [2]
//	the memo: open, write, close, rename [2]
//	fsync(aa/bb)                         [3] only now is the upload acknowledged
//
// In another scope than the default one, the directories come in this order, of which there are more, and the most
// are the scope's own:
//
//	mkdir(.polykit-cache), mkdir(….scopes), mkdir(…/<scope>), mkdir(…/aa), mkdir(…/aa/bb)   [1] those not made before
//	fsync of the directory that each of them is in                                        [1] all before the link
//
// None of them is removed for being empty from the first mkdir to the link. A promotion is an upload whose file is
// there: instead of the first three steps it is link(<artifact in the other scope>, tmp/<unique>), and its time stays
// as it is, for the memo of the other scope is bound to it.
//
//	[1] An orphan in tmp/, or nothing. No artifact: the next start sweeps the orphan.
//	[2] The whole artifact or none, for the name may or may not have reached the disk; if it did, all
//	    the bytes had before it. A memo that is missing, empty or torn is made anew from the .zst. The
//	    client has no answer yet, so both outcomes are true to what it knows.
//	[3] The artifact.
//
// While much is written, its way to the disk is begun with sync_file_range where there is that, which
// promises nothing but leaves fsync less to wait for.
//
// Where durability is "none" there is no fsync. A crash of the server alone leaves what is said here
// all the same, since what was written is with the operating system; a power cut may take what was
// acknowledged. See durability.go for why what it damages is not served.
//
// link and not rename, because rename replaces: with stat and rename two racing uploads both win.
// A directory that another process made may have a name that is not durable yet, so each process
// syncs the way to a shard once before it relies on it, whoever made it.
//
// If a step after the link fails, the link is taken back: what was refused is not stored. That leaves
// one hole: where the unlink fails as well, or power is cut before it reaches the disk, an artifact
// whose upload was answered with an error is stored. It is whole and sound, and the client's next
// attempt is told that it exists.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// upload implements cache.Upload.
type upload struct {
	ctx      context.Context
	store    *Store
	key      artifact.Key
	file     *os.File // nil once it is committed or aborted
	reserved int64    // bytes that are set aside for it
	promised int64    // of these, what is still to be written
	written  int64
	begun    int64 // of what is written, what is on its way to the disk
	promoted bool  // the file is an artifact of another scope, too
}

// writebackSize is how many bytes are written before their way to the disk is begun.
const writebackSize = 8 << 20

// Write asks for the space of what was not declared. What is written counts as taken on the file
// system itself.
func (u *upload) Write(p []byte) (int, error) {
	if more := u.written + int64(len(p)) + uploadOverhead - u.reserved; more > 0 {
		if err := u.store.space.promise(u.ctx, more); err != nil {
			return 0, translate(err)
		}
		u.reserved += more
		u.promised += more
	}
	n, err := u.file.Write(p)
	u.store.space.written(int64(n))
	u.promised -= int64(n)
	u.written += int64(n)
	if u.store.synced && u.written-u.begun >= writebackSize {
		beginWriteback(u.file, u.begun, u.written-u.begun)
		u.begun = u.written
	}
	return n, translate(err)
}

func (u *upload) Commit(_ context.Context, info artifact.Info) (artifact.Info, error) {
	info, err := u.commit(info)
	return info, translate(err)
}

func (u *upload) commit(info artifact.Info) (artifact.Info, error) {
	s := u.store
	if u.file == nil {
		return info, os.ErrClosed
	}
	// The file system's clock may tick every few milliseconds only. Artifacts of one key and size that
	// were written in the same tick would pass for each other.
	if !u.promoted {
		if err := os.Chtimes(u.file.Name(), time.Time{}, time.Now()); err != nil {
			return info, err
		}
	}
	if s.synced {
		if err := u.file.Sync(); err != nil {
			return info, err
		}
	}
	stat, err := u.file.Stat()
	if err != nil {
		return info, err
	}
	if stat.Size() != info.Size {
		return info, fmt.Errorf("%d bytes were written, but the file has %d", info.Size, stat.Size())
	}
	info.Scope, info.StoredAt = s.scope, stat.ModTime()
	path := s.artifactPath(u.key)
	if err := s.inShard(u.key, func() error { return u.link(path) }); err != nil {
		if s.scope != artifact.DefaultScope && !errors.Is(err, cache.ErrExists) {
			s.removeEmpty(shard(u.key))
		}
		return info, err
	}
	u.discard()
	if err := s.writeMemo(info, false, s.synced); err != nil {
		s.log.Warn("could not write a memo; the artifact will be verified again", "scope", s.scope, "key", u.key, "error", err)
	}
	if err := s.inShard(u.key, func() error { return s.syncDir(filepath.Dir(path)) }); err != nil {
		os.Remove(s.memoPath(u.key))
		err = errors.Join(err, os.Remove(path))
		if s.scope != artifact.DefaultScope {
			s.removeEmpty(shard(u.key))
		}
		return info, err
	}
	s.tell(info, false, s.observer.Stored)
	return info, nil
}

func (u *upload) link(path string) error {
	s := u.store
	link := func() error {
		if err := s.makeShard(u.key); err != nil {
			return err
		}
		return os.Link(u.file.Name(), path)
	}
	if s.scope != artifact.DefaultScope {
		s.emptying.RLock()
		defer s.emptying.RUnlock()
	}
	err := link()
	if errors.Is(err, fs.ErrNotExist) || noDir(err) { // somebody removed the shard since it was made
		s.shards.forget(s, shard(u.key))
		err = link()
	}
	if errors.Is(err, fs.ErrExist) {
		return cache.ErrExists
	}
	return err
}

// Abort gives back what is set aside for the upload, and all else that it holds.
func (u *upload) Abort() {
	u.discard()
	u.store.space.release(u.reserved, u.promised)
	u.reserved, u.promised = 0, 0
}

// discard closes and removes the temporary file, which after the commit is only a second name.
func (u *upload) discard() {
	if u.file == nil {
		return
	}
	u.file.Close()
	if err := os.Remove(u.file.Name()); err != nil {
		u.store.log.Warn("could not remove a temporary file; the next start will", "path", u.file.Name(), "error", err)
	}
	u.file = nil
}

// makeShard makes the directory of a key's shard, and its name durable.
func (s *Store) makeShard(key artifact.Key) error {
	if s.scope != artifact.DefaultScope {
		return s.makeWay(key)
	}
	path := shard(key)
	number := shardNumber(path)
	outer, inner := s.shards.has(number)
	if !outer {
		if err := s.makeShardDir(key, filepath.Dir(path)); err != nil {
			return err
		}
	}
	if !inner {
		if err := s.makeShardDir(key, path); err != nil {
			return err
		}
	}
	s.shards.add(number)
	return nil
}

func (s *Store) makeShardDir(key artifact.Key, path string) error {
	if err := s.makeDir(key, path); err != nil {
		return err
	}
	return s.syncDir(filepath.Dir(filepath.Join(s.dir, path)))
}

// makeDir makes a directory on the way to the shard of a key, which is relative to the storage directory.
func (s *Store) makeDir(key artifact.Key, relative string) error {
	path := filepath.Join(s.dir, relative)
	err := os.Mkdir(path, 0o755)
	switch {
	case errors.Is(err, fs.ErrExist):
		lock := sync.Locker(&s.tmpLock) // of what lies on the way to several keys
		if isShardName(filepath.Base(relative)) {
			lock = s.aside.of(key.String())
		}
		err = s.replaceByDir(path, lock)
	case err == nil:
		if stat, err := os.Lstat(path); err == nil {
			s.space.dirs(s.scope).Add(blocks(stat))
		}
	}
	return err
}

// replaceByDir makes a directory of what stands where one must be, if it is not one already. It holds a
// lock meanwhile, or else what is moved may be the directory that somebody else just made.
func (s *Store) replaceByDir(path string, lock sync.Locker) error {
	lock.Lock()
	defer lock.Unlock()
	if stat, err := os.Stat(path); err == nil && stat.IsDir() {
		return nil
	}
	if err := s.quarantine(path, fmt.Errorf("%s must be a directory", path)); err != nil {
		if isDir(path) { // it was in the way of the quarantine as well
			return nil
		}
		return err
	}
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// makeDurable makes a directory and those above it that are missing, and their names durable.
func makeDurable(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := makeDurable(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

// syncDir makes the names in a directory durable, if artifacts are to be.
func (s *Store) syncDir(path string) error {
	if !s.synced {
		return nil
	}
	return syncDir(path)
}

// syncDir makes the names in a directory durable.
func syncDir(path string) error {
	if !dirsSync {
		return nil
	}
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	err = dir.Sync()
	if closed := dir.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}
