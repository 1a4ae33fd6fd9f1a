package index

import "context"

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

// Pace is how many rows and files a reconciliation goes through in a second at most.
const Pace = pace

// NewRest returns what a reconciliation rests by: what it returns is called after some rows or files.
func NewRest(ctx context.Context) func(n int) error { return newRest(ctx).after }
