package main

import (
	"fmt"
	"io"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"
)

const importLong = `import takes artifacts over that another server or a client stored, so that builds find them from
the first day. It looks by itself what DIR is, and says so:

  a server's storage directory   DIR/aa/bb/KEY.zst, of the Rust server or of this one
  a Polykit client's cache       DIR/remote/0123456789abcdef/aa/REST-OF-KEY.zst; what is beside
                                 "remote" is not looked at
  the storage directory itself   if DIR is --storage-dir

Artifacts from another directory are copied, each as if it was uploaded: verified in full, and
stored only if it is sound, in the scope that it is in there. They count as stored now; pins are
not taken over. DIR is only read, and may be in use.

In the storage directory itself nothing is copied. What a server there did not verify by these
rules, as the Rust server, is verified, so that the first request for it need not wait and it is
listed with its package and task. What is damaged is moved to quarantine; what is over the limits
is left where it is. Without import, a server verifies each when it is first asked for.

No server may use the storage directory meanwhile; it is created if it does not exist. Give the
limits that the server has: as flags, in the same environment, or with its --config. Nothing is
evicted to make room: import stops at --max-storage and --min-free.

What is there already is passed over without being read. So an import that was interrupted, or
stopped for lack of room, is continued by the same command; Ctrl-C lets the artifacts in progress
be finished. As many are imported at once as there are processors.

--dry-run only counts what would be imported. It reads no artifact and writes nothing, and a
server may use the storage directory meanwhile. What turns out to be damaged, or is in DIR under
the same KEY twice, is counted all the same.

At the end it prints how many artifacts of how many bytes were imported, how many were there
already, and how many files are foreign: no artifacts, or symbolic links, which are not followed.
Each that was refused is printed with the reason on standard error, and the exit status is then 1.`

const importExample = `  polykit-cache import /var/cache/old --storage-dir /var/cache/polykit --dry-run
  polykit-cache import /var/cache/old --storage-dir /var/cache/polykit
  polykit-cache import ~/.cache/polykit --storage-dir /var/cache/polykit
  polykit-cache import /var/cache/polykit --storage-dir /var/cache/polykit`

// importFlags are the flags of import.
type importFlags struct {
	storageDir string
	dryRun     bool
	retention  retentionFlags // of which only what bounds the room counts
	limits     limitFlags
}

func importCommand() *cobra.Command {
	flags := importFlags{retention: newRetentionFlags(), limits: newLimitFlags()}
	cmd := &cobra.Command{
		Use:     "import DIR",
		Short:   "Take artifacts over from another server or a client",
		Long:    importLong,
		Example: importExample,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if flags.storageDir == "" {
				return usageError("--storage-dir is empty; give the directory to import into")
			}
			if err := flags.limits.complete(); err != nil {
				return err
			}
			return flags.run(cmd, args[0])
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	addConfig(f)
	f.StringVar(&flags.storageDir, "storage-dir", "./cache", "`directory` to import into; created if it does not exist")
	f.BoolVar(&flags.dryRun, "dry-run", false, "only count what would be imported")
	notFromEnvironment(f.Lookup("dry-run"))
	f.Var(&flags.retention.maxStorage, "max-storage", "most that everything in the storage directory may take, in whole blocks; import stops there; 0 for no limit (default 0)")
	f.Var(&flags.retention.minFree, "min-free", "least that is left free on the disk; import stops there; 0 for all of it")
	flags.limits.add(f)
	return cmd
}

func (i *importFlags) run(cmd *cobra.Command, dir string) error {
	from, err := openSource(dir, i.storageDir)
	if err != nil {
		return err
	}
	what := from.layout.name
	if from.own {
		what = "the storage directory itself"
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s is %s\n", printable(dir), what)
	run := &importRun{
		source:  from,
		dryRun:  i.dryRun,
		maxSize: int64(i.limits.maxSize),
		begin:   progressFor(cmd, false),
		refused: cmd.ErrOrStderr(),
	}
	if i.dryRun {
		err = run.plan(cmd.Context(), i.storageDir)
	} else {
		err = run.into(cmd, i)
	}
	if run.bar != nil {
		run.bar.stop()
		if err := run.print(cmd.OutOrStdout()); err != nil {
			return err
		}
	}
	if err == nil && run.counts[outcomeRefused].artifacts > 0 {
		err = fmt.Errorf("%s refused; it is said above why", english.Plural(int(run.counts[outcomeRefused].artifacts), "artifact was", "artifacts were"))
	}
	return interruptedImport(err)
}

// print prints how many artifacts came to which outcome.
func (r *importRun) print(w io.Writer) error {
	taken := "imported"
	switch {
	case r.source.own && r.dryRun:
		taken = "to verify"
	case r.source.own:
		taken = "verified"
	case r.dryRun:
		taken = "to import"
	}
	table := newTable(w)
	for outcome, name := range []string{outcomeTaken: taken, outcomeExisted: "there already", outcomeRefused: "refused"} {
		count := r.counts[outcome]
		fmt.Fprintf(table, "%s\t%s\t%s\n", name, countArtifacts(count.artifacts), formatSize(count.bytes))
	}
	fmt.Fprintf(table, "foreign\t%s %s\n", humanize.Comma(r.foreign), english.PluralWord(int(r.foreign), "file", ""))
	return table.Flush()
}

func countArtifacts(n int64) string {
	return humanize.Comma(n) + " " + english.PluralWord(int(n), "artifact", "")
}
