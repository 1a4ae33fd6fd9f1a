package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"sync"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/disk"
)

// importFlush is how many artifacts are imported before the index writes what it was told.
const importFlush = 500

// outcome is what became of an artifact in a source.
type outcome int

const (
	outcomeTaken   outcome = iota // it was imported, or verified where it is
	outcomeExisted                // it was there already
	outcomeRefused
	outcomes // how many there are
)

// importRun is one run of import.
type importRun struct {
	source  *source
	dryRun  bool
	maxSize int64 // bytes of an artifact
	begin   progressFunc
	refused io.Writer // is told what was refused, and why

	// What is imported into.
	store *storage
	cache *cache.Cache

	mu      sync.Mutex
	bar     *progress // nil until it has begun
	all     importCount
	counts  [outcomes]importCount
	foreign int64
	busy    []sourceFile // there was no memory for these while others were verified
}

// importCount counts artifacts.
type importCount struct{ artifacts, bytes int64 }

func (c *importCount) add(size int64) {
	c.artifacts++
	c.bytes += size
}

// plan counts what would be imported, from what can be said without reading an artifact.
func (r *importRun) plan(ctx context.Context, storageDir string) error {
	store, err := disk.Peek(disk.Config{Dir: storageDir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	r.bar = r.begin("counting", unknownTotal)
	r.source.walk(func(file sourceFile) bool {
		if r.notAnArtifact(file) {
			return ctx.Err() == nil
		}
		stored, found, err := store.Look(file.name())
		switch {
		case err != nil:
			r.count(file, outcomeRefused, err)
		case found && stored.Verified(), found && !r.source.own:
			r.count(file, outcomeExisted, nil)
		case !r.source.own && file.size > r.maxSize:
			r.count(file, outcomeRefused, fmt.Errorf("has %d bytes, more than --max-size, %d", file.size, r.maxSize))
		default:
			r.count(file, outcomeTaken, nil)
		}
		return ctx.Err() == nil
	})
	return ctx.Err()
}

// into imports into the storage directory that the flags name.
func (r *importRun) into(cmd *cobra.Command, flags *importFlags) (err error) {
	ctx, verifier := cmd.Context(), artifact.NewVerifier(flags.limits.limits())
	r.store, err = openStorage(disk.Config{
		Dir:      flags.storageDir,
		Verifier: verifier,
		Log:      slog.New(slog.DiscardHandler), // what there is to say is said of each artifact
	}, &flags.retention, warnings(cmd))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.store.Close()) }()
	// What was imported a moment ago must not be evicted for what comes now.
	limits := r.store.collector.Limits()
	limits.MakeRoom, limits.Low = nil, nil
	r.store.Manage(r.store.index, limits)
	r.cache = cache.New(r.store, verifier, cache.Config{MaxSize: r.maxSize})
	if err := r.store.complete(ctx, r.begin); err != nil {
		return err
	}
	if limits.MaxStorage > 0 {
		r.store.Measure()
	}
	r.source.walk(func(file sourceFile) bool {
		if file.err == nil && !file.foreign {
			r.all.add(file.size)
		}
		return ctx.Err() == nil
	})
	r.bar = r.begin("importing", r.all.bytes)
	return r.takeAll(ctx, min(runtime.GOMAXPROCS(0), verifier.Slots()))
}

// takeAll imports everything in the source, as many artifacts at once as are given. When ctx is done, those in
// progress are finished.
func (r *importRun) takeAll(ctx context.Context, atOnce int) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var taking errgroup.Group
	taking.SetLimit(atOnce)
	r.source.walk(func(file sourceFile) bool {
		if !r.notAnArtifact(file) {
			taking.Go(func() error {
				if err := r.take(ctx, file); err != nil {
					stop(err) // the next ones would fail in the same way
				}
				return nil
			})
		}
		return ctx.Err() == nil
	})
	taking.Wait()
	alone := r.busy
	r.busy = nil
	for _, file := range alone {
		if err := r.take(ctx, file); err != nil {
			return err
		}
	}
	for _, file := range r.busy { // no other was verified meanwhile
		r.count(file, outcomeRefused, artifact.ErrBusy)
	}
	return context.Cause(ctx)
}

// take imports an artifact, unless ctx is done. An error says that others can't be imported either.
func (r *importRun) take(ctx context.Context, file sourceFile) error {
	if ctx.Err() != nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	if stored, found, err := r.store.Look(file.name()); err == nil && found && stored.Verified() {
		r.count(file, outcomeExisted, nil)
		return nil
	}
	if r.source.own {
		r.verify(ctx, file)
		return nil
	}
	err := r.copy(ctx, file)
	_, unsound := errors.AsType[*artifact.UnsoundError](err)
	switch {
	case err == nil:
		r.count(file, outcomeTaken, nil)
	case errors.Is(err, cache.ErrExists):
		r.count(file, outcomeExisted, nil)
	case errors.Is(err, artifact.ErrBusy):
		r.mu.Lock()
		r.busy = append(r.busy, file)
		r.mu.Unlock()
	case errors.Is(err, errUnreadable), unsound, errors.Is(err, cache.ErrTooLarge), errors.Is(err, cache.ErrSizeMismatch), errors.Is(err, cache.ErrUploadAborted):
		r.count(file, outcomeRefused, err)
	case errors.Is(err, cache.ErrNoSpace):
		return fmt.Errorf("there is no room for more: make some, as with gc, or set other limits by --max-storage and --min-free, and run this again to continue: %w", err)
	default:
		return fmt.Errorf("could not store what is in %s: %w; run this again to continue", file.path, err)
	}
	return nil
}

// errUnreadable is wrapped by the error of a file that could not be opened.
var errUnreadable = errors.New("it can't be read")

// copy stores a copy of an artifact as if it was uploaded.
func (r *importRun) copy(ctx context.Context, file sourceFile) error {
	content, err := os.Open(file.path)
	if err != nil {
		return fmt.Errorf("%w: %w", errUnreadable, err)
	}
	defer content.Close()
	_, err = r.cache.In(file.scope).Put(ctx, file.key, file.size, content)
	return err
}

// verify verifies an artifact where it is.
func (r *importRun) verify(ctx context.Context, file sourceFile) {
	finding, err := r.store.Audit(ctx, file.name())
	switch {
	case err != nil:
		r.count(file, outcomeRefused, err)
	case finding == nil: // it is gone
	case finding.State == disk.StateSound, finding.State == disk.StateMemo:
		r.count(file, outcomeTaken, nil)
	case finding.Repaired:
		r.count(file, outcomeRefused, fmt.Errorf("%w (moved to quarantine)", finding.Problem))
	default:
		r.count(file, outcomeRefused, fmt.Errorf("%w (left where it is)", finding.Problem))
	}
}

// notAnArtifact counts what is none, or could not be looked at, and says whether it was that.
func (r *importRun) notAnArtifact(file sourceFile) bool {
	switch {
	case file.foreign:
		r.mu.Lock()
		defer r.mu.Unlock()
		r.foreign++
		return true
	case file.err != nil:
		r.count(file, outcomeRefused, file.err)
		return true
	}
	return false
}

// count counts what became of an artifact, and shows the progress.
func (r *importRun) count(file sourceFile, o outcome, reason error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts[o].add(file.size)
	var done int64
	for _, count := range r.counts {
		done += count.artifacts
	}
	if r.all.artifacts > 0 {
		r.bar.describe(fmt.Sprintf("importing %s of %s", humanize.Comma(done), countArtifacts(r.all.artifacts)))
	}
	r.bar.add(file.size)
	if reason != nil {
		r.bar.clear()
		fmt.Fprintf(r.refused, "refused  %s  %s\n", printable(file.path), printable(reason.Error()))
	}
	if r.store != nil && o == outcomeTaken && r.counts[o].artifacts%importFlush == 0 {
		r.store.index.Flush(context.Background()) // or too much would be pending; Close says what goes wrong
	}
}

// interruptedImport is interrupted for import.
func interruptedImport(err error) error {
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted; run this again to continue")
	}
	return err
}
