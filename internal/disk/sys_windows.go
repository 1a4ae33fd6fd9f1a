package disk

const (
	openFlags = 0
	// Windows has no fsync of a directory; NTFS journals names by itself.
	dirsSync = false
)
