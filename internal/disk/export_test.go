package disk

import "github.com/polykit/polykit-cache/internal/artifact"

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
	kept, _ := s.hot.lru.Peek(key)
	return kept
}

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
