package disk_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/disk"
)

const nobody = 65534

// asNobody runs f without the right to do what permissions forbid, which root has.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Getuid() != 0 {
		f()
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := syscall.Setfsuid(nobody); err != nil { // of this thread only
		t.Fatal(err)
	}
	defer syscall.Setfsuid(0)
	f()
}

// openForAll opens a store in a directory that nobody may look into, too.
func openForAll(t *testing.T) rig {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	return open(t, dir)
}

// run runs a child, whose test decides.
func run(t *testing.T, command *exec.Cmd) {
	t.Helper()
	var output bytes.Buffer
	command.Args = append(command.Args, "-test.v")
	command.Stdout, command.Stderr = &output, &output
	if err := command.Start(); err != nil {
		skip(t, "no process in namespaces of its own: %v", err)
	}
	if err := command.Wait(); err != nil {
		t.Errorf("the test in the other process failed: %v\n%s", err, &output)
	}
	if strings.Contains(output.String(), "--- SKIP") {
		skip(t, "the test in the other process was skipped:\n%s", &output)
	}
}

func freeSpace(t *testing.T, dir string) int64 {
	t.Helper()
	var stat syscall.Statfs_t
	if err := syscall.Statfs(dir, &stat); err != nil {
		t.Fatal(err)
	}
	return int64(stat.Bavail) * stat.Bsize
}

// skip skips a test where the system does not allow it. In CI it does, so there a skip is a failure.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// chown gives files to nobody if the test is root's.
func chown(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if os.Getuid() == 0 {
			if err := os.Chown(path, nobody, -1); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestUnreadable(t *testing.T) {
	for _, first := range []firstAsk{firstAsks[0], firstAsks[2]} { // Stat goes by the memo
		t.Run(first.name, func(t *testing.T) {
			r := openForAll(t)
			r.put(t, key, content)
			mkdir(t, r.path(".polykit-cache/quarantine"))
			chown(t, r.path("01/23"), r.path(".polykit-cache/quarantine"))
			if err := os.Chmod(r.path(zstName), 0); err != nil {
				t.Fatal(err)
			}
			asNobody(t, func() {
				for range 2 {
					if err := first.ask(t, r); err != cache.ErrNotFound {
						t.Errorf("%s returned %v, want %v", first.name, err, cache.ErrNotFound)
					}
				}
			})
			if found := r.quarantined(t)[digits+".txt"]; !strings.HasSuffix(found, ": permission denied\n") {
				t.Errorf("quarantined for %q", found)
			}
			r.lacks(t, key)
		})
	}
}

func TestCheckReadOnly(t *testing.T) {
	r := openForAll(t)
	if err := os.Chmod(r.path("tmp"), 0o555); err != nil {
		t.Fatal(err)
	}
	asNobody(t, func() {
		err := r.Ready(t.Context())
		if !errors.Is(err, os.ErrPermission) || !strings.HasPrefix(err.Error(), "storage directory can't be written: ") {
			t.Errorf("Check of a directory that can't be written returned %v", err)
		}
		if _, err := r.Put(t.Context(), key, -1, bytes.NewReader(content)); !errors.Is(err, os.ErrPermission) {
			t.Errorf("Put returned %v", err)
		}
	})
	if err := os.Chmod(r.path("tmp"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := r.Ready(t.Context()); err != nil {
		t.Error("Check of a directory that can be written again:", err)
	}
}

// TestNoSpace uses a file system of its own, in a process that may mount one: where users may make
// namespaces, that is any.
func TestNoSpace(t *testing.T) {
	dir := os.Getenv(childVariable)
	if dir == "" {
		command := child(t, t.TempDir())
		command.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		run(t, command)
		return
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=512k"); err != nil {
		skip(t, "mount: %v", err)
	}
	r := open(t, dir)
	r.put(t, key, content)

	other := cachetest.Key("other")
	large := cachetest.Random(other, 600_000)
	if _, err := r.Put(t.Context(), other, -1, bytes.NewReader(large)); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Put of what does not fit returned %v, want %v", err, cache.ErrNoSpace)
	}
	unread := bytes.NewReader(large)
	if _, err := r.Put(t.Context(), other, int64(len(large)), unread); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Put of what is said not to fit returned %v, want %v", err, cache.ErrNoSpace)
	}
	if unread.Len() != len(large) {
		t.Error("what is said not to fit was read")
	}
	r.tmpIsEmpty(t)
	if err := r.Ready(t.Context()); err != nil {
		t.Error("Check of a store with room for less:", err)
	}
	small := cachetest.Random(other, 1000)
	r.put(t, other, small)
	r.serves(t, other, small)

	// What uploads in flight still have to write is not free, neither for what declares its size nor
	// for what does not.
	third := cachetest.Key("third")
	promised, err := r.store.Create(t.Context(), cachetest.Key("promised"), 300_000)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.Create(t.Context(), third, 300_000); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Create beside an upload that needs the space returned %v, want %v", err, cache.ErrNoSpace)
	}
	undeclared, err := r.store.Create(t.Context(), third, cache.UnknownSize)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := undeclared.Write(large[:300_000]); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Write beside an upload that needs the space returned %v, want %v", err, cache.ErrNoSpace)
	}
	undeclared.Abort()
	for part := range slices.Chunk(large[:300_000], 50_000) {
		if _, err := promised.Write(part); err != nil {
			t.Error("Write of what was promised:", err)
		}
	}
	promised.Abort()
	r.put(t, third, cachetest.Random(third, 300_000))
	digits := third.String()
	removeAll(t, r.path(digits[:2]))

	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	if err := r.Ready(t.Context()); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Check of a full store returned %v, want %v", err, cache.ErrNoSpace)
	}
	if _, err := r.Put(t.Context(), cachetest.Key("third"), -1, bytes.NewReader(large)); !errors.Is(err, cache.ErrNoSpace) {
		t.Errorf("Put into a full store returned %v, want %v", err, cache.ErrNoSpace)
	}
	r.serves(t, key, content)
	removeAll(t, r.path(jsonName)) // whose room is too little for a new one
	if err := os.WriteFile(filepath.Join(dir, "filler 2"), make([]byte, 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	r.serves(t, key, content)

	filler.Close()
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal("remount:", err)
	}
	if err := r.Ready(t.Context()); !errors.Is(err, syscall.EROFS) {
		t.Errorf("Check of a read-only store returned %v, want %v", err, syscall.EROFS)
	}
	if got, _, err := r.get(t, key); err != nil || !bytes.Equal(got, content) {
		t.Errorf("Get from a read-only store returned %d bytes, %v", len(got), err)
	}
}

// TestReservationsEnd has uploads that declare what is free, one after the other: each gives back
// what it did not write.
func TestReservationsEnd(t *testing.T) {
	r := open(t, t.TempDir())
	free := freeSpace(t, r.dir) / 2
	for range 5 {
		upload, err := r.store.Create(t.Context(), key, free)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(upload, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		upload.Abort()
		upload.Abort()
	}
}

// TestTooManyFiles runs in a process of its own, since it lowers the process's limit.
func TestTooManyFiles(t *testing.T) {
	dir := os.Getenv(childVariable)
	if dir == "" {
		run(t, child(t, t.TempDir()))
		return
	}
	r := open(t, dir)
	r.put(t, key, content)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	limit.Cur = 64
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	taken := []*os.File{}
	for {
		file, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		taken = append(taken, file)
	}
	stored := map[artifact.Key]bool{}
	for spare := range 6 {
		other := cachetest.Key(fmt.Sprint(spare))
		_, _, getErr := r.get(t, key)
		_, putErr := r.Put(t.Context(), other, -1, bytes.NewReader(cachetest.Random(other, 100)))
		stored[other] = putErr == nil
		for what, err := range map[string]error{"Get": getErr, "Put": putErr, "Check": r.Ready(t.Context())} {
			// With some files to spare this or that works.
			if !errors.Is(err, cache.ErrOverloaded) && (err != nil || spare == 0) {
				t.Errorf("with %d files to spare %s returned %v, want %v", spare, what, err, cache.ErrOverloaded)
			}
		}
		taken[spare].Close()
	}
	for _, file := range taken[6:] {
		file.Close()
	}
	for key, stored := range stored {
		if stored {
			r.serves(t, key, cachetest.Random(key, 100))
		} else {
			r.lacks(t, key)
		}
	}
	r.serves(t, key, content)
	if found := r.quarantined(t); len(found) != 0 {
		t.Errorf("in quarantine: %q", found)
	}
}

// TestFilesAreClosed asks for what is damaged, foreign or missing, and counts the files that are open.
func TestFilesAreClosed(t *testing.T) {
	r := open(t, t.TempDir())
	askAll := func() {
		for _, damaged := range [][]byte{content[:2000], nil} {
			for _, first := range firstAsks {
				write(t, r.path(zstName), damaged)
				if err := first.ask(t, r); err != cache.ErrNotFound {
					t.Errorf("%s returned %v, want %v", first.name, err, cache.ErrNotFound)
				}
			}
		}
		mkdir(t, r.path(zstName))
		if _, _, err := r.get(t, key); err != cache.ErrNotFound {
			t.Errorf("Get returned %v, want %v", err, cache.ErrNotFound)
		}
		r.lacks(t, key)
		removeAll(t, r.path("01"))
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // or else it closes them
	askAll()
	before := len(list(t, "/proc/self/fd"))
	for range 10 {
		askAll()
	}
	if after := len(list(t, "/proc/self/fd")); after > before {
		t.Errorf("%d files were left open", after-before)
	}
}

// TestReplacedDuringInspection replaces an artifact while it is verified for the lack of its memo. What
// is found then is about the old one only.
func TestReplacedDuringInspection(t *testing.T) {
	sound := cachetest.Random(key, 32<<20) // takes long enough to verify
	damaged := slices.Clone(sound)
	damaged[len(damaged)-1500] ^= 1
	for name, old := range map[string][]byte{"sound": sound, "damaged": damaged} {
		t.Run(name, func(t *testing.T) {
			var r rig
			var stat fs.FileInfo
			var got []byte
			var err error
			var done chan struct{}
			for attempt, inspecting := 0, false; !inspecting; attempt++ {
				if attempt == 50 {
					t.Fatal("every inspection ended before it was seen")
				}
				r = open(t, t.TempDir())
				write(t, r.path(zstName), old)
				stat = lstat(t, r.path(zstName))
				done = make(chan struct{})
				go func() {
					defer close(done)
					got, _, err = r.get(t, key)
				}()
				for ended := false; !inspecting && !ended; { // until it is open twice: to be served, and to be verified
					inspecting = openTimes(r.path(zstName)) == 2
					select {
					case <-done:
						ended = true
					default:
					}
				}
			}
			if err := r.store.Quarantine(t.Context(), artifact.Info{Key: key, Size: stat.Size(), StoredAt: stat.ModTime()}, errors.New("damaged")); err != nil {
				t.Error("Quarantine:", err)
			}
			r.put(t, key, content)
			if name == "sound" { // whoever opens the new one without its memo gets to wait for the same inspection
				removeAll(t, r.path(jsonName))
				r.serves(t, key, content)
			}
			<-done
			if name == "sound" && (err != nil || !bytes.Equal(got, old)) {
				t.Errorf("Get, which opened the old artifact, returned %d bytes, %v", len(got), err)
			}
			if name == "damaged" && err != cache.ErrNotFound {
				t.Errorf("Get of the damaged artifact returned %v, want %v", err, cache.ErrNotFound)
			}
			r.serves(t, key, content)
			if found := r.quarantined(t); len(found) != 2 || found[digits+".txt"] != "damaged\n" {
				t.Errorf("in quarantine: %.100q", found)
			}
		})
	}
}

// openTimes returns how many times this process has a file open.
func openTimes(path string) int {
	times := 0
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		if target, _ := os.Readlink("/proc/self/fd/" + fd.Name()); target == path {
			times++
		}
	}
	return times
}

// TestEvictStrangeTime evicts an artifact whose time the index can't tell.
func TestEvictStrangeTime(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{})
	r.put(t, key, content)
	strange := time.Date(2300, 1, 1, 0, 0, 0, 0, time.UTC) // more nanoseconds than can be counted
	if err := unix.UtimesNano(r.path(zstName), []unix.Timespec{{Sec: strange.Unix()}, {Sec: strange.Unix()}}); err != nil {
		t.Fatal(err)
	}
	if stat := lstat(t, r.path(zstName)); !stat.ModTime().Equal(strange) {
		skip(t, "the file system does not know the year 2300")
	}
	looked, _, _ := r.store.Look(key.In(artifact.DefaultScope))
	if _, err := r.store.Evict(t.Context(), key.In(artifact.DefaultScope), time.Unix(0, looked.StoredAt.UnixNano())); err != nil {
		t.Error(err)
	}
}

// TestEvictWithoutDescriptors evicts a pinned artifact when nobody can read that it is.
func TestEvictWithoutDescriptors(t *testing.T) {
	r, _ := observed(t, t.TempDir(), disk.Limits{})
	info := r.put(t, key, content)
	if err := r.store.Pin(t.Context(), key, true); err != nil {
		t.Fatal(err)
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := syscall.Rlimit{Cur: 0, Max: limit.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	_, err := r.store.Evict(t.Context(), key.In(artifact.DefaultScope), info.StoredAt)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, syscall.EMFILE) {
		t.Errorf("Evict returned %v, want %v", err, syscall.EMFILE)
	}
	r.serves(t, key, content)
}

// TestWalkOfUnreadable goes through a directory of which a part can't be read, and says so.
func TestWalkOfUnreadable(t *testing.T) {
	r := openForAll(t)
	r.put(t, key, content)
	other := keyOf(digits[:2] + "ff" + digits[4:])
	r.put(t, other, cachetest.Sound(other, nil))
	if err := os.Chmod(r.path("01/23"), 0); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(r.path("01/23"), 0o755)
	var found []artifact.Key
	var err error
	asNobody(t, func() {
		if os.Getuid() != 0 {
			skip(t, "its owner would get the permissions back")
		}
		err = r.store.Walk(artifact.DefaultScope, digits[:2], func(files []cache.File) error {
			for _, file := range files {
				found = append(found, file.Key)
			}
			return nil
		})
	})
	if !errors.Is(err, fs.ErrPermission) || len(found) != 1 || found[0] != other {
		t.Errorf("Walk found %v, %v", found, err)
	}
}
