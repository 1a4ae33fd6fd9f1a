package disk

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// verifiedBy is the version of the rules by which artifacts are verified. A memo of other rules is
// made anew.
const verifiedBy = 1

// MaxMetadataSize is the largest limit for a metadata.json whose artifact can be stored: what the
// document says must fit into a memo.
const MaxMetadataSize = 1 << 20

// maxMemoSize is more bytes than any memo has: JSON may take six for one.
const maxMemoSize = 6*MaxMetadataSize + 4096

// errForeignMemo is what is wrong with a memo of a server that verifies by other rules.
var errForeignMemo = errors.New("written by another server")

// memo is the .json beside an artifact. The first four members are all that the Rust server writes
// and reads.
type memo struct {
	Hash         string `json:"hash"`
	Size         int64  `json:"size"`       // bytes of the .zst
	CreatedAt    int64  `json:"created_at"` // Unix seconds, the client's clock
	CacheKeyHash string `json:"cache_key_hash"`

	VerifiedBy       int    `json:"verified_by,omitempty"`
	ModifiedAt       int64  `json:"modified_at,omitempty"` // of the .zst, Unix nanoseconds: binds the memo to the file
	Boot             string `json:"boot,omitempty"`        // if the .zst was not synced: see boot
	UncompressedSize int64  `json:"uncompressed_size"`
	FileCount        int    `json:"file_count"`
	PackageName      string `json:"package_name"`
	TaskName         string `json:"task_name"`
	Command          string `json:"command"`
	Pinned           bool   `json:"pinned,omitempty"`   // retention must keep it
	Manifest         string `json:"manifest,omitempty"` // artifact.Info.Manifest; older memos lack it

	Checksum string `json:"checksum,omitempty"` // of all other members: see sum
}

// sum returns the checksum of all members but the checksum. A bit that the disk flips in a hash or a name
// leaves a memo that reads well, and says what is not so.
func (m memo) sum() string {
	m.Checksum = ""
	text, err := json.Marshal(m)
	if err != nil {
		panic(err) // it has only strings and numbers
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8])
}

// readMemo returns what the memo of the artifact whose file stat describes says, or why it can't be
// gone by.
func (s *Store) readMemo(key artifact.Key, stat fs.FileInfo) (artifact.Info, error) {
	m, err := s.loadMemo(key)
	if err != nil {
		return artifact.Info{}, err
	}
	return m.info(key.In(s.scope), stat)
}

// pins says whether a memo says that its artifact is pinned. That outlives whatever else makes the memo one
// that can't be gone by, if it is whole.
func (m memo) pins() bool { return m.Pinned && m.Checksum == m.sum() }

// loadMemo reads the memo of an artifact.
func (s *Store) loadMemo(key artifact.Key) (m memo, err error) {
	file, err := os.OpenFile(s.memoPath(key), os.O_RDONLY|openFlags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return m, errors.New("missing")
	}
	if err != nil {
		return m, err
	}
	text, err := io.ReadAll(io.LimitReader(file, maxMemoSize))
	file.Close()
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("torn: %w", err)
	}
	return m, nil
}

// info returns what the memo says of the artifact whose file stat describes, or why it can't be gone by.
func (m memo) info(name artifact.Name, stat fs.FileInfo) (artifact.Info, error) {
	var none artifact.Info
	var manifest artifact.Digest
	hash, err := artifact.ParseDigest(m.Hash)
	if err == nil && m.Manifest != "" {
		manifest, err = artifact.ParseDigest(m.Manifest)
	}
	switch {
	case err != nil:
		return none, fmt.Errorf("torn: a digest is %w", err)
	case m.VerifiedBy != verifiedBy:
		return none, errForeignMemo
	case m.Checksum != m.sum():
		return none, errors.New("damaged: its checksum is another")
	case m.CacheKeyHash != name.Key.String() || m.Size != stat.Size() || m.ModifiedAt != stat.ModTime().UnixNano():
		return none, errors.New("stale")
	case m.Boot != "" && m.Boot != boot():
		return none, errors.New("of an artifact that was not synced before the machine stopped")
	}
	return artifact.Info{
		Scope:            name.Scope,
		Key:              name.Key,
		Hash:             hash,
		Size:             m.Size,
		Manifest:         manifest,
		UncompressedSize: m.UncompressedSize,
		FileCount:        m.FileCount,
		Metadata: artifact.Metadata{
			PackageName: m.PackageName,
			TaskName:    m.TaskName,
			Command:     m.Command,
			CreatedAt:   time.Unix(m.CreatedAt, 0).UTC(),
		},
		StoredAt: stat.ModTime(),
	}, nil
}

// renewMemo writes the memo of an artifact that was verified again, if it is still what is stored, and says
// whether it is pinned. Who pinned it meanwhile must not find that undone.
func (s *Store) renewMemo(info artifact.Info, synced bool) (pinned bool, err error) {
	lock := s.aside.of(info.Key.String())
	lock.Lock()
	defer lock.Unlock()
	stat, err := os.Lstat(s.artifactPath(info.Key))
	if err != nil || stat.Size() != info.Size || !stat.ModTime().Equal(info.StoredAt) {
		return false, nil // it was removed, and its memo with it
	}
	if m, err := s.loadMemo(info.Key); err == nil {
		pinned = m.pins()
	}
	return pinned, s.writeMemo(info, pinned, synced)
}

// writeMemo writes the memo of a stored artifact, so that readers see the old one or the new one. It
// is not synced: a memo that a power cut tears is noticed and made anew. Whether the .zst is, synced says.
func (s *Store) writeMemo(info artifact.Info, pinned, synced bool) error {
	m := memo{
		Hash:             info.Hash.String(),
		Size:             info.Size,
		CreatedAt:        info.CreatedAt.Unix(),
		CacheKeyHash:     info.Key.String(),
		VerifiedBy:       verifiedBy,
		ModifiedAt:       info.StoredAt.UnixNano(),
		UncompressedSize: info.UncompressedSize,
		FileCount:        info.FileCount,
		PackageName:      info.PackageName,
		TaskName:         info.TaskName,
		Command:          info.Command,
		Pinned:           pinned,
	}
	if (info.Manifest != artifact.Digest{}) {
		m.Manifest = info.Manifest.String()
	}
	if !synced {
		m.Boot = boot()
	}
	return s.putMemo(info.Key, m, false)
}

// putMemo puts a memo in the place of the one that is there. Only if it is durable does it survive a power
// cut for sure.
func (s *Store) putMemo(key artifact.Key, m memo, durable bool) error {
	m.Checksum = m.sum()
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	file, err := s.createTmp(key)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	if err == nil && durable && s.synced {
		err = file.Sync()
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = s.inShard(key, func() error { return os.Rename(file.Name(), s.memoPath(key)) })
	}
	if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.EISDIR) { // a directory is in its place
		if err = s.quarantine(s.memoPath(key), errors.New("a directory where a memo belongs")); err == nil {
			err = os.Rename(file.Name(), s.memoPath(key))
		}
	}
	if err == nil && durable {
		err = s.syncDir(filepath.Join(s.root, shard(key)))
	}
	if err != nil {
		os.Remove(file.Name())
	}
	return err
}
