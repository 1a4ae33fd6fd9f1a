package cache

import (
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
)

const (
	// behindSize is how many bytes are handed to another goroutine at a time. An upload that has no more
	// needs none.
	behindSize = 256 << 10
	// behindBuffers is how many times as much may be on its way. What a verification takes beside its
	// window, as package artifact accounts for it, includes that.
	behindBuffers = 3
)

// behind does something with what is written to it, in order, while the writer goes on. It copies what it
// is given.
type behind struct {
	buf    []byte      // that is being filled
	given  int         // how many buffers there are
	full   chan []byte // to be done
	free   chan []byte
	ended  chan struct{}
	err    error       // the first; to be read when it has ended
	failed atomic.Bool // there is one
}

var behindPool = sync.Pool{New: func() any { return new([behindSize]byte) }}

// newBehind returns a behind that calls do with all that is written to it. It must be closed.
func newBehind(do func(p []byte) error) *behind {
	b := &behind{
		full:  make(chan []byte, behindBuffers),
		free:  make(chan []byte, behindBuffers),
		ended: make(chan struct{}),
	}
	go func() {
		defer close(b.ended)
		for buf := range b.full {
			if b.err == nil { // or else what is left is of no use
				b.err = guarded(do, buf)
				b.failed.Store(b.err != nil)
			}
			b.free <- buf
		}
	}()
	return b
}

// guarded turns a panic into an error: in this goroutine nothing would keep it from ending the process.
func guarded(do func(p []byte) error, p []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("store artifact: panic: %v\n%s", p, debug.Stack())
		}
	}()
	return do(p)
}

// write hands p on. It returns false if what was handed on before could not be done: what comes is of no
// use then, and close tells the error.
func (b *behind) write(p []byte) bool {
	for len(p) > 0 {
		if b.failed.Load() {
			return false
		}
		if b.buf == nil {
			b.buf = b.buffer()
		}
		n := min(len(p), cap(b.buf)-len(b.buf))
		b.buf = append(b.buf, p[:n]...)
		p = p[n:]
		if len(b.buf) == cap(b.buf) {
			b.full <- b.buf
			b.buf = nil
		}
	}
	return true
}

// buffer returns an empty buffer, as soon as there is one.
func (b *behind) buffer() []byte {
	if b.given < behindBuffers {
		b.given++
		return behindPool.Get().(*[behindSize]byte)[:0]
	}
	return (<-b.free)[:0]
}

// close waits until all is done, and returns the error of doing it.
func (b *behind) close() error {
	if len(b.buf) > 0 {
		b.full <- b.buf
	}
	close(b.full)
	<-b.ended
	for range b.given {
		behindPool.Put((*[behindSize]byte)((<-b.free)[:behindSize]))
	}
	return b.err
}
