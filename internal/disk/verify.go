package disk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// VerifyConfig configures Verify.
type VerifyConfig struct {
	Config
	// Keys are the artifacts to look at, in whatever scopes they are; all if there are none.
	Keys []artifact.Key
	// Repair moves what is damaged to quarantine and makes memos anew. It needs the directory for
	// itself: no server may use it.
	Repair bool
	// Begin is told how many artifacts of how many bytes there are to look at. It may be nil.
	Begin func(artifacts int, bytes int64)
	// Report is told of each artifact when it was looked at, and of all that is none, in no particular
	// order, by one goroutine at a time.
	Report func(*Finding)
}

// Verify looks at what is stored in a directory, which a server may use meanwhile if nothing is to be
// repaired. What is wrong is reported, and what could not be looked at; an error says that the
// directory could not be used at all.
func Verify(ctx context.Context, config VerifyConfig) error {
	if stat, err := os.Stat(config.Dir); err != nil {
		return err
	} else if !stat.IsDir() {
		return fmt.Errorf("%s is not a directory", config.Dir)
	}
	var s *Store
	if config.Repair {
		var err error
		if s, err = Open(config.Config); err != nil {
			return err
		}
		defer s.Close()
	} else {
		var err error
		if s, err = Peek(config.Config); err != nil {
			return err
		}
	}
	if config.Begin != nil {
		artifacts, bytes := 0, int64(0)
		s.entries(config.Keys, func(e shardEntry) bool {
			if e.kind == entryArtifact {
				artifacts++
				bytes += e.size
			}
			return ctx.Err() == nil
		})
		config.Begin(artifacts, bytes)
	}

	a := &auditor{store: s, repair: config.Repair, rate: rate.NewLimiter(rate.Inf, scrubBurst)}
	var reporting sync.Mutex
	var audits errgroup.Group
	audits.SetLimit(min(runtime.GOMAXPROCS(0), s.verifier.Slots()))
	s.entries(config.Keys, func(e shardEntry) bool {
		audits.Go(func() error {
			finding, err := a.audit(ctx, e)
			if err != nil {
				finding = &Finding{Path: e.path, Scope: e.store.scope, Key: e.key, Size: e.size, State: StateUnread, Problem: err}
			}
			if finding == nil || ctx.Err() != nil {
				return nil
			}
			reporting.Lock()
			defer reporting.Unlock()
			config.Report(finding)
			return nil
		})
		return ctx.Err() == nil
	})
	audits.Wait()
	return ctx.Err()
}

// Peek returns a Store that only looks at what is stored in a directory, which a server may use meanwhile and
// which need not exist. Of its methods only Scopes, Look and Walk may be called; they change nothing.
func Peek(config Config) (*Store, error) {
	dir, err := filepath.Abs(config.Dir)
	if err != nil {
		return nil, err
	}
	return newStore(&directory{dir: dir, verifier: config.Verifier, log: config.Log}), nil
}

// Audit reads all of a stored artifact of any scope, whatever is known of it. If it is sound, its memo is made anew where
// that is missing or wrong; if it is damaged, it is moved to quarantine. One over the limits is left alone. It
// returns nil if there is none.
func (s *Store) Audit(ctx context.Context, name artifact.Name) (*Finding, error) {
	s, key := s.in(name.Scope), name.Key
	a := &auditor{store: s, repair: true, rate: rate.NewLimiter(rate.Inf, scrubBurst)}
	return a.audit(ctx, shardEntry{store: s, key: key, path: s.relativePath(key), kind: entryArtifact})
}

// relativePath is the path of an artifact in the storage directory.
func (s *Store) relativePath(key artifact.Key) string {
	return s.relative(shard(key), filepath.Base(s.artifactPath(key)))
}

// entries visits everything in the storage directory, or just the artifacts of some keys, until visit
// returns false. What can't be read is visited as such.
func (s *Store) entries(keys []artifact.Key, visit func(shardEntry) bool) {
	stores, err := s.stores()
	if err != nil && !visit(shardEntry{store: s, path: filepath.Join(ownDir, scopesDir), kind: entryUnread, problem: err}) {
		return
	}
	if len(keys) > 0 {
		for _, key := range keys {
			if !visitKey(stores, key, visit) {
				return
			}
		}
		return
	}
	for _, store := range stores {
		if !store.entriesOfScope(visit) {
			return
		}
	}
}

// visitKey visits the artifacts of a key in all scopes, or that it is missing in all, and says whether to go on.
func visitKey(stores []*Store, key artifact.Key, visit func(shardEntry) bool) (more bool) {
	missing := true
	for _, s := range stores {
		e := shardEntry{store: s, key: key, path: s.relativePath(key)}
		switch stat, err := os.Lstat(s.artifactPath(key)); {
		case err == nil:
			e.size, e.kind = stat.Size(), entryArtifact
		case errors.Is(err, fs.ErrNotExist) || noDir(err):
			continue
		default:
			e.kind, e.problem = entryUnread, err
		}
		missing = false
		if !visit(e) {
			return false
		}
	}
	return !missing || visit(shardEntry{store: stores[0], key: key, path: stores[0].relativePath(key), kind: entryMissing})
}

// entriesOfScope visits everything in a scope, and says whether to go on.
func (s *Store) entriesOfScope(visit func(shardEntry) bool) (more bool) {
	outers, more := s.visitBeside("", visit)
	for _, outer := range outers {
		if !more {
			return false
		}
		var shards []string
		shards, more = s.visitBeside(outer, visit)
		for _, shard := range shards {
			entries, err := s.readShard(shard)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				entries = append(entries, shardEntry{store: s, path: s.relative(shard), kind: entryUnread, problem: err})
			}
			for _, e := range entries {
				if more = more && visit(e); !more {
					return false
				}
			}
		}
	}
	return more
}

// visitBeside visits what stands beside shards, and returns these and whether to go on.
func (s *Store) visitBeside(outer string, visit func(shardEntry) bool) (shards []string, more bool) {
	shards, foreign, err := s.shardsIn(outer)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !visit(shardEntry{store: s, path: cmp.Or(s.relative(outer), "."), kind: entryUnread, problem: err}) {
		return nil, false
	}
	for _, path := range foreign {
		if !visit(shardEntry{store: s, path: s.relative(path), kind: entryForeign}) {
			return nil, false
		}
	}
	return shards, true
}
