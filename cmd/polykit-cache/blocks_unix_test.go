//go:build unix

package main

import (
	"io/fs"
	"syscall"
)

// blocks returns the bytes that a file takes on the disk, and what tells it from others: all its names are one
// file.
func blocks(stat fs.FileInfo) (size int64, id any) {
	sys := stat.Sys().(*syscall.Stat_t)
	return sys.Blocks * 512, [2]uint64{uint64(sys.Dev), sys.Ino}
}
