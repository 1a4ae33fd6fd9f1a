package disk

import "syscall"

// freeSpace returns how many bytes this process may still write to the file system of dir.
func freeSpace(dir string) (int64, error) {
	var stat syscall.Statfs_t
	if err := syscall.Statfs(dir, &stat); err != nil {
		return 0, err
	}
	return int64(min(stat.Bavail*uint64(stat.Bsize), unknownSpace)), nil
}
