package server

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// maxComparisons is how many artifacts may wait to be compared. What comes on top is not.
const maxComparisons = 1000

// comparisons compare what was stored in one scope with what others have under the same key: builds should agree on
// that, and where they don't, somebody has poisoned a scope or a task does not make the same each time. That happens
// behind the answer to the upload, which must not tell what other scopes have by how long it takes.
type comparisons struct{ queue chan artifact.Info }

// add has an artifact compared that was stored.
func (c *comparisons) add(info artifact.Info) {
	select {
	case c.queue <- info:
	default: // too many wait, or nothing is compared
	}
}

// run compares, until ctx is done.
func (c *comparisons) run(ctx context.Context, m *Management, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case info := <-c.queue:
			if err := c.compare(ctx, m, log, info); err != nil && ctx.Err() == nil {
				log.Error("could not compare an artifact with those of other scopes", "scope", info.Scope, "key", info.Key, "error", err)
			}
		}
	}
}

func (c *comparisons) compare(ctx context.Context, m *Management, log *slog.Logger, info artifact.Info) (err error) {
	// In a goroutine of its own nothing else keeps a panic from ending the process.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	copies, err := m.Index.Copies(ctx, info.Key)
	if err != nil {
		return err
	}
	for _, other := range copies {
		if other.Scope == info.Scope {
			continue
		}
		stored, found, err := m.Storage.Look(other.Name())
		if err != nil {
			return err
		}
		if !found || (stored.Manifest == artifact.Digest{}) { // it was not verified since there are such digests
			continue
		}
		same := stored.Manifest == info.Manifest
		m.Index.Compared(same)
		if same {
			log.Info("an artifact agrees with that of another scope", "key", info.Key, "scope", info.Scope, "other_scope", other.Scope)
		} else {
			log.Warn("an artifact differs from that of another scope: one of the two is poisoned, or its task does not make the same each time",
				"key", info.Key, "package", info.PackageName, "task", info.TaskName, "scope", info.Scope, "other_scope", other.Scope)
		}
	}
	return nil
}
