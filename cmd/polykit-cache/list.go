package main

import (
	"fmt"
	"io"
	"iter"
	"math"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/client"
)

const listLong = `list lists the artifacts that are stored: the key, the package and task that made it, the size as
uploaded, when it was stored and when it was used last, how many times it was downloaded, and
whether it is pinned. The key of an artifact in another scope than the default one has the scope
before it, as in pr-7/0123…. What is not known, as of an artifact that another server stored and
nobody asked for yet, is "-". Of a name of more than 60 characters the rest is left out; --json
has it all.

` + filterHelp + `

What was stored or used last, or is the largest, comes first, and of keys the smallest; --reverse
turns that round. Of what is left out because of --limit it says on standard error that there is
more.

The server answers from its index, which may be some seconds behind. While "polykit-cache stats"
says that the index is not complete, artifacts may be missing here. What is stored, used or
deleted meanwhile may be missing too.

With --json it prints JSON lines, for each artifact an object on a line of its own with artifact,
as "polykit-cache stat --json" prints it, last_used_at, use_count, disk_size and pinned, as they
arrive: all were listed only if the exit status is 0 and nothing is on standard error.`

const listExample = `  polykit-cache list
  polykit-cache list --package web --stored-after 24h
  polykit-cache list --sort size --limit 10
  polykit-cache list --used-before 720h --limit 0 --json | jq -r .artifact.cache_key`

// alignedRows is how many rows of a table are aligned with each other, so that a long one comes as it
// arrives, and takes no more memory.
const alignedRows = 1000

// listFlags are the flags of list.
type listFlags struct {
	remoteFlags
	filter  filterFlags
	sort    choiceFlag
	reverse bool
	limit   int
}

func listCommand() *cobra.Command {
	flags := listFlags{sort: choiceFlag{"stored", []string{"stored", "used", "size", "key"}}}
	cmd := &cobra.Command{
		Use:               "list",
		Short:             "List what is stored",
		Long:              listLong,
		Example:           listExample,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			request, err := flags.request(cmd)
			if err != nil {
				return err
			}
			server, err := flags.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer server.Close()
			return flags.print(cmd, server.List(cmd.Context(), request))
		},
	}
	f := cmd.Flags()
	flags.filter.add(f)
	f.Var(&flags.sort, "sort", "what to sort by")
	f.BoolVar(&flags.reverse, "reverse", false, "sort the other way round")
	f.IntVar(&flags.limit, "limit", 50, "most artifacts that are listed; 0 for all")
	flags.add(f)
	completeChoices(cmd, "sort", flags.sort.choices)
	return cmd
}

func (l *listFlags) request(cmd *cobra.Command) (*client.ListRequest, error) {
	if err := checkBounds([]bound{{"limit", int64(l.limit), 0, math.MaxInt32}}); err != nil {
		return nil, err
	}
	filter, err := l.filter.filter(cmd)
	if err != nil {
		return nil, err
	}
	filter.Scopes = l.scope.names()
	request := &client.ListRequest{Filter: filter, PageSize: client.MaxPageSize}
	if l.limit > 0 {
		request.PageSize = int32(min(l.limit+1, client.MaxPageSize)) // one more tells whether there are more
	}
	request.OrderBy = map[string]client.Order{
		"stored": client.ByStoredAt,
		"used":   client.ByLastUsedAt,
		"size":   client.BySize,
		"key":    client.ByCacheKey,
	}[l.sort.value]
	request.Descending = (l.sort.value != "key") != l.reverse
	return request, nil
}

// print prints artifacts, and says on standard error if there are none, or more than the limit.
func (l *listFlags) print(cmd *cobra.Command, artifacts iter.Seq2[*client.Stored, error]) error {
	listed, more := 0, false
	limited := func(yield func(*client.Stored, error) bool) {
		for stored, err := range artifacts {
			if more = err == nil && l.limit > 0 && listed == l.limit; more {
				return
			}
			listed++
			if !yield(stored, err) {
				return
			}
		}
	}
	print := printStored
	if l.json {
		print = printLines
	}
	if err := print(cmd.OutOrStdout(), limited); err != nil {
		return interrupted(err)
	}
	switch {
	case more:
		fmt.Fprintf(cmd.ErrOrStderr(), "%s of more artifacts; --limit 0 lists all\n", humanize.Comma(int64(listed)))
	case listed == 0 && !l.json:
		fmt.Fprintln(cmd.ErrOrStderr(), "no artifacts")
	}
	return nil
}

// printStored prints artifacts as a table.
func printStored(w io.Writer, artifacts iter.Seq2[*client.Stored, error]) error {
	table := newTable(w)
	rows := 0
	for stored, err := range artifacts {
		if err != nil {
			table.Flush()
			return err
		}
		switch {
		case rows == 0:
			fmt.Fprintln(table, "KEY\tPACKAGE\tTASK\tSIZE\tSTORED\tUSED\tUSES\tPINNED")
		case rows%alignedRows == 0:
			if err := table.Flush(); err != nil {
				return err
			}
		}
		rows++
		pinned := "no"
		if stored.GetPinned() {
			pinned = "yes"
		}
		about := stored.GetArtifact()
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", formatKey(about.GetScope(), about.GetCacheKey()), formatName(about.GetPackageName()), formatName(about.GetTaskName()),
			formatSize(about.GetSize()), formatAge(about.GetStoredAt()), formatAge(stored.GetLastUsedAt()), humanize.Comma(stored.GetUseCount()), pinned)
	}
	return table.Flush()
}
