package disk

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// State is what an audit found of a file in the storage directory.
type State string

const (
	// StateSound is an artifact that is sound and as it was uploaded.
	StateSound State = "sound"
	// StateUnverified is an artifact over the limits as they are now. It is as it was uploaded, if it
	// has a memo; without one it is a miss.
	StateUnverified State = "unverified"
	// StateMemo is a sound artifact whose memo is missing or wrong. It is served after it was verified
	// again.
	StateMemo State = "memo"
	// StateDamaged is an artifact that is not as it was uploaded, or can't be read; or something else
	// where one belongs.
	StateDamaged State = "damaged"
	// StateMissing is a key that was asked for and has no artifact.
	StateMissing State = "missing"
	// StateOrphan is a memo without an artifact.
	StateOrphan State = "orphan"
	// StateUnread is what could not be looked at: a directory that can't be read, or an artifact when
	// the operating system failed.
	StateUnread State = "unread"
	// StateForeign is what no server put there. It is in nobody's way.
	StateForeign State = "foreign"
)

// Finding is what an audit found of one artifact, or of a file that is none.
type Finding struct {
	// Path is relative to the storage directory.
	Path string
	// Scope is the scope of the artifact.
	Scope artifact.Scope
	// Key is the zero Key if the file is no artifact and no memo.
	Key artifact.Key
	// Size is the number of bytes of the artifact, 0 if the file is none.
	Size int64
	// State is what was found.
	State State
	// Problem says what is wrong. It is nil if the artifact is sound.
	Problem error
	// Repaired says that it is wrong no more: what was damaged is in quarantine, so that its key is
	// free, and memos are made anew.
	Repaired bool
}

// Wrong says whether something is wrong that a server would have to make good, or may be.
func (f *Finding) Wrong() bool {
	switch f.State {
	case StateMemo, StateDamaged, StateMissing, StateOrphan, StateUnread:
		return true
	default:
		return false
	}
}

const (
	// busyPause is how long an audit waits when there is no memory for an artifact.
	busyPause = time.Second
	// memoPause is how long the audit of a new artifact waits for its memo.
	memoPause = time.Second
)

// auditor looks at what is stored.
type auditor struct {
	store  *Store // of the scope of what is looked at
	repair bool
	// rate bounds the bytes per second that are read.
	rate *rate.Limiter
}

// read reads a file at the audit's rate, until ctx is done.
func (a *auditor) read(ctx context.Context, file *os.File) io.Reader {
	return &pacedReader{ctx, file, a.rate}
}

type pacedReader struct {
	ctx  context.Context
	r    io.Reader
	rate *rate.Limiter
}

func (p *pacedReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b[:min(len(b), p.rate.Burst())])
	if waited := p.rate.WaitN(p.ctx, n); waited != nil {
		return 0, waited
	}
	return n, err
}

// shardEntry is one file in a shard: an artifact, a memo without one, or something else.
type shardEntry struct {
	store   *Store // of its scope
	key     artifact.Key
	path    string // relative to the storage directory
	size    int64
	kind    entryKind
	problem error // of entryUnread: why it could not be read
}

type entryKind int

const (
	entryArtifact entryKind = iota
	entryMemo
	entryForeign
	entryMissing
	entryUnread
)

// readShard returns what is in a shard, in ascending order of names. Memos of artifacts are not named.
func (s *Store) readShard(shard string) ([]shardEntry, error) {
	entries, err := os.ReadDir(filepath.Join(s.root, shard))
	if err != nil {
		return nil, err
	}
	var found []shardEntry
	artifacts := map[artifact.Key]bool{}
	for _, entry := range entries {
		e := shardEntry{store: s, path: s.relative(shard, entry.Name()), kind: entryForeign}
		extension := filepath.Ext(entry.Name())
		if key, ok := keyIn(shard, strings.TrimSuffix(entry.Name(), extension)); ok {
			switch extension {
			case ".zst":
				e.key, e.kind = key, entryArtifact
				artifacts[key] = true
				if info, err := entry.Info(); err == nil && info.Mode().IsRegular() {
					e.size = info.Size()
				}
			case ".json":
				e.key, e.kind = key, entryMemo
			}
		}
		found = append(found, e)
	}
	kept := found[:0]
	for _, e := range found {
		if e.kind != entryMemo || !artifacts[e.key] {
			kept = append(kept, e)
		}
	}
	return kept, nil
}

// keyIn returns the key that a file name in a shard is made of.
func keyIn(inShard, digits string) (artifact.Key, bool) {
	key, err := artifact.ParseKey(digits)
	return key, err == nil && key.String() == digits && shard(key) == inShard
}

// shardsIn returns the directories in the root of the scope that hold shards, in ascending order, or if
// outer is one of them the shards in it; and what is there beside them.
func (s *Store) shardsIn(outer string) (shards, foreign []string, err error) {
	entries, err := os.ReadDir(filepath.Join(s.root, outer))
	if err != nil {
		return nil, nil, err
	}
	for _, entry := range entries {
		path := filepath.Join(outer, entry.Name())
		switch {
		case isShardName(entry.Name()) && (entry.IsDir() || isDir(filepath.Join(s.root, path))):
			shards = append(shards, path)
		case outer == "" && s.scope == artifact.DefaultScope && (entry.Name() == tmpDir || entry.Name() == ownDir || entry.Name() == lockName):
		default:
			foreign = append(foreign, path)
		}
	}
	return shards, foreign, nil
}

// isDir follows a symbolic link, as the way to an artifact does.
func isDir(path string) bool {
	stat, err := os.Stat(path)
	return err == nil && stat.IsDir()
}

func isShardName(name string) bool {
	return len(name) == 2 && strings.Trim(name, "0123456789abcdef") == ""
}

// audit looks at one entry of a shard. It returns nil if there is nothing any more, and an error only
// if it could not look. If there is no memory for the artifact now, it waits.
func (a *auditor) audit(ctx context.Context, e shardEntry) (*Finding, error) {
	a = &auditor{store: e.store, repair: a.repair, rate: a.rate}
	for {
		finding, err := a.auditNow(ctx, e)
		if !errors.Is(err, artifact.ErrBusy) {
			return finding, err
		}
		if !sleep(ctx, busyPause) {
			return nil, ctx.Err()
		}
	}
}

func (a *auditor) auditNow(ctx context.Context, e shardEntry) (_ *Finding, err error) {
	// A scrub runs in a goroutine of its own, where nothing else keeps a panic from ending the process.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	f := &Finding{Path: e.path, Scope: e.store.scope, Key: e.key, Size: e.size}
	switch e.kind {
	case entryForeign:
		f.State, f.Problem = StateForeign, errors.New("is not a server's")
		return f, nil
	case entryMissing:
		f.State, f.Problem = StateMissing, errors.New("is not stored")
		return f, nil
	case entryUnread:
		f.State, f.Problem = StateUnread, e.problem
		return f, nil
	case entryMemo:
		return a.auditMemo(f)
	default:
		return a.auditArtifact(ctx, f)
	}
}

func (a *auditor) auditMemo(f *Finding) (*Finding, error) {
	// An upload that commits just now has linked its artifact before it writes the memo.
	if _, err := os.Lstat(a.store.artifactPath(f.Key)); !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f.State, f.Problem = StateOrphan, errors.New("is a memo without an artifact")
	if a.repair {
		path := filepath.Join(a.store.dir, f.Path)
		err := os.Remove(path)
		if err != nil && isDir(path) { // what is in it may be dear to somebody
			err = a.store.quarantine(path, f.Problem)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		f.Repaired = true
	}
	return f, nil
}

func (a *auditor) auditArtifact(ctx context.Context, f *Finding) (*Finding, error) {
	s := a.store
	stat, err := os.Lstat(s.artifactPath(f.Key))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // removed since the shard was read
	}
	if err != nil {
		return nil, err
	}
	if !stat.Mode().IsRegular() {
		return a.damaged(f, stat, errors.New("is not a regular file"))
	}
	file, err := os.OpenFile(s.artifactPath(f.Key), os.O_RDONLY|openFlags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return a.damaged(f, stat, err)
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if stat, err = file.Stat(); err != nil {
		return nil, err
	}
	f.Size = stat.Size()
	known, memo, lack := a.memo(f.Key, stat)

	_, info, err := s.verifier.InspectNow(ctx, a.read(ctx, file), f.Key)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if errors.Is(err, artifact.ErrBusy) {
		return nil, err
	}
	if unsound, ok := errors.AsType[*artifact.UnsoundError](err); ok && unsound.Rule == artifact.RuleLimit {
		return a.unverified(ctx, f, file, known, lack, unsound)
	}
	if err != nil { // also of reading, for nobody else can read it either
		return a.damaged(f, stat, err)
	}
	info.Scope, info.StoredAt = s.scope, stat.ModTime()
	if lack != nil {
		// A server writes it behind the artifact, and may be about to.
		if !a.repair && time.Since(stat.ModTime()) < time.Minute && !sleep(ctx, memoPause) {
			return nil, ctx.Err()
		}
		known, memo, lack = a.memo(f.Key, stat)
	}
	if lack == nil && known.Hash != info.Hash {
		return a.damaged(f, stat, hashDiffers(info.Hash, known.Hash))
	}
	f.State = StateSound
	older := lack == nil && memo.Manifest == "" // than the digest of manifests, and nothing else is wrong with it
	if older {
		known.Manifest = info.Manifest
	}
	if lack == nil && known == info {
		if a.repair && (memo.Boot != "" || older) {
			if _, err := s.renewMemo(info, file.Sync() == nil); err != nil {
				return nil, err
			}
		}
		return f, nil
	}
	if !errors.Is(lack, errForeignMemo) { // which is as it should be
		f.State, f.Problem = StateMemo, fmt.Errorf("its memo is %w", lack)
		if lack == nil {
			f.Problem = errors.New("its memo is wrong")
		}
	}
	if a.repair {
		pinned, err := s.renewMemo(info, file.Sync() == nil)
		if err != nil {
			return nil, err
		}
		s.tell(info, pinned, s.observer.Found)
		f.Repaired = f.State == StateMemo
	}
	return f, nil
}

// memo is readMemo that also returns the memo itself.
func (a *auditor) memo(key artifact.Key, stat fs.FileInfo) (known artifact.Info, m memo, lack error) {
	m, lack = a.store.loadMemo(key)
	if lack == nil {
		known, lack = m.info(key.In(a.store.scope), stat)
	}
	return known, m, lack
}

// unverified is about an artifact over the limits, which may be what it was all the same.
func (a *auditor) unverified(ctx context.Context, f *Finding, file *os.File, known artifact.Info, lack, limit error) (*Finding, error) {
	f.State, f.Problem = StateUnverified, limit
	if lack != nil {
		return f, nil
	}
	stat, err := file.Stat()
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, a.read(ctx, file)); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return a.damaged(f, stat, err)
	}
	if hash := artifact.Digest(sum.Sum(nil)); hash != known.Hash {
		return a.damaged(f, stat, hashDiffers(hash, known.Hash))
	}
	return f, nil
}

func hashDiffers(is, was artifact.Digest) error {
	return fmt.Errorf("has SHA-256 %s, but the artifact that was uploaded had %s", is, was)
}

func (a *auditor) damaged(f *Finding, stat fs.FileInfo, reason error) (*Finding, error) {
	f.State, f.Problem = StateDamaged, reason
	if a.repair {
		if err := a.store.setAside(f.Key, stat, reason); !errors.Is(err, cache.ErrNotFound) {
			return nil, err
		}
		f.Repaired = true
	}
	return f, nil
}
