package disk

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
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
