package index

// SetLimits bounds what is kept as if its constants were these. It must be called before everything else.
func (x *Index) SetLimits(maxPending, maxUses, maxIdleTasks int) {
	x.maxPending, x.maxUses, x.maxIdleTasks = maxPending, maxUses, maxIdleTasks
}

// Doubts returns how many keys are to be looked up.
func (x *Index) Doubts() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.doubts)
}
