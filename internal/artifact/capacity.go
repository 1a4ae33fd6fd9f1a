package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
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
	// slotOverhead is what a verification takes beside its window, and the upload that it is of.
	slotOverhead = 2 << 20
	// documentFactor is how many times its size a document takes, as text and as what was read of it.
	documentFactor = 4
	// entryOverhead is what an entry of an archive takes beside its name, in bytes.
	entryOverhead = 128
	// aheadSize is how many bytes of an artifact must be there, if it has as many, before it gets one of
	// the last places.
	aheadSize = 16 << 10
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
	return documentFactor*(l.ManifestSize+l.MetadataSize) + l.ManifestSize + entryOverhead*int64(l.Files) + 2*chargeStep + aheadSize
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

// Admit waits until there is memory to verify the artifact that r has, within bounds: if too many wait
// already, or it took too long, the error is ErrBusy. It returns what to read instead of r, and what
// the caller must call when it is done.
//
// While half of the places are free, whoever comes gets one at once. The other half is for those of whose
// artifacts the first bytes are there: clients that send less can't take the places of those that send.
// If r holds more than it was asked for, it must have a method Buffered, as of bufio.Reader, to say so.
func (v *Verifier) Admit(ctx context.Context, r io.Reader) (io.Reader, func(), error) {
	c := v.capacity
	if len(c.slots) < cap(c.slots)/2 {
		select {
		case c.slots <- struct{}{}:
			return r, func() { <-c.slots }, nil
		default:
		}
	}
	if len(c.slots) == cap(c.slots) && c.waiting.Load() >= c.queue {
		return nil, nil, c.full() // which is known before anything is read
	}
	if !c.extra.TryAcquire(aheadSize) {
		return nil, nil, c.crowded()
	}
	held := int64(aheadSize)
	a := &ahead{r: r}
	a.read()
	if r, ok := r.(interface{ Buffered() int }); ok {
		more := int64(r.Buffered())
		if !c.extra.TryAcquire(more) {
			c.extra.Release(held)
			return nil, nil, c.crowded()
		}
		held += more
	}
	release, err := v.admit(ctx)
	if err != nil {
		c.extra.Release(held)
		return nil, nil, err
	}
	return a, func() {
		release()
		c.extra.Release(held)
	}, nil
}

// admit waits until there is memory for one more verification.
func (v *Verifier) admit(ctx context.Context) (release func(), err error) {
	c := v.capacity
	release = func() { <-c.slots }
	select {
	case c.slots <- struct{}{}:
		return release, nil
	default:
	}
	defer c.waiting.Add(-1)
	if c.waiting.Add(1) > c.queue {
		return nil, c.full()
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

func (c *capacity) full() error {
	return fmt.Errorf("%w: %d are, and %d more wait for them", ErrBusy, cap(c.slots), c.queue)
}

func (c *capacity) crowded() error {
	return fmt.Errorf("%w: so many have begun to come that there is no memory for one more", ErrBusy)
}

// ahead is a reader of which the beginning was read ahead.
type ahead struct {
	r   io.Reader
	buf []byte
	err error // that came behind buf
}

// read reads until aheadSize bytes are there, or the end. The buffer grows with what comes.
func (a *ahead) read() {
	for len(a.buf) < aheadSize && a.err == nil {
		if len(a.buf) == cap(a.buf) {
			a.buf = slices.Grow(a.buf, min(max(len(a.buf), 512), aheadSize-len(a.buf)))
		}
		var n int
		n, a.err = a.r.Read(a.buf[len(a.buf):min(cap(a.buf), aheadSize)])
		a.buf = a.buf[:len(a.buf)+n]
	}
}

func (a *ahead) Read(p []byte) (int, error) {
	if len(a.buf) > 0 {
		n := copy(p, a.buf)
		a.buf = a.buf[n:]
		return n, nil
	}
	if a.err != nil {
		return 0, a.err
	}
	return a.r.Read(p)
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
