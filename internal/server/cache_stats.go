package server

import (
	"context"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/index"
)

func (a *artifactService) GetCacheStats(ctx context.Context, request *cachev1.GetCacheStatsRequest) (*cachev1.GetCacheStatsResponse, error) {
	m, err := a.managed()
	if err != nil {
		return nil, err
	}
	maxTasks, err := pageSize("max_tasks", request.GetMaxTasks(), defaultListSize, maxListSize)
	if err != nil {
		return nil, err
	}
	// Numbers of other scopes would tell what these have, were it by how much they grow.
	caller := a.server.caller(ctx)
	complete := m.Index.Complete() // before the numbers are read
	var stats index.Stats
	if caller.all() {
		stats, err = m.Index.Stats(ctx, maxTasks)
	} else {
		stats, err = m.Index.ScopeStats(ctx, caller.sees(), maxTasks)
	}
	if err != nil {
		return nil, err
	}
	scopes, err := m.Index.Scopes(ctx)
	if err != nil {
		return nil, err
	}
	response := &cachev1.GetCacheStatsResponse{
		Total:         sumsMessage(stats.Total),
		StartedAt:     timestamppb.New(stats.StartedAt),
		TaskCount:     stats.TaskCount,
		IndexComplete: complete && m.Index.Complete(), // which reading them may have found to be damaged
	}
	for _, s := range scopes {
		if caller.all() || slices.Contains(caller.sees(), s.Scope) {
			response.Scopes = append(response.Scopes, &cachev1.ScopeStats{Scope: s.Scope.String(), ArtifactCount: s.Artifacts, Size: s.Size, DiskSize: s.DiskSize})
		}
	}
	for _, t := range stats.Tasks {
		response.Tasks = append(response.Tasks, &cachev1.TaskStats{PackageName: t.PackageName, TaskName: t.TaskName, Stats: sumsMessage(t.Sums)})
	}
	if !caller.all() {
		return response, nil
	}
	response.Total.Usage, response.SinceStart = usageMessage(stats.Usage), usageMessage(stats.SinceStart)
	for i, t := range stats.Tasks {
		response.Tasks[i].Stats.Usage = usageMessage(t.Usage)
	}
	response.Comparisons = &cachev1.ComparisonStats{AgreedCount: stats.Usage.Agreed, DifferedCount: stats.Usage.Differed}
	response.Storage, err = storageMessage(m)
	return response, err
}

// storageMessage returns how full the disk is.
func storageMessage(m *Management) (*cachev1.StorageStats, error) {
	usage, err := m.Storage.Usage()
	if err != nil {
		return nil, err
	}
	quarantined, err := m.Storage.Quarantined()
	if err != nil {
		return nil, err
	}
	policy := m.Collector.Policy()
	storage := &cachev1.StorageStats{
		UsedSize:         usage.Used,
		MaxStorageSize:   policy.MaxStorage,
		FreeSize:         usage.Free,
		MinFreeSize:      policy.MinFree,
		DiskSize:         usage.Size,
		QuarantinedCount: int64(len(quarantined)),
	}
	for _, q := range quarantined {
		storage.QuarantinedSize += q.DiskSize
	}
	return storage, nil
}

func sumsMessage(s index.Sums) *cachev1.CacheStats {
	return &cachev1.CacheStats{
		ArtifactCount:    s.Artifacts,
		Size:             s.Size,
		UncompressedSize: s.UncompressedSize,
		DiskSize:         s.DiskSize,
	}
}

func usageMessage(u index.Usage) *cachev1.UsageStats {
	m := &cachev1.UsageStats{
		HitCount:        u.Hits,
		MissCount:       u.Misses,
		StoredCount:     u.Stored,
		EvictedCount:    u.Evicted,
		EvictedDiskSize: u.EvictedDiskSize,
	}
	if asked := u.Hits + u.Misses; asked > 0 {
		m.HitRate = float64(u.Hits) / float64(asked)
	}
	return m
}
