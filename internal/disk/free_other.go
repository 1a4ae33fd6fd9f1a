//go:build !linux && !darwin && !windows

package disk

import "io/fs"

// fileSystem says that it is not known how much a file system has.
func fileSystem(string) (size, free int64, err error) { return unknownSpace, unknownSpace, nil }

// blocks returns about how many bytes a file takes on the disk.
func blocks(stat fs.FileInfo) int64 { return wholeBlocks(stat.Size()) }
