// Package load loads a server with requests and measures how it answers. It is made to cost little
// beside the server: requests are made beforehand as far as can be, artifacts differ in a few bytes only,
// and what comes is counted and thrown away. What it costs all the same, a Result says.
package load

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sync/errgroup"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Operation is what the clients do.
type Operation string

const (
	// Put uploads artifacts, each under a key of its own.
	Put Operation = "put"
	// Get downloads artifacts that were uploaded before.
	Get Operation = "get"
	// Head asks what is known of them: HEAD over REST, StatArtifact over gRPC.
	Head Operation = "head"
	// Miss asks for artifacts that are not there.
	Miss Operation = "miss"
	// Mixed is what a build does: of 20 operations 12 are Get, 4 Miss, 2 Head, 2 Put.
	Mixed Operation = "mixed"
)

// Operations are all there are.
var Operations = []Operation{Put, Get, Head, Miss, Mixed}

// mix is what Mixed does, one as often as another.
var mix = slices.Concat(slices.Repeat([]Operation{Get}, 12), slices.Repeat([]Operation{Miss}, 4), slices.Repeat([]Operation{Head}, 2), slices.Repeat([]Operation{Put}, 2))

// Config says what to load a server with.
type Config struct {
	// Server is the URL of a client.ParseServer.
	Server *url.URL
	// TLS is how TLS is spoken; nil means as is usual.
	TLS *tls.Config
	// GRPC speaks gRPC, all clients over one connection, instead of REST, each over its own.
	GRPC      bool
	Operation Operation
	// Size is the bytes of all files in an artifact, before they are compressed.
	Size int64
	// Compressible makes files that are compressed to about a third. Others are not at all.
	Compressible bool
	// Artifacts is from how many Get and Head choose, at random. They are uploaded beforehand.
	Artifacts int
	// Clients is how many operations are in flight at once.
	Clients int
	// Duration is how long operations are begun. Each client begins one at least.
	Duration time.Duration
	// Rate is how many operations are begun in a second by all clients together, as long as they can keep
	// up. One that begins late has its latency from when it was due, or a server that stalls would be asked
	// less and look good. 0 begins each as soon as the last one of its client has ended.
	Rate float64
	// KeepAlive uses a connection for more than one request.
	KeepAlive bool
}

// Result is what was measured.
type Result struct {
	Operations int64         // that succeeded
	Errors     int64         // that did not
	Sent       int64         // bytes of artifacts
	Received   int64         // bytes of artifacts; over gRPC of the messages they are in
	Elapsed    time.Duration // until the last operation ended
	// Latency is of those that succeeded, in nanoseconds, to three digits.
	Latency *hdrhistogram.Histogram
	// CPU is what this process took meanwhile, of all processors together, 0 if that is not known.
	CPU time.Duration
	// Problems are the first errors, each once.
	Problems []error
}

const (
	longest     = int64(time.Hour) // that Latency tells from longer ones
	maxProblems = 3
)

// conn is a client of a server.
type conn interface {
	put(ctx context.Context, key artifact.Key, head, rest []byte) error
	get(ctx context.Context, key artifact.Key) (received int64, err error)
	head(ctx context.Context, key artifact.Key) error
	miss(ctx context.Context, key artifact.Key) error
	close()
}

// Load is what a server is loaded with: the artifacts and operations of a Config.
type Load struct {
	config Config
	maker  *maker
	next   *atomic.Int64 // number of a key that was not used
}

// New makes the artifacts of a load.
func New(config Config) (*Load, error) {
	maker, err := newMaker(config.Size, config.Compressible)
	if err != nil {
		return nil, err
	}
	return &Load{config, maker, new(atomic.Int64)}, nil
}

// With returns the load with other values in its Config: on another server, or with another operation,
// but with the same artifacts. Size and Compressible can't be changed.
func (l *Load) With(change func(*Config)) *Load {
	changed := *l
	change(&changed.config)
	return &changed
}

// Key returns the key with a number. The first Config.Artifacts, from 0, are those that Get and Head ask for.
func (l *Load) Key(number int64) artifact.Key { return l.maker.key(number) }

// Artifact returns the artifact for a key.
func (l *Load) Artifact(key artifact.Key) ([]byte, error) {
	head, rest, err := l.maker.artifact(key)
	return slices.Concat(head, rest), err
}

// Prepare uploads what Get and Head ask for.
func (l *Load) Prepare(ctx context.Context) error {
	conns, err := l.connect()
	if err != nil {
		return err
	}
	defer closeAll(conns)
	uploads, ctx := errgroup.WithContext(ctx)
	for _, conn := range conns {
		uploads.Go(func() error {
			for {
				number := l.next.Add(1) - 1
				if number >= int64(l.config.Artifacts) {
					return nil
				}
				if _, err := l.put(ctx, conn, number); err != nil {
					return fmt.Errorf("upload what is to be asked for: %w", err)
				}
			}
		})
	}
	return uploads.Wait()
}

// Run loads the server. An error says that it could not; errors of the operations are in the Result.
func (l *Load) Run(ctx context.Context) (*Result, error) {
	conns, err := l.connect()
	if err != nil {
		return nil, err
	}
	defer closeAll(conns)
	results := make([]*Result, len(conns))
	cpu, began := ownCPU(), time.Now()
	var clients sync.WaitGroup
	for i, conn := range conns {
		clients.Go(func() { results[i] = l.client(ctx, conn, i, began.Add(l.config.Duration)) })
	}
	clients.Wait()
	total := newResult()
	total.Elapsed, total.CPU = time.Since(began), ownCPU()-cpu
	for _, result := range results {
		total.add(result)
	}
	return total, ctx.Err()
}

// connect returns a conn for each client. None is connected yet.
func (l *Load) connect() ([]conn, error) {
	if l.config.GRPC {
		shared, err := newGRPC(l.config.Server, l.config.TLS)
		if err != nil {
			return nil, err
		}
		return slices.Repeat([]conn{shared}, l.config.Clients), nil
	}
	var conns []conn
	for range l.config.Clients {
		conns = append(conns, newREST(l.config.Server, l.config.TLS, l.config.KeepAlive))
	}
	return conns, nil
}

func (l *Load) put(ctx context.Context, conn conn, number int64) (sent int64, err error) {
	key := l.maker.key(number)
	head, rest, err := l.maker.artifact(key)
	if err == nil {
		err = conn.put(ctx, key, head, rest)
	}
	if err != nil {
		return 0, err
	}
	return int64(len(head) + len(rest)), nil
}

func closeAll(conns []conn) {
	for _, conn := range conns {
		conn.close()
	}
}

// client begins operations until end, one after the other, and one at least. It is the one with a number from 0.
func (l *Load) client(ctx context.Context, conn conn, number int, end time.Time) *Result {
	result, pace := newResult(), newPace(l.config, number)
	for began := pace.next(ctx, time.Now()); ctx.Err() == nil; {
		err := l.do(ctx, conn, result)
		ended := time.Now()
		switch {
		case ctx.Err() != nil:
		case err != nil:
			result.Errors++
			result.problem(err)
		default:
			result.Operations++
			result.Latency.RecordValue(min(int64(ended.Sub(began)), longest))
		}
		if began = pace.next(ctx, ended); !began.Before(end) {
			break
		}
	}
	return result
}

// pace says when a client begins operations.
type pace struct {
	interval time.Duration // 0 for at once
	due      time.Time
}

func newPace(c Config, number int) *pace {
	if c.Rate == 0 {
		return &pace{}
	}
	between := float64(time.Second) / c.Rate // the clients take turns
	return &pace{time.Duration(between * float64(c.Clients)), time.Now().Add(time.Duration(between * float64(number)))}
}

// next waits until the next operation is to be begun, and returns since when it counts.
func (p *pace) next(ctx context.Context, now time.Time) time.Time {
	if p.interval == 0 {
		return now
	}
	due := p.due
	p.due = due.Add(p.interval)
	if early := due.Sub(now); early > 0 {
		select {
		case <-ctx.Done():
		case <-time.After(early):
		}
		return time.Now()
	}
	return due
}

func (l *Load) do(ctx context.Context, conn conn, result *Result) error {
	operation := l.config.Operation
	if operation == Mixed {
		operation = mix[rand.IntN(len(mix))]
	}
	switch operation {
	case Put:
		sent, err := l.put(ctx, conn, l.next.Add(1))
		result.Sent += sent
		return err
	case Miss:
		return conn.miss(ctx, l.maker.key(l.next.Add(1)))
	case Head:
		return conn.head(ctx, l.maker.key(rand.Int64N(int64(l.config.Artifacts))))
	default:
		received, err := conn.get(ctx, l.maker.key(rand.Int64N(int64(l.config.Artifacts))))
		result.Received += received
		return err
	}
}

func newResult() *Result {
	return &Result{Latency: hdrhistogram.New(1, longest, 3)}
}

// add adds what one client measured.
func (r *Result) add(one *Result) {
	r.Operations += one.Operations
	r.Errors += one.Errors
	r.Sent += one.Sent
	r.Received += one.Received
	r.Latency.Merge(one.Latency)
	for _, err := range one.Problems {
		r.problem(err)
	}
}

// problem keeps an error, if it is one of the first, and none like it was kept.
func (r *Result) problem(err error) {
	same := func(other error) bool { return other.Error() == err.Error() || errors.Is(err, other) }
	if len(r.Problems) < maxProblems && !slices.ContainsFunc(r.Problems, same) {
		r.Problems = append(r.Problems, err)
	}
}
