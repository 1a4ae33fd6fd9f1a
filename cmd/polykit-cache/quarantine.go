package main

import (
	"cmp"
	"fmt"
	"io"
	"iter"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/client"
)

const quarantineLong = `quarantine lists the files that the server found damaged and moved out of the way, the newest
first: when, the size, the key that the file was stored under, or its name if it was no artifact,
and what was wrong with it. Their keys can be uploaded again, and nothing serves them any more;
the server removes them --quarantine-max-age after they were moved, or earlier where it needs the
room. They lie in .polykit-cache/quarantine of its storage directory. It lists those of all scopes
together, and so takes no --scope.

With --json it prints JSON lines, for each file an object on a line of its own with name,
cache_key, size, reason and quarantined_at, as they arrive: all files were listed only if the
exit status is 0.`

const quarantineExample = `  polykit-cache quarantine
  polykit-cache quarantine --json | jq -r .reason | sort | uniq -c`

func quarantineCommand() *cobra.Command {
	var flags remoteFlags
	cmd := &cobra.Command{
		Use:               "quarantine",
		Short:             "List what was found damaged",
		Long:              quarantineLong,
		Example:           quarantineExample,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := flags.ofAllScopes(cmd); err != nil {
				return err
			}
			server, err := flags.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer server.Close()
			print := printQuarantine
			if flags.json {
				print = printLines
			}
			return interrupted(print(cmd.OutOrStdout(), server.Quarantine(cmd.Context())))
		},
	}
	flags.add(cmd.Flags())
	return cmd
}

func printQuarantine(w io.Writer, files iter.Seq2[*client.Quarantined, error]) error {
	table := newTable(w)
	rows := 0
	for file, err := range files {
		if err != nil {
			table.Flush()
			return err
		}
		if rows == 0 {
			fmt.Fprintln(table, "WHEN\tSIZE\tKEY OR NAME\tREASON")
		}
		rows++
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", exactTime(file.GetQuarantinedAt()), formatSize(file.GetSize()),
			formatKey(file.GetScope(), cmp.Or(file.GetCacheKey(), file.GetName())), orDash(file.GetReason()))
	}
	return table.Flush()
}
