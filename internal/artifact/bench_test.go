package artifact_test

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

func BenchmarkVerify(b *testing.B) {
	text := map[string]string{} // 64 MiB that compress to about a tenth
	for i := range 64 {
		var lines bytes.Buffer
		for n := 0; lines.Len() < 1<<20; n++ {
			fmt.Fprintf(&lines, "%d: export const value%d = require('./module-%x');\n", n, n*n, i*n)
		}
		text[fmt.Sprintf("dist/%d.js", i)] = lines.String()
	}
	b.Run("incompressible", func(b *testing.B) { benchmarkVerify(b, cachetest.Random(testKey, 64<<20)) })
	b.Run("compressible", func(b *testing.B) { benchmarkVerify(b, cachetest.Sound(testKey, text)) })
}

func BenchmarkVerifySmall(b *testing.B) {
	benchmarkVerify(b, cachetest.Sound(testKey, map[string]string{"stdout.txt": string(cachetest.Random(testKey, 1<<10)), "stderr.txt": ""}))
}

// BenchmarkVerifyManyNames has about the most work that paths can be within the limits: 32 MiB of them,
// each far below directories of its own.
func BenchmarkVerifyManyNames(b *testing.B) {
	hashes := map[string]string{}
	entries := [][]byte{nil, cachetest.Metadata(testKey)}
	for i := range 7900 {
		path := fmt.Sprintf("%04d", i) + strings.Repeat("/a", 2046)
		hashes[path] = emptyHash
		entries = append(entries, cachetest.File("outputs/"+path, ""))
	}
	entries[0] = cachetest.Manifest(hashes, 0)
	benchmarkVerify(b, cachetest.Compress(cachetest.Tar(entries...)))
}

func benchmarkVerify(b *testing.B, data []byte) {
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := verify(data, testKey); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPack(b *testing.B) {
	dir := fstest.MapFS{}
	for i := range 16 {
		dir[fmt.Sprintf("dist/%d.bin", i)] = &fstest.MapFile{Data: cachetest.Random(testKey, 1<<20)}
		dir[fmt.Sprintf("dist/%d.js", i)] = &fstest.MapFile{Data: bytes.Repeat([]byte("export const value = 1;\n"), 40_000)}
	}
	b.ReportAllocs()
	for b.Loop() {
		contents, err := artifact.Pack(io.Discard, dir, testKey, testMetadata)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(contents.UncompressedSize)
	}
}
