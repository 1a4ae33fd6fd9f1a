package disk

import (
	"crypto/rand"
	"os"
	"strings"
	"sync"
)

// Durability says what a power cut, or a crash of the operating system, may take of what was
// acknowledged. A crash of the server alone takes nothing with either.
type Durability string

const (
	// DurabilityFull waits until an artifact is on the disk before it is acknowledged: nothing is lost.
	DurabilityFull Durability = "full"
	// DurabilityNone leaves writing to the operating system, which is faster: artifacts of the last
	// half minute or so may be lost. None is served damaged: see boot.
	DurabilityNone Durability = "none"
)

// boot identifies what artifacts survive that were not synced: the run of the operating system, or
// this process where that has no name. A file system may bring back a file with its size and time but
// without its content, so a memo of an artifact that was not synced says in which run it was written,
// and in a later one the artifact is verified anew before it is served.
var boot = sync.OnceValue(func() string {
	if id, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		return strings.TrimSpace(string(id))
	}
	return rand.Text()
})
