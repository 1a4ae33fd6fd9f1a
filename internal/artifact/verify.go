package artifact

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/dustin/go-humanize"
	"github.com/klauspost/compress/zstd"
)

const (
	// readSize is how much is asked of the reader at a time, so that the few bytes of a frame's or
	// block's header do not cost a read each.
	readSize = 256 << 10
	// copySize is how much of a file is hashed at a time.
	copySize = 64 << 10
)

// Verifier checks artifacts. It is safe for concurrent use.
type Verifier struct {
	limits  Limits
	scratch sync.Pool // of *scratch

	capacity *capacity
}

// scratch is what one verification needs and the next one can use again.
type scratch struct {
	source  *bufio.Reader
	decoder *zstd.Decoder
	hash    hash.Hash
	copy    []byte
}

// NewVerifier returns a Verifier that holds artifacts to the limits.
func NewVerifier(limits Limits) *Verifier {
	v := &Verifier{limits: limits, capacity: newCapacity(limits)}
	v.scratch.New = func() any {
		decoder, err := zstd.NewReader(nil,
			zstd.WithDecoderConcurrency(1), // in the caller's goroutine: nothing is left behind by a fault
			zstd.WithDecoderMaxWindow(uint64(limits.Window)),
			zstd.WithDecoderLowmem(true))
		if err != nil {
			panic(err) // the options are out of the library's range: a programming error
		}
		return &scratch{
			source:  bufio.NewReaderSize(nil, readSize),
			decoder: decoder,
			hash:    sha256.New(),
			copy:    make([]byte, copySize),
		}
	}
	return v
}

// Slots is how many verifications may run at once.
func (v *Verifier) Slots() int { return cap(v.capacity.slots) }

// InFlight returns how many verifications run now.
func (v *Verifier) InFlight() int { return len(v.capacity.slots) }

// Queued returns how many verifications wait for others to end.
func (v *Verifier) Queued() int { return int(v.capacity.waiting.Load()) }

// Verify reads an artifact to its end and returns what it holds if it is sound and made for key.
// Else the error is an *UnsoundError that says the first thing found wrong, the error of r if that
// came before, or ErrBusy. The caller must have been admitted if others verify too.
func (v *Verifier) Verify(r io.Reader, key Key) (*Contents, error) {
	return v.verify(r, key, nil)
}

// Inspect is Verify for an artifact of which nothing is known: it also tells its hash and size. It
// waits to be admitted, since a small request can ask for the inspection of a large artifact, and ends
// when ctx does.
func (v *Verifier) Inspect(ctx context.Context, r io.Reader, key Key) (*Contents, Info, error) {
	release, err := v.admit(ctx)
	if err != nil {
		return nil, Info{}, err
	}
	defer release()
	return v.InspectNow(ctx, r, key)
}

// InspectNow is Inspect that does not wait, for a caller that inspects one artifact at a time and may
// take long for it.
func (v *Verifier) InspectNow(ctx context.Context, r io.Reader, key Key) (*Contents, Info, error) {
	sum := sha256.New()
	count := &counter{}
	contents, err := v.Verify(io.TeeReader(&cancelReader{ctx, r}, io.MultiWriter(sum, count)), key)
	if err != nil {
		return nil, Info{}, err
	}
	return contents, contents.Info(key, Digest(sum.Sum(nil)), count.n), nil
}

// cancelReader reads until ctx is done.
type cancelReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *cancelReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

// A sink is given each file of an artifact while it is verified. The file is known to be as the
// manifest lists it only after the verification.
type sink func(path string, executable bool, content io.Reader) error

// verify is Verify that also passes every file to to, if to is not nil.
func (v *Verifier) verify(r io.Reader, key Key, to sink) (*Contents, error) {
	s := v.scratch.Get().(*scratch)
	defer v.scratch.Put(s)
	v.capacity.processors <- struct{}{}
	defer func() { <-v.capacity.processors }()
	src := &source{r: yielding{r, v.capacity.processors}}
	frames := newFrames(src, v.limits.Window)
	s.source.Reset(frames)
	defer s.source.Reset(nil)
	decoded := &decoded{r: s.decoder, src: src, frames: frames, limits: v.limits}
	if err := s.decoder.Reset(s.source); err != nil {
		return nil, decoded.fault(err)
	}
	defer s.decoder.Reset(nil)

	headers := newHeaders(decoded)
	a := archive{verifier: v, scratch: s, key: key, to: to, decoded: decoded, headers: headers, tar: tar.NewReader(headers)}
	a.found = map[string]int{}
	defer a.settle()
	return a.read()
}

// archive is one verification.
type archive struct {
	verifier *Verifier
	scratch  *scratch
	key      Key
	to       sink
	decoded  *decoded
	headers  *headers
	tar      *tar.Reader

	metadata *Metadata
	manifest *manifest
	files    []File         // below outputs/, as they stand in the archive
	found    map[string]int // their places in files, by path
	dirs     []string       // directories below outputs/
	size     int64          // bytes of the files
	entries  int            // of all kinds
	nameSize int64          // bytes of their names and pax headers
	charged  int64          // bytes of memory
	owed     int64          // bytes of memory, too few to be charged
}

func (a *archive) read() (*Contents, error) {
	for {
		header, err := a.tar.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, a.decoded.fault(err)
		}
		if err := a.entry(header); err != nil {
			return nil, err
		}
	}
	if err := a.decoded.end(a.scratch.copy); err != nil {
		return nil, err
	}
	return a.contents()
}

// entry reads one entry of the archive.
func (a *archive) entry(h *tar.Header) error {
	a.entries++
	a.nameSize += int64(len(h.Name)) + max(a.headers.pax, 0)
	if n := a.verifier.limits.Files; a.entries-2 > n { // without the two documents
		return unsound(RuleLimit, "the archive", "holds more than the limit of %d files", n)
	}
	if n := a.verifier.limits.ManifestSize; a.nameSize > n {
		return unsound(RuleLimit, "the archive", "holds names and pax headers of more than the limit of %s together", formatSize(n))
	}
	if err := a.charge(int64(len(h.Name)) + entryOverhead); err != nil {
		return err
	}
	if err := a.plain(h); err != nil {
		return err
	}
	name := strings.ReplaceAll(h.Name, `\`, "/")
	switch name {
	case metadataName:
		return a.readMetadata(h)
	case manifestName:
		return a.readManifest(h)
	case outputsName, outputsName + "/":
		if h.Typeflag == tar.TypeDir {
			return nil
		}
	}
	path, below := strings.CutPrefix(name, outputsName+"/")
	if !below {
		return unsound(RuleEntry, quote(h.Name), "stands outside outputs/")
	}
	if h.Typeflag == tar.TypeDir {
		path = strings.TrimSuffix(path, "/")
	}
	if n := a.verifier.limits.PathLength; len(path) > n {
		return unsound(RuleLimit, quote(h.Name), "has a path that is longer than the limit of %d bytes", n)
	}
	path, err := cleanPath(path)
	if err != nil {
		return unsound(RulePath, quote(h.Name), "is not safe to extract: its path %w", err)
	}
	if h.Typeflag == tar.TypeDir {
		a.dirs = append(a.dirs, path)
		return nil
	}
	return a.readFile(path, h)
}

// plain refuses the kinds of entries that an artifact does not hold, and those that different
// readers of tar understand differently.
func (a *archive) plain(h *tar.Header) error {
	switch h.Typeflag {
	case tar.TypeReg:
	case tar.TypeDir:
		if h.Size != 0 {
			return unsound(RuleEntry, quote(h.Name), "is a directory with content")
		}
	default:
		return unsound(RuleEntry, quote(h.Name), "is %s; an artifact holds regular files and their directories only", kind(h.Typeflag))
	}
	if left := a.verifier.limits.UnpackedSize - a.decoded.n; h.Size > left {
		return a.decoded.tooLarge()
	}
	return a.headers.check(h)
}

func kind(typeflag byte) string {
	switch typeflag {
	case tar.TypeLink:
		return "a hard link"
	case tar.TypeSymlink:
		return "a symbolic link"
	case tar.TypeChar, tar.TypeBlock:
		return "a device"
	case tar.TypeFifo:
		return "a named pipe"
	case tar.TypeGNUSparse:
		return "a sparse file"
	case tar.TypeXGlobalHeader:
		return "a global pax header"
	}
	return fmt.Sprintf("an entry of type %q", typeflag)
}

func (a *archive) readMetadata(h *tar.Header) error {
	if a.metadata != nil {
		return unsound(RuleDocument, metadataName, "is there twice")
	}
	text, err := a.readDocument(h, a.verifier.limits.MetadataSize)
	if err != nil {
		return err
	}
	metadata, hash, err := parseMetadata(text)
	if err != nil {
		return err
	}
	if named, err := ParseKey(hash); err != nil || named != a.key {
		return unsound(RuleKey, metadataName, "names the cache key %s, not the key %s that the artifact is for", quote(hash), a.key)
	}
	a.metadata = &metadata
	return nil
}

func (a *archive) readManifest(h *tar.Header) error {
	if a.manifest != nil {
		return unsound(RuleDocument, manifestName, "is there twice")
	}
	text, err := a.readDocument(h, a.verifier.limits.ManifestSize)
	if err != nil {
		return err
	}
	m, err := parseManifest(text, a.verifier.limits)
	if err != nil {
		return err
	}
	a.manifest = &m
	for _, f := range a.files {
		if err := a.checkListed(f); err != nil {
			return err
		}
	}
	return nil
}

// readDocument reads one of the two JSON files.
func (a *archive) readDocument(h *tar.Header, limit int64) ([]byte, error) {
	if h.Typeflag != tar.TypeReg {
		return nil, unsound(RuleDocument, h.Name, "is not a regular file")
	}
	if h.Size > limit {
		return nil, unsound(RuleLimit, h.Name, "is larger than the limit of %s", formatSize(limit))
	}
	if err := a.charge(documentFactor * h.Size); err != nil {
		return nil, err
	}
	var text bytes.Buffer // grows with what is there, not with what the header claims
	if _, err := text.ReadFrom(a.tar); err != nil {
		return nil, a.decoded.fault(err)
	}
	return text.Bytes(), nil
}

func (a *archive) readFile(path string, h *tar.Header) error {
	if _, twice := a.found[path]; twice {
		return unsound(RuleEntry, quote(h.Name), "is there twice")
	}
	if a.manifest != nil {
		if _, listed := a.manifest.files[path]; !listed {
			return unsound(RuleEntry, quote(h.Name), "is not listed in manifest.json")
		}
	}
	a.scratch.hash.Reset()
	content := io.Reader(a.tar)
	if a.to != nil {
		content = io.TeeReader(a.tar, a.scratch.hash)
		if err := a.to(path, h.Mode&0o111 != 0, content); err != nil {
			if a.decoded.err != nil { // what was written to is not at fault
				return a.decoded.fault(err)
			}
			return err
		}
	} else if _, err := io.CopyBuffer(a.scratch.hash, content, a.scratch.copy); err != nil {
		return a.decoded.fault(err)
	}
	f := File{Path: path, Size: h.Size}
	a.scratch.hash.Sum(f.Hash[:0])
	a.found[path] = len(a.files)
	a.files = append(a.files, f)
	a.size += f.Size
	if a.manifest != nil {
		return a.checkListed(f)
	}
	return nil
}

// checkListed compares a file with the manifest.
func (a *archive) checkListed(f File) error {
	want, listed := a.manifest.files[f.Path]
	if !listed {
		return unsound(RuleEntry, quote(outputsName+"/"+f.Path), "is not listed in manifest.json")
	}
	if f.Hash != want {
		return unsound(RuleEntry, quote(outputsName+"/"+f.Path), "has SHA-256 %s, but manifest.json lists %s", f.Hash, want)
	}
	return nil
}

// contents checks what can be known only at the end of the archive.
func (a *archive) contents() (*Contents, error) {
	if a.metadata == nil {
		return nil, unsound(RuleDocument, metadataName, "is missing")
	}
	if a.manifest == nil {
		return nil, unsound(RuleDocument, manifestName, "is missing")
	}
	if len(a.files) < len(a.manifest.files) {
		var missing []string
		for path := range a.manifest.files {
			if _, found := a.found[path]; !found {
				missing = append(missing, path)
			}
		}
		return nil, unsound(RuleEntry, manifestName, "lists %s, which the archive lacks", quote(slices.Min(missing)))
	}
	if a.size != a.manifest.totalSize {
		return nil, unsound(RuleEntry, manifestName, "says a total_size of %d bytes, but the files have %d", a.manifest.totalSize, a.size)
	}
	sortFiles(a.files)
	if err := a.checkDirs(); err != nil {
		return nil, err
	}
	return &Contents{Metadata: *a.metadata, Files: a.files, UncompressedSize: a.size}, nil
}

func sortFiles(files []File) {
	slices.SortFunc(files, func(f, g File) int { return strings.Compare(f.Path, g.Path) })
}

// checkDirs checks that no file stands where another path needs a directory, and that every
// directory contains a file. The files are sorted.
func (a *archive) checkDirs() error {
	for _, f := range a.files {
		if below, ok := a.fileBelow(f.Path); ok {
			return unsound(RulePath, quote(outputsName+"/"+f.Path), "is a file, but %s needs it to be a directory", quote(outputsName+"/"+below))
		}
	}
	for _, dir := range a.dirs {
		if _, ok := a.fileBelow(dir); !ok {
			return unsound(RuleEntry, quote(outputsName+"/"+dir), "is a directory that contains no file")
		}
	}
	return nil
}

// fileBelow returns the first file in a directory, at any depth. The files are sorted.
func (a *archive) fileBelow(dir string) (string, bool) {
	dir += "/"
	i := sort.Search(len(a.files), func(i int) bool { return a.files[i].Path >= dir })
	if i == len(a.files) || !strings.HasPrefix(a.files[i].Path, dir) {
		return "", false
	}
	return a.files[i].Path, true
}

func formatSize(n int64) string { return humanize.IBytes(uint64(n)) }
