package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

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
