package index

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// This file is how much there is of what.

// Group is a number of artifacts of one task.
type Group struct {
	// PackageName and TaskName name the task.
	PackageName, TaskName string
	// Artifacts is how many there are.
	Artifacts int64
	// DiskSize is what they take on the disk, in bytes.
	DiskSize int64
}

// Groups returns how many artifacts match, by package and task, most bytes first.
func (x *Index) Groups(ctx context.Context, f Filter) ([]Group, error) {
	x.freshen(ctx)
	c := f.condition()
	return x.groups(ctx, fmt.Sprintf(`SELECT t.package, t.task, count(*), sum(a.disk_size) FROM artifacts a JOIN tasks t ON t.id = a.task_id
		WHERE %s GROUP BY t.id ORDER BY 4 DESC, 1, 2`, c), c.args...)
}

func (x *Index) groups(ctx context.Context, query string, args ...any) (groups []Group, err error) {
	err = x.rows(ctx, query, args, func(scan func(...any) error) (bool, error) {
		var g Group
		err := scan(&g.PackageName, &g.TaskName, &g.Artifacts, &g.DiskSize)
		groups = append(groups, g)
		return true, err
	})
	return groups, err
}

// ScopeSums are about the artifacts of a scope.
type ScopeSums struct {
	Scope artifact.Scope
	// Artifacts is how many there are, of Size bytes, which take DiskSize bytes on the disk.
	Artifacts, Size, DiskSize int64
}

// Scopes returns the scopes that have artifacts in ascending order, and the default one before them.
func (x *Index) Scopes(ctx context.Context) (all []ScopeSums, err error) {
	x.freshen(ctx)
	err = x.rows(ctx, `SELECT '', artifacts - (SELECT ifnull(sum(artifacts), 0) FROM scopes), size - (SELECT ifnull(sum(size), 0) FROM scopes),
			disk_size - (SELECT ifnull(sum(disk_size), 0) FROM scopes) FROM state
		UNION ALL SELECT * FROM scopes ORDER BY 1`, nil, func(scan func(...any) error) (bool, error) {
		var name string
		var s ScopeSums
		err := scan(&name, &s.Artifacts, &s.Size, &s.DiskSize)
		if err == nil {
			s.Scope, err = scopeOf(name)
		}
		all = append(all, s)
		return true, err
	})
	return all, err
}

// Stats are what Stats and ScopeStats return.
type Stats struct {
	// Total is about all tasks, and Usage says what happened since the index began.
	Total Sums
	Usage Usage
	// SinceStart says what happened since StartedAt.
	SinceStart Usage
	StartedAt  time.Time
	// Tasks are those with the most bytes on the disk, and TaskCount is how many there are.
	Tasks     []TaskStats
	TaskCount int64
}

// Sums are about a number of artifacts.
type Sums struct {
	Artifacts, Size, UncompressedSize, DiskSize int64
}

func (s *Sums) add(other Sums) {
	s.Artifacts += other.Artifacts
	s.Size += other.Size
	s.UncompressedSize += other.UncompressedSize
	s.DiskSize += other.DiskSize
}

// TaskStats are about a task of a package.
type TaskStats struct {
	PackageName, TaskName string
	Sums
	Usage Usage
}

// SinceStart returns what happened since the index was opened.
func (x *Index) SinceStart() Usage {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.sinceStart
}

// Stats returns statistics of all scopes, with at most maxTasks tasks, or as many as have maxTextSize bytes of names.
func (x *Index) Stats(ctx context.Context, maxTasks int) (Stats, error) {
	x.freshen(ctx)
	x.mu.Lock()
	s := Stats{SinceStart: x.sinceStart, StartedAt: x.startedAt}
	x.mu.Unlock()
	err := x.rows(ctx, `SELECT hits, misses, stored, evicted, evicted_disk_size, agreed, differed, artifacts, size, uncompressed_size, disk_size,
		(SELECT count(*) FROM tasks) FROM state`, nil, func(scan func(...any) error) (bool, error) {
		return true, scan(&s.Usage.Hits, &s.Usage.Misses, &s.Usage.Stored, &s.Usage.Evicted, &s.Usage.EvictedDiskSize,
			&s.Usage.Agreed, &s.Usage.Differed, &s.Total.Artifacts, &s.Total.Size, &s.Total.UncompressedSize, &s.Total.DiskSize, &s.TaskCount)
	})
	if err != nil {
		return s, err
	}
	text := 0 // bytes
	err = x.rows(ctx, `SELECT package, task, artifacts, size, uncompressed_size, disk_size, hits, misses, stored, evicted, evicted_disk_size
		FROM tasks ORDER BY disk_size DESC, package, task LIMIT ?`, []any{maxTasks}, func(scan func(...any) error) (bool, error) {
		var t TaskStats
		err := scan(&t.PackageName, &t.TaskName, &t.Artifacts, &t.Size, &t.UncompressedSize, &t.DiskSize,
			&t.Usage.Hits, &t.Usage.Misses, &t.Usage.Stored, &t.Usage.Evicted, &t.Usage.EvictedDiskSize)
		if text += len(t.PackageName) + len(t.TaskName); err != nil || text > maxTextSize {
			return false, err
		}
		s.Tasks = append(s.Tasks, t)
		return true, nil
	})
	return s, err
}

// ScopeStats returns what Stats would if there were no other scopes than some, but for what happened: that is counted
// for all scopes together, so it is left out.
func (x *Index) ScopeStats(ctx context.Context, scopes []artifact.Scope, maxTasks int) (Stats, error) {
	x.freshen(ctx)
	s := Stats{StartedAt: x.startedAt}
	rows := "SELECT task_id, artifacts, size, uncompressed_size, disk_size FROM scope_tasks WHERE scope IN (SELECT value FROM json_each(?))"
	if slices.Contains(scopes, artifact.DefaultScope) {
		rows += ` UNION ALL SELECT id, artifacts, size, uncompressed_size, disk_size FROM tasks WHERE artifacts > 0
			UNION ALL SELECT task_id, -artifacts, -size, -uncompressed_size, -disk_size FROM scope_tasks`
	}
	text := 0 // bytes
	err := x.rows(ctx, fmt.Sprintf(`SELECT t.package, t.task, sum(r.artifacts), sum(r.size), sum(r.uncompressed_size), sum(r.disk_size)
		FROM (%s) r JOIN tasks t ON t.id = r.task_id GROUP BY t.id HAVING sum(r.artifacts) > 0 ORDER BY 6 DESC, 1, 2`, rows),
		[]any{scopeNames(scopes)}, func(scan func(...any) error) (bool, error) {
			var t TaskStats
			err := scan(&t.PackageName, &t.TaskName, &t.Artifacts, &t.Size, &t.UncompressedSize, &t.DiskSize)
			s.TaskCount++
			s.Total.add(t.Sums)
			if text += len(t.PackageName) + len(t.TaskName); text <= maxTextSize && len(s.Tasks) < maxTasks {
				s.Tasks = append(s.Tasks, t)
			}
			return true, err
		})
	return s, err
}
