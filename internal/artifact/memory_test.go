package artifact_test

import (
	"bytes"
	"io"
	"runtime"
	"slices"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// archiveOfZeros returns an artifact of one file of n times 128 KiB of zeros.
func archiveOfZeros(hash string, n int) []byte {
	size := n * 128 << 10
	return slices.Concat(
		cachetest.Store(cachetest.Metadata(testKey)),
		cachetest.Store(cachetest.Manifest(map[string]string{"zeros": hash}, size)),
		cachetest.Store(cachetest.Header("outputs/zeros", 0, int64(size))),
		cachetest.Zeros(n),
		cachetest.Store(make([]byte, 1024)))
}

// TestMemory verifies 320 MiB in a hundredth of that.
func TestMemory(t *testing.T) {
	compressible := archiveOfZeros("a6d72ac7690f53be6ae46ba88506bd97302a093f7108472bd9efc3cefda06484", 2048) // 256 MiB
	// What does not compress is as large, so it is made while it is read: the beginning of a file, as a
	// frame for each MiB.
	readers := []io.Reader{bytes.NewReader(cachetest.Store(cachetest.Header("outputs/data.bin", 0, 1<<30)))}
	content := cachetest.Store(make([]byte, 1<<20))
	for range 64 {
		readers = append(readers, bytes.NewReader(content))
	}
	incompressible := io.MultiReader(readers...)

	allocated := allocatedBy(func() {
		contents, err := verifier.Verify(bytes.NewReader(compressible), testKey)
		if err != nil || contents.UncompressedSize != 256<<20 {
			t.Errorf("got %+v, %v", contents, err)
		}
		_, err = verifier.Verify(incompressible, testKey)
		wantUnsound(t, err, artifact.RuleStream, "the tar archive ends in the middle of an entry")
	})
	if allocated > 6<<20 {
		t.Errorf("allocated %d bytes", allocated)
	}
}

func allocatedBy(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestBombs has artifacts that unpack to far more than they are: each is refused with the block that
// crosses the limit, whatever follows.
func TestBombs(t *testing.T) {
	const limit = 32 << 20
	limits := artifact.DefaultLimits
	limits.UnpackedSize = limit
	v := artifact.NewVerifier(limits)

	zeros := cachetest.Zeros(80 << 10) // 10 GiB in 320 KiB
	atLimit := limit / (128 << 10) * 4
	metadata, manifest := cachetest.Metadata(testKey), cachetest.Manifest(nil, 0)
	tooMuch := "the archive unpacks to more than the limit of 32 MiB"

	for _, c := range []struct {
		name    string
		begin   []byte // before the 10 GiB of zeros
		read    int    // how much of the zeros is read at most
		rule    artifact.Rule
		message string
	}{
		{"a file of 10 GiB", cachetest.Header("outputs/a", 0, 10<<30), 0, artifact.RuleLimit, tooMuch},
		{"zeros behind the end", cachetest.Tar(metadata, manifest), atLimit, artifact.RuleLimit, tooMuch},
		{"nothing but zeros", nil, atLimit, artifact.RuleLimit, tooMuch},
		{"a long name", cachetest.Header("././@LongLink", 'L', 10<<30), 40, artifact.RuleStream,
			"the tar archive has a long name that is empty"},
		{"a pax header", cachetest.Ustar(cachetest.Header("x", 'x', 10<<30)), 40, artifact.RuleStream,
			"the tar archive is not well formed: archive/tar: header field too long"},
		{"a global pax header", cachetest.Ustar(cachetest.Header("x", 'g', 10<<30)), 40, artifact.RuleStream,
			"the tar archive is not well formed: archive/tar: header field too long"},
		{"metadata.json", cachetest.Header("metadata.json", 0, 10<<30), 0, artifact.RuleLimit, tooMuch},
		{"a link", cachetest.Header("outputs/a", '2', 10<<30), 0, artifact.RuleEntry,
			`"outputs/a" is a symbolic link; an artifact holds regular files and their directories only`},
		{"a directory", cachetest.Header("outputs/a/", '5', 10<<30), 0, artifact.RuleEntry, `"outputs/a/" is a directory with content`},
	} {
		t.Run(c.name, func(t *testing.T) {
			begin := cachetest.Store(c.begin)
			r := &countingReader{r: io.MultiReader(bytes.NewReader(begin), bytes.NewReader(zeros))}
			allocated := allocatedBy(func() {
				_, err := v.Verify(r, testKey)
				wantUnsound(t, err, c.rule, c.message)
			})
			const slack = 128 // for what is read at a time
			if most := len(begin) + c.read + slack; r.n > most {
				t.Errorf("read %d bytes; want at most %d", r.n, most)
			}
			if allocated > 12<<20 {
				t.Errorf("allocated %d bytes", allocated)
			}
		})
	}
}

// countingReader counts what is read, in small pieces.
type countingReader struct {
	r io.Reader
	n int
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p[:min(len(p), 64)])
	r.n += n
	return n, err
}

// TestMoreBombs has the bombs that the server is tested with too. Some have to be read for a while, but
// none takes more memory than the limits say, or much more time than what is as large and sound.
func TestMoreBombs(t *testing.T) {
	v := artifact.NewVerifier(cachetest.BombLimits())
	for _, c := range cachetest.Bombs(testKey) {
		t.Run(c.Name, func(t *testing.T) {
			allocated := allocatedBy(func() {
				_, err := v.Verify(bytes.NewReader(c.Artifact), testKey)
				wantUnsound(t, err, c.Rule, c.Message)
			})
			// Most of it is garbage at once, and twice as much where races are looked for.
			if allocated > 1<<30 {
				t.Errorf("allocated %d MiB", allocated>>20)
			}
		})
	}
}
