package client

import (
	"context"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
)

// CollectRequest says what is to be kept by a RetentionPolicy, Collected what was removed, each for a Reason.
type (
	CollectRequest  = cachev1.CollectGarbageRequest
	RetentionPolicy = cachev1.RetentionPolicy
	Collected       = cachev1.CollectGarbageResponse
	Reason          = cachev1.RemovalReason
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
