package client

import (
	"bytes"
	"context"
	"io"
	"iter"
	"net/http"
	"net/url"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
)

// This file is the methods for those who run a cache.

const (
	// MaxKeys is the most keys that Missing can be asked about at once.
	MaxKeys = 10_000
	// MaxTasks is the most tasks that Stats returns.
	MaxTasks = 1_000
	// MaxPageSize is the most entries in a page of a list.
	MaxPageSize = 1_000
)

// Stored is an artifact with what changes while it is stored, Filter matches such ones, and ListRequest
// says which of them are listed and in which Order.
type (
	Stored      = cachev1.StoredArtifact
	Filter      = cachev1.ArtifactFilter
	ListRequest = cachev1.ListArtifactsRequest
	Order       = cachev1.ArtifactOrder
)

// The orders of a list.
const (
	ByStoredAt   = cachev1.ArtifactOrder_ARTIFACT_ORDER_STORED_AT
	ByLastUsedAt = cachev1.ArtifactOrder_ARTIFACT_ORDER_LAST_USED_AT
	BySize       = cachev1.ArtifactOrder_ARTIFACT_ORDER_SIZE
	ByCacheKey   = cachev1.ArtifactOrder_ARTIFACT_ORDER_CACHE_KEY
)

// DeleteRequest says what is deleted, Deleted what was, and Removal is a part of it.
type (
	DeleteRequest = cachev1.DeleteArtifactsRequest
	Deleted       = cachev1.DeleteArtifactsResponse
	Removal       = cachev1.Removal
)

// Stats is the statistics of a cache, Usage a part of them, and Quarantined a file that was found damaged
// and moved out of the way.
type (
	Stats       = cachev1.GetCacheStatsResponse
	Usage       = cachev1.UsageStats
	Quarantined = cachev1.QuarantinedFile
)

// List yields what is stored, as a request says; its page_token does not count.
func (c *REST) List(ctx context.Context, request *ListRequest) iter.Seq2[*Stored, error] {
	return list(request, func(request *ListRequest) (*cachev1.ListArtifactsResponse, error) {
		page := &cachev1.ListArtifactsResponse{}
		return page, c.query(ctx, request, page, "v1", "artifacts")
	})
}

// List yields what is stored, as a request says; its page_token does not count.
func (c *GRPC) List(ctx context.Context, request *ListRequest) iter.Seq2[*Stored, error] {
	return list(request, func(request *ListRequest) (*cachev1.ListArtifactsResponse, error) {
		return call(ctx, c, c.artifacts.ListArtifacts, request)
	})
}

func list(request *ListRequest, page func(*ListRequest) (*cachev1.ListArtifactsResponse, error)) iter.Seq2[*Stored, error] {
	return pages(func(token string) ([]*Stored, string, error) {
		next := proto.CloneOf(request)
		next.PageToken = token
		response, err := page(next)
		return response.GetArtifacts(), response.GetNextPageToken(), err
	})
}

// Delete deletes an artifact, pinned or not.
func (c *REST) Delete(ctx context.Context, key artifact.Key) error {
	return c.read(c.request(ctx, http.MethodDelete, "v1", "artifacts", key.String()), &cachev1.DeleteArtifactResponse{})
}

// Delete deletes an artifact, pinned or not.
func (c *GRPC) Delete(ctx context.Context, key artifact.Key) error {
	_, err := call(ctx, c, c.artifacts.DeleteArtifact, &cachev1.DeleteArtifactRequest{CacheKey: key.String()})
	return err
}

// DeleteMatching deletes artifacts that a filter matches. If there are more than one call deletes, the
// answer says so.
func (c *REST) DeleteMatching(ctx context.Context, request *DeleteRequest) (*Deleted, error) {
	deleted := &Deleted{}
	return deleted, c.post(ctx, request, deleted, "v1", "artifacts:delete")
}

// DeleteMatching deletes artifacts that a filter matches. If there are more than one call deletes, the
// answer says so.
func (c *GRPC) DeleteMatching(ctx context.Context, request *DeleteRequest) (*Deleted, error) {
	return call(ctx, c, c.artifacts.DeleteArtifacts, request)
}

// Missing returns those of at most MaxKeys keys that have no artifact, each once. The others count as used.
func (c *REST) Missing(ctx context.Context, keys []artifact.Key) ([]string, error) {
	missing := &cachev1.FindMissingArtifactsResponse{}
	err := c.post(ctx, missingRequest(keys), missing, "v1", "artifacts:findMissing")
	return missing.GetMissingCacheKeys(), err
}

// Missing returns those of at most MaxKeys keys that have no artifact, each once. The others count as used.
func (c *GRPC) Missing(ctx context.Context, keys []artifact.Key) ([]string, error) {
	missing, err := call(ctx, c, c.artifacts.FindMissingArtifacts, missingRequest(keys))
	return missing.GetMissingCacheKeys(), err
}

func missingRequest(keys []artifact.Key) *cachev1.FindMissingArtifactsRequest {
	request := &cachev1.FindMissingArtifactsRequest{}
	for _, key := range keys {
		request.CacheKeys = append(request.CacheKeys, key.String())
	}
	return request
}

// Pin keeps an artifact from being evicted.
func (c *REST) Pin(ctx context.Context, key artifact.Key) error {
	return c.read(c.request(ctx, http.MethodPut, "v1", "artifacts", key.String(), "pin"), &cachev1.PinArtifactResponse{})
}

// Pin keeps an artifact from being evicted.
func (c *GRPC) Pin(ctx context.Context, key artifact.Key) error {
	_, err := call(ctx, c, c.artifacts.PinArtifact, &cachev1.PinArtifactRequest{CacheKey: key.String()})
	return err
}

// Promote stores an artifact of one scope in another one too, and returns it as it is there.
func (c *REST) Promote(ctx context.Context, key artifact.Key, from, to artifact.Scope) (*Artifact, error) {
	response := &Artifact{}
	request := &cachev1.PromoteArtifactRequest{FromScope: from.String(), ToScope: to.String()}
	return response, c.post(ctx, request, response, "v1", "artifacts", key.String(), "promote")
}

// Promote stores an artifact of one scope in another one too, and returns it as it is there.
func (c *GRPC) Promote(ctx context.Context, key artifact.Key, from, to artifact.Scope) (*Artifact, error) {
	request := &cachev1.PromoteArtifactRequest{CacheKey: key.String(), FromScope: from.String(), ToScope: to.String()}
	response, err := call(ctx, c, c.artifacts.PromoteArtifact, request)
	return response.GetArtifact(), err
}

// Unpin takes back Pin.
func (c *REST) Unpin(ctx context.Context, key artifact.Key) error {
	return c.read(c.request(ctx, http.MethodDelete, "v1", "artifacts", key.String(), "pin"), &cachev1.UnpinArtifactResponse{})
}

// Unpin takes back Pin.
func (c *GRPC) Unpin(ctx context.Context, key artifact.Key) error {
	_, err := call(ctx, c, c.artifacts.UnpinArtifact, &cachev1.UnpinArtifactRequest{CacheKey: key.String()})
	return err
}

// Stats returns statistics, with at most maxTasks tasks, 1 to MaxTasks.
func (c *REST) Stats(ctx context.Context, maxTasks int) (*Stats, error) {
	stats := &Stats{}
	return stats, c.query(ctx, &cachev1.GetCacheStatsRequest{MaxTasks: int32(maxTasks)}, stats, "v1", "stats")
}

// Stats returns statistics, with at most maxTasks tasks, 1 to MaxTasks.
func (c *GRPC) Stats(ctx context.Context, maxTasks int) (*Stats, error) {
	return call(ctx, c, c.artifacts.GetCacheStats, &cachev1.GetCacheStatsRequest{MaxTasks: int32(maxTasks)})
}

// Quarantine yields what is in quarantine, the newest first.
func (c *REST) Quarantine(ctx context.Context) iter.Seq2[*Quarantined, error] {
	return pages(func(token string) ([]*Quarantined, string, error) {
		page := &cachev1.ListQuarantineResponse{}
		err := c.query(ctx, &cachev1.ListQuarantineRequest{PageSize: MaxPageSize, PageToken: token}, page, "v1", "quarantine")
		return page.GetFiles(), page.GetNextPageToken(), err
	})
}

// Quarantine yields what is in quarantine, the newest first.
func (c *GRPC) Quarantine(ctx context.Context) iter.Seq2[*Quarantined, error] {
	return pages(func(token string) ([]*Quarantined, string, error) {
		page, err := call(ctx, c, c.artifacts.ListQuarantine, &cachev1.ListQuarantineRequest{PageSize: MaxPageSize, PageToken: token})
		return page.GetFiles(), page.GetNextPageToken(), err
	})
}

// query sends what is asked as the parameters of a GET, and reads the answer.
func (c *REST) query(ctx context.Context, asked, into proto.Message, path ...string) error {
	request := c.request(ctx, http.MethodGet, path...)
	parameters := url.Values{}
	addParameters(parameters, "", asked.ProtoReflect())
	request.URL.RawQuery = parameters.Encode()
	return c.read(request, into)
}

// addParameters adds what is set in a message, as the server's gateway reads it: a field of a message in it
// has the name of both, with a dot between them.
func addParameters(parameters url.Values, prefix string, message protoreflect.Message) {
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		name := prefix + string(field.Name())
		if field.IsList() { // of texts
			for i := range value.List().Len() {
				parameters.Add(name, value.List().Get(i).String())
			}
		} else if field.Kind() != protoreflect.MessageKind {
			parameters.Set(name, value.String())
		} else if at, isTime := value.Message().Interface().(*timestamppb.Timestamp); isTime {
			parameters.Set(name, at.AsTime().Format(time.RFC3339Nano))
		} else {
			addParameters(parameters, name+".", value.Message())
		}
		return true
	})
}

// post sends what is asked as the body of a POST, and reads the answer.
func (c *REST) post(ctx context.Context, asked, into proto.Message, path ...string) error {
	text, err := protojson.Marshal(asked)
	if err != nil {
		return err
	}
	request := c.request(ctx, http.MethodPost, path...)
	request.Header.Set("Content-Type", "application/json")
	request.Body = io.NopCloser(bytes.NewReader(text))
	request.ContentLength = int64(len(text))
	return c.read(request, into)
}

// CollectRequest says what is to be kept by a RetentionPolicy, in some scopes by a ScopeRetentionPolicy besides, Collected
// what was removed, each for a Reason.
type (
	CollectRequest       = cachev1.CollectGarbageRequest
	RetentionPolicy      = cachev1.RetentionPolicy
	ScopeRetentionPolicy = cachev1.ScopeRetentionPolicy
	Collected            = cachev1.CollectGarbageResponse
	Reason               = cachev1.RemovalReason
)

// The reasons of removals by a RetentionPolicy.
const (
	ReasonMaxAge     = cachev1.RemovalReason_REMOVAL_REASON_MAX_AGE
	ReasonKeepLast   = cachev1.RemovalReason_REMOVAL_REASON_KEEP_LAST
	ReasonMaxStorage = cachev1.RemovalReason_REMOVAL_REASON_MAX_STORAGE
	ReasonMinFree    = cachev1.RemovalReason_REMOVAL_REASON_MIN_FREE
)

// CollectGarbage removes artifacts that the server's retention policy, changed as the request says, does not
// keep. If there are more than one call removes, the answer says so.
func (c *REST) CollectGarbage(ctx context.Context, request *CollectRequest) (*Collected, error) {
	collected := &Collected{}
	return collected, c.post(ctx, request, collected, "v1", "artifacts:collectGarbage")
}

// CollectGarbage removes artifacts that the server's retention policy, changed as the request says, does not
// keep. If there are more than one call removes, the answer says so.
func (c *GRPC) CollectGarbage(ctx context.Context, request *CollectRequest) (*Collected, error) {
	return call(ctx, c, c.artifacts.CollectGarbage, request)
}
