package cachetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// This file is the part of the contract that needs several at once.

func (t *storeTest) race() {
	const racers = 64
	samples := make([]sample, racers)
	uploads := make([]cache.Upload, racers)
	for i := range racers {
		samples[i] = sampleOf(Key("a"), fmt.Sprintf("content %2d", i))
		uploads[i] = t.create(Key("a"), samples[i].info.Size)
		t.write(uploads[i], samples[i].content)
	}
	infos := make([]artifact.Info, racers)
	errs := make([]error, racers)
	Together(racers, func(i int) {
		infos[i], errs[i] = uploads[i].Commit(t.ctx, samples[i].info)
		uploads[i].Abort()
	})
	winner := -1
	for i, err := range errs {
		switch {
		case err == nil && winner >= 0:
			t.Fatalf("both %d and %d committed", winner, i)
		case err == nil:
			winner = i
		case !errors.Is(err, cache.ErrExists):
			t.Errorf("Commit returned %v, want %v", err, cache.ErrExists)
		}
	}
	if winner < 0 {
		t.Fatal("nobody committed")
	}
	t.serves(samples[winner], infos[winner])
}

func (t *storeTest) manyKeys() {
	const keys = 64
	Together(keys, func(i int) {
		a := sampleOf(Key(fmt.Sprint(i)), fmt.Sprintf("content %2d", i))
		upload, err := t.store.Create(t.ctx, a.info.Key, a.info.Size)
		if err != nil {
			t.Error("Create:", err)
			return
		}
		defer upload.Abort()
		for part := a.content; len(part) > 0; part = part[min(100, len(part)):] {
			if _, err := upload.Write(part[:min(100, len(part))]); err != nil {
				t.Error("Write:", err)
				return
			}
		}
		info, err := upload.Commit(t.ctx, a.info)
		if err != nil {
			t.Error("Commit:", err)
			return
		}
		if err := served(t.ctx, t.store, a, info); err != nil {
			t.Error(err)
		}
	})
}

// seenAsAWhole looks at keys while they are committed: there is nothing, or all of it.
func (t *storeTest) seenAsAWhole() {
	for round := range 8 {
		a := sampleOf(Key(fmt.Sprint(round)), strings.Repeat("content", 10_000))
		upload := t.create(a.info.Key, a.info.Size)
		t.write(upload, a.content)
		var committed atomic.Bool
		Together(4, func(i int) {
			if i == 0 {
				if _, err := upload.Commit(t.ctx, a.info); err != nil {
					t.Error("Commit:", err)
				}
				committed.Store(true)
				return
			}
			for last := false; !last; {
				last = committed.Load()
				file, info, err := t.store.Open(t.ctx, a.info.Key)
				if errors.Is(err, cache.ErrNotFound) && !last {
					continue
				}
				if err != nil {
					t.Error("Open:", err)
					return
				}
				content, err := io.ReadAll(file)
				file.Close()
				if err != nil || !bytes.Equal(content, a.content) || info.Hash != a.info.Hash {
					t.Errorf("a commit was seen in part: %d of %d bytes, %v", len(content), len(a.content), err)
				}
			}
		})
	}
}

// quarantineRace has many uploads of a key ready when many find its artifact damaged. One upload wins,
// and nobody who means the old artifact takes the new one away.
func (t *storeTest) quarantineRace() {
	const committers, each, quarantiners = 4, 4, 16
	for round := range 20 {
		key := Key(fmt.Sprint(round))
		old := sampleOf(key, "content  0")
		upload := t.create(key, old.info.Size)
		t.write(upload, old.content)
		samples, uploads := []sample{}, []cache.Upload{}
		for i := range committers * each {
			samples = append(samples, sampleOf(key, fmt.Sprintf("content %2d", i+1)))
			uploads = append(uploads, t.create(key, samples[i].info.Size))
			t.write(uploads[i], samples[i].content)
		}
		oldInfo := t.commit(upload, old)

		var won atomic.Int64
		infos := make([]artifact.Info, len(uploads))
		Together(committers+quarantiners, func(i int) {
			if i >= committers {
				if err := t.store.Quarantine(t.ctx, oldInfo, errDamaged); err != nil {
					t.Error("Quarantine:", err)
				}
				return
			}
			for n := i * each; n < (i+1)*each; n++ {
				info, err := uploads[n].Commit(t.ctx, samples[n].info)
				if err == nil {
					won.Add(1)
					infos[n] = info
				} else if !errors.Is(err, cache.ErrExists) {
					t.Error("Commit:", err)
				}
				uploads[n].Abort()
			}
		})
		if won.Load() > 1 {
			t.Fatalf("%d uploads committed", won.Load())
		}
		for n, info := range infos {
			if !info.StoredAt.IsZero() {
				t.serves(samples[n], info)
			}
		}
		if won.Load() == 0 { // each came before the quarantine
			t.lacks(key)
		}
	}
}

func (t *storeTest) promoteRace() {
	for round := range 8 {
		key := Key(fmt.Sprint(round))
		const scopes, uploaders, promoters = 3, 4, 6
		ours, theirs := []sample{}, []sample{}
		uploads := []cache.Upload{}
		for i := range scopes {
			theirs = append(theirs, sampleOf(key, fmt.Sprintf("content %2d", i)))
			t.in(fmt.Sprint("pr-", i)).put(theirs[i])
		}
		for i := range uploaders {
			ours = append(ours, sampleOf(key, fmt.Sprintf("content %2d", 10+i)))
			uploads = append(uploads, t.create(key, ours[i].info.Size))
			t.write(uploads[i], ours[i].content)
		}
		infos := make([]artifact.Info, uploaders+promoters)
		errs := make([]error, uploaders+promoters)
		Together(uploaders+promoters, func(i int) {
			if i < uploaders {
				infos[i], errs[i] = uploads[i].Commit(t.ctx, ours[i].info)
				uploads[i].Abort()
				return
			}
			infos[i], errs[i] = t.store.Promote(t.ctx, key, Scope(fmt.Sprint("pr-", i%scopes)))
		})
		winners := 0
		for i, err := range errs {
			switch {
			case err == nil && i < uploaders:
				winners++
				t.serves(ours[i], infos[i])
			case err == nil:
				winners++
				t.serves(theirs[i%scopes], infos[i])
			case !errors.Is(err, cache.ErrExists):
				t.Errorf("the error is %v, want %v", err, cache.ErrExists)
			}
		}
		if winners != 1 {
			t.Errorf("%d won, want 1", winners)
		}
	}
}

// emptied uploads to scopes from which others remove what was uploaded: no upload fails for that.
func (t *storeTest) emptied() {
	const workers, rounds = 8, 20
	Together(workers, func(i int) {
		store := t.in(fmt.Sprint("pr-", i%2)).store
		for round := range rounds {
			a := sampleOf(Key(fmt.Sprint(i, round%3)), "content")
			upload, err := store.Create(t.ctx, a.info.Key, a.info.Size)
			if err != nil {
				t.Error("Create:", err)
				return
			}
			_, written := upload.Write(a.content)
			info, err := upload.Commit(t.ctx, a.info)
			upload.Abort()
			if err := errors.Join(written, err); err != nil {
				t.Error("Commit:", err)
				return
			}
			if err := served(t.ctx, store, a, info); err != nil {
				t.Error(err)
			}
			if _, err := store.Remove(t.ctx, a.info.Key); err != nil {
				t.Error("Remove:", err)
			}
		}
	})
}

// Together runs n functions at once, as near as that can be.
func Together(n int, run func(i int)) {
	var start, end sync.WaitGroup
	start.Add(n)
	for i := range n {
		end.Go(func() {
			start.Done()
			start.Wait()
			run(i)
		})
	}
	end.Wait()
}
