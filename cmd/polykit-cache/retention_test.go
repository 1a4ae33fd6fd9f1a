package main

import (
	"reflect"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/polykit/polykit-cache/internal/retention"
)

// TestPolicyOfFlags has each flag in its place, and what holds without any.
func TestPolicyOfFlags(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		want retention.Policy
	}{
		{nil, retention.Policy{MinFree: 50, QuarantineMaxAge: 720 * time.Hour}},
		{[]string{"--max-storage=80%", "--min-free=7", "--max-age=3h", "--keep-last=4", "--quarantine-max-age=5h"},
			retention.Policy{MaxStorage: 800, MinFree: 7, MaxAge: 3 * time.Hour, KeepLast: 4, QuarantineMaxAge: 5 * time.Hour}},
		{[]string{"--scope-retention=pr-*:keep-last=2", "--scope-retention=x:max-age=1h"}, retention.Policy{MinFree: 50, QuarantineMaxAge: 720 * time.Hour,
			Scopes: []retention.ScopePolicy{{Pattern: "pr-*", KeepLast: 2}, {Pattern: "x", MaxAge: time.Hour}}}},
	} {
		flags, set := newRetentionFlags(), pflag.NewFlagSet("", pflag.ContinueOnError)
		flags.add(set)
		if err := set.Parse(test.args); err != nil || !reflect.DeepEqual(flags.policy(1000), test.want) {
			t.Errorf("%s: %+v, %v, want %+v", test.args, flags.policy(1000), err, test.want)
		}
	}
}

// TestShareFlag reads sizes, and parts of a disk of 1,000 bytes.
func TestShareFlag(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		text string
		of   int64
		says string
	}{
		{"0", 0, "0"}, // which it can be set to
		{"0%", 0, "0"},
		{"512KiB", 512 << 10, "512KiB"},
		{"5%", 50, "5%"},
		{" 7.5 %", 75, "7.5%"},
		{"100%", 1000, "100%"},
		{"0.0001%", 1, "0.0001%"}, // 0 would be no limit
	} {
		var flag shareFlag
		if err := flag.Set(test.text); err != nil || flag.of(1000) != test.of || flag.String() != test.says {
			t.Errorf("%q is %d, %q, %v, want %d, %q", test.text, flag.of(1000), flag.String(), err, test.of, test.says)
		}
	}
	for _, text := range []string{"", "%", "-1", "-1%", "100.1%", "NaN%", "Inf%", "0GiB", "1e30%", "99999999999GiB"} {
		var flag shareFlag
		if err := flag.Set(text); err == nil {
			t.Errorf("%q is %d", text, flag.of(1000))
		}
	}
}
