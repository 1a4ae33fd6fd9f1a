package index

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// Source is the store that an index is about.
type Source interface {
	// Scopes returns the scopes that have artifacts, the default one among them in any case.
	Scopes() ([]artifact.Scope, error)
	// Walk calls visit for the artifacts of a scope whose keys begin with the two digits outer, or for all if it is
	// empty, some at a time. If some can't be read it goes on, and returns an error in the end.
	Walk(scope artifact.Scope, outer string, visit func([]cache.File) error) error
	// Look returns what is known of an artifact without reading it, and false if none is stored. An error
	// says that nobody can tell.
	Look(name artifact.Name) (stored cache.Stored, found bool, err error)
}

const (
	// pace is the most rows and files that a reconciliation goes through in a second, on average: a million
	// artifacts in three to four minutes, and with a tenth of one processor where the index knows them.
	pace = 10_000
	// workTime is about how long it works before it rests, where it can't keep that up.
	workTime = time.Millisecond
	// restTime is the least that it rests then, so that it takes no more than about half of one processor and
	// of the disk.
	restTime = time.Millisecond
	// firstPause is how long a reconciliation that failed waits for the next one: what it met may be of a moment, as
	// when the storage is exchanged for another. retryPause is how long it waits from then on.
	firstPause, retryPause = time.Second, time.Minute
	// wholeScope is the most rows of a scope that are read at once, and so compared with what is stored in one step. Most
	// scopes have far less than the default one.
	wholeScope = 10_000
)

func (x *Index) reconcileWhenLost(ctx context.Context, source Source) {
	failed := 0 // times in a row
	for {
		select {
		case <-ctx.Done():
			return
		case <-x.lost:
		}
		x.config.Log.Info("the index may not be complete; going through what is stored, in the background", "path", x.path())
		began := time.Now()
		changed, err := x.Reconcile(ctx, source, nil)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			level, pause := slog.LevelWarn, firstPause
			if failed++; failed > 1 {
				level, pause = slog.LevelError, retryPause
			}
			x.config.Log.Log(ctx, level, "could not go through what is stored; it is tried again", "in", pause, "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
				tell(x.lost)
			}
		default:
			failed = 0
			x.config.Log.Info("the index is complete", "changed", changed, "took", time.Since(began).Round(time.Millisecond))
		}
	}
}

// Reconcile makes the index know what is stored, and nothing else, and returns how many artifacts it was
// wrong about. It goes through everything, beside whatever happens meanwhile; progress, which may be nil, is
// told after each step, of which there are 256 and one for each scope but the default one. It rests in between
// unless progress is given, since then somebody waits.
func (x *Index) Reconcile(ctx context.Context, source Source, progress func(done, of int)) (changed int64, err error) {
	// In a goroutine of its own nothing else keeps a panic from ending the process.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	lost := x.losses.Load()
	var r *rest
	if progress == nil {
		r = newRest(ctx)
	}
	var unread error // which does not keep the rest from being read
	others, err := x.otherScopes(ctx, source)
	if errors.Is(err, ErrUnavailable) {
		return 0, err
	}
	unread = err
	const outers = 1 << 8
	for i := range outers + len(others) {
		var n int64
		if i < outers {
			n, err = x.reconcileOuter(ctx, source, artifact.DefaultScope, fmt.Sprintf("%02x", i), r)
		} else {
			n, err = x.reconcileScope(ctx, source, others[i-outers], r)
		}
		changed += n
		if ctx.Err() != nil || errors.Is(err, ErrUnavailable) {
			return changed, err
		}
		unread = errors.Join(unread, err)
		if progress != nil {
			progress(i+1, outers+len(others))
		}
	}
	if err := x.Flush(ctx); err != nil {
		return changed, err
	}
	if unread != nil {
		return changed, unread
	}
	if x.losses.Load() != lost {
		return changed, errors.New("more happened meanwhile than the index could be told")
	}
	x.db.RLock()
	defer x.db.RUnlock()
	if x.writer == nil {
		return changed, errClosed
	}
	if err := x.note(ctx, "UPDATE state SET complete = 1"); err != nil {
		return changed, err
	}
	size, err := x.sum(ctx)
	if err != nil {
		return changed, err
	}
	x.mu.Lock()
	x.diskSize = size
	x.mu.Unlock()
	x.complete.Store(true)
	return changed, nil
}

// otherScopes returns the scopes but the default one that there are, or that the index knows.
func (x *Index) otherScopes(ctx context.Context, source Source) ([]artifact.Scope, error) {
	known, err := x.Scopes(ctx)
	if err != nil {
		return nil, err
	}
	all := map[artifact.Scope]bool{}
	for _, s := range known {
		all[s.Scope] = true
	}
	scopes, err := source.Scopes()
	for _, scope := range scopes {
		all[scope] = true
	}
	delete(all, artifact.DefaultScope)
	return slices.Collect(maps.Keys(all)), err
}

// reconcileScope reconciles the rows of another scope than the default one.
func (x *Index) reconcileScope(ctx context.Context, source Source, scope artifact.Scope, rest *rest) (changed int64, err error) {
	var rows int64
	name, _ := columns(artifact.Name{Scope: scope})
	if err := x.rows(ctx, "SELECT artifacts FROM scopes WHERE name = ?", []any{name}, func(scan func(...any) error) (bool, error) {
		return true, scan(&rows)
	}); err != nil {
		return 0, err
	}
	if rows <= wholeScope {
		return x.reconcileOuter(ctx, source, scope, "", rest)
	}
	for i := range 1 << 8 {
		n, failed := x.reconcileOuter(ctx, source, scope, fmt.Sprintf("%02x", i), rest)
		changed += n
		err = errors.Join(err, failed)
		if ctx.Err() != nil || errors.Is(err, ErrUnavailable) {
			break
		}
	}
	return changed, err
}

// reconcileOuter reconciles the rows of keys whose first two digits are outer, or of all if it is empty. The rows are
// read before the files: what is stored or removed since, the index is told.
func (x *Index) reconcileOuter(ctx context.Context, source Source, scope artifact.Scope, outer string, rest *rest) (changed int64, err error) {
	if err := x.flush(ctx, rest); err != nil {
		return 0, err
	}
	rows, err := x.files(ctx, scope, outer, rest)
	if err != nil {
		return 0, err
	}
	err = source.Walk(scope, outer, func(files []cache.File) error {
		for _, file := range files {
			row, known := rows[file.Key]
			delete(rows, file.Key)
			if known && row.verified && row.file == file {
				continue
			}
			was, err := x.Recheck(source, file.Key.In(scope))
			if err != nil {
				return err
			}
			if !known || row.file != file || was.Verified() {
				changed++
			}
		}
		if err := x.flushIfFull(ctx, rest); err != nil {
			return err
		}
		return rest.after(len(files))
	})
	for key := range rows {
		if _, looked := x.Recheck(source, key.In(scope)); looked != nil {
			err = errors.Join(err, looked)
			continue
		}
		changed++
		if err := errors.Join(x.flushIfFull(ctx, rest), rest.pause()); err != nil {
			return changed, err
		}
	}
	return changed, err
}

// flushIfFull flushes before so much is pending that something would be forgotten.
func (x *Index) flushIfFull(ctx context.Context, rest *rest) error {
	x.mu.Lock()
	full := len(x.pending) >= flushSize
	x.mu.Unlock()
	if !full {
		return nil
	}
	return x.flush(ctx, rest)
}

// Recheck tells the index how an artifact is now, and returns that. If the index was told something else while
// it looked, that may be newer than what was seen or older, so it looks again.
func (x *Index) Recheck(source Source, name artifact.Name) (cache.Stored, error) {
	for {
		x.mu.Lock()
		changes := x.changes
		x.mu.Unlock()
		stored, found, err := source.Look(name)
		if err != nil {
			return stored, err
		}
		if x.see(name, stored, found, changes) {
			return stored, nil
		}
	}
}

// see is told how an artifact was when the index had been told a number of changes. It returns false, and does
// nothing, if it has been told more since.
func (x *Index) see(name artifact.Name, stored cache.Stored, found bool, changes uint64) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case x.changes != changes:
		return false
	case found:
		x.add(change{kind: changeFound, stored: stored})
	default:
		x.remove(name)
	}
	return true
}

// rest bounds the part of the time that a reconciliation works, and how long it does so at a time: who waits
// for a processor meanwhile waits that long. A nil one never rests, but lets others go first.
type rest struct {
	ctx   context.Context
	ended time.Time // when it rested last
	due   time.Time // when by the pace it should be where it is
}

func newRest(ctx context.Context) *rest {
	now := time.Now()
	return &rest{ctx, now, now}
}

// pause rests if the last rest was long enough ago.
func (r *rest) pause() error { return r.after(0) }

// after is pause after n more rows or files were gone through, which keeps the pace too.
func (r *rest) after(n int) error {
	if r == nil {
		runtime.Gosched()
		return nil
	}
	now := time.Now()
	if r.due = r.due.Add(time.Duration(n) * time.Second / pace); r.due.Before(now) {
		r.due = now // what was lost is not made good for
	}
	wait := r.due.Sub(now)
	if wait < restTime {
		if now.Sub(r.ended) < workTime {
			return r.ctx.Err()
		}
		wait = restTime
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.ctx.Done():
	}
	r.ended = time.Now()
	return r.ctx.Err()
}
