//go:build linux || darwin

package disk

import (
	"io/fs"
	"syscall"

	"golang.org/x/sys/unix"
)

// fileSystem returns how many bytes the file system of dir has, and how many of them this process may still
// write.
func fileSystem(dir string) (size, free int64, err error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return 0, 0, err
	}
	block := uint64(stat.Bsize)
	return int64(min(stat.Blocks*block, unknownSpace)), int64(min(stat.Bavail*block, unknownSpace)), nil
}

// blocks returns how many bytes a file takes on the disk.
func blocks(stat fs.FileInfo) int64 {
	if sys, ok := stat.Sys().(*syscall.Stat_t); ok {
		return sys.Blocks * 512 // whatever the size of the file system's own blocks
	}
	return wholeBlocks(stat.Size())
}
