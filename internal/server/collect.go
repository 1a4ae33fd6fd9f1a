package server

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/retention"
)

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
