package main

import (
	"reflect"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/polykit/polykit-cache/internal/client"
)

func TestScopeRetentionFlag(t *testing.T) {
	t.Parallel()
	var flag scopeRetentionFlag
	set := pflag.NewFlagSet("", pflag.ContinueOnError)
	set.Var(&flag, "scope-retention", "")
	if err := set.Parse([]string{"--scope-retention=pr-*:max-age=168h,keep-last=1", "--scope-retention", " pr-7:keep-last=0  default:max-age=1h30m *:keep-last=2147483647,max-age=0 "}); err != nil {
		t.Fatal(err)
	}
	want := scopeRetentionFlag{
		{Pattern: "pr-*", MaxAge: 168 * time.Hour, KeepLast: 1},
		{Pattern: "pr-7"},
		{Pattern: "default", MaxAge: 90 * time.Minute},
		{Pattern: "*", KeepLast: 1<<31 - 1},
	}
	if !reflect.DeepEqual(flag, want) {
		t.Errorf("it is %+v, want %+v", flag, want)
	}
	var again scopeRetentionFlag
	if err := again.Set(flag.String()); err != nil || !reflect.DeepEqual(again, want) {
		t.Errorf("%s is read as %+v, %v", flag.String(), again, err)
	}
	messages := []*client.ScopeRetentionPolicy{
		{Pattern: "pr-*", MaxAge: durationpb.New(168 * time.Hour), KeepLast: 1},
		{Pattern: "pr-7", MaxAge: durationpb.New(0)},
		{Pattern: "default", MaxAge: durationpb.New(90 * time.Minute)},
		{Pattern: "*", MaxAge: durationpb.New(0), KeepLast: 1<<31 - 1},
	}
	got := flag.message()
	if len(got) != len(messages) {
		t.Fatalf("as messages there are %d", len(got))
	}
	for i, want := range messages {
		if !proto.Equal(got[i], want) {
			t.Errorf("as a message it is %v, want %v", got[i], want)
		}
	}
}

// TestScopeRetentionIsRefused has all that is wrong refused as a whole, and said.
func TestScopeRetentionIsRefused(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":      "it is empty; give the scopes and what is kept in them, such as 'pr-*:max-age=168h,keep-last=1'",
		"  ":    "it is empty; give the scopes and what is kept in them, such as 'pr-*:max-age=168h,keep-last=1'",
		"pr-*":  `"pr-*" does not say what is kept; put it behind a colon, such as 'pr-*:max-age=168h,keep-last=1'`,
		"pr-*:": `"pr-*:" does not say what is kept; put it behind a colon, such as 'pr-*:max-age=168h,keep-last=1'`,
		":keep-last=1": `"" is neither the name of a scope nor the beginning of names with a * behind it: ` +
			`invalid scope: its name has 0 characters; it must have 1 to 63`,
		"PR-*:keep-last=1": `"PR-*" is neither the name of a scope nor the beginning of names with a * behind it: ` +
			`invalid scope: character 1 of its name is 'P'; use lower-case letters, digits, '.', '_' and '-'`,
		"p*r:keep-last=1": `"p*r" is neither the name of a scope nor the beginning of names with a * behind it: ` +
			`invalid scope: character 2 of its name is '*'; use lower-case letters, digits, '.', '_' and '-'`,
		"pr-**:keep-last=1": `"pr-**" is neither the name of a scope nor the beginning of names with a * behind it: ` +
			`invalid scope: character 4 of its name is '*'; use lower-case letters, digits, '.', '_' and '-'`,
		"x:max-age=7d":                 `max-age is "7d" for "x"; it must be from 0 to 87600h0m0s`,
		"x:max-age=-1s":                `max-age is "-1s" for "x"; it must be from 0 to 87600h0m0s`,
		"x:max-age=87600h0m1s":         `max-age is "87600h0m1s" for "x"; it must be from 0 to 87600h0m0s`,
		"x:max-age":                    `max-age is "" for "x"; it must be from 0 to 87600h0m0s`,
		"x:keep-last=-1":               `keep-last is "-1" for "x"; it must be from 0 to 2147483647`,
		"x:keep-last=2147483648":       `keep-last is "2147483648" for "x"; it must be from 0 to 2147483647`,
		"x:keep-last=1,":               `"" is nothing that can be set for "x"; it must be max-age=DURATION or keep-last=N`,
		"x:min-free=5%":                `"min-free=5%" is nothing that can be set for "x"; it must be max-age=DURATION or keep-last=N`,
		"x:keep-last=1,keep-last=1":    `keep-last is given twice for "x"`,
		"x:keep-last=1 x:max-age=1h":   `"x" is given twice; name each scope or beginning of names once`,
		"first:max-age=1h":             `"first" is given twice; name each scope or beginning of names once`,
		"good:keep-last=1 x:max-age=y": `max-age is "y" for "x"; it must be from 0 to 87600h0m0s`,
	} {
		flag := scopeRetentionFlag{{Pattern: "first", KeepLast: 1}}
		if err := flag.Set(text); err == nil || err.Error() != want {
			t.Errorf("%q: error\n%v, want\n%s", text, err, want)
		}
		if want := (scopeRetentionFlag{{Pattern: "first", KeepLast: 1}}); !reflect.DeepEqual(flag, want) {
			t.Errorf("%q changes it to %+v", text, flag)
		}
	}
}
