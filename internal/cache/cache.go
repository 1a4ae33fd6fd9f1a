// Package cache decides what happens to artifacts. Its Cache is the one door in front of every
// store: all rules are here, and stores hold none.
//
// An upload, whichever protocol it comes through:
//
//	body ── io.Reader ── Cache.Put
//	                       ├ refuse what is known already: size, existence, before a byte is read
//	                       ├ Verifier.Admit: wait for others to end, within bounds
//	                       ├ Store.Create → an Upload that nobody can see; Abort is the only cleanup
//	                       ├ Verifier.Verify pulls: zstd → tar → hash each file → manifest and key agree
//	                       │   ↑
//	                       ├ intake: limit → count → hand on
//	                       │   ↓
//	                       ├ behind: SHA-256 → write to the Upload, meanwhile, if it is more than a buffer
//	                       └ Upload.Commit: exactly one winner, and what it stored is durable
//
// Three things can go wrong with an upload: the client hangs up, the store fails, the artifact is
// not sound. The intake remembers the first fault and its side, so that a full disk is never reported
// as a broken archive. The body is read only when the verifier asks for more, so what is found unsound
// is refused at once. The store may fail later than that, but only with bytes that were read before.
//
// A download is Cache.Get: the artifact's bytes as an open file, and what is known of it.
//
// An artifact lives in a scope, and a scope is a Store like any other: what is promised of a store holds for each
// scope of it by itself, the first write that wins among it. So scopes are not an argument of every method but
// Store.In, and what must tell artifacts of several scopes apart does so by an artifact.Name. Who asks has a
// Cache of its own, Cache.In: it writes to one scope, and reads from that one and then from others in order. What is
// found damaged in one is a miss there, and the next one is asked. What a Put is told, and when, depends on nothing
// but the scope that it writes to. Who may do what in which scope is decided elsewhere.
package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"github.com/dustin/go-humanize"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// The faults that callers tell apart, with errors.Is. An unsound artifact is an
// *artifact.UnsoundError, a bad key an artifact.ErrInvalidKey, too many at once artifact.ErrBusy. Any
// other error is the server's own.
var (
	// ErrNotFound is a miss: no sound artifact is stored under the key.
	ErrNotFound = errors.New("artifact not found")
	// ErrExists says that an artifact is stored under the key, and so never changes.
	ErrExists = errors.New("artifact already exists")
	// ErrTooLarge says that an artifact is over Config.MaxSize.
	ErrTooLarge = errors.New("artifact too large")
	// ErrSizeMismatch says that an upload had another size than was declared.
	ErrSizeMismatch = errors.New("upload has another size than was declared")
	// ErrUploadAborted says that an upload could not be read to its end; it wraps the reason.
	ErrUploadAborted = errors.New("upload aborted")
	// ErrNoSpace says that the store has no room for the artifact.
	ErrNoSpace = errors.New("no space left for the artifact")
	// ErrOverloaded says that the store cannot do this now, but may soon.
	ErrOverloaded = errors.New("overloaded")
)

// UnknownSize stands for the size of an upload that did not declare one.
const UnknownSize = -1

// Store keeps the artifacts of a scope. The test suite of package cachetest holds every store to what is promised
// here.
//
// All methods may be called concurrently, for the same key too. Errors wrap ErrNotFound, ErrExists,
// ErrNoSpace or ErrOverloaded where these fit; any other error is trouble in the store.
type Store interface {
	// In returns the store of a scope; that of the default scope is the one that a Cache is made with. It makes
	// nothing and costs nothing: a scope is there as long as there are artifacts in it.
	In(scope artifact.Scope) Store

	// Create begins an upload of size bytes, or of UnknownSize, that nobody can see before its
	// Commit. It returns ErrExists if it knows that an artifact is stored under the key, and
	// ErrNoSpace if it knows that there is no room for it. It does not wait for verifications, since
	// the upload may be what they wait for. The caller must call Abort in the end.
	Create(ctx context.Context, key artifact.Key, size int64) (Upload, error)

	// Open returns an artifact's bytes, which stay readable and the same until they are closed even
	// if the artifact is removed, and what is known of it. It returns ErrNotFound if there is none,
	// and if what is stored turns out to be damaged: the store then moves it out of the way, so that
	// the key can be uploaded again.
	Open(ctx context.Context, key artifact.Key) (io.ReadSeekCloser, artifact.Info, error)

	// Stat returns what Open does without the bytes.
	Stat(ctx context.Context, key artifact.Key) (artifact.Info, error)

	// Quarantine moves an artifact that reason found damaged out of the way, so that the key can be
	// uploaded again. It does nothing if the artifact that info describes is not stored any more.
	Quarantine(ctx context.Context, info artifact.Info, reason error) error

	// Remove removes an artifact, so that its key can be uploaded again, and returns what it took on the
	// disk. It returns ErrNotFound if there is none.
	Remove(ctx context.Context, key artifact.Key) (diskSize int64, err error)

	// Pin marks an artifact as one that retention must keep, or takes the mark away; a mark survives a
	// power cut. It returns ErrNotFound if there is no sound artifact.
	Pin(ctx context.Context, key artifact.Key, pinned bool) error

	// Promote stores an artifact of scope from under its key in this one too, and returns what is known of it
	// here: as a Commit does, but without a copy of the bytes. It returns ErrExists if an artifact is stored here,
	// and ErrNotFound if there is no sound one in from.
	Promote(ctx context.Context, key artifact.Key, from artifact.Scope) (artifact.Info, error)

	// Check returns an error that says why, if the store can't take uploads now.
	Check(ctx context.Context) error
}

// Stored is what a store holds under a key.
type Stored struct {
	// Info is what is known of the artifact. Of one that was not verified yet it is only Scope, Key, Size and
	// StoredAt.
	artifact.Info
	// DiskSize is how many bytes it takes on the disk, in whole blocks and with what the store keeps
	// beside it.
	DiskSize int64
	// Pinned says that retention must keep it.
	Pinned bool
}

// Verified says whether the artifact was found sound.
func (s Stored) Verified() bool { return s.Hash != artifact.Digest{} }

// File is what a store can say of an artifact at a glance.
type File struct {
	// Key is the key that it is stored under.
	Key artifact.Key
	// Size is the number of its bytes.
	Size int64
	// DiskSize is as in Stored.
	DiskSize int64
	// StoredAt is when it was stored, in Unix nanoseconds.
	StoredAt int64
}

// Observer is told what happens to artifacts, after it happened. It must not block.
type Observer interface {
	// Stored is told of an upload that was stored.
	Stored(Stored)
	// Found is told of an artifact that was in the store and of which something else is known now.
	Found(Stored)
	// Pinned is told of an artifact that was pinned, or unpinned.
	Pinned(name artifact.Name, pinned bool)
	// Removed is told of an artifact that was stored and is not any more, and what it took on the disk.
	Removed(name artifact.Name, diskSize int64)
	// Hit is told of a download that found an artifact.
	Hit(artifact.Name)
	// Missed is told of a download that found none in any of the scopes that it was looked for in, of which the
	// first is the one that who asked would write to.
	Missed(key artifact.Key, scopes []artifact.Scope)
	// Used is told of an artifact that was asked for without its bytes.
	Used(artifact.Name)
}

// Upload is an artifact on its way into a Store. It must not be used concurrently.
type Upload interface {
	// Write appends to the artifact. After an error the upload can only be aborted.
	io.Writer

	// Commit makes the artifact visible under its key, at once and as a whole, with what is known of
	// it; it returns that with Scope and StoredAt set. Of all uploads of a key exactly one commits; for
	// the others Commit returns ErrExists. An artifact that was committed survives a power cut. After
	// an error the artifact is not stored.
	Commit(ctx context.Context, info artifact.Info) (artifact.Info, error)

	// Abort releases what the upload holds, and leaves no trace of one that did not commit. It may
	// be called at any time, and more than once.
	Abort()
}

// Config configures a Cache.
type Config struct {
	// MaxSize is the most bytes that an artifact may have as it is uploaded, at least 1.
	MaxSize int64
	// Observer is told of downloads and misses. It may be nil.
	Observer Observer
}

// Cache stores and serves artifacts, of one scope and those that it reads from besides. It is safe for concurrent
// use.
type Cache struct {
	base     Store            // of the default scope
	scopes   []artifact.Scope // that are read from, the one that is written to first
	reads    []Store          // theirs
	verifier *artifact.Verifier
	config   Config
}

// New returns a Cache of the default scope that keeps artifacts in store after verifier found them sound.
func New(store Store, verifier *artifact.Verifier, config Config) *Cache {
	return &Cache{store, []artifact.Scope{artifact.DefaultScope}, []Store{store}, verifier, config}
}

// In returns the cache as those see it who write to scope own, and who read from it first and then from the others,
// in this order. It costs little: a request may have one of its own.
func (c *Cache) In(own artifact.Scope, others ...artifact.Scope) *Cache {
	in := &Cache{base: c.base, verifier: c.verifier, config: c.config}
	for _, scope := range append([]artifact.Scope{own}, others...) {
		if !slices.Contains(in.scopes, scope) {
			in.scopes = append(in.scopes, scope)
			in.reads = append(in.reads, c.storeOf(scope))
		}
	}
	return in
}

// storeOf returns the store of a scope.
func (c *Cache) storeOf(scope artifact.Scope) Store {
	if scope == artifact.DefaultScope {
		return c.base
	}
	return c.base.In(scope)
}

// own is the store of the scope that is written to.
func (c *Cache) own() Store { return c.reads[0] }

// find calls look with the stores that are read from, in order, until it returns something else than ErrNotFound.
func (c *Cache) find(look func(Store) error) (err error) {
	for _, store := range c.reads {
		if err = look(store); !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return err
}

// Put reads an artifact of size bytes, or of UnknownSize, from body and stores it under key, in the scope that is
// written to, if it is sound. What is known beforehand is refused before body is read. If too many uploads wait already,
// the error is artifact.ErrBusy.
func (c *Cache) Put(ctx context.Context, key artifact.Key, size int64, body io.Reader) (artifact.Info, error) {
	about := artifact.Info{Scope: c.scopes[0], Key: key}
	c.describe(ctx, key, about)
	// Create looks too, but who waits should not learn only then that it waited in vain.
	switch _, err := c.own().Stat(ctx, key); {
	case err == nil:
		return artifact.Info{}, ErrExists // whatever its size, it would not be stored
	case size > c.config.MaxSize:
		return artifact.Info{}, c.tooLarge()
	case !errors.Is(err, ErrNotFound):
		return artifact.Info{}, err
	}
	queue := begin(ctx, "queue", about)
	body, release, err := c.verifier.Admit(ctx, body)
	queue.end(about, err)
	if err != nil {
		return artifact.Info{}, err
	}
	defer release()
	upload, err := c.own().Create(ctx, key, size)
	if err != nil {
		return artifact.Info{}, err
	}
	defer upload.Abort()

	verify := begin(ctx, "verify", about)
	in := &intake{cache: c, body: body, declared: size, upload: upload, hash: sha256.New()}
	defer in.close() // before Abort, whatever happens
	contents, err := c.verifier.Verify(in, key)
	if in.close(); in.err != nil {
		err = in.err
	}
	if err != nil {
		verify.end(about, err)
		return artifact.Info{}, err
	}
	about = contents.Info(key, artifact.Digest(in.hash.Sum(nil)), in.size)
	about.Scope = c.scopes[0]
	verify.end(about, nil)
	c.describe(ctx, key, about)

	commit := begin(ctx, "commit", about)
	info, err := upload.Commit(ctx, about)
	commit.end(about, err)
	return info, err
}

// Get returns an artifact's bytes, which the caller must close, and what is known of it.
func (c *Cache) Get(ctx context.Context, key artifact.Key) (file io.ReadSeekCloser, info artifact.Info, err error) {
	err = c.find(func(store Store) (err error) {
		file, info, err = store.Open(ctx, key)
		return err
	})
	c.describe(ctx, key, info)
	if c.config.Observer != nil {
		switch {
		case err == nil:
			c.config.Observer.Hit(info.Name())
		case errors.Is(err, ErrNotFound):
			c.config.Observer.Missed(key, c.scopes)
		}
	}
	return file, info, err
}

// Stat returns what is known of an artifact. Who asks is about to use it.
func (c *Cache) Stat(ctx context.Context, key artifact.Key) (artifact.Info, error) {
	info, err := c.stat(ctx, key)
	c.describe(ctx, key, info)
	return info, err
}

// stat is Stat of an artifact that is not the only one that is asked for.
func (c *Cache) stat(ctx context.Context, key artifact.Key) (info artifact.Info, err error) {
	err = c.find(func(store Store) (err error) {
		info, err = store.Stat(ctx, key)
		return err
	})
	if err == nil && c.config.Observer != nil {
		c.config.Observer.Used(info.Name())
	}
	return info, err
}

// Missing returns those of some keys that have no artifact, each once. The others count as used.
func (c *Cache) Missing(ctx context.Context, keys []artifact.Key) ([]artifact.Key, error) {
	var missing []artifact.Key
	seen := make(map[artifact.Key]bool, len(keys))
	for _, key := range keys {
		if seen[key] {
			continue
		}
		seen[key] = true
		switch _, err := c.stat(ctx, key); {
		case errors.Is(err, ErrNotFound):
			missing = append(missing, key)
		case err != nil:
			return nil, err
		}
	}
	return missing, nil
}

// Delete removes an artifact from the scope that is written to, so that its key can be uploaded again. Downloads that
// have begun get all of it.
func (c *Cache) Delete(ctx context.Context, key artifact.Key) error {
	_, err := c.own().Remove(ctx, key)
	return err
}

// Pin keeps an artifact of the scope that is written to from being evicted, or does so no more.
func (c *Cache) Pin(ctx context.Context, key artifact.Key, pinned bool) error {
	return c.own().Pin(ctx, key, pinned)
}

// Promote stores an artifact of one scope in another too, whatever scopes this Cache is of, and returns what is known
// of it there. It is ErrExists if there is one already, and ErrNotFound if there is no sound one in from.
func (c *Cache) Promote(ctx context.Context, from, to artifact.Scope, key artifact.Key) (artifact.Info, error) {
	info, err := c.storeOf(to).Promote(ctx, key, from)
	if err == nil && c.config.Observer != nil {
		c.config.Observer.Used(info.Name()) // or it would pass for unused since it was made
	}
	return info, err
}

// Files lists the files in an artifact, in ascending order of the bytes of their paths. It verifies
// the whole artifact again; one that is found damaged is a miss from then on.
func (c *Cache) Files(ctx context.Context, key artifact.Key) (files []artifact.File, err error) {
	err = c.find(func(store Store) (err error) {
		files, err = c.filesIn(ctx, store, key)
		return err
	})
	return files, err
}

// filesIn lists the files in an artifact of one scope.
func (c *Cache) filesIn(ctx context.Context, store Store, key artifact.Key) ([]artifact.File, error) {
	file, info, err := store.Open(ctx, key)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	contents, found, err := c.verifier.Inspect(ctx, file, key)
	if err == nil && found.Hash != info.Hash {
		err = &artifact.UnsoundError{
			Rule:  artifact.RuleStream,
			Where: "the stored artifact",
			What:  fmt.Sprintf("has SHA-256 %s, but the one that was uploaded had %s", found.Hash, info.Hash),
		}
	}
	if damage, ok := errors.AsType[*artifact.UnsoundError](err); ok && damage.Rule != artifact.RuleLimit {
		if err := store.Quarantine(ctx, info, damage); err != nil {
			return nil, err
		}
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	return contents.Files, nil
}

// Ready returns an error that says why, if artifacts can't be stored now.
func (c *Cache) Ready(ctx context.Context) error {
	return c.own().Check(ctx)
}

func (c *Cache) tooLarge() error {
	return fmt.Errorf("%w: the limit is %s (%d bytes)", ErrTooLarge, humanize.IBytes(uint64(c.config.MaxSize)), c.config.MaxSize)
}

// intake is what every byte of an upload passes through on its way to verification. It remembers the
// first fault: the client's, the store's, or that the artifact is too large.
type intake struct {
	cache    *Cache
	body     io.Reader
	declared int64 // or UnknownSize
	upload   Upload

	hash   hash.Hash
	size   int64
	behind *behind // hashes and stores, if it is more than a buffer
	end    error   // of the body, once it came
	err    error
}

// Read hands on the bytes that come with the end of the body before the end, so that what is wrong
// with them is found first.
func (in *intake) Read(p []byte) (n int, err error) {
	if in.err != nil {
		return 0, in.err
	}
	if in.end == nil {
		n, in.end = in.body.Read(p)
	}
	switch {
	case n > 0:
		in.err = in.take(p[:n])
	case in.end == io.EOF && in.declared != UnknownSize && in.size != in.declared:
		in.err = fmt.Errorf("%w: %d bytes, not %d", ErrSizeMismatch, in.size, in.declared)
	case in.end != nil && in.end != io.EOF:
		in.err = fmt.Errorf("%w: %w", ErrUploadAborted, in.end)
	default:
		return 0, in.end
	}
	if in.err != nil {
		return 0, in.err
	}
	return n, nil
}

// take counts the next bytes and has them hashed and stored.
func (in *intake) take(p []byte) error {
	in.size += int64(len(p))
	if in.size > in.cache.config.MaxSize {
		return in.cache.tooLarge()
	}
	if in.behind == nil {
		if in.size <= behindSize {
			return in.store(p)
		}
		in.behind = newBehind(in.store)
	}
	if !in.behind.write(p) {
		in.close()
		return in.err
	}
	return nil
}

// store hashes and stores the next bytes.
func (in *intake) store(p []byte) error {
	in.hash.Write(p)
	_, err := in.upload.Write(p)
	return err
}

// close waits until all that was taken is stored. If it can't be, that is the first fault: the store
// has not been given more than was read before any other.
func (in *intake) close() {
	if in.behind == nil {
		return
	}
	if err := in.behind.close(); err != nil {
		in.err = err
	}
	in.behind = nil
}
