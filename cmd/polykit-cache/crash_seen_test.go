package main

import (
	"crypto/sha256"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// TestCrashSeesDamage checks that TestCrash would see what is wrong in a directory.
func TestCrashSeesDamage(t *testing.T) {
	c := newCrash(t, 1, false)
	path := func(key artifact.Key, extension string) string {
		return filepath.Join(c.dir, shardOf(key), key.String()+extension)
	}
	write := func(path string, data []byte) error {
		return errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644))
	}
	cases := []struct {
		want   string // behind the key
		damage func(key artifact.Key, data []byte) error
	}{
		{": 4616 bytes", func(key artifact.Key, data []byte) error { return write(path(key, ".zst"), data[:len(data)-1]) }},
		{": 4617 bytes", func(key artifact.Key, data []byte) error {
			data[len(data)/2]++
			return write(path(key, ".zst"), data)
		}},
		{" is not there any more (acknowledged: true)", func(key artifact.Key, _ []byte) error { return os.Remove(path(key, ".zst")) }},
		{" has a memo, but no artifact", func(key artifact.Key, _ []byte) error { return os.Remove(path(key, ".zst")) }},
		{" has no memo any more (acknowledged: true)", func(key artifact.Key, _ []byte) error { return os.Remove(path(key, ".json")) }},
		{" has a memo that does not fit", func(key artifact.Key, _ []byte) error { return write(path(key, ".json"), []byte("{")) }},
		{".zst does not belong there", func(key artifact.Key, data []byte) error {
			return write(filepath.Join(c.dir, "ff", "ff", key.String()+".zst"), data)
		}},
		{".zst was set aside", func(key artifact.Key, _ []byte) error {
			return write(filepath.Join(c.dir, ".polykit-cache", "quarantine", key.String()+".zst"), nil)
		}},
		{".part is in tmp/ here", func(key artifact.Key, _ []byte) error {
			return write(filepath.Join(c.dir, "tmp", key.String()+".part"), nil)
		}},
	}
	keys := make([]artifact.Key, len(cases))
	c.life(syscall.SIGTERM, func() {
		for i := range cases {
			keys[i] = c.newKey()
			c.session.put(c.session.anyWay(c.random), keys[i], cachetest.Random(keys[i], 1000), true)
		}
	})
	c.inspect()
	c.failIfViolated(t, "before the damage")
	for i, damaged := range cases {
		if err := damaged.damage(keys[i], cachetest.Random(keys[i], 1000)); err != nil {
			t.Fatal(err)
		}
	}
	stranger := c.newKey()
	if err := write(path(stranger, ".zst"), cachetest.Random(stranger, 1000)); err != nil {
		t.Fatal(err)
	}
	c.inspect()
	c.tmpIsEmpty("here")
	for i, damaged := range cases {
		wantViolation(t, c.ledger, keys[i].String()+damaged.want)
	}
	wantViolation(t, c.ledger, stranger.String()+": ")
}

func wantViolation(t *testing.T, l *ledger, want string) {
	t.Helper()
	if all := strings.Join(l.violations, "\n"); !strings.Contains(all, want) {
		t.Errorf("%q is not among the violations:\n%s", want, all)
	}
}

// TestCrashSeesLies checks that TestCrash would see what is wrong with answers.
func TestCrashSeesLies(t *testing.T) {
	key := cachetest.Key("lies")
	data, other := cachetest.Random(key, 1000), cachetest.Random(key, 1001)
	put := func(data []byte) func(*session) {
		return func(s *session) { s.put(s.ways[0], key, data, true) }
	}
	part := func(s *session) { s.putPart(s.ways[0], key, data, 1000, true, true) }
	get := func(s *session) { s.read(s.ways[0], key, true) }
	stat := func(s *session) { s.read(s.ways[0], key, false) }
	status := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }
	}
	send := func(hashed, sent []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Artifact-Hash", artifact.Digest(sha256.Sum256(hashed)).String())
			w.Header().Set("Content-Length", strconv.Itoa(len(sent)))
			w.Write(sent)
		}
	}
	cut := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	type exchange struct {
		request func(*session)
		answer  http.HandlerFunc
	}
	for _, lie := range []struct {
		name, want string
		exchanges  []exchange
	}{
		{"two winners", "acknowledged though", []exchange{{put(data), status(201)}, {put(data), status(201)}}},
		{"acknowledged though there was one", "acknowledged though", []exchange{{put(data), status(409)}, {put(data), status(201)}}},
		{"acknowledged and lost", "a miss, but", []exchange{{put(data), status(201)}, {get, status(404)}}},
		{"existed and lost", "a miss, but", []exchange{{put(data), status(409)}, {stat, status(404)}}},
		{"served and lost", "a miss, but", []exchange{{put(data), status(503)}, {get, send(data, data)}, {get, status(404)}}},
		{"changed", "but once it was", []exchange{{put(other), status(503)}, {put(data), status(201)}, {get, send(other, other)}}},
		{"made up", "which nobody uploaded", []exchange{{put(data), status(201)}, {get, send(other, other)}}},
		{"of a cut upload", "which nobody uploaded", []exchange{{part, status(422)}, {get, send(data[:1000], data[:1000])}}},
		{"short", "but was said to have", []exchange{{put(data), status(201)}, {get, send(data, data[:1000])}}},
		{"of another hash", "but was said to have", []exchange{{put(data), status(201)}, {get, send(other, data)}}},
		{"a part taken for the whole", "was answered with 201", []exchange{{part, status(201)}}},
		{"nothing in the way", "was answered with 409", []exchange{{part, status(409)}}},
		{"sound and refused", "refused as unsound", []exchange{{put(data), status(422)}}},
		{"out of order", "status 500", []exchange{{get, status(500)}}},
		{"silent", "no answer", []exchange{{get, cut}}},
		{"refused without a time", "without Retry-After", []exchange{{get, status(503)}}},
	} {
		t.Run(lie.name, func(t *testing.T) {
			var answer http.HandlerFunc
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, r) }))
			defer server.Close()
			s := &session{
				ledger:   newLedger(),
				ways:     newWays(server.Listener.Addr().String())[1:2],
				event:    func() {},
				mayBreak: func() bool { return false },
			}
			defer s.close()
			for _, e := range lie.exchanges {
				answer = e.answer
				e.request(s)
			}
			wantViolation(t, s.ledger, lie.want)
		})
	}
}
