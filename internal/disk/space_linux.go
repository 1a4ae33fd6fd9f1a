package disk

import "syscall"

// checkSpace returns ENOSPC if the file system of dir has less than size bytes for this process. It
// sets nothing aside: a client could then take space for the mere promise of an upload.
func checkSpace(dir string, size int64) error {
	var stat syscall.Statfs_t
	if err := syscall.Statfs(dir, &stat); err != nil {
		return err
	}
	if uint64(size) > stat.Bavail*uint64(stat.Bsize) {
		return syscall.ENOSPC
	}
	return nil
}
