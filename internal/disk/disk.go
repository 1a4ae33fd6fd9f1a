// Package disk is a cache.Store in sharded directories, in the layout that the Rust server of the
// same name uses too:
//
//	<dir>/aa/bb/<key>.zst            the artifact, exactly as uploaded; aabb = first four digits of the key
//	<dir>/aa/bb/<key>.json           its memo: what is known of it, so that it need not be read to be served
//	<dir>/tmp/                       uploads in progress
//	<dir>/.polykit-cache.lock        locked while a server uses the directory
//	<dir>/.polykit-cache/quarantine/ what was found damaged or in the way, each with its reason; may be deleted
//	<dir>/.polykit-cache/scrub.json  how far the scrub is; may be deleted
//	<dir>/.polykit-cache/index.db    package index's; may be deleted
//	<dir>/.polykit-cache/scopes/<scope>/aa/bb/…  the artifacts of another scope than the default one, in the same layout
//
// A Store is of one scope. Its methods that cache.Store has are about the artifacts of that scope; all others are
// about the whole directory, and are the same whatever the scope. There may be thousands of scopes, so one is nothing
// but its directory: what a process needs to store and serve the scopes share, with one lock, one tmp/, one account of
// the space, one memory for what was read lately. The first upload makes the directory of a scope, and who removes
// the last artifact of one removes it.
//
// The .zst is the truth and its link is the one commit point; commit.go says why that is safe. The
// memo is only a memo: where it is missing, torn, stale, or the Rust server's (which says less), it is
// made anew by verifying the .zst, once. So nothing is served that was not verified by these rules. What
// the disk damages behind an intact memo the scrub finds: scrub.go; audit.go says of one artifact what is
// wrong with it, for the scrub and for Verify.
package disk

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sync/singleflight"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

const (
	tmpDir        = "tmp"
	ownDir        = ".polykit-cache"
	indexName     = "index.db" // with which the names of its files begin
	quarantineDir = "quarantine"
	// reasonExtension ends the name of the file that says why the one beside it is in quarantine.
	reasonExtension = ".txt"
	lockName        = ".polykit-cache.lock"

	// ownTmp ends the names of the temporary files that this package makes.
	ownTmp = ".part"
	// foreignTmpAge is how long a file that another program left in tmp/ must not have been written
	// to before it is taken for abandoned: far longer than any upload.
	foreignTmpAge = 24 * time.Hour
)

// Config configures a Store.
type Config struct {
	// Dir is the storage directory. It is created if it does not exist.
	Dir string
	// Verifier verifies what is found in the directory without a memo.
	Verifier *artifact.Verifier
	// Durability is DurabilityFull if it is empty.
	Durability Durability
	// HotSize is the most bytes of memory that are spent on what was read lately, so that it need not be
	// read again.
	HotSize int64
	// Log is told about repairs.
	Log *slog.Logger
}

// Store is a cache.Store in a directory, of one scope.
type Store struct {
	*directory
	scope artifact.Scope
	root  string // the directory that the shards of the scope are in
}

// directory is what the stores of all scopes share.
type directory struct {
	dir      string
	verifier *artifact.Verifier
	synced   bool // artifacts are, before they are acknowledged
	log      *slog.Logger
	observer cache.Observer
	lock     *flock.Flock
	shards   durableShards
	space    space
	hot      *hot
	scrubbed scrubCounts

	inspections singleflight.Group // in progress, by the path of the artifact
	aside       outerLocks
	emptying    sync.RWMutex // held for writing while what is empty of a scope is removed, and else by who puts something there
	tmpLock     sync.Mutex   // held while something that is in the way of tmp/ is replaced
}

var _ cache.Store = (*Store)(nil)

// Open takes possession of a storage directory: no other Store can be opened on it before Close. It returns the store of
// the default scope, and takes the same time however much is stored.
func Open(config Config) (*Store, error) {
	dir, err := filepath.Abs(config.Dir)
	if err != nil {
		return nil, err
	}
	if err := makeDurable(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, tmpDir), 0o755); err != nil {
		return nil, err
	}
	lock := flock.New(filepath.Join(dir, lockName), flock.SetPermissions(0o644)) // also for a server of another user to come
	locked, err := lock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock storage directory %s: %w", dir, err)
	}
	if !locked {
		return nil, fmt.Errorf("storage directory %s is in use by another server: stop that one first, or give this one a directory of its own", dir)
	}
	s := newStore(&directory{
		dir:      dir,
		verifier: config.Verifier,
		synced:   config.Durability != DurabilityNone,
		log:      config.Log,
		lock:     lock,
		space:    space{dir: dir},
		hot:      newHot(config.HotSize),
		observer: unobserved{},
	})
	if err := s.sweep(); err != nil {
		lock.Unlock()
		return nil, err
	}
	return s, nil
}

// OwnDir is the directory for what a server keeps beside the artifacts of the default scope. All of it may be deleted,
// which costs the artifacts of other scopes.
func (s *Store) OwnDir() string { return filepath.Join(s.dir, ownDir) }

// Manage has an observer told what is stored and removed, and limits what the store takes of the disk. It
// must be called before everything else, if at all.
func (s *Store) Manage(observer cache.Observer, limits Limits) {
	s.observer, s.space.limits = observer, limits
}

// Close gives the directory back. Files that are still open may be read to their end; uploads may be
// finished only until the next Open sweeps them.
func (s *Store) Close() error { return s.lock.Unlock() }

// sweep removes the temporary files that no live process owns: all of this package's, since this
// process holds the lock now, and other programs' (the Rust server does not lock) that are old.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(filepath.Join(s.dir, tmpDir))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ownTmp) {
			info, err := entry.Info()
			if err != nil || time.Since(info.ModTime()) < foreignTmpAge {
				continue
			}
		}
		path := filepath.Join(s.dir, tmpDir, entry.Name())
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		s.log.Info("swept the temporary file of an upload that was cut short", "path", path)
	}
	return nil
}

// tmpPath returns a path for a temporary file, which nothing has.
func (s *Store) tmpPath(key artifact.Key) string {
	return filepath.Join(s.dir, tmpDir, key.String()+"-"+rand.Text()+ownTmp)
}

// createTmp creates a temporary file with a unique name.
func (s *Store) createTmp(key artifact.Key) (*os.File, error) {
	path := s.tmpPath(key)
	create := func() (*os.File, error) { return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644) }
	file, err := create()
	if err != nil && s.mendTmp(err) {
		file, err = create()
	}
	return file, err
}

// shard is the directory of a key, relative to the root of a scope.
func shard(key artifact.Key) string {
	digits := key.String()
	return digits[:2] + separator + digits[2:4]
}

const separator = string(filepath.Separator)

func (s *Store) artifactPath(key artifact.Key) string { return s.path(key, ".zst") }

func (s *Store) memoPath(key artifact.Key) string { return s.path(key, ".json") }

// path is of a file in the shard of a key. Every request needs one, and filepath.Join would make it in
// several steps.
func (s *Store) path(key artifact.Key, extension string) string {
	digits := key.String()
	return s.root + separator + digits[:2] + separator + digits[2:4] + separator + digits + extension
}

// Create implements cache.Store. It goes by the memo of what is stored and does not make one, which would
// wait for other verifications to end, this upload's among them: without a memo it is found by the commit.
func (s *Store) Create(ctx context.Context, key artifact.Key, size int64) (cache.Upload, error) {
	if stat, err := os.Lstat(s.artifactPath(key)); err == nil && stat.Mode().IsRegular() {
		if _, err := s.known(key, stat); err == nil {
			return nil, cache.ErrExists
		}
	}
	size = min(max(size, 0), math.MaxInt64-uploadOverhead) + uploadOverhead
	if err := s.space.promise(ctx, size); err != nil {
		return nil, translate(err)
	}
	file, err := s.createTmp(key)
	if err != nil {
		s.space.release(size, size)
		return nil, translate(err)
	}
	return &upload{ctx: ctx, store: s, key: key, file: file, reserved: size, promised: size}, nil
}

// known returns what is known of the artifact whose file stat describes, or why nothing is.
func (s *Store) known(key artifact.Key, stat fs.FileInfo) (artifact.Info, error) {
	if kept := s.hot.get(key.In(s.scope), stat); kept != nil {
		return kept.info, nil
	}
	return s.readMemo(key, stat)
}

// Open implements cache.Store. The bytes are in memory, with a method of io.WriterTo, or an *os.File,
// which sendfile(2) can send.
func (s *Store) Open(ctx context.Context, key artifact.Key) (io.ReadSeekCloser, artifact.Info, error) {
	if name := key.In(s.scope); s.hot.holds(name) {
		if stat, err := os.Lstat(s.artifactPath(key)); err == nil {
			if kept := s.hot.get(name, stat); kept != nil && kept.content != nil {
				return kept.open(), kept.info, nil
			}
		}
	}
	for {
		file, stat, err := s.openFile(key)
		if err != nil {
			return nil, artifact.Info{}, err
		}
		info, err := s.known(key, stat)
		if err == nil {
			return s.hot.keep(file, stat, info), info, nil
		}
		inspected, err := s.inspect(ctx, key, err)
		if err == nil && os.SameFile(inspected.stat, stat) {
			return file, inspected.info, nil
		}
		file.Close()
		if err != nil {
			return nil, artifact.Info{}, err
		}
		// The file was replaced between the two looks at it, which takes a removal and an upload in
		// that time: look again.
	}
}

// Stat implements cache.Store.
func (s *Store) Stat(ctx context.Context, key artifact.Key) (artifact.Info, error) {
	var stat fs.FileInfo
	if err := s.inShard(key, func() (err error) {
		stat, err = os.Lstat(s.artifactPath(key))
		return err
	}); err != nil {
		return artifact.Info{}, s.unopened(key, err)
	}
	if stat.Mode().IsRegular() {
		if kept := s.hot.get(key.In(s.scope), stat); kept != nil {
			return kept.info, nil
		}
		if info, err := s.readMemo(key, stat); err == nil {
			s.hot.put(&hotArtifact{stat: stat, info: info})
			return info, nil
		}
	}
	file, info, err := s.Open(ctx, key)
	if err != nil {
		return artifact.Info{}, err
	}
	return info, file.Close()
}

// openFile opens the file that is stored under a key.
func (s *Store) openFile(key artifact.Key) (*os.File, fs.FileInfo, error) {
	var file *os.File
	if err := s.inShard(key, func() (err error) {
		file, err = os.OpenFile(s.artifactPath(key), os.O_RDONLY|openFlags, 0)
		return err
	}); err != nil {
		return nil, nil, s.unopened(key, err)
	}
	stat, err := file.Stat()
	switch {
	case err != nil:
		err = translate(err)
	case !stat.Mode().IsRegular():
		err = s.setAside(key, stat, errors.New("not a regular file"))
	}
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, stat, nil
}

// inspected is what an inspection found, and in which file.
type inspected struct {
	info artifact.Info
	stat fs.FileInfo
}

// inspect makes the memo of an artifact anew; lack says what is wrong with the one it has. Many
// requests for one artifact share an inspection, which does not end when one of them does.
func (s *Store) inspect(ctx context.Context, key artifact.Key, lack error) (inspected, error) {
	done := s.inspections.DoChan(s.artifactPath(key), func() (any, error) { return s.inspectFile(key, lack) })
	select {
	case result := <-done:
		found, _ := result.Val.(inspected)
		return found, result.Err
	case <-ctx.Done():
		return inspected{}, ctx.Err()
	}
}

func (s *Store) inspectFile(key artifact.Key, lack error) (_ inspected, err error) {
	// singleflight would panic in a goroutine of its own, where nothing keeps it from ending the process.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("verify artifact %s: panic: %v\n%s", key, p, debug.Stack())
		}
	}()
	file, stat, err := s.openFile(key)
	if err != nil {
		return inspected{}, err
	}
	defer file.Close()
	if m, err := s.loadMemo(key); err == nil {
		if info, err := m.info(key.In(s.scope), stat); err == nil { // an inspection ended after the memo was looked for
			return inspected{info, stat}, nil
		}
	}
	_, info, err := s.verifier.Inspect(context.Background(), file, key)
	if unsound, ok := errors.AsType[*artifact.UnsoundError](err); ok {
		return inspected{}, s.setAside(key, stat, unsound)
	}
	if err != nil {
		return inspected{}, translate(err)
	}
	info.Scope, info.StoredAt = s.scope, stat.ModTime()
	s.log.Info("verified a stored artifact, since its memo could not be gone by", "scope", s.scope, "key", key, "memo", lack)
	// What was read may be on its way to the disk only, if it was stored by a server that does not sync.
	pinned, err := s.renewMemo(info, file.Sync() == nil)
	if err != nil {
		s.log.Warn("could not write a memo; the artifact will be verified again", "scope", s.scope, "key", key, "error", err)
	}
	s.tell(info, pinned, s.observer.Found)
	return inspected{info, stat}, nil
}

// tell tells the observer of an artifact, if it is still what is stored.
func (s *Store) tell(info artifact.Info, pinned bool, event func(cache.Stored)) {
	lock := s.aside.of(info.Key.String())
	lock.Lock()
	defer lock.Unlock()
	stat, err := os.Lstat(s.artifactPath(info.Key))
	if errors.Is(err, fs.ErrNotExist) || noDir(err) || err == nil && (stat.Size() != info.Size || !stat.ModTime().Equal(info.StoredAt)) {
		return // it was removed, and the observer knows
	}
	size := wholeBlocks(info.Size) + blockSize // if it can't be looked at, which nobody must forget it for
	if err == nil {
		size = s.diskSize(info.Key, stat)
	}
	event(cache.Stored{Info: info, DiskSize: size, Pinned: pinned})
}

// unopened returns what it means that an artifact could not be opened, and frees the key of what can
// never be an artifact.
func (s *Store) unopened(key artifact.Key, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return cache.ErrNotFound
	}
	path := s.artifactPath(key)
	stat, statErr := os.Lstat(path)
	if errors.Is(statErr, fs.ErrNotExist) || noDir(statErr) { // of the shard, which is no directory
		return cache.ErrNotFound
	}
	if statErr == nil && (!stat.Mode().IsRegular() || errors.Is(err, fs.ErrPermission) && unreadable(path)) {
		return s.setAside(key, stat, err)
	}
	return translate(err)
}

// unreadable says whether it is the file that may not be read. It may as well have been the way to it,
// for a moment, while somebody changes the permissions of all that is stored.
func unreadable(path string) bool {
	file, err := os.OpenFile(path, os.O_RDONLY|openFlags, 0)
	if err == nil {
		file.Close()
	}
	return errors.Is(err, fs.ErrPermission)
}

// Check implements cache.Store.
func (s *Store) Check(context.Context) error {
	file, err := s.createTmp(artifact.Key{})
	if err == nil {
		_, err = file.Write([]byte{0})
		file.Close()
		os.Remove(file.Name())
	}
	if err != nil {
		return fmt.Errorf("storage directory can't be written: %w", translate(err))
	}
	return nil
}

// translate wraps an error of the operating system in the error of package cache that it means.
func translate(err error) error {
	for _, means := range []struct {
		errno syscall.Errno
		fault error
	}{
		{syscall.ENOSPC, cache.ErrNoSpace},
		{syscall.EDQUOT, cache.ErrNoSpace},
		{syscall.EMFILE, cache.ErrOverloaded},
		{syscall.ENFILE, cache.ErrOverloaded},
	} {
		if errors.Is(err, means.errno) {
			return fmt.Errorf("%w: %w", means.fault, err)
		}
	}
	return err
}
