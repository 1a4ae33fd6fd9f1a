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
	"strconv"
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

// Scrub scrubs until ctx is done. What is damaged is moved to quarantine, memos are made anew, and
// both are logged.
func (s *Store) Scrub(ctx context.Context, config ScrubConfig) {
	a := &auditor{store: s, repair: true, rate: rate.NewLimiter(rate.Limit(config.Rate), scrubBurst)}
	pass := s.readScrubPass(config.Interval)
	s.writeScrubPass(pass)
	for {
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
		pass = scrubPass{StartedAt: max(pass.StartedAt+int64(config.Interval), time.Now().UnixNano())}
		s.writeScrubPass(pass)
		if !sleep(ctx, max(time.Until(time.Unix(0, pass.StartedAt)), passPause)) {
			return
		}
	}
}

// scrubRest scrubs what is left of a pass.
func (s *Store) scrubRest(ctx context.Context, a *auditor, pass *scrubPass, interval time.Duration) error {
	outers, _, err := s.shardsIn("")
	if err != nil {
		return err
	}
	for _, outer := range outers {
		shards, _, err := s.shardsIn(outer)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			s.log.Error("could not scrub a directory", "path", outer, "error", err)
			continue
		}
		for _, shard := range shards {
			number := shardNumber(shard)
			if number < pass.Next {
				continue
			}
			due := time.Unix(0, pass.StartedAt).Add(time.Duration(float64(interval) * float64(number) / shardCount))
			if !sleep(ctx, time.Until(due)) {
				return ctx.Err()
			}
			err := s.scrubShard(ctx, a, shard, pass)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil { // which must not keep all that is behind it from being scrubbed
				s.log.Error("could not scrub a directory", "path", shard, "error", err)
			}
			pass.Next = number + 1
			s.writeScrubPass(*pass)
		}
	}
	pass.Next = shardCount
	return nil
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
		}
		switch finding.State {
		case StateDamaged: // which was logged when it was moved
			pass.Damaged++
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
