package disk

import (
	"bytes"
	"io"
	"io/fs"
	"os"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/polykit/polykit-cache/internal/artifact"
)

const (
	// hotContentSize is the most bytes of an artifact that are kept in memory. To send more, the operating
	// system's own cache of files is as good.
	hotContentSize = 64 << 10
	// hotOverhead is about what an artifact takes that is kept, beside its bytes and texts.
	hotOverhead = 1 << 10
)

// hot keeps what was read of artifacts lately: what is known of them, and all bytes of small ones. What
// was not asked for the longest goes first. It is only a memo, too: what is kept of a file is gone by
// when a look at the path finds that file unchanged, by the same signs that bind a memo on disk to it.
type hot struct {
	mu   sync.Mutex
	lru  *simplelru.LRU[artifact.Name, *hotArtifact] // nil if nothing is kept
	most int64                                       // bytes that may be kept
	size int64                                       // bytes that are
}

// hotArtifact is what is kept of an artifact. It never changes.
type hotArtifact struct {
	stat    fs.FileInfo // of the file that was read
	info    artifact.Info
	content []byte // nil if it is not kept
}

func newHot(size int64) *hot {
	h := &hot{most: size}
	if size <= 0 {
		return h
	}
	lru, err := simplelru.NewLRU(int(size/hotOverhead)+1, func(_ artifact.Name, a *hotArtifact) { h.size -= a.cost() })
	if err != nil {
		panic(err) // its only error is of a size that is not positive
	}
	h.lru = lru
	return h
}

// cost is how many bytes it takes to keep a.
func (a *hotArtifact) cost() int64 {
	return hotOverhead + int64(len(a.content)+len(a.info.PackageName)+len(a.info.TaskName)+len(a.info.Command))
}

// get returns what is kept of an artifact whose file stat describes, or nil.
func (h *hot) get(name artifact.Name, stat fs.FileInfo) *hotArtifact {
	if h.lru == nil {
		return nil
	}
	h.mu.Lock()
	a, kept := h.lru.Get(name)
	h.mu.Unlock()
	if !kept || !os.SameFile(a.stat, stat) || a.stat.Size() != stat.Size() || !a.stat.ModTime().Equal(stat.ModTime()) {
		return nil
	}
	return a
}

// holds says whether all bytes of an artifact are kept, of whatever file.
func (h *hot) holds(name artifact.Name) bool {
	if h.lru == nil {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	a, kept := h.lru.Peek(name)
	return kept && a.content != nil
}

// put keeps an artifact, if it is not too much by itself.
func (h *hot) put(a *hotArtifact) {
	cost := a.cost()
	if h.lru == nil || cost > h.most/16 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	name := a.info.Name()
	h.lru.Remove(name) // or its cost would stay
	h.lru.Add(name, a)
	for h.size += cost; h.size > h.most; {
		h.lru.RemoveOldest()
	}
}

// keep keeps what is known of an artifact and, if it is small, its bytes; then it returns those instead
// of the file.
func (h *hot) keep(file *os.File, stat fs.FileInfo, info artifact.Info) io.ReadSeekCloser {
	if h.lru == nil {
		return file
	}
	if info.Size > hotContentSize || hotOverhead+info.Size > h.most/16 {
		if h.get(info.Name(), stat) == nil {
			h.put(&hotArtifact{stat: stat, info: info})
		}
		return file
	}
	content := make([]byte, info.Size)
	if _, err := file.ReadAt(content, 0); err != nil {
		return file // which will say so itself
	}
	file.Close()
	a := &hotArtifact{stat: stat, info: info, content: content}
	h.put(a)
	return a.open()
}

// open returns the bytes, which must be kept.
func (a *hotArtifact) open() io.ReadSeekCloser { return memoryFile{bytes.NewReader(a.content)} }

// memoryFile is the bytes of an artifact in memory.
type memoryFile struct{ *bytes.Reader }

// Close does nothing.
func (memoryFile) Close() error { return nil }
