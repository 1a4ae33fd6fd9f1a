package disk

import (
	"errors"
	"os"
	"syscall"
)

// fallocKeepSize is FALLOC_FL_KEEP_SIZE of fallocate(2): the file's size stays what was written.
const fallocKeepSize = 1

// reserve sets space aside for a file of size bytes, where the file system can.
func reserve(file *os.File, size int64) error {
	for {
		err := syscall.Fallocate(int(file.Fd()), fallocKeepSize, 0, size)
		switch {
		case err == syscall.EINTR:
		case errors.Is(err, errors.ErrUnsupported):
			return nil
		default:
			return os.NewSyscallError("fallocate", err)
		}
	}
}
