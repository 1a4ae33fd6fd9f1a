//go:build !unix

package retention_test

import "io/fs"

// onDisk returns what tells a file from others, and the bytes that it takes on the disk.
func onDisk(stat fs.FileInfo) (id any, blocks int64, ok bool) { return stat.Name(), stat.Size(), true }
