package main

import (
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// filterHelp is a part of the help of every command that takes filterFlags.
const filterHelp = `All filters that are given must fit. A TIME is a duration back from now, such as 24h or 90m, a
date such as 2026-01-31, which begins in the local time zone, or a date and time as in RFC 3339.
A SIZE is in bytes as uploaded, or has a unit: 512KiB, 2GB. Filters are not read from the
environment.`

// filterFlags say which artifacts a command is about.
//
// None of them is read from the environment: there --max-size is set for the server, and a command that
// deletes must not do so by what is not in sight.
type filterFlags struct {
	packageName, taskName, keyPrefix                 string
	storedAfter, storedBefore, usedAfter, usedBefore timeFlag
	minSize, maxSize                                 sizeFlag
	pinned                                           optionalBool
}

func (f *filterFlags) add(to *pflag.FlagSet) {
	flags := pflag.NewFlagSet("filters", pflag.ContinueOnError)
	flags.SortFlags = false
	flags.StringVar(&f.packageName, "package", "", "only artifacts of the package with this `name`")
	flags.StringVar(&f.taskName, "task", "", "only artifacts of tasks with this `name`")
	flags.StringVar(&f.keyPrefix, "key-prefix", "", "only artifacts whose key begins with these hexadecimal `digits`")
	flags.Var(&f.storedAfter, "stored-after", "only artifacts that were stored then or later")
	flags.Var(&f.storedBefore, "stored-before", "only artifacts that were stored earlier")
	flags.Var(&f.usedAfter, "used-after", "only artifacts that were used last then or later: stored, downloaded or asked for")
	flags.Var(&f.usedBefore, "used-before", "only artifacts that were used last earlier")
	flags.Var(&f.minSize, "min-size", "only artifacts of at least this size")
	flags.Var(&f.maxSize, "max-size", "only artifacts of at most this size")
	flags.Var(&f.pinned, "pinned", "only artifacts that are pinned, or with --pinned=false only those that are not")
	flags.Lookup("pinned").NoOptDefVal = "true"
	flags.VisitAll(notFromEnvironment)
	to.AddFlagSet(flags)
}

// filter returns what is matched. It is empty if no filter was given.
func (f *filterFlags) filter(cmd *cobra.Command) (*client.Filter, error) {
	for name, value := range map[string]string{"package": f.packageName, "task": f.taskName, "key-prefix": f.keyPrefix} {
		// As of a variable that is not set. It would match everything.
		if value == "" && cmd.Flags().Changed(name) {
			return nil, usageError("--%s is empty; leave it out to match any", name)
		}
	}
	prefix := strings.ToLower(f.keyPrefix)
	if strings.Trim(prefix, "0123456789abcdef") != "" || len(prefix) > artifact.MaxKeyDigits {
		return nil, usageError("--key-prefix is %q; it must be at most %d hexadecimal digits", f.keyPrefix, artifact.MaxKeyDigits)
	}
	filter := &client.Filter{
		PackageName:  f.packageName,
		TaskName:     f.taskName,
		KeyPrefix:    prefix,
		StoredAfter:  f.storedAfter.timestamp(),
		StoredBefore: f.storedBefore.timestamp(),
		UsedAfter:    f.usedAfter.timestamp(),
		UsedBefore:   f.usedBefore.timestamp(),
		MinSize:      int64(f.minSize),
		Pinned:       f.pinned.value,
	}
	if f.maxSize > 0 {
		filter.MaxSize = proto.Int64(int64(f.maxSize))
	}
	return filter, nil
}

// timeFlag is a time. If it was given as a duration, it does not move on while the command runs.
type timeFlag struct{ at time.Time }

func (t *timeFlag) String() string {
	if t.at.IsZero() {
		return "" // not set
	}
	return t.at.Format(time.RFC3339)
}

func (t *timeFlag) Set(text string) error {
	if back, err := time.ParseDuration(text); err == nil && back >= 0 {
		return t.set(time.Now().Add(-back))
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if at, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t.set(at)
		}
	}
	return errors.New("not a duration back from now such as 24h, a date such as 2026-01-31, or a time such as 2026-01-31T12:00:00Z")
}

// set sets a time, which must be one that a server takes: the zero time would count as not given.
func (t *timeFlag) set(at time.Time) error {
	if year := at.UTC().Year(); year < 1970 || year >= 2262 {
		return errors.New("not a time from 1970 to 2261")
	}
	t.at = at
	return nil
}

func (t *timeFlag) Type() string { return "time" }

func (t *timeFlag) timestamp() *timestamppb.Timestamp {
	if t.at.IsZero() {
		return nil
	}
	return timestamppb.New(t.at)
}

// optionalBool is yes, no, or not given.
type optionalBool struct{ value *bool }

func (o *optionalBool) String() string {
	if o.value == nil {
		return ""
	}
	return strconv.FormatBool(*o.value)
}

func (o *optionalBool) Set(text string) error {
	value, err := strconv.ParseBool(text)
	if err != nil {
		return errors.New("not true or false")
	}
	o.value = &value
	return nil
}

func (o *optionalBool) Type() string { return "bool" }
