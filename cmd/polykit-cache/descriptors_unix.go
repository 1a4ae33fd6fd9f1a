//go:build unix

package main

import (
	"math"
	"syscall"
)

// maxDescriptors returns how many files and connections this process may have open together. Go has
// raised the limit as far as it may be by now.
func maxDescriptors() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return math.MaxInt32
	}
	return int(min(uint64(limit.Cur), math.MaxInt32))
}
