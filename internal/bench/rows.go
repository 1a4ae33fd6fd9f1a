//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/polykit/polykit-cache/internal/auth"
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
	{"REST get small, known clients", func(ctx context.Context, b *bench) ([]line, error) {
		return b.besideOpen(ctx, "GET 4 KiB with a token, 16 connections", load.Config{Operation: load.Get, Size: 4 << 10, Artifacts: 1000, Clients: 16})
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

// prepared starts a server on an empty directory and uploads what a load asks for, with what credential config has.
func (b *bench) prepared(ctx context.Context, config load.Config, flags ...string) (dir string, server *process, l *load.Load, err error) {
	if dir, err = os.MkdirTemp(b.dir, "store-"); err != nil {
		return "", nil, nil, err
	}
	if server, err = b.startServer(ctx, dir, flags...); err != nil {
		return "", nil, nil, err
	}
	if config.Server != nil {
		server.url.User = config.Server.User
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

// subject is a server that is measured.
type subject struct {
	*process
	dir  string // of its storage
	load *load.Load
	file string // with an artifact of the load, for a reference
}

// beside measures a server on an empty directory beside a reference.
func (b *bench) beside(ctx context.Context, config load.Config, measure func(subject) ([]line, error)) (lines []line, err error) {
	dir, server, l, err := b.prepared(ctx, config)
	if err != nil {
		return nil, err
	}
	defer b.end(&err, server, dir)
	content, err := l.Artifact(l.Key(0))
	if err != nil {
		return nil, err
	}
	file := filepath.Join(b.dir, "artifact.zst")
	if err := os.WriteFile(file, content, 0o644); err != nil {
		return nil, err
	}
	return measure(subject{server, dir, l, file})
}

// besideBare is beside a bare grpc-go server.
func (b *bench) besideBare(ctx context.Context, config load.Config, measure func(s subject, bare *process) ([]line, error)) ([]line, error) {
	return b.beside(ctx, config, func(s subject) (lines []line, err error) {
		bare, err := startReference(ctx, "grpc", s.file)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, bare.stop()) }()
		return measure(s, bare)
	})
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
func (b *bench) besideVerification(ctx context.Context, work string, compressible bool) ([]line, error) {
	config := load.Config{Operation: load.Put, Size: b.large, Compressible: compressible, Clients: 1}
	return b.beside(ctx, config, func(s subject) ([]line, error) {
		all, err := b.turns(ctx,
			emptied(b.loaded(s.process, s.load, perGB, b.large), s.dir),
			b.looped(perGB, b.large, "verify", s.file),
			b.looped(perGB, b.large, "-dir", b.dir, "write", s.file))
		if err != nil {
			return nil, err
		}
		floor := all[1]
		return []line{
			least(1, ratio(all[0], floor, speedOf)).of(work, "speed", perGB.speed(median(all[0], speedOf)), perGB.speed(median(floor, speedOf))+", floor of verification"),
			perGB.costLine(work, all[0], costTogether(floor, all[2]), 1.25, ", that floor and the write"),
		}, nil
	})
}

// besideCommit compares small uploads with the floor of a durable one.
func (b *bench) besideCommit(ctx context.Context, work string) ([]line, error) {
	return b.beside(ctx, load.Config{Operation: load.Put, Size: 2 << 10, Clients: 16}, func(s subject) ([]line, error) {
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
			return b.looped(perOperation, 0, "-clients", "16", "-dir", dir, "commit", s.file)(ctx)
		}
		all, err := b.turns(ctx, b.loaded(s.process, s.load, perOperation, 0), floor)
		if err != nil {
			return nil, err
		}
		return []line{
			least(0.7, ratio(all[0], all[1], speedOf)).of(work, "speed", perOperation.speed(median(all[0], speedOf)), perOperation.speed(median(all[1], speedOf))+", create, write, fsync, link"),
			perOperation.costLine(work, all[0], all[1], 0, ", the same"),
		}, nil
	})
}

// besideBareGRPC compares calls with those of a bare grpc-go server.
func (b *bench) besideBareGRPC(ctx context.Context, work string, config load.Config, unit unit, mostCPU float64) ([]line, error) {
	config.GRPC = true
	return b.besideBare(ctx, config, func(s subject, bare *process) ([]line, error) {
		all, err := b.turns(ctx, b.loaded(s.process, s.load, unit, config.Size), b.loaded(bare, s.load, unit, config.Size))
		if err != nil {
			return nil, err
		}
		speed := line{ratio: fmt.Sprintf("%.2f", ratio(all[0], all[1], speedOf))}
		return []line{
			speed.of(work, "speed", unit.speed(median(all[0], speedOf)), unit.speed(median(all[1], speedOf))+", bare grpc-go"),
			unit.costLine(work, all[0], all[1], mostCPU, ", bare grpc-go"),
		}, nil
	})
}

// besideREST compares large uploads over gRPC with those over REST and what bare grpc-go takes to receive
// the same messages and throw them away.
func (b *bench) besideREST(ctx context.Context) ([]line, error) {
	work := "PutArtifact " + size(b.large) + ", 1 stream"
	return b.besideBare(ctx, load.Config{Operation: load.Put, Size: b.large, Clients: 1}, func(s subject, bare *process) ([]line, error) {
		overGRPC := s.load.With(func(c *load.Config) { c.GRPC = true })
		all, err := b.turns(ctx,
			emptied(b.loaded(s.process, overGRPC, perGB, b.large), s.dir),
			emptied(b.loaded(s.process, s.load, perGB, b.large), s.dir),
			b.loaded(bare, overGRPC, perGB, b.large))
		if err != nil {
			return nil, err
		}
		speed := line{ratio: fmt.Sprintf("%.2f", ratio(all[0], all[1], speedOf))}
		return []line{
			speed.of(work, "speed", perGB.speed(median(all[0], speedOf)), perGB.speed(median(all[1], speedOf))+", REST"),
			perGB.costLine(work, all[0], costTogether(all[1], all[2]), 1.10, ", REST and bare grpc-go that receives it"),
		}, nil
	})
}

// besideOpen compares a server that asks who its clients are with one that does not.
func (b *bench) besideOpen(ctx context.Context, work string, config load.Config) (lines []line, err error) {
	dir, open, anybody, err := b.prepared(ctx, config)
	if err != nil {
		return nil, err
	}
	defer b.end(&err, open, dir)
	token := auth.NewToken()
	file := filepath.Join(b.dir, "auth.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, "tokens: [{name: bench, sha256: %s, role: writer}]\n", auth.HashToken(token)), 0o600); err != nil {
		return nil, err
	}
	config.Server = &url.URL{User: url.UserPassword("x", token)}
	dir, guarded, known, err := b.prepared(ctx, config, "--auth-file", file)
	if err != nil {
		return nil, err
	}
	defer b.end(&err, guarded, dir)
	all, err := b.turns(ctx, b.loaded(guarded, known, perOperation, 0), b.loaded(open, anybody, perOperation, 0))
	if err != nil {
		return nil, err
	}
	speed := line{ratio: fmt.Sprintf("%.2f", ratio(all[0], all[1], speedOf))}
	return []line{
		speed.of(work, "speed", perOperation.speed(median(all[0], speedOf)), perOperation.speed(median(all[1], speedOf))+", no auth file"),
		perOperation.costLine(work, all[0], all[1], 0, ", no auth file"),
	}, nil
}

// memory measures what the server has resident.
func (b *bench) memory(ctx context.Context) (lines []line, err error) {
	if err := raiseFiles(b.idle); err != nil {
		return nil, err
	}
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

// end stops a server and removes its directory.
func (b *bench) end(err *error, server *process, dir string) {
	*err = errors.Join(*err, server.stop(), os.RemoveAll(dir))
}
