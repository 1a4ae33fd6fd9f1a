// Package index remembers what is stored: what it is, how big, and when it was used last. It answers what
// the directory itself can answer only by reading all of it: what was used least lately, what there is of a
// package, how much everything takes.
//
//	upload, download, miss, removal ── told ──→ pending ── a batch a second ──→ SQLite ──→ lists, sums, candidates
//	files in the directory ── Reconcile, in the background ──↗
//
// It is a memo. Nobody who stores or serves an artifact waits for it, and nobody believes it: who acts on
// what it says looks at the store first. It may be deleted at any time. What was told but not written when
// the process was killed is found by Reconcile at the next start, which goes through the directory beside
// everything else; after a stop in good order there is nothing to find, and nothing is read.
package index

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// FileName is the name of the database in the directory of an index. SQLite puts two files beside it.
const FileName = "index.db"

const (
	// flushInterval is how long what was told is gathered, and so what a crash takes of last uses.
	flushInterval = time.Second
	// flushSize is how many changes are written before that, and in one transaction.
	flushSize = 1000
	// maxPending is the most changes, and the most last uses, that are kept until they can be written.
	// What comes on top is forgotten; changes are found by a reconciliation then.
	maxPending = 50_000
	// maxUses is how many last uses are written at a time; the others wait. So they never cost more than a small
	// part of a processor, however many different artifacts are downloaded.
	maxUses = 2000
	// maxDoubts is how many artifacts are looked up at a time since what was said of them does not fit the index.
	maxDoubts = 1000
	// maxIdleTasks is how many tasks without artifacts are remembered, for what was counted of them.
	maxIdleTasks = 10_000
	// maxMisses is how many misses are remembered to be counted for the task whose artifact is uploaded
	// then.
	maxMisses = 16_384
	// logSize is about how many bytes SQLite's log grows to before they are moved into the database.
	logSize = 1 << 20
	// openTimeout bounds the wait for a database that somebody else has open, as with the sqlite3 tool.
	openTimeout = 5 * time.Second
)

var (
	// ErrNewer says that a database is of a newer version of this program.
	ErrNewer = errors.New("the index was written by a newer polykit-cache")
	// ErrUnavailable says that an index can't answer now. It wraps the reason.
	ErrUnavailable = errors.New("the index is not available")

	errDamaged = errors.New("it is damaged")
	errClosed  = fmt.Errorf("%w: it is closed", ErrUnavailable)
)

// Config configures an Index.
type Config struct {
	// Dir is where the index is. It is created if it does not exist.
	Dir string
	// Log is told about trouble.
	Log *slog.Logger
}

// Index is an index of what is stored. It is safe for concurrent use.
type Index struct {
	config    Config
	startedAt time.Time

	db       sync.RWMutex // held for writing while the databases are opened, replaced or closed
	closed   bool
	writer   *sql.DB // of one connection
	reader   *sql.DB
	file     fs.FileInfo   // of the database when it was opened
	complete atomic.Bool   // every stored artifact has a row, and nothing else
	losses   atomic.Int64  // how many times that became untrue
	lost     chan struct{} // told when it did

	// The constants of these names; tests need less.
	maxPending, maxUses, maxIdleTasks int

	mu         sync.Mutex
	pending    []change
	changes    uint64 // that were told so far
	uses       map[artifact.Name]*use
	doubts     map[artifact.Name]bool // missed, or used without a row: to be looked up
	misses     *simplelru.LRU[artifact.Name, int64]
	counted    Usage // that is not written yet
	sinceStart Usage
	forgot     bool          // something did not fit into pending
	damage     error         // that a query found
	diskSize   int64         // of all rows, in bytes
	more       int64         // that pending adds to it
	ownSize    int64         // of the database and what SQLite puts beside it
	full       chan struct{} // told when there is a batch

	flushing sync.Mutex // held while a batch is written
}

// change is something that happened to an artifact.
type change struct {
	kind   changeKind
	stored cache.Stored // for all but the name it says how it is now
	misses int64        // before it was stored
}

type changeKind int

const (
	changeStored  changeKind = iota // by an upload
	changeFound                     // in the directory, or verified anew
	changeRemoved                   // deleted, vanished or quarantined
	changeEvicted                   // to be counted only
	changePinned                    // or unpinned
)

// use is how an artifact was used since the last batch.
type use struct {
	at   int64 // Unix nanoseconds, of the last one
	hits int64
}

// Usage counts what happened.
type Usage struct {
	// Hits are downloads that found an artifact, and Misses those that did not.
	Hits, Misses int64
	// Stored are uploads that were stored.
	Stored int64
	// Evicted are artifacts that the retention policy removed.
	Evicted int64
	// EvictedDiskSize is what these took on the disk, in bytes.
	EvictedDiskSize int64
	// Agreed and Differed are pairs of artifacts of one key in two scopes that were compared: with the same files, and
	// with others. They are of no one task.
	Agreed, Differed int64
}

func (u *Usage) add(other Usage) {
	u.Hits += other.Hits
	u.Misses += other.Misses
	u.Stored += other.Stored
	u.Evicted += other.Evicted
	u.EvictedDiskSize += other.EvictedDiskSize
	u.Agreed += other.Agreed
	u.Differed += other.Differed
}

// Open opens the index in a directory, which nobody else may have open. A database that is damaged is
// begun anew; one that is newer than this program is ErrNewer. One that can't be opened now, as on a full
// disk, is opened later: nobody needs it to store or serve. It takes the same time however much is stored.
func Open(config Config) (*Index, error) {
	misses, err := simplelru.NewLRU[artifact.Name, int64](maxMisses, nil)
	if err != nil {
		panic(err) // its only error is of a size that is not positive
	}
	x := &Index{
		config:    config,
		startedAt: time.Now(),
		lost:      make(chan struct{}, 1),
		uses:      map[artifact.Name]*use{},
		doubts:    map[artifact.Name]bool{},
		misses:    misses,
		full:      make(chan struct{}, 1),

		maxPending: maxPending, maxUses: maxUses, maxIdleTasks: maxIdleTasks,
	}
	err = x.open()
	if damaged(err) {
		err = x.beginAnew(err)
	}
	if errors.Is(err, ErrNewer) {
		return nil, fmt.Errorf("%w; start that one, or delete %s, which costs statistics and is rebuilt", err, x.path())
	}
	if err != nil {
		config.Log.Error("could not open the index; it is tried again", "path", x.path(), "error", err)
	}
	return x, nil
}

func (x *Index) path() string { return filepath.Join(x.config.Dir, FileName) }

// open opens the databases, and notes that the index is in use: without a Close, it counts as incomplete.
func (x *Index) open() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*openTimeout)
	defer cancel()
	defer func() {
		if err != nil {
			x.closeDatabases()
		}
	}()
	if err := os.MkdirAll(x.config.Dir, 0o755); err != nil {
		return err
	}
	if stat, err := os.Lstat(x.path()); err == nil && !stat.Mode().IsRegular() {
		return fmt.Errorf("%w: it is no file", errDamaged)
	}
	if x.writer, err = x.connect("_txlock=immediate&_pragma=synchronous(NORMAL)&_pragma=cache_size(-4096)"); err != nil {
		return err
	}
	x.writer.SetMaxOpenConns(1)
	if err := migrate(ctx, x.writer); err != nil {
		return err
	}
	var complete, clean bool
	switch err := x.writer.QueryRowContext(ctx, "SELECT complete, clean FROM state").Scan(&complete, &clean); {
	case errors.Is(err, sql.ErrNoRows):
		return fmt.Errorf("%w: it has no state", errDamaged)
	case err != nil:
		return err
	}
	if err := x.note(ctx, "UPDATE state SET complete = complete AND clean, clean = 0"); err != nil {
		return err
	}
	if !complete || !clean {
		x.lose()
	} else {
		x.complete.Store(true)
	}
	size, err := x.sum(ctx)
	if err != nil {
		return err
	}
	x.mu.Lock()
	x.diskSize, x.ownSize = max(x.diskSize, size), x.measure()
	x.mu.Unlock()
	if x.reader, err = x.connect("_pragma=query_only(1)&_pragma=cache_size(-2048)"); err != nil {
		return err
	}
	x.reader.SetMaxOpenConns(2) // each has a cache of its own
	x.file, err = os.Stat(x.path())
	return err
}

// gone says whether the database is not in its place any more, since somebody removed it, and a new one can
// be there. A connection that is made now would make an empty one.
func (x *Index) gone() error {
	x.db.RLock()
	defer x.db.RUnlock()
	if x.writer == nil {
		return nil
	}
	stat, err := os.Stat(x.path())
	if err == nil && os.SameFile(stat, x.file) || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.Mkdir(x.config.Dir, 0o755); err != nil { // not with all above it: that would be where the whole storage was
		if dir, err := os.Stat(x.config.Dir); err != nil || !dir.IsDir() {
			return nil
		}
	}
	return fmt.Errorf("%w: it was removed", errDamaged)
}

// connect returns a pool of connections.
func (x *Index) connect(options string) (*sql.DB, error) {
	path, err := filepath.Abs(x.path())
	if err != nil {
		return nil, err
	}
	dsn := url.URL{Scheme: "file", OmitHost: true, Path: filepath.ToSlash(path), RawQuery: options +
		fmt.Sprintf("&_pragma=busy_timeout(%d)&_pragma=journal_mode(WAL)&_pragma=foreign_keys(1)&_pragma=temp_store(MEMORY)"+
			"&_pragma=wal_autocheckpoint(%d)&_pragma=journal_size_limit(%d)", openTimeout.Milliseconds(), logSize/4096, logSize)}
	return sql.Open("sqlite", dsn.String())
}

// note writes something that a power cut must not take.
func (x *Index) note(ctx context.Context, statement string) error {
	if _, err := x.writer.ExecContext(ctx, statement); err != nil {
		return err
	}
	_, err := x.writer.ExecContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)")
	return err
}

// beginAnew replaces a database that is of no use. What it knew is found in the directory; what was counted
// is lost.
func (x *Index) beginAnew(reason error) error {
	x.config.Log.Warn("the index is damaged and is rebuilt from what is stored; statistics begin anew", "path", x.path(), "error", reason)
	x.closeDatabases()
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.RemoveAll(x.path() + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return x.open()
}

func (x *Index) closeDatabases() error {
	var err error
	if x.reader != nil {
		err = x.reader.Close()
	}
	if x.writer != nil {
		err = errors.Join(err, x.writer.Close())
	}
	x.reader, x.writer = nil, nil
	return err
}

// damaged says whether an error means that a database is of no use.
func damaged(err error) bool {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		code := e.Code() & 0xff // the rest says more exactly where
		return code == sqlite3.SQLITE_CORRUPT || code == sqlite3.SQLITE_NOTADB
	}
	return errors.Is(err, errDamaged)
}

// Close writes what is pending. Nobody may tell the index anything any more.
func (x *Index) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := x.Flush(ctx)
	for left := true; left && err == nil; err = x.Flush(ctx) {
		x.mu.Lock()
		left = len(x.uses) > 0
		x.mu.Unlock()
	}
	x.db.Lock()
	defer x.db.Unlock()
	x.closed = true
	if err == nil && x.writer != nil {
		err = x.note(ctx, "UPDATE state SET clean = 1")
	}
	return errors.Join(err, x.closeDatabases())
}

// DiskSize returns how many bytes all artifacts take on the disk, as far as they are known, and the index
// itself. While an index that was damaged is rebuilt, it does not return less than before.
func (x *Index) DiskSize() int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.diskSize + x.more + x.ownSize
}

// ArtifactsDiskSize is DiskSize without the index itself.
func (x *Index) ArtifactsDiskSize() int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.diskSize + x.more
}

// measure returns how many bytes the index takes on the disk, or will soon.
func (x *Index) measure() int64 {
	size := int64(2 * logSize) // of which a log that is small has not taken all yet
	if stat, err := os.Stat(x.path()); err == nil {
		size += stat.Size()
	}
	if stat, err := os.Stat(x.path() + "-wal"); err == nil {
		size += max(0, stat.Size()-logSize)
	}
	return size
}

// sum sums up what all artifacts take on the disk.
func (x *Index) sum(ctx context.Context) (size int64, err error) {
	err = x.writer.QueryRowContext(ctx, "SELECT disk_size FROM state").Scan(&size)
	return size, err
}

// Complete says whether every stored artifact is known, as far as anybody can say.
func (x *Index) Complete() bool { return x.complete.Load() }

// lose says that something may be stored that has no row, or the other way round. Run begins a
// reconciliation then.
func (x *Index) lose() {
	x.losses.Add(1)
	x.complete.Store(false)
	tell(x.lost)
}

// tell tells a channel with room for one that there is something to do.
func tell(channel chan struct{}) {
	select {
	case channel <- struct{}{}:
	default: // told already
	}
}
