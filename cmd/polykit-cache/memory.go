package main

// The memory that the server may take is decided here. A container that takes more than its limit is killed, and
// with it everything in flight; so with a limit the garbage collector works towards it, and what is in memory for
// clients gets a share of it, if that is less than what it gets otherwise:
//
//	1/2   uploads and other verifications   --verify-memory
//	1/8   connections                       --max-connections
//	1/32  artifacts that are asked for      --hot-size
//
// --max-manifest-size is a 1/32 too, since the half of --verify-memory that is not for windows must hold the largest
// documents several times. The rest is for the program, its index, and what the collector has not collected yet.
// All these are defaults: who sets one gets what it says, and a warning if it does not fit.

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

const (
	verifyShare   = 2
	documentShare = 32
	hotShare      = 32

	// connectionMemory is what each connection needs of a memory limit: eight times what an idle one takes, 24 KiB.
	connectionMemory = 8 * 24 << 10

	// leastMemory is the least memory limit at which the defaults fit into it.
	leastMemory = 128 << 20

	// garbageSize is how much is allocated at least between two collections of garbage; of a memory limit at most
	// 1/garbageShare is.
	garbageSize  = 16 << 20
	garbageShare = 16
	// garbagePercent is how much more may be, in percent of what lives, if memory is not limited to less than 1 GiB.
	garbagePercent = 25
)

// memoryLimit returns the most bytes of memory that this process may take, which on Linux its cgroup or one around it
// says. Where nothing limits it that is math.MaxInt64.
func memoryLimit() (int64, error) {
	limit, err := memlimit.FromCgroup()
	switch {
	case errors.Is(err, memlimit.ErrNoLimit), errors.Is(err, memlimit.ErrNoCgroup), errors.Is(err, memlimit.ErrCgroupsNotSupported):
		return math.MaxInt64, nil
	case err != nil:
		return math.MaxInt64, fmt.Errorf("the memory limit is not known: %w; set GOMEMLIMIT to nine tenths of it, if there is one", err)
	}
	return int64(min(limit, math.MaxInt64)), nil
}

// limitHeap has the garbage collector work the more, the nearer the process comes to nine tenths of its memory limit.
// The last tenth is for what the collector knows nothing of. Who sets GOMEMLIMIT gets what it says.
func limitHeap() {
	if limit, err := memoryLimit(); err == nil && limit < math.MaxInt64 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit / 10 * 9 >> 20 << 20) // whole MiB are easier to read in the log
	}
}

// formatLimit returns a number of bytes for people, where math.MaxInt64 is no limit.
func formatLimit(n int64) string {
	if n == math.MaxInt64 {
		return "none"
	}
	size := sizeFlag(n)
	return size.String()
}

// paceCollector has garbage collected when garbageSize was allocated and a part of what lives. By default it would be
// only as much as lives, of which the server's heap has so little that it would be collected twenty times a second; and
// where much lives, that is more than it is worth. What it returns must be kept: it counts as living, but is never
// touched, and so takes no memory. It counts in a memory limit too, so where that is low there is less of it, and the
// collector has its default; the limit itself has it begin early. Who sets the collector's own variables gets what they
// say.
func paceCollector(memoryLimit int64) (ballast []byte) {
	switch {
	case os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "":
		return nil
	case memoryLimit < 1<<30:
		return make([]byte, min(garbageSize, memoryLimit/garbageShare))
	}
	debug.SetGCPercent(garbagePercent)
	return make([]byte, garbageSize*100/garbagePercent)
}

// logResources logs what the server found that it may take, and warns if it is too little.
func (c *serveConfig) logResources(log *slog.Logger) {
	limit, verify := c.limits.systemMemory, sizeFlag(c.limits.capacity.Memory)
	log.Info("resources", "cpus", runtime.GOMAXPROCS(0), "memory_limit", formatLimit(limit), "gomemlimit", formatLimit(debug.SetMemoryLimit(-1)),
		"verify_memory", verify.String(), "max_manifest_size", c.limits.maxManifestSize.String(), "hot_size", c.hotSize.String())
	if err := c.limits.systemMemoryFault; err != nil {
		log.Warn("going on as if memory were not limited", "error", err)
	}
	switch connections := int64(c.server.MaxConnections) * (connectionMemory / 8); {
	case limit < leastMemory:
		log.Warn("the memory limit is so low that the server may be killed: raise it to 128 MiB at least", "memory_limit", formatLimit(limit))
	case limit/4*3 < int64(verify)+int64(c.hotSize)+connections:
		log.Warn("clients can make the server take more than its memory limit, for which it would be killed: raise that, or lower --verify-memory (with --max-manifest-size), --hot-size or --max-connections",
			"memory_limit", formatLimit(limit))
	}
}
