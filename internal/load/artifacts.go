package load

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/polykit/polykit-cache/internal/artifact"
)

const (
	// fileSize is the most bytes of one file in an artifact.
	fileSize = 1 << 20
	// window is that of zstd level 3, the level that clients use.
	window = 2 << 20
)

// maker makes artifacts that differ in their key only. The key is in a zstd frame of its own, in front of
// another one with all the rest, which is made once: so an artifact costs next to nothing.
type maker struct {
	head      *zstd.Encoder
	createdAt int64
	rest      []byte
	run       [16]byte // of all keys
}

// newMaker makes artifacts of which the files have size bytes together, which can be compressed to about
// a third, or not at all.
func newMaker(size int64, compressible bool) (*maker, error) {
	head, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(zstd.MinWindowSize), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, err
	}
	m := &maker{head: head, createdAt: time.Now().Unix()}
	rand.Read(m.run[:])
	var rest bytes.Buffer
	frame, err := zstd.NewWriter(&rest, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(window), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, err
	}
	archive := tar.NewWriter(frame)

	sums := map[string]string{}
	err = eachFile(size, compressible, func(name string, content io.Reader, _ int64) error {
		sum := sha256.New()
		_, err := io.Copy(sum, content)
		sums[name] = hex.EncodeToString(sum.Sum(nil))
		return err
	})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(map[string]any{"files": sums, "total_size": size})
	if err != nil {
		return nil, err
	}
	if err := entry(archive, "manifest.json", int64(len(manifest)), bytes.NewReader(manifest)); err != nil {
		return nil, err
	}
	err = eachFile(size, compressible, func(name string, content io.Reader, size int64) error {
		return entry(archive, "outputs/"+name, size, content)
	})
	if err != nil {
		return nil, err
	}
	if err := archive.Close(); err != nil {
		return nil, err
	}
	if err := frame.Close(); err != nil {
		return nil, err
	}
	m.rest = rest.Bytes()
	return m, nil
}

// eachFile calls do with each file of an artifact, the same in every call.
func eachFile(size int64, compressible bool, do func(name string, content io.Reader, size int64) error) error {
	for n := 0; size > 0 || n == 0; n++ {
		part := min(size, fileSize)
		seed := [32]byte{byte(n), byte(n >> 8), byte(n >> 16)}
		var content io.Reader = mathrand.NewChaCha8(seed)
		if compressible {
			content = newText(seed)
		}
		if err := do(fmt.Sprintf("part-%05d", n), io.LimitReader(content, part), part); err != nil {
			return err
		}
		size -= part
	}
	return nil
}

func entry(archive *tar.Writer, name string, size int64, content io.Reader) error {
	if err := archive.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o644, Format: tar.FormatGNU}); err != nil {
		return err
	}
	_, err := io.Copy(archive, content)
	return err
}

// text is endless and looks like words to a compressor.
type text struct {
	random *mathrand.Rand
	words  []string
	left   []byte
}

func newText(seed [32]byte) *text {
	t := &text{random: mathrand.New(mathrand.NewChaCha8(seed))}
	for range 2000 {
		word := make([]byte, 2+t.random.IntN(9), 12)
		for i := range word {
			word[i] = 'a' + byte(t.random.IntN(26))
		}
		t.words = append(t.words, string(append(word, ' ')))
	}
	return t
}

func (t *text) Read(p []byte) (int, error) {
	for n := 0; n < len(p); {
		if len(t.left) == 0 {
			// Some words are much more frequent than others.
			t.left = []byte(t.words[t.random.IntN(1+t.random.IntN(len(t.words)))])
		}
		copied := copy(p[n:], t.left)
		t.left = t.left[copied:]
		n += copied
	}
	return len(p), nil
}

// key returns the key with a number, which no other run has.
func (m *maker) key(number int64) artifact.Key {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(m.run[:], uint64(number)))
	key, err := artifact.ParseKey(hex.EncodeToString(sum[:]))
	if err != nil {
		panic(err) // it is 64 digits
	}
	return key
}

// artifact returns the artifact for a key, in two parts.
func (m *maker) artifact(key artifact.Key) (head, rest []byte, err error) {
	metadata, err := json.Marshal(map[string]any{
		"package_name":   "bench",
		"task_name":      "bench",
		"command":        "polykit-cache bench",
		"cache_key_hash": key.String(),
		"created_at":     m.createdAt,
		"version":        1,
	})
	if err != nil {
		return nil, nil, err
	}
	var begin bytes.Buffer
	archive := tar.NewWriter(&begin)
	if err := entry(archive, "metadata.json", int64(len(metadata)), bytes.NewReader(metadata)); err != nil {
		return nil, nil, err
	}
	if err := archive.Flush(); err != nil { // up to the next entry, which the rest begins with
		return nil, nil, err
	}
	return m.head.EncodeAll(begin.Bytes(), nil), m.rest, nil
}
