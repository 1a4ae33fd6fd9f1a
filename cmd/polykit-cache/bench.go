package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/client"
	"github.com/polykit/polykit-cache/internal/load"
)

const benchLong = `bench loads a server with requests for a while, and prints how many it answered and how fast.
It works with every server that has this REST interface.

  put    uploads artifacts, each under a key of its own
  get    downloads artifacts, of --artifacts that it uploads first
  head   asks what is known of them
  miss   asks for artifacts that are not there
  mixed  is what a build does: 12 of 20 get, 4 miss, 2 head, 2 put

Artifacts are sound, and made by bench: of files with --size bytes together, which do not
compress, or with --compressible to about a third. What bench uploads stays on the server, so use
one that is there for this.

Over REST each client has a connection of its own; over gRPC they share one. Bytes are those of
artifacts as uploaded. The latency of an operation is the time until its last byte, with --rate
since it was due. The last line is what bench itself costs: where both run on one machine, that
much was not the server's.`

const benchExample = `  polykit-cache bench get --size 64MiB --clients 4
  polykit-cache bench put --size 2KiB --clients 16 --duration 30s
  polykit-cache bench get --rate 500 --clients 32
  polykit-cache bench mixed --grpc --json | jq .operations_per_second`

const (
	// mostClients is the most --clients.
	mostClients = 100_000
	// mostRate is the most --rate.
	mostRate = 1e9
)

// benchFlags are the flags of bench.
type benchFlags struct {
	remote remoteFlags
	config load.Config
	size   sizeFlag
}

func benchCommand() *cobra.Command {
	flags := benchFlags{size: 4 << 10}
	var names []string
	for _, operation := range load.Operations {
		names = append(names, string(operation))
	}
	cmd := &cobra.Command{
		Use:       "bench " + strings.Join(names, "|"),
		Short:     "Measure how fast a server is",
		Long:      benchLong,
		Example:   benchExample,
		Args:      cobra.ExactArgs(1),
		ValidArgs: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains(names, args[0]) {
				return usageError("%q is not one of %s", printable(args[0]), strings.Join(names, ", "))
			}
			flags.config.Operation = load.Operation(args[0])
			if err := flags.complete(cmd.ErrOrStderr()); err != nil {
				return err
			}
			load, err := load.New(flags.config)
			if err != nil {
				return err
			}
			if flags.uploads() {
				if err := load.Prepare(cmd.Context()); err != nil {
					return err
				}
			}
			result, err := load.Run(cmd.Context())
			if err != nil {
				return err
			}
			if err := flags.print(cmd.OutOrStdout(), result); err != nil {
				return err
			}
			if result.Errors > 0 {
				return fmt.Errorf("%s failed: %w", english.Plural(int(result.Errors), "operation", ""), errors.Join(result.Problems...))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.Var(&flags.size, "size", "bytes of all files in an artifact")
	f.BoolVar(&flags.config.Compressible, "compressible", false, "make files that compress to about a third")
	f.IntVar(&flags.config.Artifacts, "artifacts", 16, "how many artifacts get and head choose from")
	f.IntVar(&flags.config.Clients, "clients", 16, "how many operations are in flight at once")
	f.DurationVar(&flags.config.Duration, "duration", 10*time.Second, "time in which operations are begun")
	f.Float64Var(&flags.config.Rate, "rate", 0, "operations begun in a second by all clients together, as long as they can keep up; 0 for as many as are answered")
	f.BoolVar(&flags.config.KeepAlive, "keep-alive", true, "use a connection for more than one request")
	flags.remote.add(f)
	return cmd
}

// uploads says whether there must be something on the server beforehand.
func (b *benchFlags) uploads() bool {
	return b.config.Operation != load.Put && b.config.Operation != load.Miss
}

// complete checks the flags and fills the config.
func (b *benchFlags) complete(warnings io.Writer) (err error) {
	c := &b.config
	if c.Server, err = client.ParseServer(b.remote.server); err != nil {
		return usageError("--server is %w", err)
	}
	if c.TLS, err = b.remote.tls.config(c.Server); err != nil {
		return err
	}
	if c.Server, err = b.remote.address(c.Server, warnings); err != nil {
		return err
	}
	c.GRPC, c.Size = b.remote.grpc, int64(b.size)
	if c.Duration <= 0 || c.Duration > longest {
		return usageError("--duration is %v; it must be more than 0 and at most %v", c.Duration, longest)
	}
	if !(c.Rate >= 0 && c.Rate <= mostRate) { // which NaN is not either
		return usageError("--rate is %v; it must be 0 to %v", c.Rate, float64(mostRate))
	}
	if c.GRPC {
		if !c.KeepAlive {
			return usageError("--keep-alive=false does not fit --grpc, whose calls share a connection")
		}
		conn, err := client.DialGRPC(c.Server, c.TLS) // which does not connect yet
		if err != nil {
			return usageError("--server does not fit --grpc: %w", err)
		}
		conn.Close()
	}
	return checkBounds([]bound{
		{"clients", int64(c.Clients), 1, mostClients},
		{"artifacts", int64(c.Artifacts), 1, 1 << 30},
	})
}

// benchReport is a result in JSON. Rates are per second, and what is a time is in seconds.
type benchReport struct {
	Operation           string  `json:"operation"`
	Protocol            string  `json:"protocol"`
	Size                int64   `json:"size"`
	Compressible        bool    `json:"compressible"`
	Clients             int     `json:"clients"`
	Rate                float64 `json:"rate,omitempty"`
	Elapsed             float64 `json:"elapsed"`
	Operations          int64   `json:"operations"`
	Errors              int64   `json:"errors"`
	OperationsPerSecond float64 `json:"operations_per_second"`
	BytesSent           int64   `json:"bytes_sent"`
	BytesReceived       int64   `json:"bytes_received"`
	BytesPerSecond      float64 `json:"bytes_per_second"`
	P50                 float64 `json:"p50"`
	P90                 float64 `json:"p90"`
	P99                 float64 `json:"p99"`
	Max                 float64 `json:"max"`
	OwnCPU              float64 `json:"own_cpu"`
}

func (b *benchFlags) print(w io.Writer, r *load.Result) error {
	latency := func(percentile float64) time.Duration { return time.Duration(r.Latency.ValueAtPercentile(percentile)) }
	elapsed := r.Elapsed.Seconds()
	protocol := "REST"
	if b.config.GRPC {
		protocol = "gRPC"
	}
	if b.remote.json {
		text, err := json.Marshal(benchReport{
			Operation:           string(b.config.Operation),
			Protocol:            protocol,
			Size:                b.config.Size,
			Compressible:        b.config.Compressible,
			Clients:             b.config.Clients,
			Elapsed:             elapsed,
			Operations:          r.Operations,
			Errors:              r.Errors,
			OperationsPerSecond: float64(r.Operations) / elapsed,
			BytesSent:           r.Sent,
			BytesReceived:       r.Received,
			BytesPerSecond:      float64(r.Sent+r.Received) / elapsed,
			P50:                 latency(50).Seconds(),
			P90:                 latency(90).Seconds(),
			P99:                 latency(99).Seconds(),
			Max:                 time.Duration(r.Latency.Max()).Seconds(),
			OwnCPU:              r.CPU.Seconds(),
		})
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", text)
		return err
	}
	kind := "incompressible"
	if b.config.Compressible {
		kind = "compressible"
	}
	lines := []string{
		fmt.Sprintf("%s of %s, %s, over %s with %s for %v", b.config.Operation, humanize.IBytes(uint64(b.config.Size)), kind, protocol,
			english.Plural(b.config.Clients, "client", ""), r.Elapsed.Round(time.Millisecond)),
		fmt.Sprintf("  operations  %s, %s a second", humanize.Comma(r.Operations), humanize.CommafWithDigits(float64(r.Operations)/elapsed, 1)),
		fmt.Sprintf("  bytes       %s sent, %s received, %s a second", humanize.IBytes(uint64(r.Sent)), humanize.IBytes(uint64(r.Received)),
			humanize.IBytes(uint64(float64(r.Sent+r.Received)/elapsed))),
	}
	if r.Operations > 0 {
		lines = append(lines, fmt.Sprintf("  latency     p50 %s, p90 %s, p99 %s, max %s", short(latency(50)), short(latency(90)), short(latency(99)), short(time.Duration(r.Latency.Max()))))
	}
	lines = append(lines, fmt.Sprintf("  errors      %s", humanize.Comma(r.Errors)))
	if all := r.Operations + r.Errors; all > 0 && r.CPU > 0 {
		lines = append(lines, fmt.Sprintf("  own cost    %s of processor time for each", short(r.CPU/time.Duration(all))))
	}
	_, err := fmt.Fprintln(w, strings.Join(lines, "\n"))
	return err
}

// short is a duration with three digits or so.
func short(d time.Duration) string {
	for unit := time.Second; unit > 1; unit /= 1000 {
		if d >= unit {
			return d.Round(unit / 100).String()
		}
	}
	return d.String()
}
