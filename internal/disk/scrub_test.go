package disk_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
)

var discard = slog.New(slog.DiscardHandler)

// tree returns the content of all files in a directory.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		files[path] = entry.Type().String()
		if entry.Type().IsRegular() {
			files[path] = string(read(t, path))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

const month = 30 * 24 * time.Hour

// keyAt returns a key whose shard is at a part of all shards.
func keyAt(part float64) artifact.Key {
	return keyOf(fmt.Sprintf("%04x", int(part*(1<<16))) + digits[4:])
}

// zst returns where an artifact is.
func (r rig) zst(key artifact.Key) string {
	d := key.String()
	return r.path(d[:2] + "/" + d[2:4] + "/" + d + ".zst")
}

func (r rig) json(key artifact.Key) string {
	return strings.TrimSuffix(r.zst(key), ".zst") + ".json"
}

// change changes a file behind the back of everybody: neither its size nor its time change.
func change(t *testing.T, path string, change func(content []byte)) {
	t.Helper()
	stat := lstat(t, path)
	content := read(t, path)
	change(content)
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = file.Write(content)
		err = errors.Join(err, file.Close(), os.Chtimes(path, stat.ModTime(), stat.ModTime()))
	}
	if err != nil {
		t.Fatal(err)
	}
}

func flipBit(content []byte) { content[len(content)/2] ^= 1 }

// scrub scrubs in the background until the returned function is called.
func (r rig) scrub(t *testing.T, config disk.ScrubConfig) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		r.store.Scrub(ctx, config)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-stopped
	})
	t.Cleanup(stop)
	synctest.Wait()
	return stop
}

func exists(t *testing.T, path string) bool {
	t.Helper()
	_, err := os.Lstat(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// TestScrub damages artifacts in ways that no request finds. Each is found when its part of the
// interval has passed, in every pass.
func TestScrub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, t.TempDir())
		parts := []float64{0, 0.25, 0.5, 0.75}
		put := func(part float64) artifact.Key {
			key := keyAt(part)
			r.put(t, key, cachetest.Random(key, 10_000))
			return key
		}
		for _, part := range parts {
			put(part)
		}
		sound := keyAt(0.9)
		r.put(t, sound, cachetest.Random(sound, 10_000))
		damage := func() {
			for _, part := range parts {
				change(t, r.zst(keyAt(part)), flipBit)
				if _, _, err := r.Get(t.Context(), keyAt(part)); err != nil {
					t.Fatalf("Get, which does not look at the bytes, returned %v", err)
				}
			}
		}
		damage()

		r.scrub(t, disk.ScrubConfig{Interval: month, Rate: 1 << 30})
		for pass := range 3 {
			for i, part := range parts {
				if i > 0 { // one second before it is due
					time.Sleep(month/4 - time.Second)
					synctest.Wait()
					if !exists(t, r.zst(keyAt(part))) {
						t.Errorf("pass %d: the artifact at %v of all was scrubbed before it was due", pass, part)
					}
					time.Sleep(time.Second)
					synctest.Wait()
				}
				if exists(t, r.zst(keyAt(part))) {
					t.Errorf("pass %d: the artifact at %v of all was not scrubbed when it was due", pass, part)
				}
				r.lacks(t, keyAt(part))
			}
			damage()
			time.Sleep(month / 4)
			synctest.Wait()
		}
		r.serves(t, sound, cachetest.Random(sound, 10_000))
		if n := strings.Count(r.log.String(), `msg="scrubbed everything that is stored"`); n != 3 {
			t.Errorf("%d passes were logged, want 3\n%s", n, r.log)
		}
		for name, reason := range r.reasons(t) {
			// Where the bit is that flipBit flips: in an artifact of 10,000 bytes, and in one of lacks.
			if !strings.Contains(reason, "has SHA-256") && reason != "metadata.json is not valid JSON\n" {
				t.Errorf("%s is in quarantine for %q", name, reason)
			}
		}
	})
}

// reasons returns the reasons in quarantine by their files.
func (r rig) reasons(t *testing.T) map[string]string {
	t.Helper()
	reasons := map[string]string{}
	paths, err := filepath.Glob(r.path(".polykit-cache/quarantine/*.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		reasons[filepath.Base(path)] = string(read(t, path))
	}
	return reasons
}

// TestScrubResumes stops a scrub, and another one goes on where it was.
func TestScrubResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		r := open(t, dir)
		early, late := keyAt(0.1), keyAt(0.9)
		r.put(t, early, cachetest.Random(early, 10_000))
		r.put(t, late, cachetest.Random(late, 10_000))
		config := disk.ScrubConfig{Interval: month, Rate: 1 << 30}
		began := time.Now()
		stop := r.scrub(t, config)
		time.Sleep(month / 2)
		synctest.Wait()
		stop()
		r.store.Close()

		change(t, r.zst(early), flipBit)
		change(t, r.zst(late), flipBit)
		time.Sleep(month / 4)
		r = open(t, dir)
		if told := r.store.Scrubbed(); told != (disk.Scrubbed{}) {
			t.Errorf("before anything is scrubbed it tells %+v", told)
		}
		r.scrub(t, config)
		if told := r.store.Scrubbed(); !told.StartedAt.Equal(began) || !told.EndedAt.IsZero() {
			t.Errorf("the pass that goes on began at %s, and one ended at %s; want %s and none", told.StartedAt, told.EndedAt, began)
		}
		time.Sleep(month/4 - time.Hour)
		synctest.Wait()
		if !exists(t, r.zst(early)) || exists(t, r.zst(late)) {
			t.Errorf("at the end of the pass, the early artifact is there: %t, the late one: %t; want only what was scrubbed already",
				exists(t, r.zst(early)), exists(t, r.zst(late)))
		}
		time.Sleep(month / 5)
		synctest.Wait()
		if exists(t, r.zst(early)) {
			t.Error("the next pass did not find the early artifact")
		}
		if told := r.store.Scrubbed(); told.Sound != 0 || told.Damaged != 2 || told.Bytes == 0 {
			t.Errorf("of two artifacts, both damaged, it tells %+v", told)
		}
		if told := r.store.Scrubbed(); !told.StartedAt.Equal(began.Add(month)) || told.EndedAt.IsZero() {
			t.Errorf("the next pass began at %s, and the one before ended at %s; want %s, and a time", told.StartedAt, told.EndedAt, began.Add(month))
		}
	})
}

// TestScrubCatchesUp has a server that was down for longer than a pass takes: it scrubs what it
// missed at once, and no more.
func TestScrubCatchesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		r := open(t, dir)
		last := keyAt(0.99)
		r.put(t, last, cachetest.Random(last, 10_000))
		config := disk.ScrubConfig{Interval: month, Rate: 1 << 30}
		r.scrub(t, config)()
		r.store.Close()
		change(t, r.zst(last), flipBit)
		time.Sleep(10 * month)
		r = open(t, dir)
		r.scrub(t, config)
		if exists(t, r.zst(last)) {
			t.Error("what was missed was not scrubbed at once")
		}
		if n := strings.Count(r.log.String(), `msg="scrubbed everything that is stored"`); n != 1 {
			t.Errorf("%d passes at once, want 1", n)
		}
	})
}

// TestScrubRate has a scrub that is always behind, at 100 KB a second.
func TestScrubRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, t.TempDir())
		r.put(t, key, cachetest.Random(key, 2_000_000))
		change(t, r.zst(key), func(content []byte) { content[len(content)-1] ^= 1 })
		r.scrub(t, disk.ScrubConfig{Interval: time.Nanosecond, Rate: 100_000})
		time.Sleep(17 * time.Second)
		synctest.Wait()
		if !exists(t, r.zst(key)) {
			t.Error("2 MB were read in less than 17 s")
		}
		time.Sleep(4 * time.Second)
		synctest.Wait()
		if exists(t, r.zst(key)) {
			t.Error("2 MB were not read within 21 s")
		}
	})
}

// TestScrubOfAnEmptyStore stops a scrub of nothing again and again. It is not through with it, so that what is then
// stored in a part that comes later is read in the same pass.
func TestScrubOfAnEmptyStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, t.TempDir())
		config := disk.ScrubConfig{Interval: month, Rate: 1 << 30}
		for range 3 {
			r.scrub(t, config)()
			time.Sleep(time.Hour)
		}
		if strings.Contains(r.log.String(), "it is not known how far the scrub was") {
			t.Errorf("a restart forgets how far it was: %s", r.log)
		}
		r.scrub(t, config)
		key := keyAt(0.5)
		content := cachetest.Random(key, 1000)
		r.put(t, key, content)
		change(t, r.zst(key), flipBit)
		time.Sleep(month / 2)
		synctest.Wait()
		r.lacks(t, key)
	})
}

// TestScrubPassIsTorn has a file that should say how far the scrub is, and does not.
func TestScrubPassIsTorn(t *testing.T) {
	for name, text := range map[string]string{
		"empty":             "",
		"torn":              `{"started_at": 17`,
		"another shape":     `[]`,
		"far in the future": `{"started_at": 9000000000000000000}`,
		"no such shard":     `{"next": 70000}`,
		"negative":          `{"next": -1}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := open(t, t.TempDir())
				r.put(t, key, content)
				change(t, r.zst(key), flipBit)
				write(t, r.path(".polykit-cache/scrub.json"), []byte(text))
				r.scrub(t, disk.ScrubConfig{Interval: time.Hour, Rate: 1 << 30})
				if !strings.Contains(r.log.String(), "it is not known how far the scrub was") {
					t.Error("nothing was logged")
				}
				time.Sleep(time.Hour)
				synctest.Wait()
				r.lacks(t, key)
			})
		})
	}
}

// wrecks are what an audit finds, each made of a sound artifact under key.
var wrecks = []struct {
	name    string
	wreck   func(t *testing.T, r rig)
	path    string
	state   disk.State
	problem string // a part of it
	// What is there after it was repaired: the artifact, if served is true.
	served bool
}{
	{"nothing", func(*testing.T, rig) {}, zstName, disk.StateSound, "", true},
	{"a bit flipped", func(t *testing.T, r rig) { change(t, r.zst(key), flipBit) }, zstName, disk.StateDamaged, "", false},
	{"the last bit flipped", func(t *testing.T, r rig) {
		change(t, r.zst(key), func(content []byte) { content[len(content)-1] ^= 1 })
	}, zstName, disk.StateDamaged, "", false},
	{"zeroed", func(t *testing.T, r rig) { change(t, r.zst(key), func(content []byte) { clear(content) }) }, zstName, disk.StateDamaged, "the zstd stream", false},
	{"truncated", func(t *testing.T, r rig) { write(t, r.zst(key), content[:len(content)-1]) }, zstName, disk.StateDamaged, "the zstd stream", false},
	{"empty", func(t *testing.T, r rig) { write(t, r.zst(key), nil) }, zstName, disk.StateDamaged, "the zstd stream", false},
	{"another sound artifact of this key", func(t *testing.T, r rig) {
		stat := lstat(t, r.zst(key))
		write(t, r.zst(key), slices.Concat(content, []byte("\x50\x2a\x4d\x18\x00\x00\x00\x00")))
		memo := strings.Replace(string(read(t, r.json(key))), fmt.Sprintf(`"size":%d`, stat.Size()), fmt.Sprintf(`"size":%d`, stat.Size()+8), 1)
		write(t, r.json(key), []byte(sealed(memo)))
		if err := os.Chtimes(r.zst(key), stat.ModTime(), stat.ModTime()); err != nil {
			t.Fatal(err)
		}
	}, zstName, disk.StateDamaged, "but the artifact that was uploaded had", false},
	{"a sound artifact of another key", func(t *testing.T, r rig) {
		write(t, r.zst(key), cachetest.Random(cachetest.Key("another"), 1000))
	}, zstName, disk.StateDamaged, "names the cache key", false},
	{"a directory in its place", func(t *testing.T, r rig) {
		removeAll(t, r.zst(key))
		mkdir(t, r.zst(key))
	}, zstName, disk.StateDamaged, "is not a regular file", false},
	{"no memo", func(t *testing.T, r rig) { removeAll(t, r.json(key)) }, zstName, disk.StateMemo, "its memo is missing", true},
	{"a torn memo", func(t *testing.T, r rig) { write(t, r.json(key), []byte(`{"hash":`)) }, zstName, disk.StateMemo, "its memo is torn", true},
	{"a stale memo", func(t *testing.T, r rig) {
		if err := os.Chtimes(r.zst(key), time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
	}, zstName, disk.StateMemo, "its memo is stale", true},
	{"a memo with another digit in the hash", func(t *testing.T, r rig) {
		memo := read(t, r.json(key))
		memo[len(`{"hash":"f`)] ^= 1 // of "c", which makes it "b"
		write(t, r.json(key), memo)
	}, zstName, disk.StateMemo, "its memo is damaged", true},
	{"a memo that is wrong", func(t *testing.T, r rig) {
		write(t, r.json(key), []byte(sealed(strings.Replace(string(read(t, r.json(key))), `"file_count":`, `"file_count":1`, 1))))
	}, zstName, disk.StateMemo, "its memo is wrong", true},
	{"a memo of the Rust server", func(t *testing.T, r rig) {
		write(t, r.json(key), []byte(fmt.Sprintf(`{"hash":"%x","size":%d,"created_at":1700000000,"cache_key_hash":"%s"}`,
			sha256.Sum256(content), len(content), key)))
	}, zstName, disk.StateSound, "", true},
	{"a memo without an artifact", func(t *testing.T, r rig) { removeAll(t, r.zst(key)) }, jsonName, disk.StateOrphan, "is a memo without an artifact", false},
	{"a foreign file", func(t *testing.T, r rig) { write(t, r.path("01/23/notes.txt"), nil) }, "01/23/notes.txt", disk.StateForeign, "is not a server's", true},
	{"an artifact in the wrong shard", func(t *testing.T, r rig) {
		mkdir(t, r.path("ff/ff"))
		write(t, r.path("ff/ff/"+digits+".zst"), content)
	}, "ff/ff/" + digits + ".zst", disk.StateForeign, "is not a server's", true},
	{"an upper-case name", func(t *testing.T, r rig) {
		write(t, r.path("01/23/"+strings.ToUpper(digits)+".zst"), content)
	}, "01/23/" + strings.ToUpper(digits) + ".zst", disk.StateForeign, "is not a server's", true},
	{"a file where shards are", func(t *testing.T, r rig) { write(t, r.path("0a"), nil) }, "0a", disk.StateForeign, "is not a server's", true},
}

// verify returns what Verify finds, by path.
func verify(t *testing.T, config disk.VerifyConfig) map[string]disk.Finding {
	t.Helper()
	found := map[string]disk.Finding{}
	config.Verifier = artifact.NewVerifier(artifact.DefaultLimits)
	config.Log = discard
	config.Report = func(f *disk.Finding) { found[filepath.ToSlash(f.Path)] = *f }
	if err := disk.Verify(t.Context(), config); err != nil {
		t.Error("Verify:", err)
	}
	return found
}

func TestVerify(t *testing.T) {
	for _, w := range wrecks {
		t.Run(w.name, func(t *testing.T) {
			r := open(t, t.TempDir())
			bystander := cachetest.Key("bystander")
			r.put(t, bystander, cachetest.Random(bystander, 1000))
			r.put(t, key, content)
			w.wreck(t, r)
			r.store.Close()
			before := tree(t, r.dir)

			check := func(found map[string]disk.Finding, repaired bool) {
				t.Helper()
				f, ok := found[w.path]
				if !ok || f.State != w.state || (f.Problem == nil) != (w.state == disk.StateSound) || f.Problem != nil && !strings.Contains(f.Problem.Error(), w.problem) {
					t.Errorf("found %+v; want %s to be %s, %q", found, w.path, w.state, w.problem)
				}
				if f.Repaired != (repaired && f.Wrong()) {
					t.Errorf("%s was repaired: %t", w.path, f.Repaired)
				}
				if f := found[filepath.ToSlash(strings.TrimPrefix(r.zst(bystander), r.dir+string(filepath.Separator)))]; f.State != disk.StateSound {
					t.Errorf("another artifact is %s, %v", f.State, f.Problem)
				}
			}
			check(verify(t, disk.VerifyConfig{Config: disk.Config{Dir: r.dir}}), false)
			if after := tree(t, r.dir); !maps.Equal(before, after) {
				t.Errorf("Verify without repair left %q of %q", after, before)
			}
			check(verify(t, disk.VerifyConfig{Config: disk.Config{Dir: r.dir}, Repair: true}), true)
			for path, f := range verify(t, disk.VerifyConfig{Config: disk.Config{Dir: r.dir}}) {
				if f.Wrong() {
					t.Errorf("after the repair %s is %s, %v", path, f.State, f.Problem)
				}
			}

			r = open(t, r.dir)
			if quarantined := len(r.quarantined(t)) > 0; quarantined != (w.state == disk.StateDamaged) {
				t.Errorf("in quarantine: %q", r.quarantined(t))
			}
			if w.served {
				r.serves(t, key, content)
			} else {
				r.lacks(t, key)
			}
			if n := r.log.inspections(); n != 0 {
				t.Errorf("%d artifacts had to be verified again after the repair", n)
			}
		})
	}
}

// TestOlderMemo is about a memo from before there was a digest of manifests: it is gone by as it is, and the next
// one who reads all of the artifact anyway adds the digest.
func TestOlderMemo(t *testing.T) {
	r := open(t, t.TempDir())
	info := r.put(t, key, content)
	if info.Manifest != manifestOf(t, content) {
		t.Errorf("the manifest is %s", info.Manifest)
	}
	older := strings.Replace(string(read(t, r.json(key))), fmt.Sprintf(`,"manifest":"%s"`, info.Manifest), "", 1)
	write(t, r.json(key), []byte(sealed(older)))
	r.store.Close()
	if f := verify(t, disk.VerifyConfig{Config: disk.Config{Dir: r.dir}})[zstName]; f.State != disk.StateSound {
		t.Errorf("Verify finds it %s, %v", f.State, f.Problem)
	}
	r = open(t, r.dir)
	if stat, err := r.Stat(t.Context(), key); err != nil || stat.Manifest != (artifact.Digest{}) || r.log.inspections() != 0 {
		t.Errorf("Stat returned %+v, %v after %d inspections", stat, err, r.log.inspections())
	}
	if f, err := r.store.Audit(t.Context(), key.In(artifact.DefaultScope)); err != nil || f.State != disk.StateSound || f.Repaired {
		t.Errorf("Audit found %+v, %v", f, err)
	}
	if looked, _, err := r.store.Look(key.In(artifact.DefaultScope)); err != nil || looked.Manifest != info.Manifest {
		t.Errorf("after the audit, Look returns %+v, %v", looked, err)
	}
}

// TestScrubFindsWhatVerifyFinds has the scrub make good the same, beside a server.
func TestScrubFindsWhatVerifyFinds(t *testing.T) {
	for _, w := range wrecks {
		t.Run(w.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := open(t, t.TempDir())
				r.put(t, key, content)
				w.wreck(t, r)
				r.scrub(t, disk.ScrubConfig{Interval: time.Hour, Rate: 1 << 30})
				time.Sleep(time.Hour)
				synctest.Wait()
				if w.served {
					r.serves(t, key, content)
				} else {
					r.lacks(t, key)
				}
				if n := r.log.inspections(); n != 0 {
					t.Errorf("%d artifacts had to be verified again after the scrub", n)
				}
				if w.state == disk.StateForeign && !exists(t, r.path(w.path)) {
					t.Error("what is foreign was removed")
				}
			})
		})
	}
}

// TestVerifyOverLimits has an artifact that was stored under larger limits: it is left alone, but for
// its bytes.
func TestVerifyOverLimits(t *testing.T) {
	r := open(t, t.TempDir())
	r.put(t, key, content)
	r.store.Close()
	limits := artifact.DefaultLimits
	limits.UnpackedSize = 1000
	find := func() (state disk.State, problem error) {
		err := disk.Verify(t.Context(), disk.VerifyConfig{
			Config: disk.Config{Dir: r.dir, Verifier: artifact.NewVerifier(limits), Log: discard},
			Repair: true,
			Report: func(f *disk.Finding) { state, problem = f.State, f.Problem },
		})
		if err != nil {
			t.Fatal(err)
		}
		return state, problem
	}
	if state, problem := find(); state != disk.StateUnverified || problem == nil {
		t.Errorf("found %s, %v, want %s", state, problem, disk.StateUnverified)
	}
	r = open(t, r.dir)
	r.serves(t, key, content)
	r.store.Close()
	change(t, r.zst(key), flipBit)
	if state, problem := find(); state != disk.StateDamaged || problem == nil {
		t.Errorf("found %s, %v, want %s", state, problem, disk.StateDamaged)
	}
	r = open(t, r.dir)
	r.lacks(t, key)
}

func TestVerifyIsCancelled(t *testing.T) {
	r := open(t, t.TempDir())
	for i := range 20 {
		key := cachetest.Key(fmt.Sprint(i))
		r.put(t, key, cachetest.Random(key, 1000))
	}
	ctx, cancel := context.WithCancel(t.Context())
	reported := 0
	err := disk.Verify(ctx, disk.VerifyConfig{
		Config: disk.Config{Dir: r.dir, Verifier: artifact.NewVerifier(artifact.DefaultLimits), Log: discard},
		Report: func(*disk.Finding) {
			reported++
			cancel()
		},
	})
	if !errors.Is(err, context.Canceled) || reported == 20 {
		t.Errorf("Verify returned %v after it looked at %d artifacts", err, reported)
	}
	if got, _, err := r.get(t, cachetest.Key("0")); err != nil || len(got) == 0 {
		t.Errorf("Get returned %d bytes, %v; what was cancelled is not damaged", len(got), err)
	}
}

func TestVerifyKeys(t *testing.T) {
	r := open(t, t.TempDir())
	r.put(t, key, content)
	other := cachetest.Key("other")
	r.put(t, other, cachetest.Random(other, 1000))
	missing := cachetest.Key("missing")
	var artifacts int
	var size int64
	found := map[artifact.Key]disk.State{}
	err := disk.Verify(t.Context(), disk.VerifyConfig{
		Config: disk.Config{Dir: r.dir, Verifier: artifact.NewVerifier(artifact.DefaultLimits), Log: discard},
		Keys:   []artifact.Key{key, missing},
		Begin:  func(n int, bytes int64) { artifacts, size = n, bytes },
		Report: func(f *disk.Finding) { found[f.Key] = f.State },
	})
	want := map[artifact.Key]disk.State{key: disk.StateSound, missing: disk.StateMissing}
	if err != nil || !maps.Equal(found, want) || artifacts != 1 || size != int64(len(content)) {
		t.Errorf("found %v among %d artifacts of %d bytes, %v; want %v", found, artifacts, size, err, want)
	}
}

func TestVerifyRepairNeedsTheDirectory(t *testing.T) {
	r := open(t, t.TempDir())
	r.put(t, key, content)
	err := disk.Verify(t.Context(), disk.VerifyConfig{
		Config: disk.Config{Dir: r.dir, Verifier: artifact.NewVerifier(artifact.DefaultLimits), Log: discard},
		Repair: true,
		Report: func(*disk.Finding) { t.Error("something was looked at") },
	})
	if err == nil || !strings.Contains(err.Error(), "in use by another server") {
		t.Errorf("Verify returned %v", err)
	}
	if _, err := r.Stat(t.Context(), key); err != nil || errors.Is(err, cache.ErrNotFound) {
		t.Error(err)
	}
}

// TestScrubIsStopped stops a scrub in the middle of an artifact, which is not damaged for that.
func TestScrubIsStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, t.TempDir())
		large := cachetest.Random(key, 2_000_000)
		r.put(t, key, large)
		stop := r.scrub(t, disk.ScrubConfig{Interval: time.Nanosecond, Rate: 100_000})
		time.Sleep(10 * time.Second)
		stop()
		r.serves(t, key, large)
		if found := r.reasons(t); len(found) > 0 {
			t.Errorf("in quarantine: %q", found)
		}
	})
}

// TestVerifyBesideUpload verifies an artifact that a server has linked, and whose memo it writes only now.
func TestVerifyBesideUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, t.TempDir())
		r.put(t, key, content)
		memo := read(t, r.json(key))
		removeAll(t, r.json(key))
		var found []disk.State
		done := make(chan error)
		go func() {
			done <- disk.Verify(t.Context(), disk.VerifyConfig{
				Config: disk.Config{Dir: r.dir, Verifier: artifact.NewVerifier(artifact.DefaultLimits), Log: discard},
				Report: func(f *disk.Finding) { found = append(found, f.State) },
			})
		}()
		synctest.Wait()
		write(t, r.json(key), memo)
		if err := <-done; err != nil || !slices.Equal(found, []disk.State{disk.StateSound}) {
			t.Errorf("Verify found %v and returned %v", found, err)
		}
	})
}

// TestVerifyWaitsForMemory proves that the audits of a verification do not fail for the memory that
// others of them take.
func TestVerifyWaitsForMemory(t *testing.T) {
	r := open(t, t.TempDir())
	for i := range 4 {
		key := keyAt(float64(i) / 4)
		r.put(t, key, cachetest.Random(key, 1<<20))
	}
	limits := artifact.DefaultLimits
	limits.Window = 256 << 20 // which outweighs all else
	limits.QueueTimeout = time.Nanosecond
	limits.Memory = limits.LeastMemory() // for one at a time
	found := 0
	err := disk.Verify(t.Context(), disk.VerifyConfig{
		Config: disk.Config{Dir: r.dir, Verifier: artifact.NewVerifier(limits), Log: discard},
		Report: func(f *disk.Finding) {
			if f.State == disk.StateSound {
				found++
			}
		},
	})
	if found != 4 || err != nil {
		t.Errorf("Verify reported %d sound artifacts and returned %v; want 4 and nil", found, err)
	}
}

// reserve is a reader that takes memory for verifications.
type reserve struct{ size int64 }

func (r reserve) Read([]byte) (int, error) { return 0, io.EOF }
func (r reserve) Buffered() int            { return int(r.size) }

// TestAuditWaitsForMemory has an artifact with so many names that it takes memory which there is not now.
func TestAuditWaitsForMemory(t *testing.T) {
	files := map[string]string{}
	for i := range 500 {
		files[fmt.Sprintf("%d%s", i, strings.Repeat("/long", 800))] = ""
	}
	for name, audit := range map[string]func(context.Context, rig, *artifact.Verifier) error{
		"verify": func(ctx context.Context, r rig, v *artifact.Verifier) error {
			found := ""
			err := disk.Verify(ctx, disk.VerifyConfig{
				Config: disk.Config{Dir: r.dir, Verifier: v, Log: discard},
				Report: func(f *disk.Finding) { found += string(f.State) },
			})
			if err == nil && found != "sound" {
				err = errors.New("found " + found)
			}
			return err
		},
		"scrub": func(ctx context.Context, r rig, v *artifact.Verifier) error {
			r.store.Close()
			log := new(logbook)
			store, err := disk.Open(disk.Config{Dir: r.dir, Verifier: v, Log: slog.New(slog.NewTextHandler(log, nil))})
			if err != nil {
				return err
			}
			defer store.Close()
			ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			store.Scrub(ctx, disk.ScrubConfig{Interval: time.Nanosecond, Rate: 1 << 30})
			if text := log.String(); !strings.Contains(text, "scrubbed everything that is stored") || strings.Contains(text, "ERROR") {
				return errors.New(text)
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := open(t, t.TempDir())
				r.put(t, key, cachetest.Sound(key, files))
				limits := artifact.DefaultLimits
				limits.Window = 512 << 20
				limits.Memory = limits.LeastMemory()
				verifier := artifact.NewVerifier(limits)
				_, release, err := verifier.Admit(t.Context(), reserve{limits.Memory/2 - 1<<20})
				if err != nil {
					t.Fatal(err)
				}
				ended := make(chan error, 1)
				go func() { ended <- audit(t.Context(), r, verifier) }()
				time.Sleep(10 * time.Second)
				select {
				case err := <-ended:
					t.Fatal("without memory:", err)
				default:
				}
				release()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestScrubSurvivesPanic proves that a panic of the verifier does not end the server, and neither the
// scrub.
func TestScrubSurvivesPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, t.TempDir())
		first, last := keyAt(0.25), keyAt(0.75)
		r.put(t, first, cachetest.Random(first, 1000))
		r.put(t, last, cachetest.Random(last, 1000))
		r.store.Close()
		log := new(logbook)
		store, err := disk.Open(disk.Config{Dir: r.dir, Log: slog.New(slog.NewTextHandler(log, nil))}) // without a Verifier
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		stop := rig{store: store}.scrub(t, disk.ScrubConfig{Interval: time.Hour, Rate: 1 << 30})
		defer stop()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := strings.Count(log.String(), "panic: "); n < 2 || !exists(t, r.zst(first)) || !exists(t, r.zst(last)) {
			t.Errorf("logged %d panics, want one for each artifact; or one is gone:\n%s", n, log)
		}
	})
}

// TestDirectoryNamedLikeAMemo proves that what people put into a directory is not removed.
func TestDirectoryNamedLikeAMemo(t *testing.T) {
	r := open(t, t.TempDir())
	dir := r.json(key)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "file"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	r.store.Close()
	err := disk.Verify(t.Context(), disk.VerifyConfig{
		Config: disk.Config{Dir: r.dir, Verifier: artifact.NewVerifier(artifact.DefaultLimits), Log: discard},
		Repair: true,
		Report: func(*disk.Finding) {},
	})
	kept, _ := filepath.Glob(r.path(".polykit-cache/quarantine/*/file"))
	if err != nil || exists(t, dir) || len(kept) != 1 {
		t.Errorf("Verify returned %v; in the quarantine are %v", err, kept)
	}
}
