package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// What a run can be told in the environment. The same seed gives the same artifacts and moments, as far
// as the system runs threads and processes the same way.
const (
	killsVariable = "POLYKIT_CACHE_TEST_KILLS"
	seedVariable  = "POLYKIT_CACHE_TEST_SEED"

	// fewKills is how many kills a run may have for everything to be checked after each.
	fewKills = 50

	uploaders, readers, checkers = 5, 3, 4
)

// TestCrash kills the real program, again and again, while clients use it in all the ways there are,
// and while it starts. Each time:
//
//   - what was acknowledged, or seen once, is there byte for byte, in all later lives too;
//   - what was not is there as a whole, or is a miss and can be uploaded;
//   - nothing is left in tmp/ after the start, nothing was set aside, and every memo fits;
//   - the index becomes complete, and says what is in the directory; after an end in good order it is at once.
//
// The system keeps what a killed process wrote, so this says nothing about power cuts: a missing fsync
// goes unseen.
func TestCrash(t *testing.T) {
	kills := fromEnvironment(t, killsVariable, 10)
	seed := fromEnvironment(t, seedVariable, mathrand.Uint64())
	t.Logf("to run this again: %s=%d %s=%d", killsVariable, kills, seedVariable, seed)
	began := time.Now()
	c := newCrash(t, seed, kills > fewKills)
	for round := 0; c.kills < kills; round++ {
		c.inspect()
		switch round % 6 {
		case 2:
			c.killAtStart()
		case 3:
			c.spoilMemos()
			c.life(syscall.SIGKILL, c.use) // while the index is reconciled
		case 5:
			c.life(syscall.SIGTERM, c.check, c.compare, c.use)
		default:
			c.life(syscall.SIGKILL, c.check, c.compare, c.use)
		}
		c.failIfViolated(t, fmt.Sprintf("round %d", round))
		if round%100 == 99 {
			t.Logf("%d kills so far, and %d acknowledged uploads", c.kills, c.counts["upload: 201"])
		}
	}
	c.sampled = false
	c.inspect()
	c.life(syscall.SIGTERM, c.check, c.compare)
	c.inspect()
	c.life(syscall.SIGTERM, c.compare)
	c.failIfViolated(t, "the end")
	t.Logf("%d kills in %v, no violation:\n%s", c.kills, time.Since(began).Round(time.Second), c.report())
	if n := c.counts["upload: 201"]; n < c.lives {
		t.Errorf("%d uploads were acknowledged by %d servers: this tested little", n, c.lives)
	}
}

func fromEnvironment(t *testing.T, variable string, otherwise uint64) uint64 {
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// crash is a storage directory and the server on it.
type crash struct {
	*ledger
	dir     string
	seed    uint64
	random  *mathrand.Rand
	sampled bool // check only some of what was checked before
	files   []compressed
	made    atomic.Int64 // keys
	checked int          // of the ledger's keys
	lives   int
	kills   uint64
	orderly bool // the last server ended in good order

	server  *process // the last one
	session *session
	left    atomic.Int64   // events to the end of the server
	moment  chan struct{}  // closed when there are none left
	users   sync.WaitGroup // clients that go on until the end
	ending  atomic.Bool    // from here on connections may break
}

func newCrash(t *testing.T, seed uint64, sampled bool) *crash {
	c := &crash{ledger: newLedger(), dir: t.TempDir(), seed: seed, random: randomOf(seed, 0), sampled: sampled}
	for range 16 {
		c.files = append(c.files, newCompressed(c.random, sizes(c.random)))
	}
	t.Cleanup(func() {
		if c.server != nil {
			c.server.Process.Kill()
			<-c.server.ended
		}
	})
	return c
}

func randomOf(seed, stream uint64) *mathrand.Rand { return mathrand.New(mathrand.NewPCG(seed, stream)) }

func (c *crash) failIfViolated(t *testing.T, when string) {
	t.Helper()
	if len(c.violations) == 0 {
		return
	}
	for _, violation := range c.violations {
		t.Errorf("%s: %s", when, violation)
	}
	t.Fatalf("%d violations after %d kills:\n%s\nthe last server's log:\n%s", len(c.violations), c.kills, c.report(), c.server.log)
}

// life is the life of a server: it starts on what the one before it left, clients do what they do, and
// it gets a signal.
func (c *crash) life(signal syscall.Signal, clients ...func()) {
	if !c.start() {
		return
	}
	for _, act := range clients {
		act()
	}
	c.end(signal)
}

func (c *crash) spawn() *process {
	env := append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	p, err := spawn("polykit-cache", env, "--storage-dir", c.dir, "--log-level=debug", "--shutdown-timeout=1h")
	if err != nil {
		panic(err)
	}
	c.lives++
	c.orderly = false
	c.server = p
	return p
}

// start starts a server, and clients of it. It must have swept all that is left of uploads.
func (c *crash) start() bool {
	orderly := c.orderly
	c.server = c.spawn()
	c.server.listen()
	if c.server.address == "" {
		<-c.server.ended
		c.violate("the server does not start: %v: %s", c.server.err, c.server.stderr.String())
		return false
	}
	if stats, err := statistics(c.server.address); err != nil || orderly && !stats.GetIndexComplete() {
		c.violate("after an end in good order (%t) statistics are %v, %v", orderly, stats, err)
	}
	c.tmpIsEmpty("after the start")
	c.ending.Store(false)
	c.session = &session{
		ledger:   c.ledger,
		ways:     newWays(c.server.address),
		cutters:  newWays(c.server.address),
		mayBreak: c.ending.Load,
		event: func() {
			if c.left.Add(-1) == 0 {
				close(c.moment)
			}
		},
	}
	c.moment = make(chan struct{})
	return true
}

// end ends the server with a signal, and looks at how it ended.
func (c *crash) end(signal syscall.Signal) {
	select {
	case <-c.server.ended:
		c.violate("the server ended by itself: %v", c.server.err)
	default:
	}
	c.ending.Store(true)
	c.server.Process.Signal(signal)
	<-c.server.ended
	c.users.Wait()
	c.session.close()
	c.wellBehaved()
	if signal == syscall.SIGKILL {
		c.kills++
		c.counts["temporary files left by killed servers"] += len(c.inTmp())
		return
	}
	if c.server.err != nil || !strings.Contains(c.server.log, "stopped") {
		c.violate("the server did not end in good order: %v", c.server.err)
	}
	c.tmpIsEmpty("after an end in good order")
	c.orderly = true
}

// wellBehaved checks what the server said until its end.
func (c *crash) wellBehaved() {
	if text := c.server.stderr.String(); text != "" {
		c.violate("the server wrote to its standard error: %s", text)
	}
	if strings.Contains(c.server.log, "level=ERROR") {
		c.violate("the server logged an error of its own")
	}
}

func (c *crash) tmpIsEmpty(when string) {
	for _, name := range c.inTmp() {
		c.violate("%s is in tmp/ %s", name, when)
	}
}

func (c *crash) inTmp() []string {
	entries, err := os.ReadDir(filepath.Join(c.dir, "tmp"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		panic(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// killAtStart kills a server that has much to sweep, somewhere between its birth and its first request.
func (c *crash) killAtStart() {
	for range 100 {
		name := c.newKey().String() + "-" + rand.Text() + ".part"
		if err := os.WriteFile(filepath.Join(c.dir, "tmp", name), []byte("part"), 0o644); err != nil {
			panic(err)
		}
	}
	before := len(c.inTmp())
	p := c.spawn()
	if c.random.IntN(4) == 0 {
		time.AfterFunc(time.Duration(c.random.Int64N(int64(50*time.Millisecond))), func() { p.Process.Kill() })
	} else { // it logs each file that it sweeps
		lines := 1 + c.random.IntN(before+1)
		p.stdout = io.TeeReader(p.stdout, writer(func(log []byte) {
			if lines -= bytes.Count(log, []byte("\n")); lines <= 0 {
				p.Process.Kill()
			}
		}))
	}
	p.listen()
	p.Process.Kill() // at the latest
	<-p.ended
	c.kills++
	c.wellBehaved()
	switch after := len(c.inTmp()); {
	case after == 0:
		c.count("starts killed after they swept")
	case after == before:
		c.count("starts killed before they swept")
	default:
		c.count("starts killed while they swept")
	}
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) {
	w(p)
	return len(p), nil
}

// spoilMemos leaves some memos as a power cut may. They must be made anew; until somebody asks for it
// that is not so.
func (c *crash) spoilMemos() {
	for range 10 {
		key := c.anyKey(c.random)
		path := filepath.Join(c.dir, shardOf(key), key.String()+".json")
		if stat, err := os.Stat(path); err == nil {
			if err := os.Truncate(path, c.random.Int64N(stat.Size())); err != nil {
				panic(err)
			}
			c.spoil(key)
		}
	}
}

// use lets clients use the server, and returns at a random moment, while they do.
func (c *crash) use() {
	c.left.Store(10 + c.random.Int64N(500))
	for i := range uploaders + readers {
		random := randomOf(c.seed, c.random.Uint64())
		c.users.Go(func() {
			for !c.ending.Load() {
				if i < uploaders {
					c.upload(random)
				} else {
					c.session.read(c.session.anyWay(random), c.anyKey(random), random.IntN(3) > 0)
				}
			}
		})
	}
	delay := time.Duration(c.random.Int64N(int64(5 * time.Millisecond))) // or all would end right beside an event
	select {
	case <-c.moment:
		<-time.After(delay)
	case <-c.server.ended:
	}
}

// upload is what a client that uploads does next.
func (c *crash) upload(random *mathrand.Rand) {
	way := c.session.anyWay(random)
	declared := random.IntN(2) == 0
	switch random.IntN(10) {
	case 0, 1: // the client gives up
		key := c.newKey()
		data := c.artifact(key, random)
		part := random.IntN(len(data))
		if !declared && random.IntN(4) == 0 {
			part = len(data) // all but that this was all
		}
		cutter := c.session.cutters[random.IntN(len(c.session.cutters))]
		c.session.putPart(cutter, key, data, part, declared, false)
	case 2: // the upload has an end, but too early
		key := c.newKey()
		data := c.artifact(key, random)
		c.session.putPart(way, key, data, 1+random.IntN(len(data)-1), declared, true)
	case 3: // again, what is stored
		key := c.anyKey(random)
		if c.known(key).present {
			c.session.put(way, key, c.artifact(key, random), declared)
		}
	case 4, 5:
		c.race(random)
	default:
		key := c.newKey()
		c.session.put(way, key, c.artifact(key, random), declared)
	}
}

// race lets several clients upload to one key, of which one wins.
func (c *crash) race(random *mathrand.Rand) {
	key := c.newKey()
	same := c.artifact(key, random)
	statuses := make([]int, len(c.session.ways))
	var racers sync.WaitGroup
	for i, way := range c.session.ways {
		data, declared := same, random.IntN(2) == 0
		if random.IntN(2) == 0 {
			data = c.artifact(key, random)
		}
		racers.Go(func() { statuses[i] = c.session.put(way, key, data, declared) })
	}
	racers.Wait()
	answers := map[int]int{}
	for _, status := range statuses {
		answers[status]++
	}
	won, lost := answers[http.StatusCreated], answers[http.StatusConflict]
	if won+lost < len(statuses) { // one was cut, or is to try again
		return
	}
	c.count("races")
	if won != 1 {
		c.violate("%s: %d of %d clients that raced got 201", key, won, len(statuses))
	}
}

// check checks what the server serves, and uploads what it lacks.
func (c *crash) check() {
	keys := c.keysFrom(0)
	known := c.checked
	c.checked = len(keys)
	queue := make(chan artifact.Key)
	var checks sync.WaitGroup
	for range checkers {
		random := randomOf(c.seed, c.random.Uint64())
		checks.Go(func() {
			for key := range queue {
				c.checkKey(key, random)
			}
		})
	}
	for i, key := range keys {
		if i >= known || !c.sampled || c.random.IntN(known) < 20 {
			queue <- key
		}
	}
	close(queue)
	checks.Wait()
}

// checkKey checks that an artifact is there as a whole, or uploads it. An answer that says to try
// again is taken at its word, within reason.
func (c *crash) checkKey(key artifact.Key, random *mathrand.Rand) {
	again := func(request func(way) int) (status int) {
		for range 1000 {
			if status = request(c.session.anyWay(random)); status != http.StatusServiceUnavailable {
				break
			}
		}
		return status
	}
	stat := again(func(way way) int { return c.session.read(way, key, false) })
	get := again(func(way way) int { return c.session.read(way, key, true) })
	if stat != get {
		c.violate("%s: stat was answered with %d, but a download with %d", key, stat, get)
	}
	if get != http.StatusNotFound {
		return
	}
	data := c.artifact(key, random)
	if put := again(func(way way) int { return c.session.put(way, key, data, random.IntN(2) == 0) }); put != http.StatusCreated {
		c.violate("%s: was a miss, but an upload was answered with %d", key, put)
	}
}

// compare compares the index with the directory, when it is complete.
func (c *crash) compare() {
	if err := agrees(c.server.address, c.dir); err != nil {
		c.violate("the index is not as the directory: %v", err)
	}
	c.count("comparisons of the index with the directory")
}

// inspect checks the directory while no server runs: all artifacts are whole, with memos that fit.
func (c *crash) inspect() {
	names, err := fs.Glob(os.DirFS(c.dir), "??/??/*")
	if err != nil {
		panic(err)
	}
	var keys []artifact.Key
	artifacts, memos := map[artifact.Key]bool{}, map[artifact.Key]bool{}
	for _, name := range names {
		digits := strings.TrimSuffix(filepath.Base(name), filepath.Ext(name))
		key, err := artifact.ParseKey(digits)
		switch extension := filepath.Ext(name); {
		case err != nil || name != shardOf(key)+digits+extension:
			c.violate("%s does not belong there", name)
		case extension == ".zst":
			artifacts[key] = true
			keys = append(keys, key)
		case extension == ".json":
			memos[key] = true
		default:
			c.violate("%s does not belong there", name)
		}
	}
	for _, key := range keys {
		if !c.sampled || !c.known(key).inspected || c.random.IntN(len(keys)) < 20 {
			c.inspectArtifact(key, memos[key])
		}
	}
	for key := range memos {
		if !artifacts[key] {
			c.violate("%s has a memo, but no artifact", key)
		}
	}
	for _, key := range c.keysFrom(0) {
		switch e := c.known(key); {
		case e.present && !artifacts[key]:
			c.violate("%s is not there any more (acknowledged: %t)", key, e.acknowledged)
		case e.memo && !memos[key]:
			c.violate("%s has no memo any more (acknowledged: %t)", key, e.acknowledged)
		}
	}
	quarantined, err := os.ReadDir(filepath.Join(c.dir, ".polykit-cache", "quarantine"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		panic(err)
	}
	for _, entry := range quarantined {
		c.violate("%s was set aside", entry.Name())
	}
}

// shardOf is where the files of a key are, relative to the storage directory.
func shardOf(key artifact.Key) string { return key.String()[:2] + "/" + key.String()[2:4] + "/" }

// inspectArtifact checks the file of an artifact and its memo, if it has one.
func (c *crash) inspectArtifact(key artifact.Key, hasMemo bool) {
	path := filepath.Join(c.dir, shardOf(key), key.String())
	data, err := os.ReadFile(path + ".zst")
	stat, statErr := os.Stat(path + ".zst")
	if err := errors.Join(err, statErr); err != nil {
		c.violate("%v", err)
		return
	}
	found := content{sha256.Sum256(data), int64(len(data))}
	c.inspected(key, found)
	if !hasMemo {
		c.count("artifacts without a memo")
		return
	}
	text, err := os.ReadFile(path + ".json")
	var memo struct {
		Hash         string `json:"hash"`
		Size         int64  `json:"size"`
		CreatedAt    int64  `json:"created_at"`
		CacheKeyHash string `json:"cache_key_hash"`
		ModifiedAt   int64  `json:"modified_at"`
	}
	if err == nil {
		err = json.Unmarshal(text, &memo)
	}
	if c.known(key).spoilt {
		return
	}
	if err != nil || memo.Hash != found.hash.String() || memo.Size != found.size || memo.CreatedAt != 1_700_000_000 ||
		memo.CacheKeyHash != key.String() || memo.ModifiedAt != stat.ModTime().UnixNano() {
		c.violate("%s has a memo that does not fit: %s (%v)", key, text, err)
	}
}

// newKey returns a key that was not used yet. Now and then it is in a new shard, but most are not,
// since each costs the server two syncs, and the check a directory.
func (c *crash) newKey() artifact.Key {
	n := c.made.Add(1)
	digits := cachetest.Key(fmt.Sprint(c.seed, n)).String()
	key, err := artifact.ParseKey(fmt.Sprintf("%02x%02x%s", n/512%256, n%8, digits[4:]))
	if err != nil {
		panic(err)
	}
	return key
}

// anyKey returns a key that is in use: one of the last, for which an upload may be on its way, or any.
func (c *crash) anyKey(random *mathrand.Rand) artifact.Key {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.keys)
	if n == 0 {
		return cachetest.Key("nothing")
	}
	if random.IntN(2) == 0 {
		return c.keys[n-1-random.IntN(min(n, 16))]
	}
	return c.keys[random.IntN(n)]
}

// artifact returns a sound artifact, mostly a small one: of bytes that do not compress, or of several
// frames with a file among them that compressed to half its size.
func (c *crash) artifact(key artifact.Key, random *mathrand.Rand) []byte {
	if random.IntN(2) == 0 {
		return cachetest.Random(key, sizes(random))
	}
	f := c.files[random.IntN(len(c.files))]
	documents := slices.Concat(cachetest.Metadata(key), cachetest.Manifest(map[string]string{"output.txt": f.hash}, f.size))
	return slices.Concat(cachetest.Store(documents), f.entry, cachetest.Store(cachetest.Tar()))
}

// sizes returns the size of a file.
func sizes(random *mathrand.Rand) int {
	if random.IntN(16) == 0 {
		return 1<<20 + random.IntN(3<<20)
	}
	return random.IntN(64 << 10)
}

// compressed is a file as it stands in artifacts: made beforehand, since compressing takes long.
type compressed struct {
	entry []byte
	hash  string
	size  int
}

func newCompressed(random *mathrand.Rand, size int) compressed {
	content := make([]byte, size)
	for i := range content {
		content[i] = "0123456789abcdef"[random.IntN(16)]
	}
	return compressed{cachetest.Compress(cachetest.File("outputs/output.txt", string(content))), sha(content), size}
}
