//go:build !unix

package load

import "time"

// ownCPU does not know.
func ownCPU() time.Duration { return 0 }
