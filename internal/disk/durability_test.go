package disk_test

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/polykit/polykit-cache/internal/disk"
)

// bootOf returns what the memo says of the run of the operating system in which it holds.
func bootOf(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var memo struct{ Boot string }
	if err := json.Unmarshal(text, &memo); err != nil {
		t.Fatal(err)
	}
	return memo.Boot
}

// TestNotSynced has an artifact that was stored without a sync. In the same run of the operating
// system nothing is lost that was written; in a later one the artifact may be damaged behind its memo,
// as file systems do to files that were not synced.
func TestNotSynced(t *testing.T) {
	dir := t.TempDir()
	r := openWith(t, disk.Config{Dir: dir, Durability: disk.DurabilityNone})
	r.put(t, key, content)
	boot := bootOf(t, r.path(jsonName))
	if boot == "" {
		t.Fatal("the memo does not say in which run it holds")
	}
	r.store.Close()

	r = open(t, dir)
	r.serves(t, key, content)
	if n := r.log.inspections(); n != 0 {
		t.Errorf("%d inspections in the same run, want none", n)
	}

	anotherRun := func() {
		text, err := os.ReadFile(r.path(jsonName))
		if err != nil {
			t.Fatal(err)
		}
		write(t, r.path(jsonName), []byte(sealed(strings.Replace(string(text), boot, "another run", 1))))
	}
	anotherRun()
	r.serves(t, key, content)
	if n := r.log.inspections(); n != 1 {
		t.Errorf("%d inspections in another run, want 1", n)
	}
	if boot := bootOf(t, r.path(jsonName)); boot != "" {
		t.Errorf("what was verified and synced holds only in the run %q", boot)
	}

	// Size and time came back, but not the content.
	stat := lstat(t, r.path(zstName))
	text, err := os.ReadFile(r.path(jsonName))
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(r.path(zstName), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.Write(make([]byte, stat.Size())); err != nil {
		t.Fatal(err)
	}
	file.Close()
	if err := os.Chtimes(r.path(zstName), stat.ModTime(), stat.ModTime()); err != nil {
		t.Fatal(err)
	}
	write(t, r.path(jsonName), []byte(sealed(strings.Replace(string(text), `"uncompressed_size"`, `"boot":"another run","uncompressed_size"`, 1))))
	r.lacks(t, key)
}

// TestScrubSyncs proves that what a scrub found sound survives a power cut from then on.
func TestScrubSyncs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := openWith(t, disk.Config{Dir: t.TempDir(), Durability: disk.DurabilityNone})
		r.put(t, key, content)
		r.scrub(t, disk.ScrubConfig{Interval: time.Hour, Rate: 1 << 30})
		time.Sleep(time.Hour)
		synctest.Wait()
		if boot := bootOf(t, r.path(jsonName)); boot != "" {
			t.Errorf("the memo holds only in the run %q", boot)
		}
		r.serves(t, key, content)
		if n := r.log.inspections(); n != 0 {
			t.Errorf("%d inspections, want none", n)
		}
	})
}

func TestSyncedMemoHoldsInEveryRun(t *testing.T) {
	for name, durability := range map[string]disk.Durability{"default": "", "full": disk.DurabilityFull} {
		t.Run(name, func(t *testing.T) {
			r := openWith(t, disk.Config{Dir: t.TempDir(), Durability: durability})
			r.put(t, key, content)
			if boot := bootOf(t, r.path(jsonName)); boot != "" {
				t.Errorf("the memo holds only in the run %q", boot)
			}
		})
	}
}
