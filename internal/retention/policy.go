package retention

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
)

// Reason is why an artifact is removed.
type Reason int

const (
	// MaxAge says that it was not used for longer than Policy.MaxAge.
	MaxAge Reason = iota + 1
	// KeepLast says that its task has Policy.KeepLast newer ones.
	KeepLast
	// MaxStorage says that everything takes more than Policy.MaxStorage, and that this was not used the longest.
	MaxStorage
	// MinFree says that less than Policy.MinFree is free, and that this was not used the longest.
	MinFree
)

// String returns the name of the flag that set it.
func (r Reason) String() string {
	return [...]string{"", "max-age", "keep-last", "max-storage", "min-free"}[r]
}

// Policy says what is kept. What is zero has no limit.
type Policy struct {
	// MaxStorage is the most bytes on the disk that everything in the storage directory may take.
	MaxStorage int64
	// MinFree is the least bytes that may be free on the file system.
	MinFree int64
	// MaxAge is how long an artifact is kept after its last use.
	MaxAge time.Duration
	// KeepLast is how many artifacts of each task are kept, those that were stored last.
	KeepLast int
	// QuarantineMaxAge is how long files are kept in quarantine.
	QuarantineMaxAge time.Duration
	// Scopes are the policies of scopes. Of those that match a scope, the one that names it counts, or else the one with
	// the longest pattern; none that matches is as one without limits.
	Scopes []ScopePolicy
}

// ScopePolicy says what is kept in some scopes. What is zero has no limit of its own.
type ScopePolicy struct {
	// Pattern is the name of a scope, or with a * at its end the beginning of names.
	Pattern string
	// MaxAge and KeepLast are as in Policy.
	MaxAge   time.Duration
	KeepLast int
}

// CheckPattern returns an error that says what is wrong with a ScopePolicy.Pattern, if no scope can match it.
func CheckPattern(pattern string) error {
	name := pattern
	if prefix, wild := strings.CutSuffix(pattern, "*"); wild {
		name = prefix + "x" // as a scope with the shortest name may be called, but for the * itself
	}
	if _, err := artifact.ParseScope(name); err != nil {
		return fmt.Errorf("%q is neither the name of a scope nor the beginning of names with a * behind it: %w", pattern, err)
	}
	return nil
}

// rank says how closely a policy matches a scope: more is closer, and -1 not at all.
func (p ScopePolicy) rank(scope artifact.Scope) int {
	name := scope.String()
	prefix, wild := strings.CutSuffix(p.Pattern, "*")
	switch {
	case p.Pattern == name:
		return math.MaxInt
	case wild && strings.HasPrefix(name, prefix):
		return len(prefix)
	}
	return -1
}

// group is some scopes and what is kept in them.
type group struct {
	scopes, notScopes []artifact.Scope // as in index.Candidacy
	maxAge            time.Duration
	keepLast          int
}

// stricter returns the smaller of two limits, of which 0 is none.
func stricter[T cmp.Ordered](a, b T) T {
	var none T
	if a == none || b != none && b < a {
		return b
	}
	return a
}

// groups returns the scopes that there are, in groups of those whose artifacts are kept in the same way. The last one is
// that of all scopes without a policy of their own, also of those that are to come.
func (p Policy) groups(scopes []index.ScopeSums) []group {
	all := group{maxAge: p.MaxAge, keepLast: p.KeepLast}
	groups := make([]group, len(p.Scopes))
	for i, own := range p.Scopes {
		groups[i] = group{maxAge: stricter(p.MaxAge, own.MaxAge), keepLast: stricter(p.KeepLast, own.KeepLast)}
	}
	for _, s := range scopes {
		closest, rank := -1, -1
		for i, own := range p.Scopes {
			if r := own.rank(s.Scope); r > rank {
				closest, rank = i, r
			}
		}
		if closest >= 0 && (groups[closest].maxAge != all.maxAge || groups[closest].keepLast != all.keepLast) {
			groups[closest].scopes = append(groups[closest].scopes, s.Scope)
			all.notScopes = append(all.notScopes, s.Scope)
		}
	}
	groups = slices.DeleteFunc(groups, func(g group) bool { return len(g.scopes) == 0 })
	return append(groups, all)
}

// beyond returns which artifacts of the group are too old at a time, and which are beyond the last ones of their task;
// each is nil if that has no limit. What is too old does not count among the last ones.
func (g group) beyond(now time.Time) (old, last *index.Candidacy) {
	both := index.Candidacy{Scopes: g.scopes, NotScopes: g.notScopes}
	var since time.Time
	if g.maxAge > 0 {
		since = now.Add(-g.maxAge)
		old = new(both)
		old.UsedBefore = since
	}
	if g.keepLast > 0 {
		last = new(both)
		last.BeyondLast, last.UsedSince = g.keepLast, since
	}
	return old, last
}

// target returns how many bytes of room are enough, if there is less than the low mark.
func (p Policy) target(u disk.Usage) int64 {
	u.Room, _ = p.room(u)
	if capacity := u.Capacity(); u.Room < capacity/lowShare {
		return capacity / enoughShare
	}
	return 0
}

// room is how many bytes more may be used, and what forbids to use more than that. It is negative if too
// much is used. Nothing is evicted for a full disk if none of it must be free.
func (p Policy) room(u disk.Usage) (int64, Reason) {
	room, reason := int64(unlimited), Reason(0)
	if p.MinFree > 0 {
		room, reason = u.Free-p.MinFree, MinFree
	}
	if p.MaxStorage > 0 && p.MaxStorage-u.Used < room {
		room, reason = p.MaxStorage-u.Used, MaxStorage
	}
	return room, reason
}
