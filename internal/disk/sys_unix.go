//go:build unix

package disk

import "syscall"

const (
	// openFlags keep a symbolic link from being followed and a named pipe from blocking.
	openFlags = syscall.O_NOFOLLOW | syscall.O_NONBLOCK
	// dirsSync says whether a directory can be synced.
	dirsSync = true
)
