package index

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// batch is what was told and is not written yet.
type batch struct {
	changes []change
	uses    map[artifact.Name]*use
	counted Usage
	forgot  bool
	damage  error
	more    int64 // bytes on the disk that changes add
}

func (b *batch) empty() bool {
	return len(b.changes) == 0 && len(b.uses) == 0 && b.counted == Usage{} && !b.forgot
}

// take takes what was told so far.
func (x *Index) take() batch {
	x.mu.Lock()
	defer x.mu.Unlock()
	b := batch{x.pending, x.uses, x.counted, x.forgot, x.damage, x.more}
	x.pending, x.counted, x.forgot, x.damage = nil, Usage{}, false, nil
	if len(x.uses) <= x.maxUses {
		x.uses = map[artifact.Name]*use{}
		return b
	}
	b.uses = make(map[artifact.Name]*use, x.maxUses)
	for name, u := range x.uses {
		b.uses[name] = u
		delete(x.uses, name)
		if len(b.uses) == x.maxUses {
			break
		}
	}
	return b
}

// giveBack puts a batch that could not be written before what was told since.
func (x *Index) giveBack(b batch) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.counted.add(b.counted)
	x.pending = append(b.changes, x.pending...)
	if len(x.pending) > x.maxPending {
		x.pending, b.forgot = x.pending[:x.maxPending], true
	}
	x.forgot = x.forgot || b.forgot
	for name, u := range b.uses {
		if now := x.uses[name]; now != nil {
			now.hits += u.hits
		} else if len(x.uses) < x.maxPending {
			x.uses[name] = u
		}
	}
}

// Flush writes what was told so far. What can't be written is kept for the next time.
func (x *Index) Flush(ctx context.Context) error { return x.flush(ctx, nil) }

// flush is Flush that rests in between.
func (x *Index) flush(ctx context.Context, rest *rest) error {
	x.flushing.Lock()
	defer x.flushing.Unlock()
	b := x.take()
	err := b.damage
	if err == nil {
		err = x.gone()
	}
	if err == nil {
		err = x.write(ctx, b, rest)
	}
	if damaged(err) || errors.Is(err, ErrUnavailable) {
		if err = x.reopen(err); err == nil {
			err = x.write(ctx, b, rest)
		}
	}
	if err != nil {
		x.giveBack(b)
		return fmt.Errorf("write to the index: %w", err)
	}
	x.written(ctx, b)
	if b.forgot {
		x.lose()
	}
	return nil
}

// reopen opens a database that could not be opened before, or replaces one that is damaged.
func (x *Index) reopen(reason error) error {
	x.db.Lock()
	defer x.db.Unlock()
	switch {
	case x.closed:
		return reason
	case damaged(reason):
		return x.beginAnew(reason)
	default:
		return x.open()
	}
}

// written sums up anew what is on the disk, now that a batch is written.
func (x *Index) written(ctx context.Context, b batch) {
	x.db.RLock()
	defer x.db.RUnlock()
	if x.writer == nil {
		return
	}
	size, err := x.sum(ctx)
	own := x.measure()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ownSize = own
	x.more -= b.more
	switch {
	case err != nil:
		x.diskSize += b.more
	case x.complete.Load():
		x.diskSize = size
	default: // it has not counted all yet
		x.diskSize = max(x.diskSize+b.more, size)
	}
}

// write writes a batch in one transaction.
func (x *Index) write(ctx context.Context, b batch, rest *rest) (err error) {
	x.db.RLock()
	defer x.db.RUnlock()
	if x.writer == nil {
		return errClosed
	}
	if b.empty() {
		return nil
	}
	tx, err := x.writer.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			tx.Rollback()
		}
	}()
	w := &writing{ctx: ctx, tx: tx, statements: map[string]*sql.Stmt{}, tasks: map[task]int64{}, maxIdleTasks: x.maxIdleTasks}
	for _, c := range b.changes {
		if err := errors.Join(w.change(c), rest.pause()); err != nil {
			return err
		}
	}
	for name, u := range b.uses {
		if err := errors.Join(w.use(name, u), rest.pause()); err != nil {
			return err
		}
	}
	u := b.counted
	if err := w.do(`UPDATE state SET hits = hits + ?, misses = misses + ?, stored = stored + ?, evicted = evicted + ?,
		evicted_disk_size = evicted_disk_size + ?, agreed = agreed + ?, differed = differed + ?`,
		u.Hits, u.Misses, u.Stored, u.Evicted, u.EvictedDiskSize, u.Agreed, u.Differed); err != nil {
		return err
	}
	if b.forgot {
		if err := w.do("UPDATE state SET complete = 0"); err != nil {
			return err
		}
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, name := range w.unknown {
		x.doubt(name)
	}
	return nil
}

// task is a task of a package.
type task struct{ packageName, taskName string }

// writing is a transaction.
type writing struct {
	ctx        context.Context
	tx         *sql.Tx
	statements map[string]*sql.Stmt // prepared so far
	tasks      map[task]int64       // ids
	unknown    []artifact.Name      // used, and without a row

	maxIdleTasks int
}

func (w *writing) prepare(query string) (*sql.Stmt, error) {
	if s := w.statements[query]; s != nil {
		return s, nil
	}
	s, err := w.tx.PrepareContext(w.ctx, query)
	if err == nil {
		w.statements[query] = s
	}
	return s, err
}

func (w *writing) do(query string, args ...any) error {
	s, err := w.prepare(query)
	if err == nil {
		_, err = s.ExecContext(w.ctx, args...)
	}
	return err
}

// get returns a number, or false if there is no row.
func (w *writing) get(query string, args ...any) (n int64, found bool, err error) {
	s, err := w.prepare(query)
	if err != nil {
		return 0, false, err
	}
	err = s.QueryRowContext(w.ctx, args...).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, nil
	}
	return n, err == nil, err
}

func (w *writing) change(c change) error {
	scope, key := columns(c.stored.Name())
	switch c.kind {
	case changePinned:
		return w.do("UPDATE artifacts SET pinned = ? WHERE scope = ? AND key = ?", c.stored.Pinned, scope, key)
	case changeRemoved:
		return w.do("DELETE FROM artifacts WHERE scope = ? AND key = ?", scope, key)
	case changeEvicted:
		return w.do("UPDATE tasks SET evicted = evicted + 1, evicted_disk_size = evicted_disk_size + ? WHERE package = ? AND task = ?",
			c.stored.DiskSize, c.stored.PackageName, c.stored.TaskName)
	}
	id, err := w.task(task{c.stored.PackageName, c.stored.TaskName})
	if err != nil {
		return err
	}
	if c.kind == changeStored {
		if err := w.do("UPDATE tasks SET stored = stored + 1, misses = misses + ? WHERE id = ?", c.misses, id); err != nil {
			return err
		}
	}
	return w.upsert(c, id)
}

// upsert writes an artifact's row. One that was only found was used before by what its row says.
func (w *writing) upsert(c change, task int64) error {
	query := `INSERT INTO artifacts (scope, key, hash, size, uncompressed_size, files, task_id, command, created_at, stored_at, used_at, uses, disk_size, pinned)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?)
		ON CONFLICT (scope, key) DO UPDATE SET hash = excluded.hash, size = excluded.size, uncompressed_size = excluded.uncompressed_size,
			files = excluded.files, task_id = excluded.task_id, command = excluded.command, created_at = excluded.created_at,
			stored_at = excluded.stored_at, disk_size = excluded.disk_size, pinned = excluded.pinned`
	if c.kind == changeStored {
		query += ", used_at = excluded.used_at, uses = 0"
	} else {
		query += ", used_at = max(used_at, excluded.used_at)"
	}
	s := c.stored
	var hash []byte
	if s.Verified() {
		hash = s.Hash[:]
	}
	created := s.CreatedAt.Unix()
	if s.CreatedAt.IsZero() {
		created = 0
	}
	scope, key := columns(s.Name())
	return w.do(query, scope, key, hash, s.Size, s.UncompressedSize, s.FileCount, task, s.Command, created,
		s.StoredAt.UnixNano(), s.StoredAt.UnixNano(), s.DiskSize, s.Pinned)
}

// task returns the id of a task, which it makes if there is none.
func (w *writing) task(t task) (int64, error) {
	if id, known := w.tasks[t]; known {
		return id, nil
	}
	id, found, err := w.get("SELECT id FROM tasks WHERE package = ? AND task = ?", t.packageName, t.taskName)
	if err == nil && !found {
		if id, _, err = w.get("INSERT INTO tasks (package, task) VALUES (?, ?) RETURNING id", t.packageName, t.taskName); err == nil {
			err = w.do("DELETE FROM tasks WHERE artifacts = 0 AND id <= ?", id-int64(w.maxIdleTasks))
		}
	}
	if err == nil {
		w.tasks[t] = id
	}
	return id, err
}

// use writes how an artifact was used. If it has no row, somebody put it there behind the server's back.
func (w *writing) use(name artifact.Name, u *use) error {
	scope, key := columns(name)
	id, found, err := w.get("UPDATE artifacts SET used_at = max(used_at, ?), uses = uses + ? WHERE scope = ? AND key = ? RETURNING task_id",
		u.at, u.hits, scope, key)
	if err == nil && !found {
		w.unknown = append(w.unknown, name)
	}
	if err != nil || !found || u.hits == 0 {
		return err
	}
	return w.do("UPDATE tasks SET hits = hits + ? WHERE id = ?", u.hits, id)
}

// Run writes what the index is told, in batches, and reconciles the index with a source when it has to,
// until ctx is done.
func (x *Index) Run(ctx context.Context, source Source) {
	reconciled := make(chan struct{})
	go func() {
		defer close(reconciled)
		x.reconcileWhenLost(ctx, source)
	}()
	defer func() { <-reconciled }()
	ticker := time.NewTicker(flushInterval)
	defer ticker.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-x.full:
		}
		err := x.attend(context.WithoutCancel(ctx), source)
		if err != nil && !failing {
			x.config.Log.Error("could not write to the index; it is tried again every second", "path", x.path(), "error", err)
		}
		if err == nil && failing {
			x.config.Log.Info("the index can be written again", "path", x.path())
		}
		failing = err != nil
	}
}

// attend writes what was told, and looks up what is in doubt.
func (x *Index) attend(ctx context.Context, source Source) (err error) {
	// In a goroutine of its own nothing else keeps a panic from ending the process.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if err := x.Flush(ctx); err != nil {
		return err
	}
	x.mu.Lock()
	doubts := x.doubts
	x.doubts = map[artifact.Name]bool{}
	x.mu.Unlock()
	for name := range doubts {
		// Most misses are of what was never there.
		var known bool
		scope, key := columns(name)
		if err := x.rows(ctx, "SELECT 1 FROM artifacts WHERE scope = ? AND key = ?", []any{scope, key}, func(func(...any) error) (bool, error) {
			known = true
			return false, nil
		}); err != nil {
			return err
		}
		_, stored, err := source.Look(name)
		if err == nil && stored != known {
			_, err = x.Recheck(source, name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
