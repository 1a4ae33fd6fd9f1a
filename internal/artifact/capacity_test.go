package artifact_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

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

// inspections are running at the same time.
type inspections struct {
	verifier *artifact.Verifier
	reading  atomic.Int64 // of these, how many began to read
	sound    atomic.Int64
	busy     atomic.Int64
	failed   atomic.Int64 // for another reason
	open     chan struct{}
}

func (i *inspections) start(ctx context.Context, n int) {
	key := cachetest.Key("a")
	sound := cachetest.Sound(key, map[string]string{"a": "alpha"})
	for range n {
		go func() {
			_, _, err := i.verifier.Inspect(ctx, &gate{Reader: bytes.NewReader(sound), reading: &i.reading, open: i.open}, key)
			switch {
			case err == nil:
				i.sound.Add(1)
			case errors.Is(err, artifact.ErrBusy):
				i.busy.Add(1)
			default:
				i.failed.Add(1)
			}
		}()
	}
	synctest.Wait()
}

func (i *inspections) want(t *testing.T, reading, sound, busy, failed int64) {
	t.Helper()
	synctest.Wait()
	got := []int64{i.reading.Load(), i.sound.Load(), i.busy.Load(), i.failed.Load()}
	if want := []int64{reading, sound, busy, failed}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("began, were sound, busy, failed: %v; want %v", got, want)
	}
}

// newInspections has room for four inspections at once; three may wait, for five seconds.
func newInspections() *inspections {
	limits := artifact.DefaultLimits
	limits.Capacity = artifact.Capacity{Memory: 2 * 4 * 10 << 20, Queue: 3, QueueTimeout: 5 * time.Second}
	return &inspections{verifier: artifact.NewVerifier(limits), open: make(chan struct{})}
}

func TestAdmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newInspections()
		i.start(t.Context(), 9)
		i.want(t, 4, 0, 2, 0)
		close(i.open)
		i.want(t, 7, 7, 2, 0)
		i.start(t.Context(), 4) // all is given back
		i.want(t, 11, 11, 2, 0)
	})
}

func TestAdmissionTakesTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newInspections()
		i.start(t.Context(), 6)
		time.Sleep(5*time.Second - 1)
		i.want(t, 4, 0, 0, 0)
		time.Sleep(time.Nanosecond)
		i.want(t, 4, 0, 2, 0)
		i.start(t.Context(), 3) // their places are free again
		i.want(t, 4, 0, 2, 0)
		close(i.open)
		i.want(t, 7, 7, 2, 0)
	})
}

func TestAdmissionIsCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newInspections()
		i.start(t.Context(), 4)
		ctx, cancel := context.WithCancel(t.Context())
		i.start(ctx, 3)
		cancel()
		i.want(t, 4, 0, 0, 3)
		i.start(t.Context(), 3)
		close(i.open)
		i.want(t, 7, 7, 0, 3)
	})
}

// TestProcessors proves that a verification needs a processor, but not while it waits for bytes.
func TestProcessors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newInspections()
		giveBack := i.verifier.TakeProcessors()
		i.start(t.Context(), 4)
		i.want(t, 0, 0, 0, 0)
		giveBack()
		i.want(t, 4, 0, 0, 0)
		giveBack = i.verifier.TakeProcessors() // although four verifications run
		close(i.open)
		i.want(t, 4, 0, 0, 0)
		giveBack()
		i.want(t, 4, 4, 0, 0)
	})
}

// TestMemoryIsShared has artifacts with large manifests, of which the second one must wait for the
// memory that the first one took.
func TestMemoryIsShared(t *testing.T) {
	files := map[string]string{}
	for n := range 4_000 {
		files[fmt.Sprintf("%0250d/%0250d/%0250d/%0250d/%0250d/%0250d", n, n, n, n, n, n)] = ""
	}
	large, small := cachetest.Sound(testKey, files), cachetest.Sound(testKey, map[string]string{"a": strings.Repeat("alpha", 1<<20)})
	limits := artifact.DefaultLimits
	limits.ManifestSize = 8 << 20
	limits.Capacity = artifact.Capacity{Memory: limits.LeastMemory(), Queue: 0, QueueTimeout: time.Second}
	v := artifact.NewVerifier(limits)

	_, err := v.Verify(&halfway{Reader: bytes.NewReader(large), left: len(large) - 1, then: func() {
		if _, err := v.Verify(bytes.NewReader(large), testKey); !errors.Is(err, artifact.ErrBusy) {
			t.Errorf("a second large one returned %v, want %v", err, artifact.ErrBusy)
		}
		if _, err := v.Verify(bytes.NewReader(small), testKey); err != nil {
			t.Error("a small one beside it:", err)
		}
	}}, testKey)
	if err != nil {
		t.Error("a large one, alone:", err)
	}
	if _, err := v.Verify(bytes.NewReader(large), testKey); err != nil {
		t.Error("a large one, later:", err)
	}
}

// halfway is a reader that does something before its last bytes.
type halfway struct {
	io.Reader
	left int
	then func()
}

func (h *halfway) Read(p []byte) (int, error) {
	if h.left == 0 {
		h.then()
		h.left = -1
	}
	if h.left > 0 {
		p = p[:min(len(p), h.left)]
	}
	n, err := h.Reader.Read(p)
	if h.left > 0 {
		h.left -= n
	}
	return n, err
}

func TestSlots(t *testing.T) {
	limits := artifact.DefaultLimits
	if n := limits.Slots(); n != 25 {
		t.Errorf("the default limits admit %d at once, want 25", n)
	}
	if limits.Memory < limits.LeastMemory() {
		t.Errorf("the default memory of %d bytes is less than %d", limits.Memory, limits.LeastMemory())
	}
	limits.Window = 512 << 20
	if n := limits.Slots(); n != 1 {
		t.Errorf("the largest window admits %d at once, want 1", n)
	}
}

// TestSilentOnesTakeHalf has artifacts that do not come, or of which less comes than is asked for: they
// take half of the places, and those that come get the others.
func TestSilentOnesTakeHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limits := artifact.DefaultLimits
		limits.Capacity = artifact.Capacity{Memory: 2 * 4 * 10 << 20, Queue: 0, QueueTimeout: time.Second}
		if limits.Memory < limits.LeastMemory() {
			limits.ManifestSize = 1 << 20
		}
		v := artifact.NewVerifier(limits)
		hangUp := make(chan struct{})
		var admitted, ended atomic.Int64
		for i := range 100 {
			sent := make([]byte, i*100) // less than 16 KiB
			go func() {
				r, release, err := v.Admit(t.Context(), io.MultiReader(bytes.NewReader(sent), &gate{strings.NewReader(""), new(atomic.Int64), hangUp, false}))
				if err != nil {
					ended.Add(1) // there was no place for it when it had ended
					return
				}
				admitted.Add(1)
				io.Copy(io.Discard, r)
				release()
				ended.Add(1)
			}()
		}
		synctest.Wait()
		if n := admitted.Load(); n != 2 {
			t.Errorf("%d silent ones were admitted, want 2", n)
		}
		for range 5 {
			for _, sent := range []int{0, 1, 511, 512, 513, 16<<10 - 1, 16 << 10, 16<<10 + 1, 1 << 20} {
				content := make([]byte, sent)
				for i := range content {
					content[i] = byte(i)
				}
				r, release, err := v.Admit(t.Context(), iotest.DataErrReader(iotest.HalfReader(bytes.NewReader(content))))
				if err != nil {
					t.Fatalf("one that sends %d bytes: %v", sent, err)
				}
				if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, content) {
					t.Errorf("read %d bytes of %d, %v", len(got), sent, err)
				}
				release()
			}
		}
		for range 10_000 { // all is given back, or else there would soon be no memory for more
			_, release, err := v.Admit(t.Context(), strings.NewReader(""))
			if err != nil {
				t.Fatal(err)
			}
			release()
		}
		close(hangUp)
		synctest.Wait()
		if n := ended.Load(); n != 100 {
			t.Errorf("%d of 100 silent ones ended", n)
		}
		r, release, err := v.Admit(t.Context(), iotest.ErrReader(errors.New("reset")))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Read(make([]byte, 1)); err == nil || err.Error() != "reset" {
			t.Errorf("an artifact that can't be read is read with %v", err)
		}
		release()
	})
}

// message is a reader that holds more than it was asked for.
type message struct{ io.Reader }

func (m message) Buffered() int { return 4 << 20 }

// TestWaitingTakeMemory has artifacts that wait and of which much is there already. The memory for that is
// bounded, whatever the queue.
func TestWaitingTakeMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limits := artifact.DefaultLimits
		limits.ManifestSize = 1 << 20
		limits.Capacity = artifact.Capacity{Memory: 2 * 4 * 10 << 20, Queue: 1000, QueueTimeout: time.Second}
		v := artifact.NewVerifier(limits)
		for range 10 { // four have taken all places, and others wait; all must be given back
			var releases []func()
			for range 4 {
				_, release, err := v.Admit(t.Context(), strings.NewReader(""))
				if err != nil {
					t.Fatal(err)
				}
				releases = append(releases, release)
			}
			waiting, crowded, gone := 0, 0, make(chan error, 100)
			for range 100 {
				go func() {
					_, _, err := v.Admit(t.Context(), message{strings.NewReader("")})
					gone <- err
				}()
			}
			synctest.Wait()
			for range len(gone) {
				if err := <-gone; !errors.Is(err, artifact.ErrBusy) || !strings.Contains(err.Error(), "no memory") {
					t.Errorf("one could not wait: %v", err)
				}
				crowded++
			}
			waiting = 100 - crowded
			if waiting != 9 { // of 40 MiB, less what the four hold
				t.Errorf("%d wait, and for %d there is no memory; want 9", waiting, crowded)
			}
			for range waiting {
				if err := <-gone; !errors.Is(err, artifact.ErrBusy) {
					t.Errorf("one that waited: %v", err)
				}
			}
			for _, release := range releases {
				release()
			}
		}
	})
}
