package cachetest

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"sync"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// Memory is a cache.Store in memory that fails as it is told to. The zero Memory is empty and healthy, and of the
// default scope.
type Memory struct {
	scope artifact.Scope
	of    *Memory // the one of the default scope, which has all that follows; nil for that one itself

	mu          sync.Mutex
	faults      Faults
	stored      map[artifact.Name]stored
	quarantined []error
	uploads     int // that still hold something
	files       int // that are open
}

var _ cache.Store = (*Memory)(nil)

// Faults are the errors that the operations of a Memory return; those without one work.
type Faults struct {
	// Create, Open, Stat, Quarantine, Remove, Pin, Promote and Check are what these methods return, in all scopes.
	Create, Open, Stat, Quarantine, Remove, Pin, Promote, Check error

	// Write is what Upload.Write returns once an upload has WriteAfter bytes.
	Write      error
	WriteAfter int64

	// Commit is what Upload.Commit returns. If CommitHappens, the artifact is stored nevertheless, as
	// in a store whose answer gets lost. That breaks the promise of cache.Upload, but happens.
	Commit        error
	CommitHappens bool

	// Read is what reading a file returns from ReadAfter bytes on. With io.EOF the file is shorter
	// than its Info says.
	Read      error
	ReadAfter int64
}

// stored is an artifact in a Memory.
type stored struct {
	content []byte
	info    artifact.Info
}

// Fail makes operations fail from now on, also those on uploads and files that are open. The zero
// Faults heal.
func (m *Memory) Fail(faults Faults) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = faults
}

// lock locks what all scopes share, and returns it.
func (m *Memory) lock() *Memory {
	if m.of != nil {
		m = m.of
	}
	m.mu.Lock()
	return m
}

// In implements cache.Store. The faults are those of all scopes.
func (m *Memory) In(scope artifact.Scope) cache.Store {
	if m.of != nil {
		m = m.of
	}
	if scope == artifact.DefaultScope {
		return m
	}
	return &Memory{scope: scope, of: m}
}

// Damage replaces the bytes of a stored artifact, of which is known what was known before.
func (m *Memory) Damage(key artifact.Key, content []byte) {
	all, name := m.lock(), key.In(m.scope)
	defer all.mu.Unlock()
	all.stored[name] = stored{content, all.stored[name].info}
}

// InUse returns how many uploads still hold something, for they neither committed nor aborted, and
// how many files are open.
func (m *Memory) InUse() (uploads, files int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.uploads, m.files
}

// Quarantined returns the reasons for which artifacts were quarantined.
func (m *Memory) Quarantined() []error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.quarantined
}

// Create implements cache.Store.
func (m *Memory) Create(_ context.Context, key artifact.Key, _ int64) (cache.Upload, error) {
	all := m.lock()
	defer all.mu.Unlock()
	if all.faults.Create != nil {
		return nil, all.faults.Create
	}
	if _, exists := all.stored[key.In(m.scope)]; exists {
		return nil, cache.ErrExists
	}
	all.uploads++
	return &memoryUpload{memory: all, name: key.In(m.scope)}, nil
}

// Open implements cache.Store.
func (m *Memory) Open(_ context.Context, key artifact.Key) (io.ReadSeekCloser, artifact.Info, error) {
	all := m.lock()
	defer all.mu.Unlock()
	if all.faults.Open != nil {
		return nil, artifact.Info{}, all.faults.Open
	}
	found, ok := all.stored[key.In(m.scope)]
	if !ok {
		return nil, artifact.Info{}, cache.ErrNotFound
	}
	all.files++
	return &memoryFile{memory: all, bytes: bytes.NewReader(found.content)}, found.info, nil
}

// Stat implements cache.Store.
func (m *Memory) Stat(_ context.Context, key artifact.Key) (artifact.Info, error) {
	all := m.lock()
	defer all.mu.Unlock()
	if all.faults.Stat != nil {
		return artifact.Info{}, all.faults.Stat
	}
	found, ok := all.stored[key.In(m.scope)]
	if !ok {
		return artifact.Info{}, cache.ErrNotFound
	}
	return found.info, nil
}

// Quarantine implements cache.Store.
func (m *Memory) Quarantine(_ context.Context, info artifact.Info, reason error) error {
	all := m.lock()
	defer all.mu.Unlock()
	if all.faults.Quarantine != nil {
		return all.faults.Quarantine
	}
	if found, ok := all.stored[info.Key.In(m.scope)]; ok && found.info == info {
		delete(all.stored, info.Key.In(m.scope))
		all.quarantined = append(all.quarantined, reason)
	}
	return nil
}

// Remove implements cache.Store. In memory an artifact takes no disk.
func (m *Memory) Remove(_ context.Context, key artifact.Key) (diskSize int64, err error) {
	all := m.lock()
	defer all.mu.Unlock()
	if all.faults.Remove != nil {
		return 0, all.faults.Remove
	}
	if _, ok := all.stored[key.In(m.scope)]; !ok {
		return 0, cache.ErrNotFound
	}
	delete(all.stored, key.In(m.scope))
	return 0, nil
}

// Pin implements cache.Store. Nothing is ever evicted from memory, so there is nothing to note.
func (m *Memory) Pin(ctx context.Context, key artifact.Key, _ bool) error {
	all := m.lock()
	fault := all.faults.Pin
	all.mu.Unlock()
	if fault != nil {
		return fault
	}
	_, err := m.Stat(ctx, key)
	return err
}

// Promote implements cache.Store.
func (m *Memory) Promote(_ context.Context, key artifact.Key, from artifact.Scope) (artifact.Info, error) {
	all := m.lock()
	defer all.mu.Unlock()
	if all.faults.Promote != nil {
		return artifact.Info{}, all.faults.Promote
	}
	if _, exists := all.stored[key.In(m.scope)]; exists {
		return artifact.Info{}, cache.ErrExists
	}
	found, ok := all.stored[key.In(from)]
	if !ok {
		return artifact.Info{}, cache.ErrNotFound
	}
	found.info.Scope = m.scope
	all.stored[key.In(m.scope)] = found
	return found.info, nil
}

// Check implements cache.Store.
func (m *Memory) Check(context.Context) error {
	all := m.lock()
	defer all.mu.Unlock()
	return all.faults.Check
}

type memoryUpload struct {
	memory  *Memory
	name    artifact.Name
	content []byte
	done    bool // committed or aborted
}

func (u *memoryUpload) Write(p []byte) (int, error) {
	u.memory.mu.Lock()
	defer u.memory.mu.Unlock()
	if u.done {
		return 0, fs.ErrClosed
	}
	n := len(p)
	var err error
	if f := u.memory.faults; f.Write != nil && int64(len(u.content)+n) > f.WriteAfter {
		n = int(max(0, f.WriteAfter-int64(len(u.content))))
		err = f.Write
	}
	u.content = append(u.content, p[:n]...)
	return n, err
}

func (u *memoryUpload) Commit(_ context.Context, info artifact.Info) (artifact.Info, error) {
	m := u.memory
	m.mu.Lock()
	defer m.mu.Unlock()
	if u.done {
		return info, fs.ErrClosed
	}
	fault := m.faults.Commit
	if fault != nil && !m.faults.CommitHappens {
		return info, fault
	}
	if _, exists := m.stored[u.name]; exists {
		return info, cache.ErrExists
	}
	info.Scope, info.StoredAt = u.name.Scope, time.Now().UTC().Round(0)
	if m.stored == nil {
		m.stored = map[artifact.Name]stored{}
	}
	m.stored[u.name] = stored{u.content, info}
	if fault != nil {
		return info, fault
	}
	u.release()
	return info, nil
}

func (u *memoryUpload) Abort() {
	u.memory.mu.Lock()
	defer u.memory.mu.Unlock()
	if !u.done {
		u.release()
	}
}

func (u *memoryUpload) release() {
	u.done = true
	u.memory.uploads--
}

type memoryFile struct {
	memory *Memory
	bytes  *bytes.Reader
	closed bool
}

func (f *memoryFile) Read(p []byte) (int, error) {
	f.memory.mu.Lock()
	faults, closed := f.memory.faults, f.closed
	f.memory.mu.Unlock()
	if closed {
		return 0, fs.ErrClosed
	}
	if faults.Read != nil {
		left := faults.ReadAfter - (f.bytes.Size() - int64(f.bytes.Len()))
		if left <= 0 {
			return 0, faults.Read
		}
		p = p[:min(int64(len(p)), left)]
	}
	return f.bytes.Read(p)
}

func (f *memoryFile) Seek(offset int64, whence int) (int64, error) {
	return f.bytes.Seek(offset, whence)
}

func (f *memoryFile) Close() error {
	f.memory.mu.Lock()
	defer f.memory.mu.Unlock()
	if f.closed {
		return fs.ErrClosed
	}
	f.closed = true
	f.memory.files--
	return nil
}
