//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/polykit/polykit-cache/internal/client"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/load"
)

// scale measures what it costs that much is stored.
func (b *bench) scale(ctx context.Context) (lines []line, err error) {
	work := humanize.Comma(int64(b.artifacts)) + " artifacts of 1 KiB stored"
	fmt.Fprintf(b.progress, "  uploading %s artifacts\n", humanize.Comma(int64(b.artifacts)))
	dir, server, all, err := b.prepared(ctx, load.Config{Operation: load.Get, Size: 1 << 10, Artifacts: b.artifacts, Clients: 16}, "--durability", "none")
	if err != nil {
		return nil, err
	}
	if err := server.stop(); err != nil {
		return nil, err
	}
	var slowest time.Duration
	for range b.rounds {
		began := time.Now()
		if server, err = b.startServer(ctx, dir); err != nil {
			return nil, err
		}
		slowest = max(slowest, time.Since(began))
		if err := server.stop(); err != nil {
			return nil, err
		}
	}
	if server, err = b.startServer(ctx, dir); err != nil {
		return nil, err
	}
	defer func() { b.end(&err, server, dir) }()
	// The same few artifacts are asked for in both stores, so that it is what else is stored that tells.
	few := load.Config{Operation: load.Get, Size: 1 << 10, Artifacts: min(1000, b.artifacts), Clients: 4}
	emptyDir, empty, fewInEmpty, err := b.prepared(ctx, few)
	if err != nil {
		return nil, err
	}
	defer b.end(&err, empty, emptyDir)
	fewInFull := all.With(func(c *load.Config) { c.Artifacts, c.Clients = few.Artifacts, few.Clients })
	allInFull := all.With(func(c *load.Config) { c.Clients = few.Clients })
	turns, err := b.turns(ctx, b.loaded(server, fewInFull, perOperation, 0), b.loaded(empty, fewInEmpty, perOperation, 0), b.loaded(server, allInFull, perOperation, 0))
	if err != nil {
		return nil, err
	}
	resident, err := server.memory("VmRSS")
	if err != nil {
		return nil, err
	}
	p50 := func(t turn) float64 { return float64(t.p50) }
	of := func(turns []turn) string { return short(time.Duration(median(turns, p50))) }
	any := line{ratio: fmt.Sprintf("%.2f", ratio(turns[2], turns[1], p50))}
	lines = []line{
		bounded(1, slowest.Seconds(), seconds).of(work, "start until it listens, slowest", "", ""),
		most(1.2, ratio(turns[0], turns[1], p50)).of(work, fmt.Sprintf("GET p50 of %d of them", few.Artifacts), of(turns[0]), of(turns[1])+", empty store"),
		any.of(work, "GET p50 of any of them", of(turns[2]), of(turns[1])+", empty store"),
		bounded(100<<20, float64(resident), mib).of(work, "resident after that", "", ""),
	}
	for _, rebuilt := range []bool{false, true} {
		reconciled, err := b.reconciled(ctx, &server, dir, fewInFull, rebuilt)
		if err != nil {
			return nil, err
		}
		lines = append(lines, reconciled...)
	}
	return lines, nil
}

// reconciled measures what it costs, after the server was killed, that it goes through what is stored beside
// its work; and if rebuilt, without an index that knows some of it.
func (b *bench) reconciled(ctx context.Context, server **process, dir string, l *load.Load, rebuilt bool) (lines []line, err error) {
	work := "the same, after a kill"
	(*server).kill()
	if rebuilt {
		work += " and without the index"
		files, err := filepath.Glob(filepath.Join(dir, ".polykit-cache", index.FileName+"*"))
		for _, file := range files {
			err = errors.Join(err, os.Remove(file))
		}
		if err != nil {
			return nil, err
		}
	}
	began := time.Now()
	if *server, err = b.startServer(ctx, dir); err != nil {
		return nil, err
	}
	c, err := client.NewGRPC((*server).url, nil)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	// What is added to a machine that has nothing left takes from all, so it must have time left: requests that
	// come one by one cost it more than those of a full load, since for each somebody is woken.
	const rate = 1000
	side := b.loaded(*server, l.With(func(c *load.Config) { c.Rate = rate }), perOperation, 0)
	var during, after []turn
	var complete bool
	for !complete {
		turn, err := side(ctx)
		if err != nil {
			return nil, err
		}
		stats, err := c.Stats(ctx, 1)
		if err != nil {
			return nil, err
		}
		// The last one ended without it.
		if complete = stats.IndexComplete; !complete || during == nil {
			during = append(during, turn)
		}
	}
	took := time.Since(began)
	peak, err := (*server).memory("VmHWM")
	if err != nil {
		return nil, err
	}
	for range max(b.rounds, min(len(during), 20)) { // the 99th percentile of a turn varies much
		turn, err := side(ctx)
		if err != nil {
			return nil, err
		}
		after = append(after, turn)
	}
	p99 := func(t turn) float64 { return float64(t.p99) }
	of := func(turns []turn) string { return short(time.Duration(median(turns, p99))) }
	return []line{
		bounded(300, took.Seconds(), seconds).of(work, "until everything is in the index", "", ""),
		most(1.25, median(during, p99)/median(after, p99)).of(work, fmt.Sprintf("GET p99 meanwhile, at %s", perOperation.speed(rate)), of(during), of(after)+", afterwards"),
		bounded(100<<20, float64(peak), mib).of(work, "peak resident", "", ""),
	}, nil
}
