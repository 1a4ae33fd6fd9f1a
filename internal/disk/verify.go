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
	// Keys are the artifacts to look at; all if there are none.
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
// repaired. What is wrong is reported; an error says what could not be looked at.
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
		dir, err := filepath.Abs(config.Dir)
		if err != nil {
			return err
		}
		s = &Store{dir: dir, verifier: config.Verifier, log: config.Log}
	}
	if config.Begin != nil {
		artifacts, bytes := 0, int64(0)
		err := s.entries(config.Keys, func(e shardEntry) error {
			if e.kind == entryArtifact {
				artifacts++
				bytes += e.size
			}
			return ctx.Err()
		})
		if err != nil {
			return err
		}
		config.Begin(artifacts, bytes)
	}

	a := &auditor{store: s, repair: config.Repair, inspect: s.verifier.Inspect, rate: rate.NewLimiter(rate.Inf, scrubBurst)}
	var reporting sync.Mutex
	audits, auditing := errgroup.WithContext(ctx)
	audits.SetLimit(runtime.GOMAXPROCS(0))
	walked := s.entries(config.Keys, func(e shardEntry) error {
		audits.Go(func() error {
			finding, err := a.audit(auditing, e)
			if err != nil {
				return fmt.Errorf("%s: %w", e.path, err)
			}
			if finding == nil {
				return nil
			}
			reporting.Lock()
			defer reporting.Unlock()
			config.Report(finding)
			return nil
		})
		return auditing.Err()
	})
	err := audits.Wait() // which says why the walk was ended, if it was
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return cmp.Or(err, walked)
}

// entries visits everything in the storage directory, or just the artifacts of some keys, until visit
// returns an error.
func (s *Store) entries(keys []artifact.Key, visit func(shardEntry) error) error {
	for _, key := range keys {
		e := shardEntry{key: key, path: filepath.Join(shard(key), filepath.Base(s.artifactPath(key))), kind: entryMissing}
		switch stat, err := os.Lstat(s.artifactPath(key)); {
		case err == nil:
			e.size, e.kind = stat.Size(), entryArtifact
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		if err := visit(e); err != nil {
			return err
		}
	}
	if len(keys) > 0 {
		return nil
	}
	outers, err := s.visitForeign("", visit)
	if err != nil {
		return err
	}
	for _, outer := range outers {
		shards, err := s.visitForeign(outer, visit)
		if err != nil {
			return err
		}
		for _, shard := range shards {
			entries, err := s.readShard(shard)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			for _, e := range entries {
				if err := visit(e); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// visitForeign visits what stands beside shards, and returns these.
func (s *Store) visitForeign(outer string, visit func(shardEntry) error) (shards []string, err error) {
	shards, foreign, err := s.shardsIn(outer)
	if errors.Is(err, fs.ErrNotExist) && outer != "" {
		return nil, nil
	}
	for _, path := range foreign {
		if err == nil {
			err = visit(shardEntry{path: path, kind: entryForeign})
		}
	}
	return shards, err
}
