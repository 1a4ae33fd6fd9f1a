package disk

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// Quarantined is a file in quarantine.
type Quarantined struct {
	// Name is its name there.
	Name string
	// Scope and Key are what it was stored under; the zero Key if it was no artifact.
	Scope artifact.Scope
	Key   artifact.Key
	// Size is the number of its bytes, and DiskSize what it takes on the disk.
	Size, DiskSize int64
	// Reason is why it was moved there.
	Reason string
	// At is when.
	At time.Time
}

// Compare orders files as Quarantined does: -1 if q comes before other.
func (q Quarantined) Compare(other Quarantined) int {
	return cmp.Or(other.At.Compare(q.At), strings.Compare(q.Name, other.Name))
}

// Quarantined returns the files in quarantine, the newest first.
func (s *Store) Quarantined() ([]Quarantined, error) {
	dir := filepath.Join(s.dir, ownDir, quarantineDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var found []Quarantined
	for _, entry := range entries {
		extension := filepath.Ext(entry.Name())
		if extension == reasonExtension {
			continue
		}
		stat, err := entry.Info()
		if err != nil {
			continue // gone
		}
		q := Quarantined{Name: entry.Name(), Size: stat.Size(), DiskSize: blocks(stat), At: stat.ModTime()}
		base := strings.TrimSuffix(entry.Name(), extension)
		if name, _, ok := cutLast(base, "-"); ok {
			q.Scope, name = cutScope(name)
			if extension == ".zst" {
				q.Key, _ = artifact.ParseKey(name)
			}
		}
		reason := filepath.Join(dir, base+reasonExtension)
		if text, err := os.ReadFile(reason); err == nil {
			q.Reason = strings.TrimSpace(string(text))
		}
		if stat, err := os.Lstat(reason); err == nil { // it was written when the file was moved
			q.At = stat.ModTime()
			q.DiskSize += blocks(stat)
		}
		found = append(found, q)
	}
	slices.SortFunc(found, Quarantined.Compare)
	return found, nil
}

// QuarantineSize returns how many files are in quarantine, and what they take on the disk in bytes, without looking
// into them.
func (s *Store) QuarantineSize() (files int, diskSize int64, err error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, ownDir, quarantineDir))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	for _, entry := range entries {
		stat, err := entry.Info()
		if err != nil {
			continue // gone
		}
		diskSize += blocks(stat)
		if filepath.Ext(entry.Name()) != reasonExtension {
			files++
		}
	}
	return files, diskSize, err
}

// EmptyQuarantine removes what was moved there before a time, and then, the oldest first, what is needed to
// free as many bytes on the disk as are given. It returns how many it freed.
func (s *Store) EmptyQuarantine(before time.Time, atLeast int64) (freed int64, err error) {
	all, err := s.Quarantined()
	if err != nil {
		return 0, err
	}
	dir := filepath.Join(s.dir, ownDir, quarantineDir)
	for _, q := range slices.Backward(all) {
		if !q.At.Before(before) && freed >= atLeast {
			break
		}
		if removed := os.RemoveAll(filepath.Join(dir, q.Name)); removed != nil {
			err = errors.Join(err, removed)
			continue
		}
		os.Remove(filepath.Join(dir, strings.TrimSuffix(q.Name, filepath.Ext(q.Name))+reasonExtension))
		freed += q.DiskSize
	}
	s.space.own.Add(-freed)
	return freed, err
}

// cutLast is strings.Cut around the last separator.
func cutLast(s, separator string) (before, after string, found bool) {
	if i := strings.LastIndex(s, separator); i >= 0 {
		return s[:i], s[i+len(separator):], true
	}
	return s, "", false
}

// Quarantine implements cache.Store.
func (s *Store) Quarantine(_ context.Context, info artifact.Info, reason error) error {
	stat, err := os.Lstat(s.artifactPath(info.Key))
	if err != nil || stat.Size() != info.Size || !stat.ModTime().Equal(info.StoredAt) {
		return nil
	}
	if err := s.setAside(info.Key, stat, reason); !errors.Is(err, cache.ErrNotFound) {
		return err
	}
	return nil
}

// setAside moves what is stored under key into quarantine, if it is still the file that stat
// describes, and returns cache.ErrNotFound.
func (s *Store) setAside(key artifact.Key, stat fs.FileInfo, reason error) error {
	err := s.moveAside(key, stat, reason)
	if errors.Is(err, cache.ErrNotFound) && s.scope != artifact.DefaultScope {
		s.removeEmpty(shard(key))
	}
	return err
}

func (s *Store) moveAside(key artifact.Key, stat fs.FileInfo, reason error) error {
	lock := s.aside.of(key.String()) // or else what is moved may be a new artifact, uploaded since somebody else moved the old one
	lock.Lock()
	defer lock.Unlock()
	path := s.artifactPath(key)
	if now, err := os.Lstat(path); err != nil || !os.SameFile(now, stat) {
		return cache.ErrNotFound // somebody else did
	}
	size := s.diskSize(key, stat)
	os.Remove(s.memoPath(key)) // while it can't be a new artifact's
	if err := s.quarantine(path, reason); err != nil {
		return fmt.Errorf("set damaged artifact %s aside: %w", key, translate(err))
	}
	s.observer.Removed(key.In(s.scope), size)
	return cache.ErrNotFound
}

// quarantine moves a file into quarantine, where it has its own name with something unique behind it, and the scope in
// front of it unless that is the default one.
func (s *Store) quarantine(path string, reason error) error {
	dir := filepath.Join(s.dir, ownDir, quarantineDir)
	extension := filepath.Ext(path)
	target := filepath.Join(dir, s.quarantinePrefix()+strings.TrimSuffix(filepath.Base(path), extension)+"-"+rand.Text())
	move := func() error {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		return os.Rename(path, target+extension)
	}
	err := move()
	// The error does not tell which of the directories can't be written. One that is moved must be, too.
	if errors.Is(err, fs.ErrPermission) {
		s.mendDirs(filepath.Dir(path), path)
		err = move()
	}
	if err != nil && s.mendQuarantine() {
		err = move()
	}
	if err != nil {
		return err
	}
	if stat, err := os.Lstat(target + extension); err == nil {
		s.space.own.Add(blocks(stat) + blockSize)
	}
	s.log.Warn("set a file aside", "path", path, "reason", reason, "to", target+extension)
	if err := os.WriteFile(target+reasonExtension, []byte(reason.Error()+"\n"), 0o644); err != nil {
		s.log.Warn("could not write down why", "path", path, "error", err)
	}
	return nil
}
