package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// fullVariable is set in a process that may mount a file system, to the directory to mount it on.
const fullVariable = "POLYKIT_CACHE_TEST_FULL"

// TestFull fills a small file system, on the real program. It runs in a process that may mount one:
// where users may make namespaces, that is any.
func TestFull(t *testing.T) {
	dir := os.Getenv(fullVariable)
	if dir == "" {
		executable, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), executable, "-test.run=^TestFull$", "-test.v")
		cmd.Env = append(os.Environ(), fullVariable+"="+t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		var output bytes.Buffer
		cmd.Stdout, cmd.Stderr = &output, &output
		if err := cmd.Start(); err != nil {
			skip(t, "no process in namespaces of its own: %v", err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the test in the other process failed: %v\n%s", err, &output)
		}
		if strings.Contains(output.String(), "--- SKIP") {
			skip(t, "the test in the other process was skipped:\n%s", &output)
		}
		return
	}
	const small, large = "size=4m,nr_inodes=64", "size=16m"
	for name, test := range map[string]struct {
		mount string   // its options
		flags []string // of the server; without any it does not evict
		run   func(t *testing.T, r *faultRig)
	}{
		"refused before the body": {small, nil, testFullDeclared},
		"refused in the body":     {small, nil, testFullUndeclared},
		"several at once":         {small, nil, testFullSeveral},
		"filled meanwhile":        {small, nil, testFullMeanwhile},
		"full":                    {small, nil, testFull},
		"no inodes":               {small, nil, testFullInodes},
		// The index counts for 2 MiB at least. The default of --min-free is a twentieth.
		"max-storage":          {large, []string{"--max-storage=12MiB"}, testEvicted(func(t *testing.T, r *faultRig) { r.usesAtMost(t, 12*mebi) })},
		"min-free":             {large, []string{"--max-storage=0"}, testEvicted(func(t *testing.T, r *faultRig) { r.leavesFree(t, 16*mebi/20) })},
		"no room, max-storage": {large, []string{"--max-storage=12MiB"}, testNeverRoom(12 * mebi)},
		"no room, min-free":    {large, []string{"--max-storage=0"}, testNeverRoom(16 * mebi / 20 * 19)},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			if err := os.Mkdir(root, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Mount("tmpfs", root, "tmpfs", 0, test.mount); err != nil {
				skip(t, "mount: %v", err)
			}
			r := &faultRig{root: root, dir: root, data: several}
			r.traced = start(t, r.dir, test.flags...)
			control := r.newKey(t)
			is(t, "PUT", r.put(control), "201")
			test.run(t, r)
			if test.flags == nil {
				is(t, "GET of what was there", r.get(control), "200")
			}
			if open := r.openBelow(t, r.dir); len(open) != 1 {
				t.Errorf("open files: %q", open)
			}
			is(t, "the end", r.stop(), "exit 0")
			r.traced = start(t, r.dir, test.flags...)
			if test.flags != nil {
				r.evicted(t)
			}
			r.audit(t)
			is(t, "the end", r.stop(), "exit 0")
		})
	}
}

// puts are the ways of an upload, by whether the size is declared.
var puts = map[bool]map[string]func(*faultRig, artifact.Key) string{
	true:  {"rest": (*faultRig).put, "grpc": (*faultRig).putGRPC},
	false: {"rest": (*faultRig).putChunked, "grpc": (*faultRig).putGRPCUndeclared},
}

// sized makes r's artifacts those of a size, but the first.
func (r *faultRig) sized(size int) {
	first := r.keys[0]
	r.data = func(key artifact.Key) []byte {
		if key == first {
			return several(key)
		}
		return cachetest.Random(key, size)
	}
}

// nothing checks that nothing is left of an upload that failed.
func (r *faultRig) nothing(t *testing.T, key artifact.Key) {
	t.Helper()
	is(t, "GET of what was refused", r.get(key), "404")
	if files := r.list(t, "tmp"); len(files) != 0 {
		t.Errorf("in tmp/: %q", files)
	}
}

// forget takes a key off those that are stored in the end.
func (r *faultRig) forget(key artifact.Key) {
	r.keys = slices.DeleteFunc(r.keys, func(k artifact.Key) bool { return k == key })
}

// fill takes all space that is left, and returns what gives it back.
func (r *faultRig) fill(t *testing.T) (free func()) {
	t.Helper()
	path := r.path("filler")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for err == nil {
		_, err = file.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// testFullDeclared declares more than there is, and does not send it.
func testFullDeclared(t *testing.T, r *faultRig) {
	key := r.newKey(t)
	defer r.forget(key)
	request, err := http.NewRequest(http.MethodPut, "http://"+r.address+"/v1/artifacts/"+key.String(), iotest.ErrReader(errors.New("the body was asked for")))
	if err != nil {
		t.Fatal(err)
	}
	request.ContentLength = 5 << 20
	request.Header.Set("Expect", "100-continue")
	transport := &http.Transport{ExpectContinueTimeout: time.Hour}
	defer transport.CloseIdleConnections()
	response, err := transport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(response.Body)
	response.Body.Close()
	if want := `{"error":"The server has no space left for this artifact"}`; response.StatusCode != 507 || string(text) != want || err != nil {
		t.Errorf("REST answers %s %s, %v; want 507 %s", response.Status, text, err, want)
	}
	r.nothing(t, key)
	body, send := io.Pipe() // nothing comes out of it, so that there is no answer but an early one
	defer send.Close()
	is(t, "gRPC", r.upload(key, 5<<20, body), "507")
	r.nothing(t, key)
}

// testFullUndeclared sends more than there is without saying so.
func testFullUndeclared(t *testing.T, r *faultRig) {
	for name, put := range puts[false] {
		key := r.newKey(t)
		r.sized(5 << 20)
		is(t, name, put(r, key), "507")
		r.nothing(t, key)
		r.sized(100_000)
		is(t, name+" of what fits", put(r, key), "201")
	}
	r.keys = r.keys[:1] // the sizes of the others were two
	r.emptyBut(t)
}

// emptyBut deletes what is stored under other keys than r's.
func (r *faultRig) emptyBut(t *testing.T) {
	t.Helper()
	files, err := filesIn(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	for key := range files {
		if !slices.Contains(r.keys, key) {
			is(t, "DELETE", r.request(http.MethodDelete, "/v1/artifacts/"+key.String(), 0, nil, nil), "200")
		}
	}
}

// testFullSeveral sends together more than there is, while somebody reads. Then it makes room and sends
// again what was refused.
func testFullSeveral(t *testing.T, r *faultRig) {
	r.sized(700_000)
	type upload struct {
		key     artifact.Key
		put     func(*faultRig, artifact.Key) string
		outcome string
	}
	var uploads []*upload
	for range 2 {
		for _, declared := range []bool{true, false} {
			for _, name := range []string{"rest", "grpc"} {
				uploads = append(uploads, &upload{key: r.newKey(t), put: puts[declared][name]})
			}
		}
	}
	var reading, uploading sync.WaitGroup
	done := make(chan struct{})
	reading.Go(func() {
		for {
			is(t, "GET meanwhile", r.get(r.keys[0]), "200")
			select {
			case <-done:
				return
			default:
			}
		}
	})
	for _, u := range uploads {
		uploading.Go(func() { u.outcome = u.put(r, u.key) })
	}
	uploading.Wait()
	close(done)
	reading.Wait()

	stored := 0
	for _, u := range uploads {
		is(t, "PUT at once with others", u.outcome, "201", "507")
		if u.outcome == "201" {
			stored++
			is(t, "GET of what was stored", r.get(u.key), "200")
		} else {
			r.nothing(t, u.key)
		}
	}
	if stored == 0 || stored == len(uploads) {
		t.Errorf("%d of %d were stored", stored, len(uploads))
	}
	for _, u := range uploads {
		if u.outcome == "201" {
			r.forget(u.key)
		}
	}
	r.emptyBut(t)
	for _, u := range uploads {
		if u.outcome == "507" {
			is(t, "PUT when there is room", u.put(r, u.key), "201")
			is(t, "GET of it", r.get(u.key), "200")
			r.forget(u.key)
			r.emptyBut(t)
		}
	}
}

// testFullMeanwhile lets somebody else take the space that an upload was promised.
func testFullMeanwhile(t *testing.T, r *faultRig) {
	r.sized(1 << 20)
	key := r.newKey(t)
	data := r.data(key)
	for name, put := range map[string]func(body io.Reader) string{
		"rest": func(body io.Reader) string {
			return r.request(http.MethodPut, "/v1/artifacts/"+key.String(), int64(len(data)), body, nil)
		},
		"grpc": func(body io.Reader) string { return r.upload(key, int64(len(data)), body) },
	} {
		body, send := io.Pipe()
		outcome := make(chan string, 1)
		go func() {
			outcome <- put(body)
			body.Close()
		}()
		if _, err := send.Write(data[:len(data)/2]); err != nil {
			t.Fatal(err)
		}
		free := r.fill(t)
		send.Write(data[len(data)/2:])
		send.Close()
		is(t, name, <-outcome, "507")
		r.nothing(t, key)
		free()
	}
	is(t, "PUT when there is room", r.put(key), "201")
}

// testFull asks a server on a full file system for everything.
func testFull(t *testing.T, r *faultRig) {
	r.sized(100_000)
	forgotten, damaged := r.newKey(t), r.newKey(t)
	is(t, "PUT", r.put(forgotten), "201")
	is(t, "PUT", r.put(damaged), "201")
	if err := errors.Join(os.Remove(r.json(forgotten)), os.Truncate(r.zst(damaged), 50_000)); err != nil {
		t.Fatal(err)
	}
	free := r.fill(t)
	is(t, "GET /readyz", r.ready(damaged), "503")
	var refused []artifact.Key
	for declared, puts := range puts {
		for name, put := range puts {
			key := r.newKey(t)
			is(t, fmt.Sprint(name, ", declared: ", declared), put(r, key), "507")
			r.nothing(t, key)
			refused = append(refused, key)
		}
	}
	is(t, "GET", r.get(r.keys[0]), "200")
	is(t, "HEAD", r.head(r.keys[0]), "200")
	is(t, "GET of the files", r.files(r.keys[0]), "200")
	is(t, "GET without the memo", r.get(forgotten), "200")
	is(t, "HEAD without the memo", r.head(forgotten), "200")
	if files := r.list(t, "tmp"); len(files) != 0 {
		t.Errorf("in tmp/: %q", files)
	}
	is(t, "GET of what is damaged", r.get(damaged), "404")
	r.quarantined(t)

	free()
	is(t, "GET /readyz when there is room", r.ready(damaged), "200")
	for _, key := range append(refused, damaged) {
		is(t, "PUT when there is room", r.put(key), "201")
	}
}

// testFullInodes uploads until no more files can be made.
func testFullInodes(t *testing.T, r *faultRig) {
	r.sized(100)
	for {
		key := r.newKey(t)
		outcome := r.put(key)
		is(t, "PUT", outcome, "201", "507")
		if outcome == "201" {
			continue
		}
		is(t, "gRPC", r.putGRPC(key), "507")
		r.nothing(t, key)
		is(t, "GET", r.get(r.keys[1]), "200")
		gone := r.keys[1]
		r.forget(gone)
		r.emptyBut(t)
		is(t, "PUT when there is room", r.put(key), "201")
		return
	}
}

// statfs returns how many bytes of the file system are used, and how many are free.
func (r *faultRig) statfs(t *testing.T) (used, free int64) {
	t.Helper()
	var stat syscall.Statfs_t
	if err := syscall.Statfs(r.dir, &stat); err != nil {
		t.Fatal(err)
	}
	return int64(stat.Blocks-stat.Bfree) * stat.Bsize, int64(stat.Bavail) * stat.Bsize
}

// usesAtMost checks that everything takes no more than a limit.
func (r *faultRig) usesAtMost(t *testing.T, limit int64) {
	t.Helper()
	if used, _ := r.statfs(t); used > limit {
		t.Errorf("%d bytes are used; want at most %d", used, limit)
	}
}

// leavesFree checks that so much is free, but for what the index has written since the last upload.
func (r *faultRig) leavesFree(t *testing.T, least int64) {
	t.Helper()
	if _, free := r.statfs(t); free < least-256<<10 {
		t.Errorf("%d bytes are free; want about %d", free, least)
	}
}

// testEvicted uploads more than there is room for, one after the other and several at once: all are stored, and
// what was used last is kept, and what is pinned.
func testEvicted(within func(*testing.T, *faultRig)) func(*testing.T, *faultRig) {
	return func(t *testing.T, r *faultRig) {
		const size, kept = 1_000_000, 5
		r.sized(size)
		pinned := r.newKey(t)
		is(t, "PUT", r.put(pinned), "201")
		is(t, "PUT of the pin", r.request(http.MethodPut, "/v1/artifacts/"+pinned.String()+"/pin", 0, nil, nil), "200")
		for range 5 {
			for declared, puts := range puts {
				for name, put := range puts {
					key := r.newKey(t)
					is(t, fmt.Sprint(name, ", declared: ", declared), put(r, key), "201")
					within(t, r)
					is(t, "GET of the first", r.get(r.keys[0]), "200") // which keeps it
				}
			}
		}
		last := slices.Clone(r.keys[len(r.keys)-kept:])
		for _, key := range last {
			is(t, "GET of the last", r.get(key), "200")
		}
		is(t, "GET of the first", r.get(r.keys[0]), "200")
		is(t, "GET of the first that was not used", r.get(r.keys[2]), "404")

		var uploading sync.WaitGroup
		for _, puts := range puts {
			for _, put := range puts {
				key := r.newKey(t)
				uploading.Go(func() { is(t, "PUT at once with others", put(r, key), "201") })
			}
		}
		uploading.Wait()
		within(t, r)
		is(t, "GET of what is pinned", r.get(pinned), "200")
		is(t, "GET of the first", r.get(r.keys[0]), "200")
		if files := r.list(t, "tmp"); len(files) != 0 {
			t.Errorf("in tmp/: %q", files)
		}
	}
}

// testNeverRoom uploads what can never have room beside what the server needs itself, where all that may be used
// is a number of bytes: it is refused before its body, and nothing is evicted for it.
func testNeverRoom(all int64) func(*testing.T, *faultRig) {
	return func(t *testing.T, r *faultRig) {
		r.sized(1_000_000)
		for range 4 {
			is(t, "PUT", r.put(r.newKey(t)), "201")
		}
		for _, size := range []int64{all - 16<<10, all, all + 1, 1 << 29} {
			key := r.newKey(t)
			body, send := io.Pipe() // nothing comes out of it, so that there is no answer but an early one
			is(t, fmt.Sprint("gRPC of ", size), r.upload(key, size, body), "507")
			send.Close()
			r.nothing(t, key)
			r.forget(key)
		}
		for _, key := range r.keys {
			is(t, "GET of what was there", r.get(key), "200")
		}
		// An artifact of nearly all is stored, and takes the place of others.
		key, others := r.newKey(t), r.data
		r.data = func(k artifact.Key) []byte {
			if k == key {
				return cachetest.Random(key, int(all)-3*mebi)
			}
			return others(k)
		}
		is(t, "PUT of what has room", r.put(key), "201")
		is(t, "GET of it", r.get(key), "200")
	}
}

// evicted checks that what is not stored any more was evicted, which must be something, and takes it off the keys.
func (r *faultRig) evicted(t *testing.T) {
	t.Helper()
	files, err := filesIn(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	stats, err := statistics(r.address)
	if err != nil {
		t.Fatal(err)
	}
	uploaded := int64(len(r.keys))
	r.keys = slices.DeleteFunc(r.keys, func(key artifact.Key) bool { return files[key] == storedFile{} })
	gone := uploaded - int64(len(r.keys))
	if u := stats.GetTotal().GetUsage(); gone == 0 || u.GetStoredCount() != uploaded || u.GetEvictedCount() != gone {
		t.Errorf("of %d that were uploaded %d are gone, and statistics are %v", uploaded, gone, u)
	}
}
