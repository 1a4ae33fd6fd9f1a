//go:build linux

// Command bench measures the server side by side with what it is to be measured by, and prints a table:
//
//	go run ./internal/bench            every row
//	go run ./internal/bench put memory rows whose names hold one of these
//
// All servers are processes of their own on loopback, and what they cost is what the operating system
// says of their processes. A machine is never quiet: so a row and its reference take turns, ratios are
// of turns that stand side by side, and the table has their medians. What loads the servers takes part
// of the machine too, the same for both: a ratio of speeds is nearer to 1 than the servers are, and the
// ratio of processor times is the one that says how near.
//
// The references are nginx, which sends the same files with sendfile (Debian package nginx-light); a
// bare grpc-go server with messages from memory; a single-threaded loop over the same bytes in memory
// that hashes, decodes and hashes (the floor of verification); and create, write, fsync, link by as many
// at once as there are clients (the floor of a small durable upload).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// settings are how much is measured.
type settings struct {
	rounds    int
	duration  time.Duration // of a turn
	large     int64         // bytes of the files in a large artifact
	huge      int64         // and in one of those that fill the memory, if something keeps them
	idle      int           // connections that are idle
	artifacts int           // that are stored for the row about scale
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 0 && args[0] == referenceArg {
		return reference(args[1:], stdout)
	}
	var s settings
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&s.rounds, "rounds", 5, "turns of each row and of its reference")
	flags.DurationVar(&s.duration, "duration", 3*time.Second, "time of a turn")
	flags.Int64Var(&s.large, "large", 64<<20, "bytes in a large artifact")
	flags.Int64Var(&s.huge, "huge", 1<<30, "bytes in an artifact of the row about memory")
	flags.IntVar(&s.idle, "idle", 10_000, "idle connections")
	flags.IntVar(&s.artifacts, "artifacts", 1_000_000, "artifacts of the row about scale")
	dir := flags.String("dir", "", "directory to put files into, on the disk that is measured; the system's for temporary files if empty")
	if err := flags.Parse(args); err != nil {
		return err
	}
	for name, value := range map[string]int64{"rounds": int64(s.rounds), "duration": int64(s.duration), "large": s.large, "huge": s.huge, "idle": int64(s.idle), "artifacts": int64(s.artifacts)} {
		if value <= 0 {
			return fmt.Errorf("-%s is %s; it must be more than 0", name, flags.Lookup(name).Value)
		}
	}
	var chosen []row
	for _, row := range rows {
		if len(flags.Args()) == 0 || containsAny(row.name, flags.Args()) {
			chosen = append(chosen, row)
		}
	}
	if len(chosen) == 0 {
		return fmt.Errorf("no row has a name with one of %q in it", flags.Args())
	}
	temp, err := os.MkdirTemp(*dir, "polykit-cache-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	b := &bench{settings: s, dir: temp, progress: stderr}
	if err := b.build(ctx); err != nil {
		return err
	}
	var table table
	var failed error // which does not take what was measured before
	for i, row := range chosen {
		fmt.Fprintf(stderr, "%d/%d %s\n", i+1, len(chosen), row.name)
		lines, err := row.measure(ctx, b)
		if err != nil {
			failed = fmt.Errorf("%s: %w", row.name, err)
			break
		}
		table = append(table, lines...)
	}
	fmt.Fprintf(stdout, "%s, %s, %s/%s, %d processors, %d rounds of %v\n\n", time.Now().Format(time.DateOnly), runtime.Version(),
		runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), s.rounds, s.duration)
	return errors.Join(table.print(stdout), failed)
}

func containsAny(name string, parts []string) bool {
	for _, part := range parts {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}

// bench is one run.
type bench struct {
	settings
	dir      string // for all files
	binary   string // the program that is measured
	progress io.Writer
}

// build builds the program as it is released.
func (b *bench) build(ctx context.Context) error {
	b.binary = filepath.Join(b.dir, "polykit-cache")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", b.binary, "github.com/polykit/polykit-cache/cmd/polykit-cache")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the program: %w\n%s", err, output)
	}
	return nil
}
