package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// ErrBusy says that verifications take all that they may together. It passes.
var ErrBusy = errors.New("too many artifacts are verified at once")

// Capacity bounds what all verifications of a Verifier cost together, whatever they are sent.
type Capacity struct {
	// Memory is the most bytes that they may take, at least Limits.LeastMemory. One half is for
	// windows, and so bounds how many run at once; one half is for what artifacts with very many files
	// or very long documents take beside that.
	Memory int64
	// Queue is the most verifications that may wait for others to end.
	Queue int
	// QueueTimeout is how long one may wait.
	QueueTimeout time.Duration
}

const (
	// slotOverhead is what a verification takes beside its window.
	slotOverhead = 1 << 20
	// documentFactor is how many times its size a document takes, as text and as what was read of it.
	documentFactor = 4
	// entryOverhead is what an entry of an archive takes beside its name, in bytes.
	entryOverhead = 128
	// chargeStep is how much memory is asked for at a time; what is less needs no asking.
	chargeStep = 1 << 20
)

// LeastMemory is the least Capacity.Memory with which every artifact within the limits can be
// verified, if it is alone.
func (l Limits) LeastMemory() int64 {
	return 2 * max(l.Window+slotOverhead, l.extremes())
}

// extremes is what the largest artifact within the limits takes beside its slot.
func (l Limits) extremes() int64 {
	return documentFactor*(l.ManifestSize+l.MetadataSize) + l.ManifestSize + entryOverhead*int64(l.Files) + 2*chargeStep
}

// Slots is how many verifications may run at once.
func (l Limits) Slots() int { return int(max(1, l.Memory/2/(l.Window+slotOverhead))) }

// capacity is what is left of a Capacity, and of the machine's processors.
type capacity struct {
	slots   chan struct{} // holds one for each verification that was admitted
	waiting atomic.Int64
	queue   int64
	timeout time.Duration
	extra   *semaphore.Weighted // bytes beside the slots

	// processors holds one for each verification that is not waiting for bytes. More than there are
	// processors would only make the rest of the server wait: who asks for what is stored already
	// must not stand behind all uploads.
	processors chan struct{}
}

func newCapacity(limits Limits) *capacity {
	return &capacity{
		slots:      make(chan struct{}, limits.Slots()),
		queue:      int64(limits.Queue),
		timeout:    limits.QueueTimeout,
		extra:      semaphore.NewWeighted(max(limits.Memory/2, limits.extremes())),
		processors: make(chan struct{}, runtime.GOMAXPROCS(0)),
	}
}

// Admit waits until there is memory for one more verification, whose caller must release it. If
// too many wait already, or it took too long, the error is ErrBusy.
func (v *Verifier) Admit(ctx context.Context) (release func(), err error) {
	c := v.capacity
	release = func() { <-c.slots }
	select {
	case c.slots <- struct{}{}:
		return release, nil
	default:
	}
	defer c.waiting.Add(-1)
	if c.waiting.Add(1) > c.queue {
		return nil, fmt.Errorf("%w: %d are, and %d more wait for them", ErrBusy, cap(c.slots), c.queue)
	}
	timeout := time.NewTimer(c.timeout)
	defer timeout.Stop()
	select {
	case c.slots <- struct{}{}:
		return release, nil
	case <-timeout.C:
		return nil, fmt.Errorf("%w: %d are, and none ended within %v", ErrBusy, cap(c.slots), c.timeout)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// yielding is a reader that gives the processor up while it waits for bytes.
type yielding struct {
	r          io.Reader
	processors chan struct{}
}

func (y yielding) Read(p []byte) (int, error) {
	<-y.processors
	defer func() { y.processors <- struct{}{} }()
	return y.r.Read(p)
}

// charge accounts for n more bytes of memory that the archive takes beside its slot.
func (a *archive) charge(n int64) error {
	a.owed += n
	for a.owed >= chargeStep {
		if !a.verifier.capacity.extra.TryAcquire(chargeStep) {
			return fmt.Errorf("%w: this one has so many files, or such long documents, that there is no memory for it now", ErrBusy)
		}
		a.owed -= chargeStep
		a.charged += chargeStep
	}
	return nil
}

// settle gives back what was charged.
func (a *archive) settle() { a.verifier.capacity.extra.Release(a.charged) }
