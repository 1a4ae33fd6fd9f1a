package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// beginWriteback begins to write a part of a file to the disk. Whether that can be does not matter: it is
// fsync that waits for the end, and that fails if something did.
func beginWriteback(file *os.File, offset, size int64) {
	unix.SyncFileRange(int(file.Fd()), offset, size, unix.SYNC_FILE_RANGE_WRITE)
}
