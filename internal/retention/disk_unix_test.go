//go:build unix

package retention_test

import (
	"io/fs"
	"syscall"
)

// onDisk returns what tells a file from others, and the bytes that it takes on the disk.
func onDisk(stat fs.FileInfo) (id any, blocks int64, ok bool) {
	sys, ok := stat.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, 0, false
	}
	return sys.Ino, sys.Blocks * 512, true
}
