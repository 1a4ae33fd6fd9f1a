package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/index"
)

func (a *artifactService) DeleteArtifact(ctx context.Context, request *cachev1.DeleteArtifactRequest) (*cachev1.DeleteArtifactResponse, error) {
	key, err := a.key(ctx, request.GetCacheKey())
	if err != nil {
		return nil, err
	}
	caller := a.server.caller(ctx)
	if err := caller.cache.Delete(ctx, key); err != nil {
		a.recheck(key.In(caller.writes()), err)
		return nil, err
	}
	return &cachev1.DeleteArtifactResponse{}, nil
}

// recheck tells the index how an artifact is of which it was wrong, if err says so.
func (a *artifactService) recheck(name artifact.Name, err error) {
	if m := a.server.management; m != nil && errors.Is(err, cache.ErrNotFound) {
		m.Index.Recheck(m.Storage, name) // an error says that nobody can tell now
	}
}

func (a *artifactService) DeleteArtifacts(ctx context.Context, request *cachev1.DeleteArtifactsRequest) (*cachev1.DeleteArtifactsResponse, error) {
	m, err := a.managed()
	if err != nil {
		return nil, err
	}
	filter, err := filterOf(request.GetFilter(), a.server.caller(ctx).changes())
	if err != nil {
		return nil, err
	}
	if matchesAll(request.GetFilter()) != request.GetAll() {
		return nil, fmt.Errorf("%w: give a filter, or set all to delete everything that is not pinned, and not both", errInvalidRequest)
	}
	if filter.Pinned == nil {
		filter.Pinned = new(bool)
	}
	if request.GetDryRun() {
		groups, err := m.Index.Groups(ctx, filter)
		if err != nil {
			return nil, err
		}
		return &cachev1.DeleteArtifactsResponse{Removals: groupMessages(groups)}, nil
	}
	groups, more, err := a.deleteAll(ctx, m, filter)
	if err != nil {
		return nil, err
	}
	return &cachev1.DeleteArtifactsResponse{Removals: groupMessages(groups), More: more}, nil
}

// matchesAll says whether a filter matches everything in some scopes.
func matchesAll(f *cachev1.ArtifactFilter) bool {
	if f == nil {
		return true
	}
	without := proto.CloneOf(f)
	without.Scopes = nil
	return proto.Equal(without, &cachev1.ArtifactFilter{})
}

// deleteAll deletes at most maxRemovals artifacts that match, and says whether there are more. What fails does
// not keep it from going on with others; it is an error only if nothing was deleted, so that who asks again
// until there is no more learns what was deleted, and then of the error.
func (a *artifactService) deleteAll(ctx context.Context, m *Management, filter index.Filter) (groups []index.Group, more bool, err error) {
	type task struct{ packageName, taskName string }
	sums := map[task]*index.Group{}
	removed := 0
	var failed error // the first
	query := index.Query{Filter: filter, Order: index.ByKey, Limit: maxListSize}
	for more = true; more && removed < maxRemovals; more = query.After != "" {
		var entries []index.Entry
		if entries, query.After, err = m.Index.List(ctx, query); err != nil {
			failed = cmp.Or(failed, err)
			break
		}
		for _, e := range entries {
			size, err := a.deleteListed(ctx, m, filter, e)
			if errors.Is(err, cache.ErrNotFound) {
				a.recheck(e.Name(), err)
				continue
			}
			if err != nil {
				failed = cmp.Or(failed, err)
				continue
			}
			removed++
			t := task{e.PackageName, e.TaskName}
			if sums[t] == nil {
				sums[t] = &index.Group{PackageName: e.PackageName, TaskName: e.TaskName}
			}
			sums[t].Artifacts++
			sums[t].DiskSize += size
		}
	}
	for _, sum := range sums {
		a.server.log.InfoContext(ctx, "deleted artifacts", "package", sum.PackageName, "task", sum.TaskName, "artifacts", sum.Artifacts, "disk_size", sum.DiskSize)
		groups = append(groups, *sum)
	}
	slices.SortFunc(groups, func(a, b index.Group) int { return cmp.Compare(b.DiskSize, a.DiskSize) })
	if failed == nil {
		return groups, more, nil
	}
	if removed == 0 {
		return nil, false, failed
	}
	a.server.log.ErrorContext(ctx, "could not delete all artifacts that match", "error", failed)
	return groups, true, nil
}

// deleteListed deletes an artifact that a list says matches a filter, unless another one was stored under its
// key since then, or it was pinned.
func (a *artifactService) deleteListed(ctx context.Context, m *Management, filter index.Filter, e index.Entry) (diskSize int64, err error) {
	if !*filter.Pinned {
		return m.Storage.Evict(ctx, e.Name(), e.StoredAt)
	}
	return e.DiskSize, a.server.cache.In(e.Scope).Delete(ctx, e.Key)
}

func groupMessages(groups []index.Group) []*cachev1.Removal {
	var messages []*cachev1.Removal
	for _, g := range groups {
		messages = append(messages, &cachev1.Removal{
			PackageName:   g.PackageName,
			TaskName:      g.TaskName,
			Reason:        cachev1.RemovalReason_REMOVAL_REASON_DELETED,
			ArtifactCount: g.Artifacts,
			DiskSize:      g.DiskSize,
		})
	}
	return messages
}
