//go:build unix

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

const nobody = 65534

func init() {
	// The server as a user whom permissions bind. Root they do not.
	commands["polykit-cache-unprivileged"] = func() {
		if os.Getuid() == 0 {
			if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(nobody), syscall.Setuid(nobody)); err != nil {
				panic(err)
			}
		}
		main()
	}
}

// answers are the statuses of the first request after a damage, by the kind of request. The second one
// must not find anything else than what the first left in order.
type answers struct{ get, head, put, metadata, files int }

var (
	served = answers{200, 200, 409, 200, 200}
	missed = answers{404, 404, 201, 404, 404}
	// goneByMemo is what is not looked at but by who wants its bytes.
	goneByMemo = answers{404, 200, 409, 200, 404}
)

// damage is something that happens to what is stored.
type damage struct {
	name string
	do   func(t *testing.T, s stored)
	want answers
	// aside is what must be in quarantine afterwards, by the ends of names, and part of each reason.
	aside map[string]string
}

// stored is an artifact that is stored.
type stored struct {
	dir     string // storage directory
	key     artifact.Key
	content []byte
}

func (s stored) outer() string { return filepath.Join(s.dir, s.key.String()[:2]) }
func (s stored) shard() string { return filepath.Join(s.outer(), s.key.String()[2:4]) }
func (s stored) zst() string   { return filepath.Join(s.shard(), s.key.String()+".zst") }
func (s stored) json() string  { return filepath.Join(s.shard(), s.key.String()+".json") }

const somebodys = "somebody's"

// replace puts something else where a file or directory is.
func replace(path func(stored) string, by func(t *testing.T, path string, old []byte)) func(*testing.T, stored) {
	return func(t *testing.T, s stored) {
		old, _ := os.ReadFile(path(s)) // nothing of a directory
		check(t, os.RemoveAll(path(s)))
		by(t, path(s), old)
	}
}

func check(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// writes replaces a file by one of the server's own with other bytes.
func writes(edit func(old []byte) []byte) func(*testing.T, string, []byte) {
	return func(t *testing.T, path string, old []byte) {
		check(t, os.WriteFile(path, edit(slices.Clone(old)), 0o644), own(path))
	}
}

// own gives a path to the user that the server runs as.
func own(path string) error {
	if os.Getuid() != 0 {
		return nil
	}
	return os.Lchown(path, nobody, nobody)
}

func removed(*testing.T, string, []byte) {}

func foreign(t *testing.T, path string, _ []byte) {
	check(t, os.WriteFile(path, []byte(somebodys), 0o644), own(path))
}

// links replaces by a symbolic link.
func links(target string) func(*testing.T, string, []byte) {
	return func(t *testing.T, path string, old []byte) { check(t, os.Symlink(target, path)) }
}

// linksToItself is a link that leads nowhere, and says so in another way than one to what is not there.
func linksToItself(t *testing.T, path string, old []byte) { links(path)(t, path, old) }

// moved replaces by a symbolic link to what was there.
func moved(path func(stored) string) func(*testing.T, stored) {
	return func(t *testing.T, s stored) {
		to := filepath.Join(s.dir, "moved-"+s.key.String()+"-"+filepath.Base(path(s)))
		check(t, os.Rename(path(s), to), os.Symlink(to, path(s)))
	}
}

func directory(t *testing.T, path string, _ []byte) { check(t, os.Mkdir(path, 0o755), own(path)) }

func fullDirectory(t *testing.T, path string, _ []byte) {
	directory(t, path, nil)
	foreign(t, filepath.Join(path, "file"), nil)
}

func closedDirectory(t *testing.T, path string, _ []byte) {
	fullDirectory(t, path, nil)
	check(t, os.Chmod(path, 0))
}

func pipe(t *testing.T, path string, _ []byte) { check(t, syscall.Mkfifo(path, 0o644), own(path)) }

func socket(t *testing.T, path string, _ []byte) {
	short, err := os.MkdirTemp("", "") // since a socket's name can't be long
	check(t, err)
	defer os.RemoveAll(short)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(short, "s")})
	check(t, err)
	listener.SetUnlinkOnClose(false)
	check(t, listener.Close(), os.Rename(filepath.Join(short, "s"), path), own(path))
}

// mode sets permissions.
func mode(path func(stored) string, mode fs.FileMode) func(*testing.T, stored) {
	return func(t *testing.T, s stored) { check(t, os.Chmod(path(s), mode)) }
}

func both(a, b func(*testing.T, stored)) func(*testing.T, stored) {
	return func(t *testing.T, s stored) {
		a(t, s)
		b(t, s)
	}
}

func flip(at int) func([]byte) []byte {
	return func(p []byte) []byte {
		p[len(p)+at] ^= 1
		return p
	}
}

// otherDigit changes the first digit of a memo's hash.
func otherDigit(p []byte) []byte {
	digit := &p[len(`{"hash":"`)]
	if *digit == '0' {
		*digit = '1'
	} else {
		*digit = '0'
	}
	return p
}

func zeroed(p []byte) []byte { return make([]byte, len(p)) }
func emptied([]byte) []byte  { return nil }
func halved(p []byte) []byte { return p[:len(p)/2] }
func longer(p []byte) []byte { return append(p, 0) }
func as(p []byte) []byte     { return p }
func asides(reason string) map[string]string {
	return map[string]string{".zst": reason}
}

// zstDamages are those of an artifact's bytes.
var zstDamages = []damage{
	{"truncated", replace(stored.zst, writes(halved)), missed, asides("the zstd stream ends in the middle of a frame")},
	{"emptied", replace(stored.zst, writes(emptied)), missed, asides("the zstd stream is empty")},
	{"zeroed", replace(stored.zst, writes(zeroed)), missed, asides("the zstd stream does not begin with a zstd frame")},
	{"extended", replace(stored.zst, writes(longer)), missed, asides("the zstd stream has bytes behind its last frame")},
	{"a flipped bit", replace(stored.zst, writes(flip(-1200))), missed, asides(`"outputs/data.bin" has SHA-256 `)},
	{"written again", replace(stored.zst, writes(as)), served, nil},
	{"missing", replace(stored.zst, removed), missed, nil},
	{"without permissions", mode(stored.zst, 0), goneByMemo, asides("open ")},
	{"only for writing", mode(stored.zst, 0o200), goneByMemo, asides("open ")},
	{"a directory", replace(stored.zst, directory), missed, asides("not a regular file")},
	{"a directory with something in it", replace(stored.zst, fullDirectory), missed, asides("not a regular file")},
	{"a directory without permissions", replace(stored.zst, closedDirectory), missed, asides("open ")},
	{"a foreign file", replace(stored.zst, foreign), missed, asides("the zstd stream does not begin with a zstd frame")},
	{"another artifact", replace(stored.zst, writes(func([]byte) []byte { return cachetest.Random(cachetest.Key("other"), 1000) })),
		missed, asides("metadata.json names the cache key ")},
	{"a link to the artifact", moved(stored.zst), missed, asides("open ")},
	{"a link to nowhere", replace(stored.zst, links("nowhere")), missed, asides("open ")},
	{"a link to itself", replace(stored.zst, linksToItself), missed, asides("open ")},
	{"a link to a directory", replace(stored.zst, links("/")), missed, asides("open ")},
	{"a named pipe", replace(stored.zst, pipe), missed, asides("not a regular file")},
	{"a socket", replace(stored.zst, socket), missed, asides("open ")},
}

// jsonDamages are those of what is known of an artifact. The first jsonKinds are as different as can be.
var jsonDamages = []damage{
	{"truncated", replace(stored.json, writes(halved)), served, nil},
	{"missing", replace(stored.json, removed), served, nil},
	{"without permissions", mode(stored.json, 0), served, nil},
	{"a directory", replace(stored.json, fullDirectory), served, map[string]string{".json": "a directory where a memo belongs"}},
	{"a link to itself", replace(stored.json, linksToItself), served, nil},
	{"emptied", replace(stored.json, writes(emptied)), served, nil},
	{"zeroed", replace(stored.json, writes(zeroed)), served, nil},
	{"a flipped bit", replace(stored.json, writes(flip(-1))), served, nil},
	{"another digit in the hash", replace(stored.json, writes(otherDigit)), served, nil},
	{"a directory without permissions", replace(stored.json, closedDirectory), served, map[string]string{".json": "a directory where a memo belongs"}},
	{"a foreign file", replace(stored.json, foreign), served, nil},
	{"a link to nowhere", replace(stored.json, links("nowhere")), served, nil},
	{"a named pipe", replace(stored.json, pipe), served, nil},
	{"a socket", replace(stored.json, socket), served, nil},
}

const jsonKinds = 5

// shardDamages are those of the directories that an artifact is in.
var shardDamages = []damage{
	{"the shard removed", replace(stored.shard, removed), missed, nil},
	{"both directories removed", replace(stored.outer, removed), missed, nil},
	{"a file for the shard", replace(stored.shard, foreign), missed, map[string]string{"": "must be a directory"}},
	{"a file for both", replace(stored.outer, foreign), missed, map[string]string{"": "must be a directory"}},
	{"a link to nowhere", replace(stored.shard, links("nowhere")), missed, map[string]string{"": "must be a directory"}},
	{"a link to itself", replace(stored.shard, linksToItself), missed, map[string]string{"": "must be a directory"}},
	{"both a link to itself", replace(stored.outer, linksToItself), missed, map[string]string{"": "must be a directory"}},
	{"a named pipe", replace(stored.shard, pipe), missed, map[string]string{"": "must be a directory"}},
	{"moved elsewhere", moved(stored.shard), served, nil},
	{"both moved elsewhere", moved(stored.outer), served, nil},
	{"without permissions", mode(stored.shard, 0), served, nil},
	{"both without permissions", both(mode(stored.shard, 0), mode(stored.outer, 0)), served, nil},
	{"that can't be written", mode(stored.shard, 0o555), served, nil},
	{"that can't be read", mode(stored.shard, 0o300), served, nil},
	{"that can't be looked into", mode(stored.shard, 0o600), served, nil},
	{"that can't be written, the memo missing", both(replace(stored.json, removed), mode(stored.shard, 0o555)), served, nil},
	{"that can't be written, the artifact missing", both(replace(stored.zst, removed), mode(stored.shard, 0o555)), missed, nil},
	{"that can't be written, the artifact truncated", both(replace(stored.zst, writes(halved)), mode(stored.shard, 0o555)),
		missed, asides("the zstd stream ends in the middle of a frame")},
	{"that can't be read, the artifact missing", both(replace(stored.zst, removed), mode(stored.shard, 0o300)), missed, nil},
	{"removed, and the other can't be written", both(replace(stored.shard, removed), mode(stored.outer, 0o555)), missed, nil},
	{"foreign files in it", func(t *testing.T, s stored) {
		for _, name := range []string{"README", s.key.String(), s.key.String() + ".zst.bak", s.key.String() + ".txt", ".zst", ".json"} {
			foreign(t, filepath.Join(s.shard(), name), nil)
		}
	}, served, nil},
}

// TestDamagedFiles damages what is stored of an artifact, and asks for it in every way.
func TestDamagedFiles(t *testing.T) {
	s := startUnprivileged(t)
	for _, kind := range []struct {
		name    string
		damages []damage
	}{{"zst", zstDamages}, {"json", jsonDamages}} {
		for _, d := range kind.damages {
			for _, a := range asks {
				name := kind.name + " " + d.name + "/" + a.name
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					s.testDamage(t, keyInOneShard(name), d, a)
				})
			}
		}
	}
	for _, zst := range zstDamages {
		for _, json := range jsonDamages[:jsonKinds] {
			name := "zst " + zst.name + ", json " + json.name
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				d := damage{name, both(zst.do, json.do), zst.want, maps.Clone(json.aside)}
				if d.want == goneByMemo {
					d.want = missed
				}
				if d.aside == nil {
					d.aside = map[string]string{}
				}
				maps.Copy(d.aside, zst.aside)
				s.testDamage(t, keyInOneShard(name), d, asks[0])
			})
		}
	}
}

// keyInOneShard returns a key in a shard that is made once.
func keyInOneShard(seed string) artifact.Key {
	key, err := artifact.ParseKey("0000" + cachetest.Key(seed).String()[4:])
	if err != nil {
		panic(err)
	}
	return key
}

// TestDamagedShard does the same with the directories that an artifact is in.
func TestDamagedShard(t *testing.T) {
	s := startUnprivileged(t)
	for i, d := range shardDamages {
		for j, a := range asks {
			t.Run(d.name+"/"+a.name, func(t *testing.T) {
				t.Parallel()
				n := i*len(asks) + j // a shard for each, and both of its directories have a name that no other has
				key, err := artifact.ParseKey(fmt.Sprintf("%02x%02x%060x", n, n, 0))
				check(t, err)
				s.testDamage(t, key, d, a)
			})
		}
	}
}

// unprivileged is a server that permissions bind.
type unprivileged struct {
	dir, url string
}

// startUnprivileged starts a server, which must not have logged an error in the end, nor that it could
// not do something, but for warnings that it is allowed.
func startUnprivileged(t *testing.T, allowed ...string) *unprivileged {
	t.Helper()
	u, log := startUnprivilegedWithLog(t)
	t.Cleanup(func() { // when all parallel subtests have ended
		for line := range strings.Lines(log()) {
			isAllowed := strings.Contains(line, "level=WARN") &&
				slices.ContainsFunc(allowed, func(a string) bool { return strings.Contains(line, a) })
			if strings.Contains(line, "level=ERROR") || strings.Contains(line, "msg=\"could not") && !isAllowed {
				t.Errorf("logged %s", line)
			}
		}
	})
	return u
}

// startUnprivilegedWithLog starts a server, and returns what ends it, once, and returns its log.
func startUnprivilegedWithLog(t *testing.T, args ...string) (*unprivileged, func() string) {
	t.Helper()
	parent := t.TempDir()
	dir := filepath.Join(parent, "store")
	check(t, os.Chmod(filepath.Dir(parent), 0o755), own(parent), os.Mkdir(dir, 0o755), own(dir))
	p := startProgram(t, "polykit-cache-unprivileged", dir, args...)
	return &unprivileged{dir, "http://" + p.address}, sync.OnceValue(func() string {
		check(t, p.Process.Signal(syscall.SIGTERM))
		return p.ends(t)
	})
}

// ask is a way to ask for an artifact.
type ask struct {
	name, method, path string
	want               func(answers) int
}

var asks = []ask{
	{"GET", "GET", "", func(a answers) int { return a.get }},
	{"HEAD", "HEAD", "", func(a answers) int { return a.head }},
	{"PUT", "PUT", "", func(a answers) int { return a.put }},
	{"metadata", "GET", "/metadata", func(a answers) int { return a.metadata }},
	{"files", "GET", "/files", func(a answers) int { return a.files }},
}

// of asks for an artifact, or uploads it, and returns the status and the body.
func (a ask) of(t *testing.T, url string, s stored) (int, []byte) {
	t.Helper()
	var body io.Reader
	if a.method == "PUT" {
		body = bytes.NewReader(s.content)
	}
	request, err := http.NewRequest(a.method, url+"/v1/artifacts/"+s.key.String()+a.path, body)
	check(t, err)
	response, err := http.DefaultClient.Do(request)
	check(t, err)
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	check(t, err)
	return response.StatusCode, got
}

// wantStatus asks, and wants a status.
func (a ask) wantStatus(t *testing.T, url string, s stored, want int, when string) {
	t.Helper()
	status, body := a.of(t, url, s)
	if status != want {
		t.Errorf("%s %s: got %d %.200s; want %d", a.name, when, status, body, want)
	}
	if a.name == "GET" && status == 200 && !bytes.Equal(body, s.content) {
		t.Errorf("GET %s: got %d bytes, not the %d that were uploaded", when, len(body), len(s.content))
	}
}

func (u *unprivileged) testDamage(t *testing.T, key artifact.Key, d damage, first ask) {
	get, put := asks[0], asks[2]
	s := stored{u.dir, key, cachetest.Random(key, 1000)}
	put.wantStatus(t, u.url, s, 201, "before the damage")
	d.do(t, s)
	first.wantStatus(t, u.url, s, first.want(d.want), "first")
	if status, body := first.of(t, u.url, s); status >= 500 {
		t.Errorf("%s once more: got %d %.200s", first.name, status, body)
	}
	if d.want.get == 404 && (first.name != "PUT" || d.want.put == 409) {
		get.wantStatus(t, u.url, s, 404, "then")
		put.wantStatus(t, u.url, s, 201, "then")
	}
	for _, a := range asks {
		a.wantStatus(t, u.url, s, a.want(served), "in the end")
	}
	found := u.quarantined(t, key.String())
	maps.Copy(found, u.quarantined(t, key.String()[:2])) // its directories
	if len(found) != len(d.aside) {
		t.Errorf("in quarantine are %q; want %q", found, d.aside)
	}
	for end, reason := range d.aside {
		if got, ok := found[end]; !ok || !strings.Contains(got, reason) {
			t.Errorf("in quarantine are %q; want %q", found, d.aside)
		}
	}
}

// quarantined returns the reasons why files of a name are in quarantine, by the ends of their names.
func (u *unprivileged) quarantined(t *testing.T, name string) map[string]string {
	t.Helper()
	found := map[string]string{}
	dir := filepath.Join(u.dir, ".polykit-cache", "quarantine")
	paths, err := filepath.Glob(filepath.Join(dir, name+"-*"))
	check(t, err)
	for _, path := range paths {
		end := filepath.Ext(path)
		if end == ".txt" {
			continue
		}
		if _, twice := found[end]; twice {
			t.Errorf("%s is in quarantine twice", name+end)
		}
		reason, err := os.ReadFile(strings.TrimSuffix(path, end) + ".txt")
		check(t, err)
		found[end] = string(reason)
	}
	return found
}

// storeDamages are those of the directories that all artifacts share.
var storeDamages = []struct {
	name string
	do   func(t *testing.T, dir string)
	// beside is what stays beside what was in the way, by patterns.
	beside string
}{
	{"nothing", func(*testing.T, string) {}, ""},
	{"tmp removed", at("tmp", removed), ""},
	{"tmp a file", at("tmp", foreign), ".polykit-cache/quarantine/tmp-*[^t]"},
	{"tmp a link to nowhere", at("tmp", links("nowhere")), ".polykit-cache/quarantine/tmp-*[^t]"},
	{"tmp without permissions", closed("tmp", 0), ""},
	{"tmp that can't be written", closed("tmp", 0o555), ""},
	{"foreign things in tmp", func(t *testing.T, dir string) {
		foreign(t, filepath.Join(dir, "tmp", "file"), nil)
		fullDirectory(t, filepath.Join(dir, "tmp", "directory.part"), nil)
	}, "tmp/file"},
	{"quarantine removed", at(".polykit-cache/quarantine", removed), ""},
	{"quarantine a file", at(".polykit-cache/quarantine", foreign), ".polykit-cache/quarantine-*"},
	{"quarantine a link to nowhere", at(".polykit-cache/quarantine", links("nowhere")), ".polykit-cache/quarantine-*"},
	{"quarantine a link to itself", at(".polykit-cache/quarantine", linksToItself), ".polykit-cache/quarantine-*"},
	{"quarantine without permissions", closed(".polykit-cache/quarantine", 0), ""},
	{"quarantine that can't be written", closed(".polykit-cache/quarantine", 0o555), ""},
	{"quarantine of root", ofRoot(".polykit-cache/quarantine"), ".polykit-cache/quarantine-*"},
	{".polykit-cache removed", at(".polykit-cache", removed), ""},
	{".polykit-cache a file", at(".polykit-cache", foreign), ".polykit-cache-*"},
	{".polykit-cache a link to nowhere", at(".polykit-cache", links("nowhere")), ".polykit-cache-*"},
	{".polykit-cache a link to itself", at(".polykit-cache", linksToItself), ".polykit-cache-*"},
	{".polykit-cache without permissions", closed(".polykit-cache", 0), ""},
	{".polykit-cache of root", func(t *testing.T, dir string) {
		ofRoot(".polykit-cache/quarantine")(t, dir)
		ofRoot(".polykit-cache")(t, dir)
	}, ".polykit-cache-*"},
	{"storage directory without permissions", closed(".", 0), ""},
	{"storage directory that can't be written", func(t *testing.T, dir string) {
		at(".polykit-cache", removed)(t, dir)
		at("tmp", removed)(t, dir)
		closed(".", 0o555)(t, dir)
	}, ""},
	{"foreign things in the storage directory", func(t *testing.T, dir string) {
		foreign(t, filepath.Join(dir, "file"), nil)
		fullDirectory(t, filepath.Join(dir, "lost+found"), nil)
	}, "lost+found/file"},
}

// at replaces a path in a storage directory.
func at(path string, by func(*testing.T, string, []byte)) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		check(t, os.RemoveAll(filepath.Join(dir, path)))
		by(t, filepath.Join(dir, path), nil)
	}
}

// closed sets permissions of a path in a storage directory.
func closed(path string, mode fs.FileMode) func(*testing.T, string) {
	return func(t *testing.T, dir string) { check(t, os.Chmod(filepath.Join(dir, path), mode)) }
}

// ofRoot makes a directory root's, as when root ran the server once.
func ofRoot(path string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		if os.Getuid() != 0 {
			skip(t, "only root can give a directory to root")
		}
		check(t, os.Chown(filepath.Join(dir, path), 0, 0))
	}
}

// TestDamagedStore does the same with the directories that all artifacts share: what is damaged is set
// aside, and uploads are stored.
func TestDamagedStore(t *testing.T) {
	get, put := asks[0], asks[2]
	for _, d := range storeDamages {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			u := startUnprivileged(t)
			sound, damaged, first, last := artifactOf(t, u.dir, "aaaa"), artifactOf(t, u.dir, "bbbb"), artifactOf(t, u.dir, "cccc"), artifactOf(t, u.dir, "dddd")
			for _, s := range []stored{sound, damaged, first} {
				put.wantStatus(t, u.url, s, 201, "before the damage")
			}
			halve := replace(stored.zst, writes(halved))
			halve(t, first)
			get.wantStatus(t, u.url, first, 404, "before the damage") // so that there is a quarantine
			halve(t, damaged)
			// While the index is reconciled it makes its directory again at once, and then once a second.
			if _, err := completes(strings.TrimPrefix(u.url, "http://")); err != nil {
				t.Fatal(err)
			}
			d.do(t, u.dir)

			get.wantStatus(t, u.url, damaged, 404, "first")
			get.wantStatus(t, u.url, damaged, 404, "once more")
			for _, s := range []stored{damaged, last} {
				put.wantStatus(t, u.url, s, 201, "then")
			}
			response, err := http.Get(u.url + "/readyz")
			check(t, err)
			response.Body.Close()
			if response.StatusCode != 200 {
				t.Errorf("/readyz is %s", response.Status)
			}
			for _, s := range []stored{sound, damaged, last} {
				for _, a := range asks {
					a.wantStatus(t, u.url, s, a.want(served), "in the end")
				}
			}
			if found := u.quarantined(t, damaged.key.String()); len(found) != 1 || !strings.Contains(found[".zst"], "the zstd stream ends in the middle of a frame") {
				t.Errorf("in quarantine are %q; want what was damaged", found)
			}
			if beside, err := filepath.Glob(filepath.Join(u.dir, d.beside)); len(beside) != 1 || err != nil {
				t.Errorf("beside what was in the way are %q, %v; want one %s", beside, err, d.beside)
			}
		})
	}
}

// TestStoreRemoved removes all of the storage directory while a server uses it.
func TestStoreRemoved(t *testing.T) {
	for _, first := range asks {
		t.Run(first.name, func(t *testing.T) {
			t.Parallel()
			// What is stored is gone through at the start, and what goes through it may find that it is gone.
			u := startUnprivileged(t, "could not go through what is stored; it is tried again")
			s := stored{u.dir, cachetest.Key("a"), cachetest.Random(cachetest.Key("a"), 1000)}
			asks[2].wantStatus(t, u.url, s, 201, "before the damage")
			check(t, os.RemoveAll(u.dir))
			first.wantStatus(t, u.url, s, first.want(missed), "first")
			if first.name != "PUT" {
				asks[2].wantStatus(t, u.url, s, 201, "then")
			}
			for _, a := range asks {
				a.wantStatus(t, u.url, s, a.want(served), "in the end")
			}
		})
	}
}

// TestShardOfAnother pins a limit: what another user's permissions forbid the server can't mend. It says
// so for as long as it is so, touches nothing, and goes on when somebody has mended it.
func TestShardOfAnother(t *testing.T) {
	if os.Getuid() != 0 {
		skip(t, "only root can give a directory to root")
	}
	get, put := asks[0], asks[2]
	u, log := startUnprivilegedWithLog(t)
	sound, damaged, new := stored{u.dir, keyInOneShard("a"), nil}, stored{u.dir, keyInOneShard("b"), nil}, stored{u.dir, keyInOneShard("c"), nil}
	for _, s := range []*stored{&sound, &damaged, &new} {
		s.content = cachetest.Random(s.key, 1000)
	}
	put.wantStatus(t, u.url, sound, 201, "before the damage")
	put.wantStatus(t, u.url, damaged, 201, "before the damage")
	replace(stored.zst, writes(halved))(t, damaged)
	check(t, os.Chown(sound.shard(), 0, 0))
	for range 2 {
		get.wantStatus(t, u.url, sound, 200, "now")
		get.wantStatus(t, u.url, damaged, 500, "now")
		put.wantStatus(t, u.url, new, 500, "now")
	}
	if aside, err := filepath.Glob(filepath.Join(u.dir, ".polykit-cache", "quarantine-*")); len(aside) > 0 || err != nil {
		t.Errorf("the quarantine was moved: %v, %v", aside, err)
	}
	check(t, own(sound.shard()))
	for _, s := range []stored{damaged, new} {
		get.wantStatus(t, u.url, s, 404, "then")
		put.wantStatus(t, u.url, s, 201, "then")
		get.wantStatus(t, u.url, s, 200, "then")
	}
	if entries, err := os.ReadDir(filepath.Join(u.dir, ".polykit-cache", "quarantine")); len(entries) != 2 || err != nil {
		t.Errorf("in quarantine are %v, %v; want what was damaged, and the reason", entries, err)
	}
	if n := strings.Count(log(), "level=ERROR"); n != 4 {
		t.Errorf("logged %d errors; want 4:\n%s", n, log())
	}
}

// artifactOf returns an artifact in the shard of four digits.
func artifactOf(t *testing.T, dir, digits string) stored {
	t.Helper()
	key, err := artifact.ParseKey(digits + strings.Repeat("0", 60))
	check(t, err)
	return stored{dir, key, cachetest.Random(key, 1000)}
}

// TestUnreadable has directories of another user, one that can't be read and one that can't be entered.
// What is behind them is looked at all the same, by the scrub and by verify, and both say what they
// could not look at.
func TestUnreadable(t *testing.T) {
	if os.Getuid() != 0 {
		skip(t, "only root can give a directory to root")
	}
	u, log := startUnprivilegedWithLog(t, "--scrub-interval=1ms")
	unlisted, shut, behind := artifactOf(t, u.dir, "aaaa"), artifactOf(t, u.dir, "bbbb"), artifactOf(t, u.dir, "cccc")
	for _, s := range []stored{unlisted, shut, behind} {
		asks[2].wantStatus(t, u.url, s, 201, "before the damage")
	}
	check(t, os.Chmod(unlisted.outer(), 0o700), os.Chown(unlisted.outer(), 0, 0))
	check(t, os.Chmod(shut.shard(), 0o744), os.Chown(shut.shard(), 0, 0))

	replace(stored.zst, writes(flip(-1200)))(t, behind)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(behind.zst()); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the scrub does not find what is behind a directory that it can't read")
		}
	}
	if text := log(); !strings.Contains(text, `msg="could not scrub a directory" path=aa `) || !strings.Contains(text, `msg="could not scrub a file" path=bb/bb/`) {
		t.Errorf("the log does not say what could not be scrubbed:\n%s", text)
	}

	for _, args := range [][]string{{"verify"}, {"verify", "--repair"}} {
		verify := exec.Command("polykit-cache-unprivileged", append(args, "--storage-dir", u.dir)...)
		out, err := verify.CombinedOutput()
		if verify.ProcessState.ExitCode() != 1 {
			t.Errorf("%s ended with %v; want exit status 1", args, err)
		}
		for _, want := range []string{
			"unread      aa  open ",
			"unread      bb/bb/" + shut.key.String() + ".zst  ",
			"looked at 0 B: 0 sound and 2 unread\n",
		} {
			if !strings.Contains(string(out), want) {
				t.Errorf("%s does not say %q, but\n%s", args, want, out)
			}
		}
	}
}

// TestMendedDirectoryKeepsItsBits takes permissions from a directory of which the group is inherited.
func TestMendedDirectoryKeepsItsBits(t *testing.T) {
	u := startUnprivileged(t)
	tmp := filepath.Join(u.dir, "tmp")
	check(t, os.Chmod(tmp, fs.ModeSetgid|fs.ModeSticky|0o555))
	asks[2].wantStatus(t, u.url, artifactOf(t, u.dir, "aaaa"), 201, "then")
	stat, err := os.Stat(tmp)
	check(t, err)
	if got, want := stat.Mode(), fs.ModeDir|fs.ModeSetgid|fs.ModeSticky|0o755; got != want {
		t.Errorf("the directory has %v; want %v", got, want)
	}
}
