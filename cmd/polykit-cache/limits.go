package main

import (
	"fmt"
	"math"

	"github.com/dustin/go-humanize"
	"github.com/spf13/pflag"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/disk"
)

// unpackedRatio is how many times --max-size an artifact may unpack to if --max-unpacked-size does
// not say.
const unpackedRatio = 16

// limitFlags are the limits of an artifact, and what all verifications together may take.
type limitFlags struct {
	maxSize         sizeFlag
	maxUnpackedSize sizeFlag
	maxWindow       sizeFlag
	maxFiles        int
	maxPathLength   int
	maxMetadataSize sizeFlag
	maxManifestSize sizeFlag
	memory          sizeFlag
	capacity        artifact.Capacity // but for the memory before it is complete

	systemMemory      int64 // what the system lets the process have, once it is complete
	systemMemoryFault error // why that is not known
}

func newLimitFlags() limitFlags {
	limits := artifact.DefaultLimits
	return limitFlags{
		maxSize:         1 << 30,
		maxWindow:       sizeFlag(limits.Window),
		maxFiles:        limits.Files,
		maxPathLength:   limits.PathLength,
		maxMetadataSize: sizeFlag(limits.MetadataSize),
		capacity:        limits.Capacity,
	}
}

func (c *limitFlags) add(f *pflag.FlagSet) {
	f.Var(&c.maxSize, "max-size", "most bytes of an artifact as uploaded")
	f.Var(&c.maxUnpackedSize, "max-unpacked-size", fmt.Sprintf("most bytes that an artifact may unpack to (default %d times --max-size)", unpackedRatio))
	f.Var(&c.maxWindow, "max-window", "largest zstd window that an artifact may need; bounds the memory of an upload")
	f.IntVar(&c.maxFiles, "max-files", c.maxFiles, "most files and directories in an artifact")
	f.IntVar(&c.maxPathLength, "max-path-length", c.maxPathLength, "most bytes in the path of a file in an artifact")
	f.Var(&c.maxMetadataSize, "max-metadata-size", "most bytes in an artifact's metadata.json")
	f.Var(&c.maxManifestSize, "max-manifest-size", fmt.Sprintf("most bytes in an artifact's manifest.json, and in all its paths together (default %s, or 1/%d of the memory limit)", humanize.IBytes(uint64(artifact.DefaultLimits.ManifestSize)), documentShare))
	f.Var(&c.memory, "verify-memory", fmt.Sprintf("most memory that uploads and other verifications take together; bounds how many run at once (default %s or half of the memory limit, but at least what the largest artifact needs)", humanize.IBytes(uint64(c.capacity.Memory))))
}

// bound is what a number must be.
type bound struct {
	flag               string
	value, least, most int64
}

func checkBounds(bounds []bound) error {
	for _, b := range bounds {
		if b.value < b.least || b.value > b.most {
			return usageError("--%s is %d; it must be from %d to %d", b.flag, b.value, b.least, b.most)
		}
	}
	return nil
}

// complete checks the limits and fills in those that depend on others.
func (c *limitFlags) complete() error {
	c.systemMemory, c.systemMemoryFault = memoryLimit()
	if c.maxManifestSize == 0 {
		c.maxManifestSize = sizeFlag(min(artifact.DefaultLimits.ManifestSize, c.systemMemory/documentShare))
	}
	err := checkBounds([]bound{
		{"max-window", int64(c.maxWindow), artifact.MinWindow, artifact.MaxWindow},
		{"max-files", int64(c.maxFiles), 1, math.MaxInt32},
		{"max-path-length", int64(c.maxPathLength), 1, math.MaxInt32},
		{"max-metadata-size", int64(c.maxMetadataSize), 1, disk.MaxMetadataSize},
		{"max-manifest-size", int64(c.maxManifestSize), 1, math.MaxInt32},
	})
	if err != nil {
		return err
	}
	if c.maxUnpackedSize == 0 {
		c.maxUnpackedSize = sizeFlag(math.MaxInt64)
		if c.maxSize < math.MaxInt64/unpackedRatio {
			c.maxUnpackedSize = c.maxSize * unpackedRatio
		}
	}
	least := c.limits().LeastMemory()
	switch {
	case c.memory == 0:
		c.capacity.Memory = max(min(c.capacity.Memory, c.systemMemory/verifyShare), least)
		c.memory = sizeFlag(c.capacity.Memory)
	case int64(c.memory) < least:
		return usageError("--verify-memory is %d; the largest artifact that the other limits allow needs %d", c.memory, least)
	default:
		c.capacity.Memory = int64(c.memory)
	}
	return nil
}

func (c *limitFlags) limits() artifact.Limits {
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
