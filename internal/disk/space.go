package disk

import (
	"errors"
	"io/fs"
	"math"
	"sync"
	"syscall"
)

// space accounts for what uploads in flight still have to write, so that not all of them are promised
// the same free space. What is promised is not taken from the file system, for a client could then
// take space for the mere promise of an upload.
type space struct {
	dir string

	mu       sync.Mutex
	promised int64 // bytes that are not written yet
}

// promise sets size bytes aside, or returns ENOSPC if they are not free.
func (s *space) promise(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	free, err := freeSpace(s.dir)
	if errors.Is(err, fs.ErrNotExist) { // the directory is made again when the upload is
		free, err = unknownSpace, nil
	}
	if err != nil {
		return err
	}
	if size > free-s.promised {
		return syscall.ENOSPC
	}
	s.promised += size
	return nil
}

// keep gives back what was promised, since it is written or will not be.
func (s *space) keep(size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.promised -= size
}

// unknownSpace is the free space of a file system that does not tell: a full disk is then found when
// it is written to.
const unknownSpace = math.MaxInt64
