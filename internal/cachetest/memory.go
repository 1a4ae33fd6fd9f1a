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

// Memory is a cache.Store in memory that fails as it is told to. The zero Memory is empty and healthy.
type Memory struct {
	mu          sync.Mutex
	faults      Faults
	stored      map[artifact.Key]stored
	quarantined []error
	uploads     int // that still hold something
	files       int // that are open
}

var _ cache.Store = (*Memory)(nil)

// Faults are the errors that the operations of a Memory return; those without one work.
type Faults struct {
	// Create, Open, Stat, Quarantine, Remove, Pin and Check are what these methods return.
	Create, Open, Stat, Quarantine, Remove, Pin, Check error

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

// Damage replaces the bytes of a stored artifact, of which is known what was known before.
func (m *Memory) Damage(key artifact.Key, content []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stored[key] = stored{content, m.stored[key].info}
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
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.faults.Create != nil {
		return nil, m.faults.Create
	}
	if _, exists := m.stored[key]; exists {
		return nil, cache.ErrExists
	}
	m.uploads++
	return &memoryUpload{memory: m, key: key}, nil
}

// Open implements cache.Store.
func (m *Memory) Open(_ context.Context, key artifact.Key) (io.ReadSeekCloser, artifact.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.faults.Open != nil {
		return nil, artifact.Info{}, m.faults.Open
	}
	found, ok := m.stored[key]
	if !ok {
		return nil, artifact.Info{}, cache.ErrNotFound
	}
	m.files++
	return &memoryFile{memory: m, bytes: bytes.NewReader(found.content)}, found.info, nil
}

// Stat implements cache.Store.
func (m *Memory) Stat(_ context.Context, key artifact.Key) (artifact.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.faults.Stat != nil {
		return artifact.Info{}, m.faults.Stat
	}
	found, ok := m.stored[key]
	if !ok {
		return artifact.Info{}, cache.ErrNotFound
	}
	return found.info, nil
}

// Quarantine implements cache.Store.
func (m *Memory) Quarantine(_ context.Context, info artifact.Info, reason error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.faults.Quarantine != nil {
		return m.faults.Quarantine
	}
	if found, ok := m.stored[info.Key]; ok && found.info == info {
		delete(m.stored, info.Key)
		m.quarantined = append(m.quarantined, reason)
	}
	return nil
}

// Remove implements cache.Store. In memory an artifact takes no disk.
func (m *Memory) Remove(_ context.Context, key artifact.Key) (diskSize int64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.faults.Remove != nil {
		return 0, m.faults.Remove
	}
	if _, ok := m.stored[key]; !ok {
		return 0, cache.ErrNotFound
	}
	delete(m.stored, key)
	return 0, nil
}

// Pin implements cache.Store. Nothing is ever evicted from memory, so there is nothing to note.
func (m *Memory) Pin(ctx context.Context, key artifact.Key, _ bool) error {
	m.mu.Lock()
	fault := m.faults.Pin
	m.mu.Unlock()
	if fault != nil {
		return fault
	}
	_, err := m.Stat(ctx, key)
	return err
}

// Check implements cache.Store.
func (m *Memory) Check(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.faults.Check
}

type memoryUpload struct {
	memory  *Memory
	key     artifact.Key
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
	if _, exists := m.stored[u.key]; exists {
		return info, cache.ErrExists
	}
	info.StoredAt = time.Now().UTC().Round(0)
	if m.stored == nil {
		m.stored = map[artifact.Key]stored{}
	}
	m.stored[u.key] = stored{u.content, info}
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
