package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/client"
)

const statsLong = `stats prints how much is stored, what it was good for, and how full the disk is:

  artifacts   how many are stored, and of how many packages and tasks
  size        their size as uploaded, that is, compressed, and what they unpack to
  on disk     what they take on the server's disk, in whole blocks
  hit rate    which part of the downloads found an artifact, since the server started and in all,
              that is, since its index began
  uploads     how many were stored
  evicted     how many artifacts the server's retention policy removed
  storage     what the storage directory takes of what it may take (--max-storage)
  disk        how full the disk is, and how much is kept free (--min-free)
  quarantine  how many damaged files lie there
  scopes      how often a key was stored in one scope and another, with the same files or with
              different ones

Then it lists the scopes, if there are others than the default one, and the packages and tasks,
those first that take most. A miss counts for the task whose artifact was then uploaded under the
key. With a token that is not for all scopes, or with --scope, it is only how much is stored in
the scopes that are read: what happened, and how full the disk is, is known for all together.

While the index is not complete, as after a crash, the numbers are lower than they should be, and
it says so on standard error.

With --json it prints one object on one line, the answer of GET /v1/stats.`

const statsExample = `  polykit-cache stats
  polykit-cache stats --limit 1000
  polykit-cache stats --json | jq .total.usage.hit_rate`

func statsCommand() *cobra.Command {
	var flags remoteFlags
	limit := 20
	cmd := &cobra.Command{
		Use:               "stats",
		Short:             "Print how much is stored, and what it was good for",
		Long:              statsLong,
		Example:           statsExample,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkBounds([]bound{{"limit", int64(limit), 1, client.MaxTasks}}); err != nil {
				return err
			}
			server, err := flags.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer server.Close()
			stats, err := server.Stats(cmd.Context(), limit)
			if err != nil {
				return interrupted(err)
			}
			if flags.json {
				return printLine(cmd.OutOrStdout(), stats)
			}
			if err := printStats(cmd.OutOrStdout(), stats); err != nil {
				return err
			}
			if listed, all := len(stats.GetTasks()), stats.GetTaskCount(); int64(listed) < all {
				fmt.Fprintf(cmd.ErrOrStderr(), "%d of %s; --limit lists up to %d\n", listed, countTasks(all), client.MaxTasks)
			}
			if !stats.GetIndexComplete() {
				fmt.Fprintln(cmd.ErrOrStderr(), "the index is not complete yet, and the numbers are lower than they should be; ask again later")
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&limit, "limit", limit, fmt.Sprintf("most packages and tasks that are listed, up to %d", client.MaxTasks))
	flags.add(cmd.Flags())
	return cmd
}

func printStats(w io.Writer, stats *client.Stats) error {
	total := stats.GetTotal()
	rows := [][2]string{
		{"artifacts", fmt.Sprintf("%s of %s", humanize.Comma(total.GetArtifactCount()), countTasks(stats.GetTaskCount()))},
		{"size", fmt.Sprintf("%s, unpacked %s%s", formatSize(total.GetSize()), formatSize(total.GetUncompressedSize()), formatTimes(total.GetUncompressedSize(), total.GetSize()))},
		{"on disk", formatSize(total.GetDiskSize())},
	}
	if usage := total.GetUsage(); usage != nil { // who sees some scopes only is not told
		rows = append(rows, [][2]string{
			{"hit rate", fmt.Sprintf("%s since the server started, %s; %s in all", formatHits(stats.GetSinceStart()), formatAge(stats.GetStartedAt()), formatHits(usage))},
			{"uploads", fmt.Sprintf("%s since then; %s in all", humanize.Comma(stats.GetSinceStart().GetStoredCount()), humanize.Comma(usage.GetStoredCount()))},
			{"evicted", fmt.Sprintf("%s since then; %s in all", formatEvicted(stats.GetSinceStart()), formatEvicted(usage))},
		}...)
	}
	if storage := stats.GetStorage(); storage != nil {
		stored := formatSize(storage.GetUsedSize()) + ", without a limit"
		if most := storage.GetMaxStorageSize(); most > 0 {
			stored = fmt.Sprintf("%s of at most %s  %s", formatSize(storage.GetUsedSize()), formatSize(most), formatBar(storage.GetUsedSize(), most))
		}
		rows = append(rows, [][2]string{
			{"storage", stored},
			{"disk", fmt.Sprintf("%s free of %s  %s; %s is kept free", formatSize(storage.GetFreeSize()), formatSize(storage.GetDiskSize()),
				formatBar(storage.GetDiskSize()-storage.GetFreeSize(), storage.GetDiskSize()), formatSize(storage.GetMinFreeSize()))},
			{"quarantine", fmt.Sprintf("%s, %s", english.Plural(int(storage.GetQuarantinedCount()), "file", ""), formatSize(storage.GetQuarantinedSize()))},
		}...)
	}
	table := newTable(w)
	for _, row := range rows {
		fmt.Fprintf(table, "%s\t%s\n", row[0], row[1])
	}
	if compared := stats.GetComparisons(); compared.GetAgreedCount()+compared.GetDifferedCount() > 0 {
		fmt.Fprintf(table, "scopes\tagree in %s, differ in %s in all\n", humanize.Comma(compared.GetAgreedCount()), humanize.Comma(compared.GetDifferedCount()))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if len(stats.GetScopes()) > 1 {
		fmt.Fprintln(table, "\nSCOPE\tARTIFACTS\tSIZE\tON DISK")
		for _, scope := range stats.GetScopes() {
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", printable(scope.GetScope()), humanize.Comma(scope.GetArtifactCount()), formatSize(scope.GetSize()), formatSize(scope.GetDiskSize()))
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	if len(stats.GetTasks()) == 0 {
		return nil
	}
	fmt.Fprintln(table, "\nPACKAGE\tTASK\tARTIFACTS\tSIZE\tON DISK\tHIT RATE\tEVICTED")
	for _, task := range stats.GetTasks() {
		about, evicted := task.GetStats(), "-"
		if usage := about.GetUsage(); usage != nil {
			evicted = humanize.Comma(usage.GetEvictedCount())
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", formatName(task.GetPackageName()), formatName(task.GetTaskName()),
			humanize.Comma(about.GetArtifactCount()), formatSize(about.GetSize()), formatSize(about.GetDiskSize()),
			formatHits(about.GetUsage()), evicted)
	}
	return table.Flush()
}

func countTasks(n int64) string {
	return english.Plural(int(n), "package and task", "packages and tasks")
}

// formatTimes returns how many times as large something unpacks, or nothing if there is nothing.
func formatTimes(unpacked, packed int64) string {
	if packed <= 0 || unpacked <= 0 {
		return ""
	}
	return fmt.Sprintf(" (%.1f times)", float64(unpacked)/float64(packed))
}

// formatHits returns which part of downloads found an artifact, and of how many.
func formatHits(usage *client.Usage) string {
	asked := usage.GetHitCount() + usage.GetMissCount()
	if asked == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f%% of %s", 100*usage.GetHitRate(), humanize.Comma(asked))
}

func formatEvicted(usage *client.Usage) string {
	return fmt.Sprintf("%s of %s", humanize.Comma(usage.GetEvictedCount()), formatSize(usage.GetEvictedDiskSize()))
}

// formatBar draws a part of a whole.
func formatBar(part, whole int64) string {
	const width = 20
	filled := 0.0
	if whole > 0 {
		filled = min(1, max(0, float64(part)/float64(whole)))
	}
	marks := int(filled*width + 0.5)
	return fmt.Sprintf("[%s%s] %.0f%%", strings.Repeat("#", marks), strings.Repeat("-", width-marks), 100*filled)
}
