package main

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/retention"
)

// shareFlag is a number of bytes, or a part of the disk in percent.
type shareFlag struct {
	size    sizeFlag
	percent float64
}

func (s *shareFlag) String() string {
	if s.percent > 0 {
		return strconv.FormatFloat(s.percent, 'g', -1, 64) + "%"
	}
	if s.size == 0 {
		return "0"
	}
	return s.size.String()
}

func (s *shareFlag) Set(text string) error {
	if number, isPercent := strings.CutSuffix(text, "%"); isPercent {
		percent, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || !(percent >= 0 && percent <= 100) { // also if it is no number at all
			return errors.New("not a part from 0% to 100%")
		}
		*s = shareFlag{percent: percent}
		return nil
	}
	if text == "0" {
		*s = shareFlag{}
		return nil
	}
	var size sizeFlag
	if err := size.Set(text); err != nil {
		return errors.New("not 0, a size such as 100GiB, or a part of the disk such as 80%")
	}
	*s = shareFlag{size: size}
	return nil
}

func (s *shareFlag) Type() string { return "size|percent" }

// of returns the bytes that are meant on a disk of a size.
func (s *shareFlag) of(disk int64) int64 {
	if s.percent > 0 {
		return max(1, int64(float64(disk)/100*s.percent)) // 0 would be no limit
	}
	return int64(s.size)
}

// leastStorage is the least --max-storage of a server, 0 aside: less than that the index alone may take, and
// nothing could be stored. Who forgets a unit would lose what is.
const leastStorage = 8 << 20

// retentionFlags say what is kept.
type retentionFlags struct {
	maxStorage       shareFlag
	minFree          shareFlag
	maxAge           time.Duration
	keepLast         int
	scopes           scopeRetentionFlag
	quarantineMaxAge time.Duration
}

func newRetentionFlags() retentionFlags {
	return retentionFlags{minFree: shareFlag{percent: 5}, quarantineMaxAge: 30 * 24 * time.Hour}
}

func (r *retentionFlags) add(f *pflag.FlagSet) {
	r.addPolicy(f)
	f.DurationVar(&r.quarantineMaxAge, "quarantine-max-age", r.quarantineMaxAge, "time that a file is kept in quarantine; 0 for ever")
}

// addPolicy adds the flags that say which artifacts are kept.
func (r *retentionFlags) addPolicy(f *pflag.FlagSet) {
	f.Var(&r.maxStorage, "max-storage", "most that everything in the storage directory may take, in whole blocks and with uploads in flight; what was not used the longest is evicted; 0 for no limit (default 0)")
	f.Var(&r.minFree, "min-free", "least that is kept free on the disk, in the same way; 0 for all of it")
	f.DurationVar(&r.maxAge, "max-age", 0, "time that an artifact is kept after its last use; 0 for ever")
	f.IntVar(&r.keepLast, "keep-last", 0, "how many artifacts of each task of a package are kept, those that were stored last; 0 for all")
	f.Var(&r.scopes, "scope-retention", "what is kept in a scope, or with a * in all whose names begin so, besides what holds for all: 'pr-*:max-age=168h,keep-last=1'; can be given several times, in the environment with spaces in between; the name of a scope or else the longest beginning counts")
}

func (r *retentionFlags) complete() error {
	if err := checkBounds([]bound{{"keep-last", int64(r.keepLast), 0, math.MaxInt32}}); err != nil {
		return err
	}
	for flag, d := range map[string]time.Duration{"max-age": r.maxAge, "quarantine-max-age": r.quarantineMaxAge} {
		if d < 0 || d > longest {
			return usageError("--%s is %v; it must be from 0 to %v", flag, d, longest)
		}
	}
	return nil
}

// policy returns the policy for a disk of a size.
func (r *retentionFlags) policy(diskSize int64) retention.Policy {
	return retention.Policy{
		MaxStorage:       r.maxStorage.of(diskSize),
		MinFree:          r.minFree.of(diskSize),
		MaxAge:           r.maxAge,
		KeepLast:         r.keepLast,
		QuarantineMaxAge: r.quarantineMaxAge,
		Scopes:           r.scopes,
	}
}

// storage is a store with its index and retention.
type storage struct {
	*disk.Store
	index     *index.Index
	collector *retention.Collector
}

// openStorage opens the storage in a directory. The caller must close it.
func openStorage(config disk.Config, flags *retentionFlags, log *slog.Logger) (*storage, error) {
	store, err := disk.Open(config)
	if err != nil {
		return nil, err
	}
	usage, err := store.Usage()
	if err == nil {
		s := &storage{Store: store}
		if s.index, err = index.Open(index.Config{Dir: store.OwnDir(), Log: log}); err == nil {
			s.collector = retention.New(s.index, store, flags.policy(usage.Size), log)
			store.Manage(s.index, s.collector.Limits())
			return s, nil
		}
	}
	return nil, errors.Join(err, store.Close())
}

// Close gives the directory back. What runs in the background must have ended.
func (s *storage) Close() error {
	return errors.Join(s.index.Close(), s.Store.Close())
}

// run runs what belongs to a storage in the background, until ctx is done.
func (s *storage) run(ctx context.Context) {
	var background sync.WaitGroup
	background.Go(func() { s.index.Run(ctx, s.Store) })
	background.Go(func() { s.collector.Run(ctx) })
	background.Wait()
}
