package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// bufferSize is how much of an upload is stored before it is verified, and not meanwhile.
const bufferSize = 256 << 10

// newLarge returns a cache for artifacts of up to limit bytes.
func newLarge(store cache.Store, limit int64) *cache.Cache {
	return cache.New(store, artifact.NewVerifier(artifact.DefaultLimits), cache.Config{MaxSize: limit})
}

// TestPutSizes uploads artifacts of about as many bytes as buffers have.
func TestPutSizes(t *testing.T) {
	least := len(cachetest.Random(key, 0))
	for _, n := range []int{1, 2, 3, 4, 5, 9} {
		for _, more := range []int{-1, 0, 1} {
			content := ofSize(t, n*bufferSize+more, least)
			size := int64(len(content))
			for name, read := range map[string]func(io.Reader) io.Reader{
				"at once":      func(r io.Reader) io.Reader { return r },
				"in halves":    iotest.HalfReader,
				"with the end": iotest.DataErrReader,
				"in pieces":    func(r io.Reader) io.Reader { return pieces{r} },
			} {
				t.Run(fmt.Sprintf("%d, %s", size, name), func(t *testing.T) {
					r := newMemory()
					for _, limit := range []int64{size - 1, size} {
						_, err := newLarge(r.memory, limit).Put(t.Context(), key, cache.UnknownSize, read(bytes.NewReader(content)))
						if limit < size {
							if !errors.Is(err, cache.ErrTooLarge) {
								t.Errorf("over the limit: %v", err)
							}
							r.idle(t)
						} else if err != nil {
							t.Error(err)
						}
					}
					r.holds(t, content)
				})
			}
		}
	}
}

// ofSize returns an artifact of size bytes: a skippable frame in front of a small one.
func ofSize(t *testing.T, size, least int) []byte {
	t.Helper()
	fill := size - least - 8
	content := append([]byte("\x50\x2A\x4D\x18"), byte(fill), byte(fill>>8), byte(fill>>16), byte(fill>>24))
	for i := range fill {
		content = append(content, byte(i*i>>7))
	}
	if content = append(content, cachetest.Random(key, 0)...); len(content) != size {
		t.Fatalf("made %d bytes, want %d", len(content), size)
	}
	return content
}

// pieces reads as much at a time as a connection has.
type pieces struct{ r io.Reader }

func (p pieces) Read(b []byte) (int, error) { return p.r.Read(b[:min(len(b), 4321)]) }

// TestPutReportsFirstFaultOfLarge is TestPutReportsFirstFault for artifacts that are stored while they
// are verified: the store may fail later than the others, but what it had was there before.
func TestPutReportsFirstFaultOfLarge(t *testing.T) {
	const n = 3 << 20
	sound := append(cachetest.Store(cachetest.Metadata(key)), cachetest.Store(cachetest.Header("outputs/data.bin", 0, 1<<30))...)
	sound = append(sound, cachetest.Store(make([]byte, n))...)
	broken := []byte("no zstd frame")
	more := cachetest.Store(make([]byte, n))
	const unsound = "the zstd stream has bytes behind its last frame"
	total := int64(len(sound))
	never := func() { t.Error("the body was read after the fault") }
	for _, test := range []struct {
		name       string
		body       body
		limit      int64
		writeAfter int64 // the store fails then, if it is not 0
		message    string
	}{
		{"the artifact", body{{p: sound}, {p: broken}, {p: more, do: never}}, 1 << 30, 0, unsound},
		{"the artifact, then the client", body{{p: sound}, {p: broken, err: errReset}, {do: never}}, 1 << 30, 0, unsound},
		{"the artifact, then its size", body{{p: sound}, {p: broken}, {p: more, do: never}}, total + 20, 0, unsound},
		{"the artifact, then the store", body{{p: sound}, {p: broken}, {p: more, do: never}}, 1 << 30, total + 20, unsound},
		{"the client", body{{p: sound}, {err: errReset}, {do: never}}, 1 << 30, 0, "upload aborted: connection reset by peer"},
		{"the size", body{{p: sound}, {p: more}}, total + 10, 0, "artifact too large: the limit is 3.0 MiB (31"},
		{"the store, then the artifact", body{{p: sound}, {p: broken}}, 1 << 30, total - 1, errDisk.Error()},
		{"the store with the artifact", body{{p: sound}, {p: broken}}, 1 << 30, total + 1, errDisk.Error()},
		{"the store, then the client", body{{p: sound}, {err: errReset}}, 1 << 30, total - 1, errDisk.Error()},
		{"the store, then the size", body{{p: sound}, {p: more}}, total, total - 1, errDisk.Error()},
		{"the store, then the end", body{{p: sound}}, 1 << 30, total - 1, errDisk.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newMemory()
			if test.writeAfter > 0 {
				r.memory.Fail(cachetest.Faults{Write: errDisk, WriteAfter: test.writeAfter})
			}
			_, err := newLarge(r.memory, test.limit).Put(t.Context(), key, cache.UnknownSize, &test.body)
			if err == nil || !strings.HasPrefix(err.Error(), test.message) {
				t.Errorf("Put returned %v, want %s", err, test.message)
			}
			r.lacks(t)
		})
	}
}

// TestPutStopsAtFault proves that an upload which can't be stored is not read to its end.
func TestPutStopsAtFault(t *testing.T) {
	content := cachetest.Random(key, 64<<20)
	r := newMemory()
	r.memory.Fail(cachetest.Faults{Write: errDisk, WriteAfter: 1 << 20})
	rest := bytes.NewReader(content)
	if _, err := newLarge(r.memory, 1<<30).Put(t.Context(), key, cache.UnknownSize, rest); err != errDisk {
		t.Errorf("Put returned %v, want %v", err, errDisk)
	}
	// No more than fits into the buffers, and what is verified meanwhile.
	if read := len(content) - rest.Len(); read > 4<<20 {
		t.Errorf("read %d bytes", read)
	}
	r.lacks(t)
}

// unlucky is a store in which one write, in the middle of an upload, is another one.
type unlucky struct {
	*cachetest.Memory
	write func() error
}

func (u unlucky) Create(ctx context.Context, key artifact.Key, size int64) (cache.Upload, error) {
	upload, err := u.Memory.Create(ctx, key, size)
	return &unluckyUpload{Upload: upload, write: u.write}, err
}

type unluckyUpload struct {
	cache.Upload
	write   func() error
	written int
}

func (u *unluckyUpload) Write(p []byte) (int, error) {
	before := u.written
	if u.written += len(p); before < 1<<20 && u.written >= 1<<20 {
		return 0, u.write()
	}
	return u.Upload.Write(p)
}

// TestPutStoreFailsOnce has a store that would go on without some of the bytes.
func TestPutStoreFailsOnce(t *testing.T) {
	r := newMemory()
	store := unlucky{r.memory, func() error { return errDisk }}
	content := cachetest.Random(key, 3<<19)
	if _, err := newLarge(store, 1<<30).Put(t.Context(), key, cache.UnknownSize, bytes.NewReader(content)); err != errDisk {
		t.Errorf("Put returned %v, want %v", err, errDisk)
	}
	r.lacks(t)
}

func TestPutPanics(t *testing.T) {
	content := cachetest.Random(key, 4<<20)
	r := newMemory()
	store := unlucky{r.memory, func() error { panic("out of luck") }}
	_, err := newLarge(store, 1<<30).Put(t.Context(), key, cache.UnknownSize, bytes.NewReader(content))
	if err == nil || !strings.HasPrefix(err.Error(), "store artifact: panic: out of luck\n") {
		t.Errorf("where the store panics, Put returned %v", err)
	}
	r.idle(t)

	func() {
		defer func() {
			if p := recover(); p != "the client's" {
				t.Errorf("where the body panics, Put panics with %v", p)
			}
		}()
		newLarge(r.memory, 1<<30).Put(t.Context(), key, cache.UnknownSize, &body{{p: content[:3<<20]}, {do: func() { panic("the client's") }}})
		t.Error("the panic of the body is lost")
	}()
	r.lacks(t)
}
