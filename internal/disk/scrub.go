package disk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// A scrub reads everything that is stored, again and again, for a disk may return other bytes than it
// was given, or none, and nobody would know before the artifact is needed. It goes from shard to shard
// so that a pass takes the whole interval, and remembers where it is, so that restarts neither begin it anew
// nor skip anything.

const (
	scrubName = "scrub.json"
	// shardCount is how many shards there can be: their four digits count them.
	shardCount = 1 << 16
	// scrubBurst is how much is read at once.
	scrubBurst = 256 << 10
	// passPause is the least time between two passes, whatever their interval.
	passPause = time.Second
)

// ScrubConfig configures a scrub.
type ScrubConfig struct {
	// Interval is the time that a pass over everything that is stored takes, if Rate allows that.
	Interval time.Duration
	// Rate is the most bytes that are read per second.
	Rate int64
}

// scrubPass is how far a pass is.
type scrubPass struct {
	StartedAt int64 `json:"started_at"` // Unix nanoseconds
	Next      int   `json:"next"`       // the number of the shard that comes next
	Artifacts int64 `json:"artifacts"`  // looked at so far
	Bytes     int64 `json:"bytes"`      // of these
	Damaged   int64 `json:"damaged"`    // of these
}

// Scrubbed is what scrubs did since the store was opened.
type Scrubbed struct {
	// Sound is how many artifacts were read and not found damaged. It is no difference of two counts, which could be
	// less than before while they change.
	Sound int64
	// Damaged is how many were, and moved to quarantine, with what was in the place of one.
	Damaged int64
	// Bytes is how many bytes the artifacts have.
	Bytes int64
	// StartedAt is when the pass that goes on began, maybe before the store was opened, or when the next one will;
	// zero if nothing is scrubbed.
	StartedAt time.Time
	// EndedAt is when the last pass over everything ended; zero if none has.
	EndedAt time.Time
}

// scrubCounts are counts for Scrubbed.
type scrubCounts struct{ sound, bytes, damaged, startedAt, endedAt atomic.Int64 }

// Scrubbed returns what scrubs did since the store was opened.
func (s *Store) Scrubbed() Scrubbed {
	c := &s.scrubbed
	scrubbed := Scrubbed{Sound: c.sound.Load(), Bytes: c.bytes.Load(), Damaged: c.damaged.Load()}
	if at := c.startedAt.Load(); at > 0 {
		scrubbed.StartedAt = time.Unix(0, at)
	}
	if at := c.endedAt.Load(); at > 0 {
		scrubbed.EndedAt = time.Unix(0, at)
	}
	return scrubbed
}

// Scrub scrubs until ctx is done. What is damaged is moved to quarantine, memos are made anew, and
// both are logged.
func (s *Store) Scrub(ctx context.Context, config ScrubConfig) {
	a := &auditor{store: s, repair: true, rate: rate.NewLimiter(rate.Limit(config.Rate), scrubBurst)}
	pass := s.readScrubPass(config.Interval)
	s.writeScrubPass(pass)
	for {
		s.scrubbed.startedAt.Store(pass.StartedAt)
		err := s.scrubRest(ctx, a, &pass, config.Interval)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.log.Error("a scrub failed; the next one begins where it stopped", "error", err)
			if !sleep(ctx, min(config.Interval, time.Hour)) {
				return
			}
			continue
		}
		level := slog.LevelInfo
		if pass.Artifacts == 0 {
			level = slog.LevelDebug
		}
		s.log.Log(ctx, level, "scrubbed everything that is stored", "artifacts", pass.Artifacts, "bytes", pass.Bytes, "damaged", pass.Damaged,
			"took", time.Since(time.Unix(0, pass.StartedAt)).Round(time.Second))
		s.scrubbed.endedAt.Store(time.Now().UnixNano())
		pass = scrubPass{StartedAt: max(pass.StartedAt+int64(config.Interval), time.Now().UnixNano())}
		s.scrubbed.startedAt.Store(pass.StartedAt)
		s.writeScrubPass(pass)
		if !sleep(ctx, max(time.Until(time.Unix(0, pass.StartedAt)), passPause)) {
			return
		}
	}
}

// scrubRest scrubs what is left of a pass.
func (s *Store) scrubRest(ctx context.Context, a *auditor, pass *scrubPass, interval time.Duration) error {
	if _, err := os.ReadDir(s.dir); err != nil {
		return err
	}
	due := func(number int) time.Duration {
		return time.Until(time.Unix(0, pass.StartedAt).Add(time.Duration(float64(interval) * float64(number) / shardCount)))
	}
	for outer := pass.Next >> 8; outer < 1<<8; outer++ {
		// Before it is known what is there, or what is stored until then would be passed over, and a store that is
		// empty would be done with at each start.
		if !sleep(ctx, due(outer<<8)) {
			return ctx.Err()
		}
		shards, err := s.shardsOfAll(fmt.Sprintf("%02x", outer))
		if err != nil {
			s.log.Error("could not scrub a directory", "path", filepath.Join(ownDir, scopesDir), "error", err)
		}
		for i, shard := range shards {
			number := shardNumber(shard.path)
			if number < pass.Next {
				continue
			}
			if !sleep(ctx, due(number)) {
				return ctx.Err()
			}
			err := shard.store.scrubShard(ctx, a, shard.path, pass)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil { // which must not keep all that is behind it from being scrubbed
				s.log.Error("could not scrub a directory", "path", shard.store.relative(shard.path), "error", err)
			}
			if i+1 == len(shards) || shardNumber(shards[i+1].path) != number {
				pass.Next = number + 1
				s.writeScrubPass(*pass)
			}
		}
	}
	s.removeEmptyScopes(ctx)
	pass.Next = shardCount
	return nil
}

// scopeShard is a shard of a scope.
type scopeShard struct {
	store *Store
	path  string
}

// shardsOfAll returns the shards of all scopes in one of the directories that hold them, by their numbers: so a pass is
// as far in all of them.
func (s *Store) shardsOfAll(outer string) ([]scopeShard, error) {
	var all []scopeShard
	stores, err := s.stores()
	for _, store := range stores {
		shards, _, err := store.shardsIn(outer)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !noDir(err) {
			s.log.Error("could not scrub a directory", "path", store.relative(outer), "error", err)
		}
		for _, shard := range shards {
			all = append(all, scopeShard{store, shard})
		}
	}
	slices.SortStableFunc(all, func(a, b scopeShard) int { return strings.Compare(a.path, b.path) })
	return all, err
}

func (s *Store) scrubShard(ctx context.Context, a *auditor, shard string, pass *scrubPass) error {
	entries, err := s.readShard(shard)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.kind == entryForeign {
			continue
		}
		finding, err := a.audit(ctx, e)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			s.log.Error("could not scrub a file", "path", e.path, "error", err)
			continue
		}
		if finding == nil {
			continue
		}
		if e.kind == entryArtifact {
			pass.Artifacts++
			pass.Bytes += finding.Size
			if finding.State != StateDamaged {
				s.scrubbed.sound.Add(1)
			}
			s.scrubbed.bytes.Add(finding.Size)
		}
		switch finding.State {
		case StateDamaged: // which was logged when it was moved
			pass.Damaged++
			s.scrubbed.damaged.Add(1)
		case StateMemo, StateOrphan:
			s.log.Warn("a scrub repaired a memo", "path", finding.Path, "problem", finding.Problem)
		case StateUnverified:
			s.log.Warn("a stored artifact is over the limits, and so could not be scrubbed in full", "path", finding.Path, "problem", finding.Problem)
		}
	}
	return nil
}

// shardNumber returns the number that a shard's four digits are.
func shardNumber(shard string) int {
	n, err := strconv.ParseUint(shard[:2]+shard[3:], 16, 16)
	if err != nil {
		panic(fmt.Sprintf("%q is not a shard", shard)) // shardsIn returns shards only
	}
	return int(n)
}

func (s *Store) scrubPath() string { return filepath.Join(s.dir, ownDir, scrubName) }

// readScrubPass returns how far the scrub is, or a new pass if that is not known.
func (s *Store) readScrubPass(interval time.Duration) scrubPass {
	var pass scrubPass
	text, err := os.ReadFile(s.scrubPath())
	if err == nil {
		err = json.Unmarshal(text, &pass)
	}
	now := time.Now().UnixNano()
	if err == nil && pass.StartedAt <= now+int64(interval) && pass.Next >= 0 && pass.Next <= shardCount {
		return pass
	}
	if err == nil {
		err = errors.New("no scrub can be there")
	}
	if !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("it is not known how far the scrub was; it begins anew", "path", s.scrubPath(), "error", err)
	}
	return scrubPass{StartedAt: now}
}

// writeScrubPass writes down how far the scrub is. What a crash loses of that is scrubbed again.
func (s *Store) writeScrubPass(pass scrubPass) {
	text, err := json.Marshal(pass)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(s.scrubPath()), 0o755)
	}
	if err == nil {
		err = os.WriteFile(s.scrubPath()+ownTmp, text, 0o644)
	}
	if err == nil {
		err = os.Rename(s.scrubPath()+ownTmp, s.scrubPath())
	}
	if err != nil {
		s.log.Warn("could not write down how far the scrub is", "error", err)
	}
}

// sleep waits, and says whether ctx is still not done.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
