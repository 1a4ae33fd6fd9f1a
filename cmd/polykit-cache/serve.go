package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"strconv"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/server"
)

// unpackedRatio is how many times --max-size an artifact may unpack to if --max-unpacked-size does
// not say.
const unpackedRatio = 16

const (
	// ownDescriptors is how many descriptors are kept for what is no connection and no client's file.
	// Each connection may need one for a file beside its own, so half of the rest is for connections.
	ownDescriptors = 64

	// leastHeaderSize has room for what proxies add, and mostHeaderSize is more than anybody needs.
	leastHeaderSize = 4 << 10
	mostHeaderSize  = 16 << 20
)

// serveConfig is all that can be set of a server. The flags document it.
type serveConfig struct {
	storageDir      string
	bind            string
	port            int
	durability      choiceFlag
	maxSize         sizeFlag
	maxUnpackedSize sizeFlag
	maxWindow       sizeFlag
	maxFiles        int
	maxPathLength   int
	maxMetadataSize sizeFlag
	maxManifestSize sizeFlag
	capacity        artifact.Capacity
	memory          sizeFlag // of the capacity
	logLevel        choiceFlag
	logFormat       choiceFlag
	server          server.Config
	minUploadRate   sizeFlag
	minDownloadRate sizeFlag
	maxHeaderSize   sizeFlag
	drainSize       sizeFlag
}

func serveCommand() *cobra.Command {
	limits := artifact.DefaultLimits
	c := serveConfig{
		durability:      choiceFlag{string(disk.DurabilityFull), []string{string(disk.DurabilityFull), string(disk.DurabilityNone)}},
		maxSize:         1 << 30,
		maxWindow:       sizeFlag(limits.Window),
		maxMetadataSize: sizeFlag(limits.MetadataSize),
		maxManifestSize: sizeFlag(limits.ManifestSize),
		capacity:        limits.Capacity,
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
			return c.serve(cmd.Context(), cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&c.storageDir, "storage-dir", "./cache", "`directory` that artifacts are stored in; created if it does not exist")
	f.StringVar(&c.bind, "bind", "127.0.0.1", "`address` to listen on; 0.0.0.0 or :: for all")
	f.IntVar(&c.port, "port", 8080, "TCP `port` to listen on; 0 picks a free one and logs it")
	f.Var(&c.durability, "durability", "what a power cut may take: nothing that was acknowledged (full), or what was stored in about the last half minute (none), which is faster; a crash of the server alone takes nothing with either")
	f.Var(&c.maxSize, "max-size", "most bytes of an artifact as uploaded")
	f.Var(&c.maxUnpackedSize, "max-unpacked-size", fmt.Sprintf("most bytes that an artifact may unpack to (default %d times --max-size)", unpackedRatio))
	f.Var(&c.maxWindow, "max-window", "largest zstd window that an artifact may need; bounds the memory of an upload")
	f.IntVar(&c.maxFiles, "max-files", limits.Files, "most files and directories in an artifact")
	f.IntVar(&c.maxPathLength, "max-path-length", limits.PathLength, "most bytes in the path of a file in an artifact")
	f.Var(&c.maxMetadataSize, "max-metadata-size", "most bytes in an artifact's metadata.json")
	f.Var(&c.maxManifestSize, "max-manifest-size", "most bytes in an artifact's manifest.json, and in all its paths together")
	f.Var(&c.memory, "verify-memory", fmt.Sprintf("most memory that uploads and other verifications take together; bounds how many run at once (default %s, or what the largest artifact needs)", humanize.IBytes(uint64(limits.Memory))))
	f.IntVar(&c.capacity.Queue, "max-queued-uploads", c.capacity.Queue, "most uploads that wait for others to end; more are told to come again")
	f.DurationVar(&c.capacity.QueueTimeout, "queue-timeout", c.capacity.QueueTimeout, "time that an upload may wait for others to end")
	f.DurationVar(&c.server.HeaderTimeout, "header-timeout", c.server.HeaderTimeout, "time in which a client must have sent the header of a request")
	f.DurationVar(&c.server.IdleTimeout, "idle-timeout", c.server.IdleTimeout, "time that a connection is kept without a request")
	f.DurationVar(&c.server.StallTimeout, "stall-timeout", c.server.StallTimeout, "time that a client may keep the server waiting in the middle of a request before it is given up")
	f.Var(&c.minUploadRate, "min-upload-rate", "bytes a second that an upload must come with, if it takes longer than that")
	f.Var(&c.minDownloadRate, "min-download-rate", "bytes a second that a download must be taken with, if it takes longer than that")
	f.IntVar(&c.server.MaxConnections, "max-connections", 0, fmt.Sprintf("most connections at once; more are told to come again (default %d, or half of the files that may be open)", server.DefaultConfig.MaxConnections))
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
	for _, bound := range []struct {
		flag               string
		value, least, most int64
	}{
		{"max-window", int64(c.maxWindow), artifact.MinWindow, artifact.MaxWindow},
		{"max-files", int64(c.maxFiles), 1, math.MaxInt32},
		{"max-path-length", int64(c.maxPathLength), 1, math.MaxInt32},
		{"max-metadata-size", int64(c.maxMetadataSize), 1, disk.MaxMetadataSize},
		{"max-manifest-size", int64(c.maxManifestSize), 1, math.MaxInt32},
		{"max-connections", int64(c.server.MaxConnections), 0, math.MaxInt32},
		{"max-streams", int64(c.server.MaxStreams), 1, math.MaxInt32},
		{"max-header-size", int64(c.maxHeaderSize), leastHeaderSize, mostHeaderSize},
		{"max-queued-uploads", int64(c.capacity.Queue), 0, math.MaxInt32},
	} {
		if bound.value < bound.least || bound.value > bound.most {
			return usageError("--%s is %d; it must be from %d to %d", bound.flag, bound.value, bound.least, bound.most)
		}
	}
	for flag, d := range map[string]time.Duration{
		"queue-timeout":    c.capacity.QueueTimeout,
		"header-timeout":   c.server.HeaderTimeout,
		"stall-timeout":    c.server.StallTimeout,
		"idle-timeout":     c.server.IdleTimeout,
		"drain-timeout":    c.server.DrainTimeout,
		"shutdown-timeout": c.server.ShutdownTimeout,
	} {
		if d <= 0 {
			return usageError("--%s is %v; it must be more than 0", flag, d)
		}
	}
	if c.maxUnpackedSize == 0 {
		c.maxUnpackedSize = sizeFlag(math.MaxInt64)
		if c.maxSize < math.MaxInt64/unpackedRatio {
			c.maxUnpackedSize = c.maxSize * unpackedRatio
		}
	}
	if c.server.MaxConnections == 0 {
		c.server.MaxConnections = max(1, min(server.DefaultConfig.MaxConnections, (maxDescriptors()-ownDescriptors)/2))
	}
	c.server.MinUploadRate = int64(c.minUploadRate)
	c.server.MinDownloadRate = int64(c.minDownloadRate)
	c.server.MaxHeaderSize = int(c.maxHeaderSize)
	c.server.DrainSize = int64(c.drainSize)
	least := c.limits().LeastMemory()
	switch {
	case c.memory == 0:
		c.capacity.Memory = max(c.capacity.Memory, least)
	case int64(c.memory) < least:
		return usageError("--verify-memory is %d; the largest artifact that the other limits allow needs %d", c.memory, least)
	default:
		c.capacity.Memory = int64(c.memory)
	}
	return nil
}

// limits returns the limits of an artifact.
func (c *serveConfig) limits() artifact.Limits {
	return artifact.Limits{
		UnpackedSize: int64(c.maxUnpackedSize),
		Window:       int64(c.maxWindow),
		Files:        c.maxFiles,
		PathLength:   c.maxPathLength,
		MetadataSize: int64(c.maxMetadataSize),
		ManifestSize: int64(c.maxManifestSize),
		Capacity:     c.capacity,
	}
}

// serve serves until ctx is done.
func (c *serveConfig) serve(ctx context.Context, logTo io.Writer) error {
	options := &slog.HandlerOptions{Level: levels[c.logLevel.value], ReplaceAttr: nameTrace}
	log := slog.New(slog.NewTextHandler(logTo, options))
	if c.logFormat.value == "json" {
		log = slog.New(slog.NewJSONHandler(logTo, options))
	}
	verifier := artifact.NewVerifier(c.limits())
	store, err := disk.Open(disk.Config{Dir: c.storageDir, Verifier: verifier, Durability: disk.Durability(c.durability.value), Log: log})
	if err != nil {
		return err
	}
	defer store.Close()
	listener, err := net.Listen("tcp", net.JoinHostPort(c.bind, strconv.Itoa(c.port)))
	if err != nil {
		return err
	}
	s := server.New(cache.New(store, verifier, cache.Config{MaxSize: int64(c.maxSize)}), c.server, log)
	log.Info("listening", "address", listener.Addr().String(), "storage_dir", c.storageDir, "max_size", c.maxSize.String(),
		"max_connections", c.server.MaxConnections, "max_uploads", c.limits().Slots(), "version", version())
	if err := s.Serve(ctx, listener); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

func nameTrace(_ []string, attr slog.Attr) slog.Attr {
	if level, ok := attr.Value.Any().(slog.Level); ok && attr.Key == slog.LevelKey && level == levels["trace"] {
		return slog.String(slog.LevelKey, "TRACE")
	}
	return attr
}
