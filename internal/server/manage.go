package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/retention"
)

// This file is the methods for those who run a cache. They answer from the index.

const (
	defaultListSize = 100
	maxListSize     = 1_000
	// maxKeys is the most keys in one question.
	maxKeys = 10_000
	// maxScopes is the most scopes in one filter.
	maxScopes = 1_000
	// maxRemovals is the most artifacts that one call removes.
	maxRemovals = 10_000
	// maxScopePolicies is the most policies of scopes in one call: each is held against every scope.
	maxScopePolicies = 100
)

// Management is what the methods need that are for those who run a cache.
type Management struct {
	// Index answers what is stored.
	Index *index.Index
	// Collector removes what is not to be kept, by Policy.
	Collector *retention.Collector
	// Storage is the store itself.
	Storage interface {
		index.Source
		Evict(ctx context.Context, name artifact.Name, storedAt time.Time) (diskSize int64, err error)
		Usage() (disk.Usage, error)
		Quarantined() ([]disk.Quarantined, error)
	}
}

// managed returns what the server is given for its management, if it is.
func (a *artifactService) managed() (*Management, error) {
	if err := a.server.taking(); err != nil {
		return nil, err
	}
	if a.server.management == nil {
		return nil, fmt.Errorf("%w: this server has none", index.ErrUnavailable)
	}
	return a.server.management, nil
}

// pageSize returns how many entries a page is to have.
func pageSize(name string, asked int32, usual, most int) (int, error) {
	switch size := int(asked); {
	case size < 0:
		return 0, fmt.Errorf("%w: %s is %d; it must not be negative", errInvalidRequest, name, size)
	case size == 0:
		return usual, nil
	default:
		return min(size, most), nil
	}
}

func (a *artifactService) ListArtifacts(ctx context.Context, request *cachev1.ListArtifactsRequest) (*cachev1.ListArtifactsResponse, error) {
	m, err := a.managed()
	if err != nil {
		return nil, err
	}
	query := index.Query{Descending: request.GetDescending(), After: request.GetPageToken()}
	if query.Filter, err = filterOf(request.GetFilter(), a.server.caller(ctx).sees()); err != nil {
		return nil, err
	}
	var known bool
	if query.Order, known = orders[request.GetOrderBy()]; !known {
		return nil, fmt.Errorf("%w: order_by is %d, which is none", errInvalidRequest, request.GetOrderBy())
	}
	if query.Limit, err = pageSize("page_size", request.GetPageSize(), defaultListSize, maxListSize); err != nil {
		return nil, err
	}
	entries, next, err := m.Index.List(ctx, query)
	if errors.Is(err, index.ErrInvalidCursor) {
		return nil, fmt.Errorf("%w: page_token is not one that this server gave out for this list", errInvalidRequest)
	}
	if err != nil {
		return nil, err
	}
	response := &cachev1.ListArtifactsResponse{NextPageToken: next}
	for _, e := range entries {
		response.Artifacts = append(response.Artifacts, storedMessage(e))
	}
	return response, nil
}

var orders = map[cachev1.ArtifactOrder]index.Order{
	cachev1.ArtifactOrder_ARTIFACT_ORDER_UNSPECIFIED:  index.ByStoredAt,
	cachev1.ArtifactOrder_ARTIFACT_ORDER_STORED_AT:    index.ByStoredAt,
	cachev1.ArtifactOrder_ARTIFACT_ORDER_LAST_USED_AT: index.ByUsedAt,
	cachev1.ArtifactOrder_ARTIFACT_ORDER_SIZE:         index.BySize,
	cachev1.ArtifactOrder_ARTIFACT_ORDER_CACHE_KEY:    index.ByKey,
}

// storedMessage returns what is known of a stored artifact as the wire contract says it.
func storedMessage(e index.Entry) *cachev1.StoredArtifact {
	stored := &cachev1.StoredArtifact{
		Artifact:   message(e.Info),
		LastUsedAt: timestamppb.New(e.UsedAt),
		UseCount:   e.Uses,
		DiskSize:   e.DiskSize,
		Pinned:     e.Pinned,
	}
	if !e.Verified() {
		stored.Artifact.Hash, stored.Artifact.CreatedAt = "", nil
	}
	return stored
}

// filterOf returns what a filter of the wire contract matches, in the scopes that the caller may see, which are all
// if allowed is nil.
func filterOf(f *cachev1.ArtifactFilter, allowed []artifact.Scope) (index.Filter, error) {
	filter := index.Filter{
		Scopes:      allowed,
		PackageName: f.GetPackageName(),
		TaskName:    f.GetTaskName(),
		KeyPrefix:   strings.ToLower(f.GetKeyPrefix()),
		MinSize:     f.GetMinSize(),
	}
	if f != nil {
		filter.MaxSize, filter.Pinned = f.MaxSize, f.Pinned
	}
	if strings.Trim(filter.KeyPrefix, "0123456789abcdef") != "" || len(filter.KeyPrefix) > artifact.MaxKeyDigits {
		return filter, fmt.Errorf("%w: key_prefix must be at most %d hexadecimal digits", errInvalidRequest, artifact.MaxKeyDigits)
	}
	if filter.MinSize < 0 || f.GetMaxSize() < 0 {
		return filter, fmt.Errorf("%w: min_size and max_size must not be negative", errInvalidRequest)
	}
	if names := f.GetScopes(); len(names) > 0 {
		if len(names) > maxScopes {
			return filter, fmt.Errorf("%w: there are %d scopes; name at most %d", errInvalidRequest, len(names), maxScopes)
		}
		filter.Scopes = []artifact.Scope{}
		for _, name := range names {
			scope, err := artifact.ParseScope(name)
			if err != nil {
				return filter, err
			}
			if allowed == nil || slices.Contains(allowed, scope) { // of others it is not told whether there are any
				filter.Scopes = append(filter.Scopes, scope)
			}
		}
	}
	for _, bound := range []struct {
		name string
		from *timestamppb.Timestamp
		to   *time.Time
	}{
		{"stored_after", f.GetStoredAfter(), &filter.StoredAfter},
		{"stored_before", f.GetStoredBefore(), &filter.StoredBefore},
		{"used_after", f.GetUsedAfter(), &filter.UsedAfter},
		{"used_before", f.GetUsedBefore(), &filter.UsedBefore},
	} {
		if bound.from == nil {
			continue
		}
		at := bound.from.AsTime()
		if err := bound.from.CheckValid(); err != nil || at.Before(earliest) || at.After(latest) {
			return filter, fmt.Errorf("%w: %s must be from %s to %s", errInvalidRequest, bound.name, earliest.Format(time.DateOnly), latest.Format(time.DateOnly))
		}
		*bound.to = at
	}
	return filter, nil
}

// The times that can be counted in nanoseconds.
var (
	earliest = time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC)
	latest   = time.Date(2262, 1, 1, 0, 0, 0, 0, time.UTC)
)

func (a *artifactService) FindMissingArtifacts(ctx context.Context, request *cachev1.FindMissingArtifactsRequest) (*cachev1.FindMissingArtifactsResponse, error) {
	if len(request.GetCacheKeys()) > maxKeys {
		return nil, fmt.Errorf("%w: there are %d keys; ask for at most %d at once", errInvalidRequest, len(request.GetCacheKeys()), maxKeys)
	}
	if err := a.server.taking(); err != nil {
		return nil, err
	}
	keys := make([]artifact.Key, len(request.GetCacheKeys()))
	for i, digits := range request.GetCacheKeys() {
		var err error
		if keys[i], err = artifact.ParseKey(digits); err != nil {
			return nil, err
		}
	}
	missing, err := a.server.caller(ctx).cache.Missing(ctx, keys)
	if err != nil {
		return nil, err
	}
	response := &cachev1.FindMissingArtifactsResponse{}
	for _, key := range missing {
		response.MissingCacheKeys = append(response.MissingCacheKeys, key.String())
	}
	return response, nil
}

func (a *artifactService) PinArtifact(ctx context.Context, request *cachev1.PinArtifactRequest) (*cachev1.PinArtifactResponse, error) {
	return &cachev1.PinArtifactResponse{}, a.pin(ctx, request.GetCacheKey(), true)
}

func (a *artifactService) UnpinArtifact(ctx context.Context, request *cachev1.UnpinArtifactRequest) (*cachev1.UnpinArtifactResponse, error) {
	return &cachev1.UnpinArtifactResponse{}, a.pin(ctx, request.GetCacheKey(), false)
}

func (a *artifactService) pin(ctx context.Context, digits string, pinned bool) error {
	key, err := a.key(ctx, digits)
	if err != nil {
		return err
	}
	return a.server.caller(ctx).cache.Pin(ctx, key, pinned)
}

func (a *artifactService) PromoteArtifact(ctx context.Context, request *cachev1.PromoteArtifactRequest) (*cachev1.PromoteArtifactResponse, error) {
	key, err := a.key(ctx, request.GetCacheKey())
	if err != nil {
		return nil, err
	}
	caller := a.server.caller(ctx)
	if caller.access == nil {
		return nil, errNoScopes
	}
	from, err := artifact.ParseScope(request.GetFromScope())
	if err != nil {
		return nil, err
	}
	to, err := artifact.ParseScope(request.GetToScope())
	if err != nil {
		return nil, err
	}
	if err := caller.access.MayPromote(from, to); err != nil {
		a.server.refusals.count(err)
		return nil, err
	}
	info, err := caller.cache.Promote(ctx, from, to, key)
	if err != nil {
		return nil, err
	}
	a.server.log.InfoContext(ctx, "promoted an artifact", "key", key, "from", from, "to", to, "by", caller.access.Who)
	return &cachev1.PromoteArtifactResponse{Artifact: message(info)}, nil
}

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

func (a *artifactService) CollectGarbage(ctx context.Context, request *cachev1.CollectGarbageRequest) (*cachev1.CollectGarbageResponse, error) {
	m, err := a.managed()
	if err != nil {
		return nil, err
	}
	policy, err := policyOf(m.Collector.Policy(), request.GetPolicy())
	if err != nil {
		return nil, err
	}
	response := &cachev1.CollectGarbageResponse{}
	var removals []retention.Removal
	if request.GetDryRun() {
		removals, err = m.Collector.Plan(ctx, policy)
	} else {
		removals, response.More, err = m.Collector.Collect(ctx, policy, maxRemovals)
	}
	if err != nil && len(removals) == 0 || request.GetDryRun() && err != nil {
		return nil, err
	}
	if err != nil { // which who asks again learns, behind what was removed
		a.server.log.ErrorContext(ctx, "could not remove all that the policy does not keep", "error", err)
		response.More = true
	}
	for _, r := range removals {
		response.Removals = append(response.Removals, &cachev1.Removal{
			PackageName:   r.PackageName,
			TaskName:      r.TaskName,
			Reason:        reasons[r.Reason],
			ArtifactCount: r.Artifacts,
			DiskSize:      r.DiskSize,
		})
	}
	return response, nil
}

var reasons = map[retention.Reason]cachev1.RemovalReason{
	retention.MaxAge:     cachev1.RemovalReason_REMOVAL_REASON_MAX_AGE,
	retention.KeepLast:   cachev1.RemovalReason_REMOVAL_REASON_KEEP_LAST,
	retention.MaxStorage: cachev1.RemovalReason_REMOVAL_REASON_MAX_STORAGE,
	retention.MinFree:    cachev1.RemovalReason_REMOVAL_REASON_MIN_FREE,
}

// policyOf returns a policy changed as a request asks.
func policyOf(policy retention.Policy, changed *cachev1.RetentionPolicy) (retention.Policy, error) {
	if changed == nil {
		return policy, nil
	}
	for name, value := range map[string]int64{
		"max_storage_size": changed.GetMaxStorageSize(),
		"min_free_size":    changed.GetMinFreeSize(),
		"keep_last":        int64(changed.GetKeepLast()),
	} {
		if value < 0 {
			return policy, fmt.Errorf("%w: %s is %d; it must not be negative", errInvalidRequest, name, value)
		}
	}
	if changed.MaxStorageSize != nil {
		policy.MaxStorage = changed.GetMaxStorageSize()
	}
	if changed.MinFreeSize != nil {
		policy.MinFree = changed.GetMinFreeSize()
	}
	if changed.KeepLast != nil {
		policy.KeepLast = int(changed.GetKeepLast())
	}
	if changed.MaxAge != nil {
		age, err := durationOf(changed.GetMaxAge())
		if err != nil {
			return policy, err
		}
		policy.MaxAge = age
	}
	if len(changed.GetScopes()) > 0 {
		scopes, err := scopePolicies(changed.GetScopes())
		if err != nil {
			return policy, err
		}
		policy.Scopes = scopes
	}
	return policy, nil
}

// scopePolicies returns the policies of scopes that a request has.
func scopePolicies(asked []*cachev1.ScopeRetentionPolicy) ([]retention.ScopePolicy, error) {
	if len(asked) > maxScopePolicies {
		return nil, fmt.Errorf("%w: there are %d policies of scopes; give at most %d", errInvalidRequest, len(asked), maxScopePolicies)
	}
	var policies []retention.ScopePolicy
	for _, p := range asked {
		if err := retention.CheckPattern(p.GetPattern()); err != nil {
			return nil, fmt.Errorf("%w: pattern %w", errInvalidRequest, err)
		}
		if slices.ContainsFunc(policies, func(other retention.ScopePolicy) bool { return other.Pattern == p.GetPattern() }) {
			return nil, fmt.Errorf("%w: pattern %q is given twice", errInvalidRequest, p.GetPattern())
		}
		if p.GetKeepLast() < 0 {
			return nil, fmt.Errorf("%w: keep_last is %d; it must not be negative", errInvalidRequest, p.GetKeepLast())
		}
		age, err := durationOf(p.GetMaxAge())
		if err != nil {
			return nil, err
		}
		policies = append(policies, retention.ScopePolicy{Pattern: p.GetPattern(), MaxAge: age, KeepLast: int(p.GetKeepLast())})
	}
	return policies, nil
}

func durationOf(d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if err := d.CheckValid(); err != nil || d.GetSeconds() < 0 || d.GetNanos() < 0 || d.GetSeconds() > math.MaxInt64/int64(time.Second)-1 {
		return 0, fmt.Errorf("%w: max_age must be from 0 to 292 years", errInvalidRequest)
	}
	return d.AsDuration(), nil
}

func (a *artifactService) ListQuarantine(_ context.Context, request *cachev1.ListQuarantineRequest) (*cachev1.ListQuarantineResponse, error) {
	m, err := a.managed()
	if err != nil {
		return nil, err
	}
	size, err := pageSize("page_size", request.GetPageSize(), defaultListSize, maxListSize)
	if err != nil {
		return nil, err
	}
	files, err := m.Storage.Quarantined()
	if err != nil {
		return nil, err
	}
	// A page token is when the last file of the page before was moved, and its name: it may be gone by now.
	if token := request.GetPageToken(); token != "" {
		at, name, ok := strings.Cut(token, "-")
		nanoseconds, err := strconv.ParseInt(at, 10, 64)
		if err != nil || !ok {
			return nil, fmt.Errorf("%w: page_token is not one that this server gave out", errInvalidRequest)
		}
		last := disk.Quarantined{At: time.Unix(0, nanoseconds), Name: name}
		files = files[sort.Search(len(files), func(i int) bool { return files[i].Compare(last) > 0 }):]
	}
	response := &cachev1.ListQuarantineResponse{}
	if len(files) > size {
		files = files[:size]
		response.NextPageToken = fmt.Sprintf("%d-%s", files[size-1].At.UnixNano(), files[size-1].Name)
	}
	for _, q := range files {
		file := &cachev1.QuarantinedFile{Scope: q.Scope.String(), Name: q.Name, Size: q.Size, Reason: q.Reason, QuarantinedAt: timestamppb.New(q.At)}
		if (q.Key != artifact.Key{}) {
			file.CacheKey = q.Key.String()
		}
		response.Files = append(response.Files, file)
	}
	return response, nil
}
