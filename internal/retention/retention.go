// Package retention decides what is not kept, and removes it.
//
//	Policy ── candidates, from the index ── each looked at and removed by the store ── the index is told
//
// What goes first: what was not used for Policy.MaxAge; then, of each task, what is beyond the KeepLast newest
// artifacts; then, until everything fits, what is in quarantine, and what was not used the longest. Pinned
// artifacts are never removed.
//
// A scope may have a MaxAge and a KeepLast of its own, which hold besides those of all: the stricter of the two counts.
// Newer artifacts of a task count only in their own scope. What must fit is everything together, whatever scope it is in.
//
// Room is made before it is needed: when less than a hundredth of what everything here may take is left,
// artifacts are evicted until it is a fiftieth, so that uploads find room without waiting. Only one that needs
// more at once waits, until that much is evicted. Downloads that have begun keep their artifact until they end.
package retention

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
)

// Store is what artifacts are removed from.
type Store interface {
	index.Source
	Evict(ctx context.Context, name artifact.Name, storedAt time.Time) (diskSize int64, err error)
	Usage() (disk.Usage, error)
	Measure()
	Quarantined() ([]disk.Quarantined, error)
	EmptyQuarantine(before time.Time, atLeast int64) (freed int64, err error)
}

const (
	// unlimited is how much room there is without a limit.
	unlimited = math.MaxInt64
	// interval is how often is looked for what is too old.
	interval = time.Minute
	// page is how many artifacts are removed at a time.
	page = 500
	// lowShare and enoughShare are the parts of what everything may take that are free when eviction begins,
	// and when it ends.
	lowShare, enoughShare = 100, 50
)

// Removal is a number of artifacts of one task that are removed for one reason.
type Removal struct {
	PackageName, TaskName string
	Reason                Reason
	// Artifacts is how many there are, and DiskSize the bytes on the disk that this frees.
	Artifacts, DiskSize int64
}

// Collector removes what a policy does not keep.
type Collector struct {
	index  *index.Index
	policy Policy
	log    *slog.Logger
	store  Store
	low    chan struct{} // told when there is little room
	tracer trace.Tracer  // of removals that no traced request asked for; nil if they are not traced
	short  bool          // Run said that there is too little, and nothing to evict
	mu     sync.Mutex    // held while artifacts are removed

	counting sync.Mutex
	removed  map[Reason]Removed
}

// Removed counts artifacts that were removed, and the bytes on the disk that this freed.
type Removed struct{ Artifacts, DiskSize int64 }

// Removed returns what was removed since the Collector was made, by the reason.
func (c *Collector) Removed() map[Reason]Removed {
	c.counting.Lock()
	defer c.counting.Unlock()
	return maps.Clone(c.removed)
}

func (c *Collector) count(reason Reason, size int64) {
	c.counting.Lock()
	defer c.counting.Unlock()
	sum := c.removed[reason]
	c.removed[reason] = Removed{sum.Artifacts + 1, sum.DiskSize + size}
}

// New returns a Collector that removes what a policy does not keep from a store with an index.
func New(x *index.Index, store Store, policy Policy, log *slog.Logger) *Collector {
	return &Collector{index: x, policy: policy, log: log, store: store, low: make(chan struct{}, 1), removed: map[Reason]Removed{MaxAge: {}, KeepLast: {}, MaxStorage: {}, MinFree: {}}}
}

// Limits returns the limits that the store needs.
func (c *Collector) Limits() disk.Limits {
	return disk.Limits{
		MaxStorage: c.policy.MaxStorage,
		MinFree:    c.policy.MinFree,
		Stored:     c.index.DiskSize,
		MakeRoom:   c.makeRoom,
		Low: func() {
			select {
			case c.low <- struct{}{}:
			default: // told already
			}
		},
		LowShare: lowShare,
	}
}

// Policy returns the policy that Run goes by.
func (c *Collector) Policy() Policy { return c.policy }

// Run removes what the policy does not keep, until ctx is done.
func (c *Collector) Run(ctx context.Context) {
	c.store.Measure()
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if err := c.tidy(ctx); err != nil && ctx.Err() == nil {
			c.log.Error("could not remove what is not to be kept; it is tried again in a minute", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			c.store.Measure()
		case <-c.low:
		}
	}
}

// tidy removes everything that the policy does not keep, and makes enough room.
func (c *Collector) tidy(ctx context.Context) (err error) {
	// In a goroutine of its own nothing else keeps a panic from ending the process.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if c.policy.QuarantineMaxAge > 0 {
		c.emptyQuarantine(time.Now().Add(-c.policy.QuarantineMaxAge), 0)
	}
	for {
		removals, left, err := c.collect(ctx, c.policy, Policy.target, page)
		c.logRemovals(removals)
		if left == some && err == nil {
			continue
		}
		if left == nothing && !c.short {
			c.warnOfLack()
		}
		c.short = left == nothing
		return err
	}
}

// warnOfLack says that there is less room than there should be, though all is evicted that may be.
func (c *Collector) warnOfLack() {
	usage, err := c.store.Usage()
	if err != nil {
		return // as was said
	}
	c.log.Warn("there is too little room, and nothing that may be evicted; uploads are refused as soon as there is none: free some of the disk, unpin artifacts, or set other limits",
		"room", usage.Room, "used", usage.Used, "max_storage", c.policy.MaxStorage, "free", usage.Free, "min_free", c.policy.MinFree)
}

// emptyQuarantine removes what is older from the quarantine, and what is needed.
func (c *Collector) emptyQuarantine(before time.Time, atLeast int64) {
	freed, err := c.store.EmptyQuarantine(before, atLeast)
	if err != nil {
		c.log.Error("could not empty the quarantine", "error", err)
	}
	if freed > 0 {
		c.log.Info("removed files from the quarantine", "disk_size", freed)
	}
}

func (c *Collector) logRemovals(removals []Removal) {
	var artifacts, size int64
	for _, r := range removals {
		c.log.Debug("evicted artifacts of a task", "package", r.PackageName, "task", r.TaskName, "reason", r.Reason, "artifacts", r.Artifacts, "disk_size", r.DiskSize)
		artifacts += r.Artifacts
		size += r.DiskSize
	}
	if artifacts > 0 {
		c.log.Info("evicted artifacts", "artifacts", artifacts, "disk_size", size)
	}
}

// makeRoom makes room for size bytes. Nothing is evicted for what can never have room.
func (c *Collector) makeRoom(ctx context.Context, size int64) error {
	var failed error // to evict something
	for {
		usage, err := c.store.Usage()
		if err != nil || usage.Room >= size {
			return err
		}
		if failed != nil {
			return failed
		}
		if most := usage.Room + c.index.ArtifactsDiskSize() + c.quarantined(); size > most {
			return fmt.Errorf("%d bytes more are needed, and there would be %d if everything was evicted", size, most)
		}
		if room, _ := c.policy.room(usage); room >= size {
			return errors.New("the disk is full, and nothing is evicted for that")
		}
		removals, left, err := c.collect(ctx, c.policy, func(Policy, disk.Usage) int64 { return size }, page)
		c.logRemovals(removals)
		if failed = err; left == nothing {
			failed = cmp.Or(err, errors.New("all that may be removed is removed"))
		}
		// Others may have had what was freed, or freed more, so look once more.
	}
}

// quarantined returns how many bytes on the disk are in quarantine.
func (c *Collector) quarantined() (size int64) {
	all, err := c.store.Quarantined()
	if err != nil {
		c.log.Error("could not look into the quarantine", "error", err)
	}
	for _, q := range all {
		size += q.DiskSize
	}
	return size
}

// Collect removes at most limit artifacts that a policy does not keep, and says whether there may be more.
func (c *Collector) Collect(ctx context.Context, policy Policy, limit int) (removals []Removal, more bool, err error) {
	removals, left, err := c.collect(ctx, policy, func(Policy, disk.Usage) int64 { return 0 }, limit)
	return removals, left == some, err
}

// left is what collect has left.
type left int

const (
	enough  left = iota // there is enough room, and nothing that is not to be kept
	some                // there may be more to remove
	nothing             // there is not enough room, and nothing more to remove
)

// collect is Collect that goes on until there is as much room as is wanted of what is used.
func (c *Collector) collect(ctx context.Context, policy Policy, wanted func(Policy, disk.Usage) int64, limit int) ([]Removal, left, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	began := time.Now()
	removals, left, err := c.remove(ctx, policy, wanted, limit)
	c.trace(ctx, began, removals, err)
	return removals, left, err
}

// remove is collect without a trace, with c.mu locked.
func (c *Collector) remove(ctx context.Context, policy Policy, wanted func(Policy, disk.Usage) int64, limit int) ([]Removal, left, error) {
	c.flush(ctx)
	usage, err := c.store.Usage()
	if err != nil {
		return nil, enough, err
	}
	room, sums := wanted(policy, usage), summary{}
	if is, _ := policy.room(usage); is < room {
		c.emptyQuarantine(time.Time{}, room-is)
	}
	failures, failed := 0, error(nil) // of removing one, and the first
	left, err := c.each(ctx, policy, limit, false, func() (int64, Reason, error) {
		usage, err := c.store.Usage()
		is, reason := policy.room(usage)
		return room - is, reason, err
	}, func(e index.Entry, reason Reason) (removed bool, err error) {
		if c.index.InUse(e.Name()) {
			return false, nil
		}
		size, err := c.store.Evict(ctx, e.Name(), e.StoredAt)
		if errors.Is(err, cache.ErrNotFound) { // which the index did not know
			if _, err = c.index.Recheck(c.store, e.Name()); err == nil {
				return false, nil
			}
		}
		if err != nil { // which must not keep others from being removed
			failures, failed = failures+1, cmp.Or(failed, err)
			return false, nil
		}
		c.index.Evicted(e, size)
		sums.add(e, reason, size)
		c.count(reason, size)
		return true, nil
	})
	if failures > 0 {
		c.log.Error("could not evict artifacts", "artifacts", failures, "error", failed)
	}
	if left != some { // or else others went instead
		err = cmp.Or(err, failed)
	}
	return sums.removals(), left, err
}

// Plan returns what Collect would remove if it had no limit.
func (c *Collector) Plan(ctx context.Context, policy Policy) ([]Removal, error) {
	c.flush(ctx)
	usage, err := c.store.Usage()
	if err != nil {
		return nil, err
	}
	quarantined, err := c.store.Quarantined()
	if err != nil {
		return nil, err
	}
	free := func(size int64) {
		usage.Used -= size
		if usage.Free < unlimited-size { // or the file system does not tell
			usage.Free += size
		}
	}
	if room, _ := policy.room(usage); room < 0 { // what is there goes first
		for _, q := range quarantined {
			free(q.DiskSize)
		}
	}
	sums := summary{}
	_, err = c.each(ctx, policy, math.MaxInt, true, func() (int64, Reason, error) {
		room, reason := policy.room(usage)
		return -room, reason, nil
	}, func(e index.Entry, reason Reason) (bool, error) {
		free(e.DiskSize)
		sums.add(e, reason, e.DiskSize)
		return true, nil
	})
	return sums.removals(), err
}

// flush lets the index know what happened last. It answers without that, too.
func (c *Collector) flush(ctx context.Context) {
	err := c.index.Flush(ctx)
	if err == nil {
		err = c.index.CorrectUses(ctx)
	}
	if err != nil && ctx.Err() == nil {
		c.log.Warn("what goes first is told by an index that is not the newest, since it can't be written", "error", err)
	}
}

// each visits artifacts that a policy does not keep, in the order in which they go, until so many are removed
// as limit says; visit says whether one is. lacking says how many bytes of room there are too few, and for what
// reason. If nothing is removed meanwhile, as planned says, what was visited for one reason is told apart from
// what is left for the next.
func (c *Collector) each(ctx context.Context, policy Policy, limit int, planned bool, lacking func() (int64, Reason, error), visit func(index.Entry, Reason) (removed bool, err error)) (left, error) {
	removed := 0
	// all visits candidates until enough are removed.
	all := func(candidates index.Candidacy, reason Reason) error {
		for e, err := range c.index.Candidates(ctx, candidates) {
			if err != nil {
				return err
			}
			gone, err := visit(e, reason)
			if err != nil {
				return err
			}
			if gone {
				removed++
			}
			if removed >= limit {
				return nil
			}
		}
		return nil
	}
	rest := index.Candidacy{}
	groups, err := c.groups(ctx, policy)
	if err != nil {
		return enough, err
	}
	now := time.Now()
	for _, g := range groups {
		old, last := g.beyond(now)
		if old != nil {
			if err := all(*old, MaxAge); err != nil || removed >= limit {
				return some, err
			}
			rest.Without = append(rest.Without, *old)
		}
		if last != nil {
			if err := all(*last, KeepLast); err != nil || removed >= limit {
				return some, err
			}
			if planned {
				rest.Without = append(rest.Without, *last)
			}
		}
	}
	lack, reason, err := lacking()
	if err != nil || lack <= 0 {
		return enough, err
	}
	for e, err := range c.index.Candidates(ctx, rest) {
		var gone bool
		if err == nil {
			gone, err = visit(e, reason)
		}
		if gone && err == nil {
			removed++
			lack, reason, err = lacking()
		}
		switch {
		case err != nil:
			return enough, err
		case lack <= 0:
			return enough, nil
		case removed >= limit:
			return some, nil
		}
	}
	return nothing, nil
}

// groups returns the groups of scopes of a policy.
func (c *Collector) groups(ctx context.Context, policy Policy) ([]group, error) {
	if len(policy.Scopes) == 0 {
		return policy.groups(nil), nil
	}
	scopes, err := c.index.Scopes(ctx)
	return policy.groups(scopes), err
}

// summary sums removals up.
type summary map[Removal]*Removal // by what is not a number

func (s summary) add(e index.Entry, reason Reason, size int64) {
	key := Removal{PackageName: e.PackageName, TaskName: e.TaskName, Reason: reason}
	sum := s[key]
	if sum == nil {
		sum = &Removal{PackageName: e.PackageName, TaskName: e.TaskName, Reason: reason}
		s[key] = sum
	}
	sum.Artifacts++
	sum.DiskSize += size
}

// removals returns the sums, most bytes first.
func (s summary) removals() []Removal {
	var all []Removal
	for _, sum := range s {
		all = append(all, *sum)
	}
	slices.SortFunc(all, func(a, b Removal) int {
		return cmp.Or(cmp.Compare(b.DiskSize, a.DiskSize), cmp.Compare(a.PackageName, b.PackageName), cmp.Compare(a.TaskName, b.TaskName), cmp.Compare(a.Reason, b.Reason))
	})
	return all
}
