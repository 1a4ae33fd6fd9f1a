//go:build unix

package cache_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
)

// text returns what looks like words to a compressor: it compresses to about a third.
func text(size int) string {
	random := rand.New(rand.NewChaCha8([32]byte{}))
	words := make([]string, 2000)
	for i := range words {
		word := make([]byte, 2+random.IntN(9))
		for j := range word {
			word[j] = 'a' + byte(random.IntN(26))
		}
		words[i] = string(word) + " "
	}
	var text strings.Builder
	for text.Len() < size {
		text.WriteString(words[random.IntN(1+random.IntN(len(words)))]) // some are much more frequent than others
	}
	return text.String()[:size]
}

// rest returns all of an artifact but its metadata.json, which is put in front in a frame of its own:
// so artifacts for any keys cost next to nothing.
func rest(content string) []byte {
	files := map[string]string{}
	for i := 0; len(content) > 0; i++ {
		n := min(len(content), 1<<20)
		files[fmt.Sprintf("part-%05d", i)] = content[:n]
		content = content[n:]
	}
	return cachetest.Rest(files)
}

func head(key artifact.Key) []byte { return cachetest.Store(cachetest.Metadata(key)) }

// BenchmarkPutLarge uploads artifacts of 64 MiB of files. Beside it stand the floor, which is what no
// upload does without, in one goroutine and in memory; and the file, written and synced.
func BenchmarkPutLarge(b *testing.B) {
	random := make([]byte, 64<<20)
	rand.NewChaCha8([32]byte{}).Read(random)
	for name, content := range map[string]string{"incompressible": string(random), "compressible": text(64 << 20)} {
		rest := rest(content)
		whole := slices.Concat(head(key), rest)
		b.Run(name+"/floor", func(b *testing.B) {
			measure(b, len(content), func() {
				for b.Loop() {
					floor(b, whole)
				}
			})
		})
		b.Run(name+"/file", func(b *testing.B) {
			dir := b.TempDir()
			measure(b, len(content), func() {
				for i := 0; b.Loop(); i++ {
					write(b, filepath.Join(dir, fmt.Sprint(i)), whole)
				}
			})
		})
		b.Run(name+"/put", func(b *testing.B) {
			c := benchmarkCache(b)
			b.ReportAllocs()
			measure(b, len(content), func() {
				for i := 0; b.Loop(); i++ {
					put(b, c, cachetest.Key(fmt.Sprint(i)), rest)
				}
			})
		})
	}
}

// BenchmarkPutSmall uploads artifacts of 2 KiB, 16 at a time. Beside it stands what no store on a file
// system does without: create, write, fsync and link.
func BenchmarkPutSmall(b *testing.B) {
	const clients = 16
	random := make([]byte, 2<<10)
	rand.NewChaCha8([32]byte{}).Read(random)
	rest := rest(string(random))
	b.Run("file", func(b *testing.B) {
		dir := b.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "tmp"), 0o755); err != nil {
			b.Fatal(err)
		}
		whole := slices.Concat(head(key), rest)
		parallel(b, clients, func(n int64) {
			path := filepath.Join(dir, "tmp", fmt.Sprint(n))
			write(b, path, whole)
			if err := os.Link(path, filepath.Join(dir, fmt.Sprint(n))); err != nil {
				b.Error(err)
			}
		})
	})
	b.Run("put", func(b *testing.B) {
		c := benchmarkCache(b)
		b.ReportAllocs()
		parallel(b, clients, func(n int64) { put(b, c, cachetest.Key(fmt.Sprint(n)), rest) })
	})
	b.Run("put in memory", func(b *testing.B) {
		c := cache.New(new(cachetest.Memory), artifact.NewVerifier(artifact.DefaultLimits), cache.Config{MaxSize: 1 << 30})
		b.ReportAllocs()
		parallel(b, clients, func(n int64) { put(b, c, cachetest.Key(fmt.Sprint(n)), rest) })
	})
}

// parallel calls do b.N times, from so many goroutines.
func parallel(b *testing.B, goroutines int, do func(n int64)) {
	measure(b, 0, func() {
		var n atomic.Int64
		var all sync.WaitGroup
		for range goroutines {
			all.Go(func() {
				for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
					do(i)
				}
			})
		}
		all.Wait()
	})
}

func benchmarkCache(b *testing.B) *cache.Cache {
	verifier := artifact.NewVerifier(artifact.DefaultLimits)
	store, err := disk.Open(disk.Config{Dir: b.TempDir(), Verifier: verifier, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { store.Close() })
	return cache.New(store, verifier, cache.Config{MaxSize: 1 << 30})
}

func put(b *testing.B, c *cache.Cache, key artifact.Key, rest []byte) {
	head := head(key)
	body := io.MultiReader(bytes.NewReader(head), bytes.NewReader(rest))
	if _, err := c.Put(b.Context(), key, int64(len(head)+len(rest)), body); err != nil {
		b.Error(err)
	}
}

func write(b *testing.B, path string, content []byte) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		b.Error(err)
		return
	}
	defer file.Close()
	for part := range slices.Chunk(content, 256<<10) {
		if _, err := file.Write(part); err != nil {
			b.Error(err)
		}
	}
	if err := file.Sync(); err != nil {
		b.Error(err)
	}
}

var decoder = sync.OnceValue(func() *zstd.Decoder {
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		panic(err)
	}
	return decoder
})

func floor(b *testing.B, content []byte) {
	sum := sha256.New()
	sum.Write(content)
	if err := decoder().Reset(io.MultiReader(bytes.NewReader(content))); err != nil { // not all at once
		b.Fatal(err)
	}
	if _, err := decoder().WriteTo(sum); err != nil {
		b.Fatal(err)
	}
}

// measure also reports the processor time of the process, for each operation.
func measure(b *testing.B, size int, run func()) {
	b.SetBytes(int64(size))
	runtime.GC()
	b.ResetTimer()
	before := processor(b)
	run()
	b.ReportMetric(float64(processor(b)-before)/float64(b.N)/1e6, "cpu-ms/op")
}

func processor(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
