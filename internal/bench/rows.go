//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/polykit/polykit-cache/internal/load"
)

// row is a kind of work.
type row struct {
	name    string
	measure func(context.Context, *bench) ([]line, error)
}

// rows are all there are. Their marks are those that the server has to reach.
var rows = []row{
	{"REST get large", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideNginx(ctx, "GET "+size(b.large)+", 4 connections", load.Config{Operation: load.Get, Size: b.large, Artifacts: 4, Clients: 4}, perGB, 0.95, 1.15)
	}},
	{"REST get small", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideNginx(ctx, "GET 4 KiB, 16 connections", load.Config{Operation: load.Get, Size: 4 << 10, Artifacts: 1000, Clients: 16}, perOperation, 0.45, 0)
	}},
	{"REST head", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideNginx(ctx, "HEAD, 16 connections", load.Config{Operation: load.Head, Size: 4 << 10, Artifacts: 1000, Clients: 16}, perOperation, 0.45, 0)
	}},
	{"REST miss", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideNginx(ctx, "GET of a missing key, 16 connections", load.Config{Operation: load.Miss, Artifacts: 1, Clients: 16}, perOperation, 0.45, 0)
	}},
	{"REST put large incompressible", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideVerification(ctx, "PUT "+size(b.large)+", incompressible, 1 connection", false)
	}},
	{"REST put large compressible", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideVerification(ctx, "PUT "+size(b.large)+", compressible, 1 connection", true)
	}},
	{"REST put small", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideCommit(ctx, "PUT 2 KiB, 16 connections")
	}},
	{"gRPC get large", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideBareGRPC(ctx, "GetArtifact "+size(b.large)+", 4 streams", load.Config{Operation: load.Get, Size: b.large, Artifacts: 1, Clients: 4}, perGB, 1.10)
	}},
	{"gRPC get small", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideBareGRPC(ctx, "GetArtifact 4 KiB, 16 streams", load.Config{Operation: load.Get, Size: 4 << 10, Artifacts: 1, Clients: 16}, perOperation, 1.25)
	}},
	{"gRPC put large", func(ctx context.Context, b *bench) ([]line, error) { return b.besideREST(ctx) }},
	{"memory", func(ctx context.Context, b *bench) ([]line, error) { return b.memory(ctx) }},
	{"scale", func(ctx context.Context, b *bench) ([]line, error) { return b.scale(ctx) }},
}

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

// prepared starts a server on an empty directory and uploads what a load asks for.
func (b *bench) prepared(ctx context.Context, config load.Config, flags ...string) (dir string, server *process, l *load.Load, err error) {
	if dir, err = os.MkdirTemp(b.dir, "store-"); err != nil {
		return "", nil, nil, err
	}
	if server, err = b.startServer(ctx, dir, flags...); err != nil {
		return "", nil, nil, err
	}
	config.Server, config.KeepAlive = server.url, true
	if l, err = load.New(config); err == nil && config.Operation != load.Put && config.Operation != load.Miss {
		err = l.Prepare(ctx)
	}
	if err != nil {
		return "", nil, nil, errors.Join(err, server.stop())
	}
	return dir, server, l, nil
}

// artifactFile writes an artifact of a load to a file, for a reference.
func (b *bench) artifactFile(l *load.Load) (string, error) {
	content, err := l.Artifact(l.Key(0))
	if err != nil {
		return "", err
	}
	path := filepath.Join(b.dir, "artifact.zst")
	return path, os.WriteFile(path, content, 0o644)
}

// besideNginx compares the server with nginx, which sends the same files.
func (b *bench) besideNginx(ctx context.Context, work string, config load.Config, unit unit, leastSpeed, mostCPU float64) (lines []line, err error) {
	dir, server, l, err := b.prepared(ctx, config)
	if err != nil {
		return nil, err
	}
	defer b.end(&err, server, dir)
	// One file has two names, so that nginx finds it by the path that is asked for, with no rule to try.
	root, err := os.MkdirTemp(b.dir, "root-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(root)
	artifacts := filepath.Join(root, "v1", "artifacts")
	if err := os.MkdirAll(artifacts, 0o755); err != nil {
		return nil, err
	}
	if config.Operation != load.Miss {
		for n := range int64(config.Artifacts) {
			key := l.Key(n).String()
			if err := os.Link(filepath.Join(dir, key[:2], key[2:4], key+".zst"), filepath.Join(artifacts, key)); err != nil {
				return nil, err
			}
		}
	}
	nginx, err := b.startNginx(ctx, root)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, nginx.stop()) }()
	all, err := b.turns(ctx, b.loaded(server, l, unit, config.Size), b.loaded(nginx, l, unit, config.Size))
	if err != nil {
		return nil, err
	}
	return append(
		[]line{least(leastSpeed, ratio(all[0], all[1], speedOf)).of(work, "speed", unit.speed(median(all[0], speedOf)), unit.speed(median(all[1], speedOf))+", nginx")},
		unit.costLine(work, all[0], all[1], mostCPU, ", nginx")), nil
}

// besideVerification compares large uploads with the floor of verification.
func (b *bench) besideVerification(ctx context.Context, work string, compressible bool) (lines []line, err error) {
	dir, server, l, err := b.prepared(ctx, load.Config{Operation: load.Put, Size: b.large, Compressible: compressible, Clients: 1})
	if err != nil {
		return nil, err
	}
	defer b.end(&err, server, dir)
	file, err := b.artifactFile(l)
	if err != nil {
		return nil, err
	}
	all, err := b.turns(ctx, emptied(b.loaded(server, l, perGB, b.large), dir), b.looped(perGB, b.large, "verify", file), b.looped(perGB, b.large, "-dir", b.dir, "write", file))
	if err != nil {
		return nil, err
	}
	floor := slices.Clone(all[1])
	for i := range floor {
		floor[i].cpu += all[2][i].cpu
	}
	return []line{
		least(1, ratio(all[0], floor, speedOf)).of(work, "speed", perGB.speed(median(all[0], speedOf)), perGB.speed(median(floor, speedOf))+", floor of verification"),
		perGB.costLine(work, all[0], floor, 1.25, ", that floor and the write"),
	}, nil
}

// besideCommit compares small uploads with the floor of a durable one.
func (b *bench) besideCommit(ctx context.Context, work string) (lines []line, err error) {
	dir, server, l, err := b.prepared(ctx, load.Config{Operation: load.Put, Size: 2 << 10, Clients: 16})
	if err != nil {
		return nil, err
	}
	defer b.end(&err, server, dir)
	file, err := b.artifactFile(l)
	if err != nil {
		return nil, err
	}
	// What the floor leaves is removed at the end only: ext4 looks for a new file's inode the longer, the
	// more were removed within seconds.
	floorDir, err := os.MkdirTemp(b.dir, "commit-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(floorDir)
	floor := func(ctx context.Context) (turn, error) {
		dir, err := os.MkdirTemp(floorDir, "turn-")
		if err != nil {
			return turn{}, err
		}
		return b.looped(perOperation, 0, "-clients", "16", "-dir", dir, "commit", file)(ctx)
	}
	all, err := b.turns(ctx, b.loaded(server, l, perOperation, 0), floor)
	if err != nil {
		return nil, err
	}
	return []line{
		least(0.7, ratio(all[0], all[1], speedOf)).of(work, "speed", perOperation.speed(median(all[0], speedOf)), perOperation.speed(median(all[1], speedOf))+", create, write, fsync, link"),
		perOperation.costLine(work, all[0], all[1], 0, ", the same"),
	}, nil
}

// besideBareGRPC compares calls with those of a bare grpc-go server.
func (b *bench) besideBareGRPC(ctx context.Context, work string, config load.Config, unit unit, mostCPU float64) (lines []line, err error) {
	config.GRPC = true
	dir, server, l, err := b.prepared(ctx, config)
	if err != nil {
		return nil, err
	}
	defer b.end(&err, server, dir)
	file, err := b.artifactFile(l)
	if err != nil {
		return nil, err
	}
	bare, err := startReference(ctx, "grpc", file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bare.stop()) }()
	all, err := b.turns(ctx, b.loaded(server, l, unit, config.Size), b.loaded(bare, l, unit, config.Size))
	if err != nil {
		return nil, err
	}
	speed := line{ratio: fmt.Sprintf("%.2f", ratio(all[0], all[1], speedOf))}
	return []line{
		speed.of(work, "speed", unit.speed(median(all[0], speedOf)), unit.speed(median(all[1], speedOf))+", bare grpc-go"),
		unit.costLine(work, all[0], all[1], mostCPU, ", bare grpc-go"),
	}, nil
}

// besideREST compares large uploads over gRPC with those over REST and what bare grpc-go takes to receive
// the same messages and throw them away.
func (b *bench) besideREST(ctx context.Context) (lines []line, err error) {
	work := "PutArtifact " + size(b.large) + ", 1 stream"
	dir, server, l, err := b.prepared(ctx, load.Config{Operation: load.Put, Size: b.large, Clients: 1})
	if err != nil {
		return nil, err
	}
	defer b.end(&err, server, dir)
	file, err := b.artifactFile(l)
	if err != nil {
		return nil, err
	}
	bare, err := startReference(ctx, "grpc", file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bare.stop()) }()
	overGRPC := l.With(func(c *load.Config) { c.GRPC = true })
	all, err := b.turns(ctx, emptied(b.loaded(server, overGRPC, perGB, b.large), dir), emptied(b.loaded(server, l, perGB, b.large), dir), b.loaded(bare, overGRPC, perGB, b.large))
	if err != nil {
		return nil, err
	}
	both := slices.Clone(all[1])
	for i := range both {
		both[i].cpu += all[2][i].cpu
	}
	speed := line{ratio: fmt.Sprintf("%.2f", ratio(all[0], all[1], speedOf))}
	return []line{
		speed.of(work, "speed", perGB.speed(median(all[0], speedOf)), perGB.speed(median(all[1], speedOf))+", REST"),
		perGB.costLine(work, all[0], both, 1.10, ", REST and bare grpc-go that receives it"),
	}, nil
}

// memory measures what the server has resident.
func (b *bench) memory(ctx context.Context) (lines []line, err error) {
	const clients = 8
	for _, protocol := range []string{"REST", "gRPC"} {
		work := fmt.Sprintf("%d clients put and get %s each over %s", clients, size(b.huge), protocol)
		config := load.Config{Operation: load.Get, GRPC: protocol == "gRPC", Size: b.huge, Artifacts: clients, Clients: clients, Duration: time.Nanosecond}
		dir, server, l, err := b.prepared(ctx, config, "--max-size", fmt.Sprint(2*b.huge+1<<20))
		if err != nil {
			return nil, err
		}
		result, err := l.Run(ctx) // each client once
		if err == nil && result.Operations != clients {
			err = errors.Join(append(result.Problems, fmt.Errorf("%d of %d downloads", result.Operations, clients))...)
		}
		peak, err2 := server.memory("VmHWM")
		b.end(&err, server, dir)
		if err = errors.Join(err, err2); err != nil {
			return nil, err
		}
		lines = append(lines, bounded(256<<20, float64(peak), mib).of(work, "peak resident", "", ""))
	}
	idle, err := b.idleMemory(ctx)
	return append(lines, idle...), err
}

// idleMemory measures it while the server has nothing to do.
func (b *bench) idleMemory(ctx context.Context) (lines []line, err error) {
	if err := raiseFiles(b.idle); err != nil {
		return nil, err
	}
	config := load.Config{Operation: load.Get, Size: 4 << 10, Artifacts: 1, Clients: 1}
	dir, server, l, err := b.prepared(ctx, config, "--max-connections", strconv.Itoa(b.idle+100))
	if err != nil {
		return nil, err
	}
	defer b.end(&err, server, dir)
	idle, err := server.memory("VmRSS")
	if err != nil {
		return nil, err
	}
	request := fmt.Appendf(nil, "GET /v1/artifacts/%s HTTP/1.1\r\nHost: bench\r\n\r\n", l.Key(0))
	answer := make([]byte, 64<<10)
	for range b.idle {
		conn, err := net.Dial("tcp", server.url.Host)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		if _, err := conn.Write(request); err != nil {
			return nil, err
		}
		if _, err := conn.Read(answer); err != nil {
			return nil, err
		}
	}
	crowded, err := server.memory("VmRSS")
	if err != nil {
		return nil, err
	}
	return []line{
		bounded(32<<20, float64(idle), mib).of("nothing", "resident", "", ""),
		bounded(300<<20, float64(crowded), mib).of(fmt.Sprintf("%s idle connections, after a GET of 4 KiB on each", humanize.Comma(int64(b.idle))), "resident", "", ""),
	}, nil
}

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
	defer b.end(&err, server, dir)
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
	return []line{
		bounded(1, slowest.Seconds(), seconds).of(work, "start until it listens, slowest", "", ""),
		most(1.2, ratio(turns[0], turns[1], p50)).of(work, fmt.Sprintf("GET p50 of %d of them", few.Artifacts), of(turns[0]), of(turns[1])+", empty store"),
		any.of(work, "GET p50 of any of them", of(turns[2]), of(turns[1])+", empty store"),
		bounded(100<<20, float64(resident), mib).of(work, "resident after that", "", ""),
	}, nil
}

// end stops a server and removes its directory.
func (b *bench) end(err *error, server *process, dir string) {
	*err = errors.Join(*err, server.stop(), os.RemoveAll(dir))
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
