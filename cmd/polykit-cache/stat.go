package main

import (
	"fmt"
	"io"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/polykit/polykit-cache/internal/client"
)

const statLong = `stat prints what the server knows of the artifact under KEY, without downloading it.

"created" is when the artifact was made, by the clock of the client that made it; "stored" is when
it was stored, by the server's clock.

With --json it prints one object on one line, the same over REST and gRPC: the answer of GET
/v1/artifacts/KEY/metadata, with 64-bit integers as strings and times as in RFC 3339.

If the server has no artifact under KEY the exit status is 3.`

const statExample = `  polykit-cache stat 0123456789abcdef0123456789abcdef
  polykit-cache stat 0123456789abcdef0123456789abcdef --json | jq -r .hash`

func statCommand() *cobra.Command {
	var flags remoteFlags
	cmd := &cobra.Command{
		Use:     "stat KEY",
		Short:   "Print what the server knows of an artifact",
		Long:    statLong,
		Example: statExample,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			server, key, err := flags.connectFor(cmd.ErrOrStderr(), args[0])
			if err != nil {
				return err
			}
			defer server.Close()
			stat, err := server.Stat(cmd.Context(), key)
			if err != nil {
				return explain(key, err)
			}
			if flags.json {
				return printLine(cmd.OutOrStdout(), stat)
			}
			return printStat(cmd.OutOrStdout(), stat)
		},
	}
	flags.add(cmd.Flags())
	return cmd
}

func printStat(w io.Writer, stat *client.Artifact) error {
	table := newTable(w)
	for _, row := range [][2]string{
		{"key", printable(stat.GetCacheKey())},
		{"hash", printable(stat.GetHash())},
		{"size", exactSize(stat.GetSize())},
		{"unpacked", exactSize(stat.GetUncompressedSize())},
		{"files", humanize.Comma(stat.GetFileCount())},
		{"package", printable(stat.GetPackageName())},
		{"task", printable(stat.GetTaskName())},
		{"command", printable(stat.GetCommand())},
		{"created", exactTime(stat.GetCreatedAt())},
		{"stored", exactTime(stat.GetStoredAt())},
	} {
		fmt.Fprintf(table, "%s\t%s\n", row[0], row[1])
	}
	return table.Flush()
}

func exactSize(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%s (%d bytes)", formatSize(n), n)
}

func exactTime(t *timestamppb.Timestamp) string {
	return fmt.Sprintf("%s (%s)", t.AsTime().Format(time.RFC3339), humanize.Time(t.AsTime()))
}
