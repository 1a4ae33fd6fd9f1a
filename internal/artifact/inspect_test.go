package artifact_test

import (
	"bytes"
	"io"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// gate is a reader that counts itself when it is first read, and then waits until it is opened.
type gate struct {
	io.Reader
	reading *atomic.Int64
	open    chan struct{}
	passed  bool
}

func (g *gate) Read(p []byte) (int, error) {
	if !g.passed {
		g.reading.Add(1)
		<-g.open
		g.passed = true
	}
	return g.Reader.Read(p)
}

// TestInspectionsWait proves that no more inspections run at once than there are processors, and that
// the others follow.
func TestInspectionsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := cachetest.Key("a")
		sound := cachetest.Sound(key, map[string]string{"a": "alpha"})
		verifier := artifact.NewVerifier(artifact.DefaultLimits)
		processors := int64(runtime.GOMAXPROCS(0))
		var reading, sounds atomic.Int64
		open := make(chan struct{})
		for range 3 * processors {
			go func() {
				if _, _, err := verifier.Inspect(&gate{Reader: bytes.NewReader(sound), reading: &reading, open: open}, key); err == nil {
					sounds.Add(1)
				}
			}()
		}
		synctest.Wait()
		if n := reading.Load(); n != processors {
			t.Errorf("%d inspections run at once; want %d", n, processors)
		}
		close(open)
		synctest.Wait()
		if n := sounds.Load(); n != 3*processors {
			t.Errorf("%d inspections succeeded; want %d", n, 3*processors)
		}
	})
}
