package index_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// failing is a Source whose walks fail for a while.
type failing struct {
	*directory
	mu   sync.Mutex
	left int         // how many reconciliations still fail
	at   []time.Time // when each began
}

// begun returns when each reconciliation began.
func (f *failing) begun() []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.at)
}

// fail has some more fail.
func (f *failing) fail(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left = n
}

func (f *failing) Walk(scope artifact.Scope, outer string, visit func([]cache.File) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if outer == "00" {
		f.at = append(f.at, time.Now())
	}
	if outer == "ff" && f.left > 0 {
		f.left--
		return errors.New("the disk is not there")
	}
	return f.directory.Walk(scope, outer, visit)
}

// TestReconcileAgain leaves an index to itself whose store fails at first: it is tried again after a second, and from
// then on each minute, until it works. What fails behind that is a first time again. Time is the test's own.
func TestReconcileAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		r := open(t, dir)
		r.SetLimits(2, 100, 100)
		source := &failing{directory: directoryOf(stored("a", "p", "t", 5, start)), left: 3}
		ctx, stop := context.WithCancel(t.Context())
		ran := make(chan struct{})
		go func() {
			defer close(ran)
			r.Run(ctx, source)
		}()
		begins := func(want ...time.Duration) {
			t.Helper()
			all := source.begun()
			if len(all) != len(want) {
				t.Fatalf("there were %d reconciliations, want %d", len(all), len(want))
			}
			for i, at := range all {
				if got := at.Sub(all[0]).Round(100 * time.Millisecond); got != want[i] { // each takes some time itself
					t.Errorf("the reconciliation %d began after %v, want %v", i, got, want[i])
				}
			}
		}
		wait := func(d time.Duration) {
			time.Sleep(d)
			synctest.Wait()
		}
		wait(500 * time.Millisecond)
		begins(0)
		if r.Complete() {
			t.Error("the index is complete, though the store could not be read")
		}
		wait(time.Second)
		begins(0, time.Second)
		wait(55 * time.Second)
		begins(0, time.Second)
		wait(10 * time.Second)
		begins(0, time.Second, time.Minute+time.Second)
		wait(time.Minute)
		begins(0, time.Second, time.Minute+time.Second, 2*time.Minute+time.Second)
		if !r.Complete() {
			t.Error("the index is not complete, though the store can be read")
		}
		wait(time.Hour)
		begins(0, time.Second, time.Minute+time.Second, 2*time.Minute+time.Second)
		r.agrees(t, source.directory)

		// More happens at once than the index can be told.
		source.fail(1)
		for _, name := range []string{"b", "c", "d"} {
			r.Stored(stored(name, "p", "t", 5, start))
			source.set(stored(name, "p", "t", 5, start))
		}
		wait(10 * time.Second)
		if all := source.begun(); len(all) != 6 || all[5].Sub(all[4]).Round(100*time.Millisecond) != time.Second || !r.Complete() {
			t.Errorf("there were reconciliations at %v; the index is complete: %t", all, r.Complete())
		}
		stop()
		<-ran
		var levels []string
		for line := range strings.Lines(r.log.String()) {
			if _, rest, found := strings.Cut(line, "level="); found && strings.Contains(line, "could not go through what is stored") {
				level, _, _ := strings.Cut(rest, " ")
				levels = append(levels, level)
			}
		}
		if want := []string{"WARN", "ERROR", "ERROR", "WARN"}; !slices.Equal(levels, want) {
			t.Errorf("the failures are logged as %q, want %q", levels, want)
		}
	})
}
