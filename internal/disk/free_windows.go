package disk

import (
	"io/fs"

	"golang.org/x/sys/windows"
)

// fileSystem returns how many bytes the file system of dir has, and how many of them this process may still
// write.
func fileSystem(dir string) (size, free int64, err error) {
	path, err := windows.UTF16PtrFromString(dir)
	if err != nil {
		return 0, 0, err
	}
	var available, total uint64
	if err := windows.GetDiskFreeSpaceEx(path, &available, &total, nil); err != nil {
		return 0, 0, err
	}
	return int64(min(total, unknownSpace)), int64(min(available, unknownSpace)), nil
}

// blocks returns about how many bytes a file takes on the disk.
func blocks(stat fs.FileInfo) int64 { return wholeBlocks(stat.Size()) }
