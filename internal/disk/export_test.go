package disk

import (
	"io/fs"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Hot returns how many artifacts are kept in memory, and what they are counted as in bytes.
func (s *Store) Hot() (artifacts int, size int64) {
	s.hot.mu.Lock()
	defer s.hot.mu.Unlock()
	if s.hot.lru == nil {
		return 0, s.hot.size
	}
	return s.hot.lru.Len(), s.hot.size
}

// Kept returns what is kept of an artifact, so that tests can tell whether it is the same as before.
func (s *Store) Kept(key artifact.Key) any {
	s.hot.mu.Lock()
	defer s.hot.mu.Unlock()
	kept, _ := s.hot.lru.Peek(key.In(s.scope))
	return kept
}

// DurableDirs returns how many directories of other scopes than the default one are known to be durable.
func (s *Store) DurableDirs() int {
	s.shards.mu.Lock()
	defer s.shards.mu.Unlock()
	if s.shards.others == nil {
		return 0
	}
	return s.shards.others.Len()
}

// BlocksOf returns what a file or directory takes on the disk.
func BlocksOf(stat fs.FileInfo) int64 { return blocks(stat) }

// RenewMemo writes the memo of an artifact anew, as who verified it does.
func (s *Store) RenewMemo(info artifact.Info) (pinned bool, err error) {
	return s.renewMemo(info, true)
}

// Promised returns how many bytes are set aside for uploads and not written.
func (s *Store) Promised() int64 {
	s.space.mu.Lock()
	defer s.space.mu.Unlock()
	return s.space.promised
}
