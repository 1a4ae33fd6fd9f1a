package index_test

import (
	"fmt"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/index"
)

// BenchmarkStored tells an index of artifacts that are stored one after the other, and has them written.
func BenchmarkStored(b *testing.B) {
	x, err := index.Open(index.Config{Dir: b.TempDir(), Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		b.Fatal(err)
	}
	defer x.Close()
	var n int
	b.ReportAllocs()
	for b.Loop() {
		at := start.Add(time.Duration(n) * time.Millisecond)
		x.Stored(cache.Stored{Info: artifact.Info{Key: cachetest.Key(fmt.Sprint(n)), Hash: artifact.Digest{1}, Size: int64(n % 1000), FileCount: 2, StoredAt: at,
			Metadata: artifact.Metadata{PackageName: "package", TaskName: fmt.Sprint(n % 50), Command: "make build"}}, DiskSize: 8192})
		if n++; n%1000 == 0 {
			if err := x.Flush(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	}
}
