package disk

// Hot returns how many artifacts are kept in memory, and what they are counted as in bytes.
func (s *Store) Hot() (artifacts int, size int64) {
	s.hot.mu.Lock()
	defer s.hot.mu.Unlock()
	if s.hot.lru == nil {
		return 0, s.hot.size
	}
	return s.hot.lru.Len(), s.hot.size
}
