package main

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/polykit/polykit-cache/internal/client"
	"github.com/polykit/polykit-cache/internal/retention"
)

// scopeRetentionFlag is what is kept in some scopes, for each PATTERN:NAME=VALUE,... It can be given several times, and
// has several in the environment, with spaces between them.
type scopeRetentionFlag []retention.ScopePolicy

func (s *scopeRetentionFlag) String() string { return strings.Join(s.GetSlice(), " ") }

// GetSlice, Append and Replace let a configuration file have it as a list.
func (s *scopeRetentionFlag) GetSlice() []string {
	var all []string
	for _, p := range *s {
		var limits []string
		if p.MaxAge > 0 {
			limits = append(limits, "max-age="+p.MaxAge.String())
		}
		if p.KeepLast > 0 || len(limits) == 0 {
			limits = append(limits, "keep-last="+strconv.Itoa(p.KeepLast))
		}
		all = append(all, p.Pattern+":"+strings.Join(limits, ","))
	}
	return all
}

// Append is Set, which adds too.
func (s *scopeRetentionFlag) Append(text string) error { return s.Set(text) }

// Replace sets it to nothing but these.
func (s *scopeRetentionFlag) Replace(texts []string) error {
	var replaced scopeRetentionFlag
	for _, text := range texts {
		if err := replaced.Append(text); err != nil {
			return err
		}
	}
	*s = replaced
	return nil
}

func (s *scopeRetentionFlag) Set(text string) error {
	policies := slices.Clone(*s)
	for field := range strings.FieldsSeq(text) {
		p, err := parseScopePolicy(field)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(policies, func(other retention.ScopePolicy) bool { return other.Pattern == p.Pattern }) {
			return fmt.Errorf("%q is given twice; name each scope or beginning of names once", p.Pattern)
		}
		policies = append(policies, p)
	}
	if len(policies) == len(*s) {
		return errors.New("it is empty; give the scopes and what is kept in them, such as 'pr-*:max-age=168h,keep-last=1'")
	}
	*s = policies
	return nil
}

func (s *scopeRetentionFlag) Type() string { return "PATTERN:max-age=DURATION,keep-last=N" }

func parseScopePolicy(text string) (retention.ScopePolicy, error) {
	pattern, limits, found := strings.Cut(text, ":")
	p := retention.ScopePolicy{Pattern: pattern}
	if !found || limits == "" {
		return p, fmt.Errorf("%q does not say what is kept; put it behind a colon, such as 'pr-*:max-age=168h,keep-last=1'", text)
	}
	if err := retention.CheckPattern(pattern); err != nil {
		return p, err
	}
	given := map[string]bool{}
	for limit := range strings.SplitSeq(limits, ",") {
		name, value, _ := strings.Cut(limit, "=")
		if given[name] {
			return p, fmt.Errorf("%s is given twice for %q", name, pattern)
		}
		given[name] = true
		switch name {
		case "max-age":
			age, err := time.ParseDuration(value)
			if err != nil || age < 0 || age > longest {
				return p, fmt.Errorf("max-age is %q for %q; it must be from 0 to %v", value, pattern, longest)
			}
			p.MaxAge = age
		case "keep-last":
			n, err := strconv.ParseUint(value, 10, 31)
			if err != nil {
				return p, fmt.Errorf("keep-last is %q for %q; it must be from 0 to %d", value, pattern, math.MaxInt32)
			}
			p.KeepLast = int(n)
		default:
			return p, fmt.Errorf("%q is nothing that can be set for %q; it must be max-age=DURATION or keep-last=N", limit, pattern)
		}
	}
	return p, nil
}

// message returns the flag as the wire contract says it.
func (s *scopeRetentionFlag) message() []*client.ScopeRetentionPolicy {
	var policies []*client.ScopeRetentionPolicy
	for _, p := range *s {
		policies = append(policies, &client.ScopeRetentionPolicy{Pattern: p.Pattern, MaxAge: durationpb.New(p.MaxAge), KeepLast: int32(p.KeepLast)})
	}
	return policies
}
