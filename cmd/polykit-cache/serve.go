package main

import (
	"errors"
	"fmt"
	"math"
	"net"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/server"
)

const (
	// ownDescriptors is how many descriptors are kept for what is no connection and no client's file.
	// Each connection may need one for a file beside its own, so half of the rest is for connections.
	ownDescriptors = 64

	// leastHeaderSize has room for what proxies add, and mostHeaderSize is more than anybody needs.
	leastHeaderSize = 4 << 10
	mostHeaderSize  = 16 << 20

	// mostHotSize is the default of --hot-size where memory is not short.
	mostHotSize = 16 << 20

	// longest is the longest duration that can be set: adding to it must not overflow.
	longest = 10 * 365 * 24 * time.Hour
)

// serveConfig is all that can be set of a server. The flags document it.
type serveConfig struct {
	storageDir      string
	bind            string
	port            int
	adminAddress    string
	trustedProxies  prefixesFlag
	tls             serverTLSFlags
	authFile        string
	durability      choiceFlag
	hotSize         sizeFlag
	limits          limitFlags
	retention       retentionFlags
	scrub           disk.ScrubConfig
	scrubRate       sizeFlag
	logLevel        choiceFlag
	logFormat       choiceFlag
	server          server.Config
	minUploadRate   sizeFlag
	minDownloadRate sizeFlag
	maxHeaderSize   sizeFlag
	drainSize       sizeFlag
	given           func(flag string) bool // whether a flag was set, on the command line or elsewhere
}

func serveCommand() *cobra.Command {
	return commandOfServer(func(cmd *cobra.Command, c *serveConfig) error { return c.serve(cmd.Context(), cmd.OutOrStdout()) })
}

// commandOfServer returns a command that has the flags of a server, and runs with them when they are complete.
func commandOfServer(run func(*cobra.Command, *serveConfig) error) *cobra.Command {
	c := serveConfig{
		limits:          newLimitFlags(),
		retention:       newRetentionFlags(),
		scrub:           disk.ScrubConfig{Interval: 30 * 24 * time.Hour},
		scrubRate:       16 << 20,
		durability:      choiceFlag{string(disk.DurabilityFull), []string{string(disk.DurabilityFull), string(disk.DurabilityNone)}},
		logLevel:        choiceFlag{"info", []string{"trace", "debug", "info", "warn", "error"}},
		logFormat:       choiceFlag{"text", []string{"text", "json"}},
		server:          server.DefaultConfig,
		minUploadRate:   sizeFlag(server.DefaultConfig.MinUploadRate),
		minDownloadRate: sizeFlag(server.DefaultConfig.MinDownloadRate),
		maxHeaderSize:   sizeFlag(server.DefaultConfig.MaxHeaderSize),
		drainSize:       sizeFlag(server.DefaultConfig.DrainSize),
	}
	cmd := &cobra.Command{
		Use:   "polykit-cache",
		Short: "Remote cache for build artifacts",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.complete(); err != nil {
				return err
			}
			return run(cmd, &c)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	c.given = f.Changed
	addConfig(f)
	f.StringVar(&c.storageDir, "storage-dir", "./cache", "`directory` that artifacts are stored in; created if it does not exist")
	f.StringVar(&c.bind, "bind", "127.0.0.1", "`address` to listen on; 0.0.0.0 or :: for all")
	f.IntVar(&c.port, "port", 8080, "TCP `port` to listen on; 0 picks a free one and logs it")
	f.StringVar(&c.adminAddress, "admin-address", "", "`address` and port, such as 127.0.0.1:9090, to serve /metrics, /debug/pprof, /log-level, /healthz and /readyz on without a credential; none without it")
	f.Var(&c.trustedProxies, "trusted-proxies", "addresses and networks of proxies, such as 10.0.0.0/8, that are believed when they say whom they ask for (X-Forwarded-For), for the log")
	c.tls.add(f)
	f.StringVar(&c.authFile, "auth-file", "", "`file` that says who may do what; without it everybody may do everything; read again when it changes, and on SIGHUP; \"auth check\" checks it")
	f.Var(&c.durability, "durability", "what a power cut may take: nothing that was acknowledged (full), or what was stored in about the last half minute (none), which is faster; a crash of the server alone takes nothing with either")
	c.retention.add(f)
	f.DurationVar(&c.scrub.Interval, "scrub-interval", c.scrub.Interval, "time in which everything that is stored is read once, to find what the disk damaged; 0 for never")
	f.Var(&c.scrubRate, "scrub-rate", "most bytes a second that are read for that")
	f.Var(&c.hotSize, "hot-size", fmt.Sprintf("most memory for artifacts that were asked for lately, so that small ones are not read again (default %s, or 1/%d of the memory limit)", humanize.IBytes(mostHotSize), hotShare))
	c.limits.add(f)
	f.IntVar(&c.limits.capacity.Queue, "max-queued-uploads", c.limits.capacity.Queue, "most uploads that wait for others to end; more are told to come again")
	f.DurationVar(&c.limits.capacity.QueueTimeout, "queue-timeout", c.limits.capacity.QueueTimeout, "time that an upload may wait for others to end")
	f.DurationVar(&c.server.HeaderTimeout, "header-timeout", c.server.HeaderTimeout, "time in which a client must have sent the header of a request")
	f.DurationVar(&c.server.IdleTimeout, "idle-timeout", c.server.IdleTimeout, "time that a connection is kept without a request")
	f.DurationVar(&c.server.StallTimeout, "stall-timeout", c.server.StallTimeout, "time that a client may keep the server waiting in the middle of a request before it is given up")
	f.Var(&c.minUploadRate, "min-upload-rate", "bytes a second that an upload must come with, if it takes longer than that")
	f.Var(&c.minDownloadRate, "min-download-rate", "bytes a second that a download must be taken with, if it takes longer than that")
	f.IntVar(&c.server.MaxConnections, "max-connections", 0, fmt.Sprintf("most connections at once; more are told to come again (default %d, or half of the files that may be open, or one for each %s of the memory limit)", server.DefaultConfig.MaxConnections, humanize.IBytes(connectionMemory)))
	f.IntVar(&c.server.MaxStreams, "max-streams", c.server.MaxStreams, "most requests and calls at once on one HTTP/2 connection")
	f.Var(&c.maxHeaderSize, "max-header-size", "most bytes in the header of a request")
	f.Var(&c.drainSize, "drain-size", "most bytes read of the body of a refused upload, so that the client reads the answer")
	f.DurationVar(&c.server.DrainTimeout, "drain-timeout", c.server.DrainTimeout, "time for reading that")
	f.DurationVar(&c.server.ShutdownTimeout, "shutdown-timeout", c.server.ShutdownTimeout, "time that requests in flight get to finish after SIGINT or SIGTERM")
	f.Var(&c.logLevel, "log-level", "least level that is logged")
	f.Var(&c.logFormat, "log-format", "format of the log")
	return cmd
}

// complete checks the settings and fills in those that depend on others.
func (c *serveConfig) complete() error {
	if c.port < 0 || c.port > math.MaxUint16 {
		return usageError("--port is %d; it must be from 0 to %d", c.port, math.MaxUint16)
	}
	if c.storageDir == "" {
		return usageError("--storage-dir is empty; give the directory that artifacts are to be stored in")
	}
	if _, err := net.ResolveIPAddr("ip", c.bind); err != nil || c.bind == "" {
		return usageError("--bind is %q; it must be an address of this machine, such as 127.0.0.1, 0.0.0.0 or ::", c.bind)
	}
	if _, _, err := net.SplitHostPort(c.adminAddress); err != nil && c.adminAddress != "" {
		return usageError("--admin-address is %q; it must be an address and a port, such as 127.0.0.1:9090", c.adminAddress)
	}
	err := checkBounds([]bound{
		{"max-connections", int64(c.server.MaxConnections), 0, math.MaxInt32},
		{"max-streams", int64(c.server.MaxStreams), 1, math.MaxInt32},
		{"max-header-size", int64(c.maxHeaderSize), leastHeaderSize, mostHeaderSize},
		{"max-queued-uploads", int64(c.limits.capacity.Queue), 0, math.MaxInt32},
	})
	if err != nil {
		return err
	}
	for flag, d := range map[string]time.Duration{
		"queue-timeout":    c.limits.capacity.QueueTimeout,
		"header-timeout":   c.server.HeaderTimeout,
		"stall-timeout":    c.server.StallTimeout,
		"idle-timeout":     c.server.IdleTimeout,
		"drain-timeout":    c.server.DrainTimeout,
		"shutdown-timeout": c.server.ShutdownTimeout,
	} {
		if d <= 0 {
			return usageError("--%s is %v; it must be more than 0", flag, d)
		}
		if d > longest {
			return usageError("--%s is %v; it must be at most %v", flag, d, longest)
		}
	}
	if c.scrub.Interval < 0 {
		return usageError("--scrub-interval is %v; it must not be negative", c.scrub.Interval)
	}
	if c.scrub.Interval > longest {
		return usageError("--scrub-interval is %v; it must be at most %v", c.scrub.Interval, longest)
	}
	if c.limits.capacity.QueueTimeout >= c.server.StallTimeout {
		return usageError("--queue-timeout is %v; it must be less than --stall-timeout, %v, for an upload that waits can keep others on its connection waiting", c.limits.capacity.QueueTimeout, c.server.StallTimeout)
	}
	if size := c.retention.maxStorage.size; size > 0 && size < leastStorage {
		return usageError("--max-storage is %d; it must be 0 or at least %d, since the index takes some of it", int64(size), leastStorage)
	}
	c.scrub.Rate = int64(c.scrubRate)
	if err := errors.Join(c.tls.complete(), c.retention.complete(), c.limits.complete()); err != nil {
		return err
	}
	memory := c.limits.systemMemory
	if c.server.MaxConnections == 0 {
		most := min(int64(server.DefaultConfig.MaxConnections), int64(maxDescriptors()-ownDescriptors)/2, memory/connectionMemory)
		c.server.MaxConnections = int(max(1, most))
	}
	if c.hotSize == 0 {
		c.hotSize = sizeFlag(min(mostHotSize, memory/hotShare))
	}
	c.server.MinUploadRate = int64(c.minUploadRate)
	c.server.MinDownloadRate = int64(c.minDownloadRate)
	c.server.MaxHeaderSize = int(c.maxHeaderSize)
	c.server.DrainSize = int64(c.drainSize)
	return nil
}
