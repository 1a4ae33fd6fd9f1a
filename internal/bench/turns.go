//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/polykit/polykit-cache/internal/load"
)

// unit is what speed and cost are counted in.
type unit int

const (
	perOperation unit = iota
	perGB             // of artifacts
)

// turn is what was measured in one turn.
type turn struct {
	speed float64 // units per second
	cpu   float64 // processor time per unit, in seconds
	p50   time.Duration
	p99   time.Duration
}

// side is one of those that take turns.
type side func(context.Context) (turn, error)

// turns lets sides take turns, each time another one first, and returns the turns of each.
func (b *bench) turns(ctx context.Context, sides ...side) ([][]turn, error) {
	all := make([][]turn, len(sides))
	for round := range b.rounds {
		for i := range sides {
			i = (i + round) % len(sides)
			turn, err := sides[i](ctx)
			if err != nil {
				return nil, err
			}
			all[i] = append(all[i], turn)
		}
	}
	return all, nil
}

// median is the median of a figure of each turn.
func median(turns []turn, figure func(turn) float64) float64 {
	var all []float64
	for _, turn := range turns {
		all = append(all, figure(turn))
	}
	return middle(all)
}

// ratio is the median of the ratios of a figure in turns that stood side by side.
func ratio(server, reference []turn, figure func(turn) float64) float64 {
	var all []float64
	for i, turn := range server {
		all = append(all, figure(turn)/figure(reference[i]))
	}
	return middle(all)
}

// costTogether returns turns that cost what those of two sides did.
func costTogether(one, other []turn) []turn {
	both := slices.Clone(one)
	for i := range both {
		both[i].cpu += other[i].cpu
	}
	return both
}

func middle(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

func speedOf(t turn) float64 { return t.speed }
func cpuOf(t turn) float64   { return t.cpu }

// loaded is a side that is a server under a load.
func (b *bench) loaded(p *process, l *load.Load, unit unit, bytes int64) side {
	l = l.With(func(c *load.Config) { c.Server, c.Duration, c.KeepAlive = p.url, b.duration, true })
	return func(ctx context.Context) (turn, error) {
		before, err := p.cpu()
		if err != nil {
			return turn{}, err
		}
		result, err := l.Run(ctx)
		if err != nil {
			return turn{}, err
		}
		after, err := p.cpu()
		if err != nil {
			return turn{}, err
		}
		if result.Errors > 0 {
			return turn{}, fmt.Errorf("%d operations failed: %w", result.Errors, errors.Join(result.Problems...))
		}
		units := float64(result.Operations)
		if unit == perGB {
			units *= float64(bytes) / 1e9
		}
		return turn{
			speed: units / result.Elapsed.Seconds(),
			cpu:   (after - before).Seconds() / units,
			p50:   time.Duration(result.Latency.ValueAtPercentile(50)),
			p99:   time.Duration(result.Latency.ValueAtPercentile(99)),
		}, nil
	}
}

// emptied is a side after whose turns the storage directory is emptied behind the server's back: what the
// disk and the memory hold of one turn would make the next one slower, or fill them.
func emptied(s side, dir string) side {
	return func(ctx context.Context) (turn, error) {
		t, err := s(ctx)
		if err != nil {
			return t, err
		}
		files, err := filepath.Glob(filepath.Join(dir, "??", "??", "*"))
		for _, file := range files {
			err = errors.Join(err, os.Remove(file))
		}
		return t, err
	}
}

// looped is a side that is a reference's loop.
func (b *bench) looped(unit unit, bytes int64, args ...string) side {
	return func(ctx context.Context) (turn, error) {
		self, err := os.Executable()
		if err != nil {
			return turn{}, err
		}
		cmd := exec.CommandContext(ctx, self, append([]string{referenceArg, "-duration", b.duration.String()}, args...)...)
		cmd.Stderr = os.Stderr
		output, err := cmd.Output()
		if err != nil {
			return turn{}, err
		}
		var done done
		if err := json.Unmarshal(output, &done); err != nil {
			return turn{}, err
		}
		units := float64(done.Operations)
		if unit == perGB {
			units *= float64(bytes) / 1e9
		}
		return turn{speed: units / done.Elapsed.Seconds(), cpu: done.CPU.Seconds() / units}, nil
	}
}

// costLine is a line about processor time, without a mark if that is 0.
func (u unit) costLine(work string, server, reference []turn, mark float64, suffix string) line {
	r := ratio(server, reference, cpuOf)
	l := line{ratio: fmt.Sprintf("%.2f", r)}
	if mark > 0 {
		l = most(mark, r)
	}
	figure := "CPU per operation"
	if u == perGB {
		figure = "CPU per GB"
	}
	return l.of(work, figure, u.cost(median(server, cpuOf)), u.cost(median(reference, cpuOf))+suffix)
}

// speed is units per second for people.
func (u unit) speed(units float64) string {
	if u == perGB {
		return fmt.Sprintf("%.2f GB/s", units)
	}
	return humanize.Comma(int64(units)) + "/s"
}

// cost is the processor time of a unit for people.
func (u unit) cost(cpu float64) string {
	if u == perGB {
		return seconds(cpu)
	}
	return fmt.Sprintf("%.1f µs", cpu*1e6)
}

func seconds(s float64) string { return strconv.FormatFloat(s, 'g', 3, 64) + " s" }
func mib(n float64) string     { return fmt.Sprintf("%.0f MiB", n/(1<<20)) }
func size(n int64) string      { return humanize.IBytes(uint64(n)) }

func short(d time.Duration) string { return d.Round(time.Microsecond).String() }
