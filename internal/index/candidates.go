package index

import (
	"context"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Candidates are artifacts that may be evicted, those first that were not used the longest.
type Candidates = iter.Seq2[Entry, error]

// firstCandidates is how many candidates are read at first. Each part has twice as many as the one before, for
// what is beyond the last ones is found anew for each, but no more than mostCandidates, which takes memory.
const firstCandidates, mostCandidates = 500, 50_000

// Candidacy says which artifacts may be evicted. What is zero says nothing. Pinned ones are never among them.
type Candidacy struct {
	// Scopes are those that they are in one of, if it is not nil, and NotScopes those that they are in none of.
	Scopes, NotScopes []artifact.Scope
	// UsedBefore is later than their last use, UsedSince is not.
	UsedBefore, UsedSince time.Time
	// BeyondLast says that as many newer ones of their task are stored in the same scope, or more. What was not
	// used since UsedSince does not count among the newer ones, unless it is pinned.
	BeyondLast int
	// Without are candidacies of which they have none.
	Without []Candidacy
}

// since is UsedSince as rows have it.
func (q Candidacy) since() int64 {
	if q.UsedSince.IsZero() {
		return math.MinInt64
	}
	return q.UsedSince.UnixNano()
}

// beyondLast selects the ids of artifacts whose task has as many newer ones in the same scope as are given: a scope
// can't push out what is in another. Only tasks that have more are looked at. Of what was not verified yet nobody knows
// the task. In the default scope, where most are, they are in the order of an index.
func (q Candidacy) beyondLast() *condition {
	const query = `SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY %s ORDER BY stored_at DESC, id DESC) AS place
		FROM artifacts o WHERE %s AND hash IS NOT NULL AND (used_at >= ? OR pinned) AND %s IN (SELECT id FROM tasks WHERE artifacts > ?)) WHERE place > ?`
	args := []any{q.since(), q.BeyondLast, q.BeyondLast}
	all := &condition{}
	if (q.Scopes == nil || slices.Contains(q.Scopes, artifact.DefaultScope)) && !slices.Contains(q.NotScopes, artifact.DefaultScope) {
		all.and(fmt.Sprintf(query, "task_id", "+o.scope = ''", "task_id"), args...)
	}
	others := &condition{}
	others.and("o.scope > ''")
	others.scopes("o", q.Scopes, q.NotScopes)
	all.and(fmt.Sprintf(query, "scope, task_id", others, "+task_id"), append(others.args, args...)...)
	return &condition{[]string{"a.id IN (" + strings.Join(all.terms, " UNION ALL ") + ")"}, all.args}
}

// Candidates returns artifacts that may be evicted. It reads them in parts, so whoever goes through them may
// take long.
func (x *Index) Candidates(ctx context.Context, q Candidacy) Candidates {
	return func(yield func(Entry, error) bool) {
		var last *Entry
		for limit := firstCandidates; ; limit = min(2*limit, mostCandidates) {
			n := 0
			for e, err := range x.candidates(ctx, q, last, limit) {
				if !yield(e, err) || err != nil {
					return
				}
				n++
				last = &e
			}
			if n < limit {
				return
			}
		}
	}
}

// candidates returns the next candidates behind the last one.
func (x *Index) candidates(ctx context.Context, q Candidacy, last *Entry, limit int) Candidates {
	c := q.condition()
	c.and("a.pinned = 0")
	if last != nil {
		c.and("(a.used_at, a.id) > (?, ?)", last.UsedAt.UnixNano(), last.id)
	}
	return x.entries(ctx, fmt.Sprintf("SELECT %s WHERE %s ORDER BY a.used_at, a.id LIMIT ?", entryColumns, c), append(c.args, limit)...)
}

func (q Candidacy) condition() *condition {
	c := &condition{}
	c.scopes("a", q.Scopes, q.NotScopes)
	if !q.UsedBefore.IsZero() {
		c.and("a.used_at < ?", q.UsedBefore.UnixNano())
	}
	if !q.UsedSince.IsZero() {
		c.and("a.used_at >= ?", q.since())
	}
	if q.BeyondLast > 0 {
		beyond := q.beyondLast()
		c.and(beyond.String(), beyond.args...)
	}
	for _, other := range q.Without {
		without := other.condition()
		c.and("NOT ("+without.String()+")", without.args...)
	}
	return c
}

// CorrectUses makes what was used later than now used now. A clock that was wrong said so, or a file's time
// did; it would not be evicted until then.
func (x *Index) CorrectUses(ctx context.Context) error {
	x.db.RLock()
	defer x.db.RUnlock()
	if x.writer == nil {
		return errClosed
	}
	now := time.Now().UnixNano()
	_, err := x.writer.ExecContext(ctx, "UPDATE artifacts SET used_at = ? WHERE used_at > ?", now, now)
	return err
}
