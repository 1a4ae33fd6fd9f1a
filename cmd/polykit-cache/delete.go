package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/proto"

	"github.com/polykit/polykit-cache/internal/client"
)

const deleteLong = `delete deletes the artifacts under the given keys, pinned or not; or, without a KEY, those that
the filters match; or with --all everything. Pinned artifacts are then left alone, unless
--pinned asks for them. What is deleted can be uploaded again. Downloads that have begun get all
of it. With KEYs it does not ask.

` + eachKeyHelp + `

With filters or --all it says first what matches, and asks on the terminal; --yes does not ask,
and is needed where there is no terminal. --dry-run only says what would be deleted. It prints
how many artifacts of which package and task were deleted, how many bytes that frees on the
server's disk, and why; or with --json one object, as POST /v1/artifacts:delete answers it, with
removals. The server answers from its index, which may be some seconds behind. If something fails
in the middle, it prints what it knows to be deleted; the same command, run again, deletes the
rest.

` + filterHelp

const deleteExample = `  polykit-cache delete 0123456789abcdef0123456789abcdef
  polykit-cache delete --package web --task build --dry-run
  polykit-cache delete --used-before 720h --yes
  polykit-cache delete --all`

// deleteFlags are the flags of delete.
type deleteFlags struct {
	remoteFlags
	filter filterFlags
	all    bool
	dryRun bool
	yes    bool
}

func deleteCommand() *cobra.Command {
	var flags deleteFlags
	cmd := &cobra.Command{
		Use:               "delete [KEY...]",
		Short:             "Delete artifacts by key, or by filter",
		Long:              deleteLong,
		Example:           deleteExample,
		Args:              cobra.ArbitraryArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			filter, err := flags.check(cmd, args)
			if err != nil {
				return err
			}
			if len(args) > 0 {
				return eachKey(cmd, &flags.remoteFlags, args, remote.Delete)
			}
			server, err := flags.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer server.Close()
			return flags.deleteMatching(cmd, server, filter)
		},
	}
	f := cmd.Flags()
	flags.filter.add(f)
	f.BoolVar(&flags.all, "all", false, "everything that is not pinned")
	f.BoolVar(&flags.dryRun, "dry-run", false, "only say what would be deleted")
	f.BoolVarP(&flags.yes, "yes", "y", false, "do not ask")
	for _, name := range []string{"all", "dry-run", "yes"} {
		notFromEnvironment(f.Lookup(name))
	}
	flags.add(f)
	return cmd
}

// check returns the filter, which is empty if keys or all are given.
func (d *deleteFlags) check(cmd *cobra.Command, keys []string) (*client.Filter, error) {
	filter, err := d.filter.filter(cmd)
	if err != nil {
		return nil, err
	}
	filtered := !proto.Equal(filter, &client.Filter{})
	switch {
	case len(keys) > 0 && (filtered || d.all || d.dryRun):
		return nil, usageError("keys were given, and filters, --all or --dry-run as well; give keys alone, or no keys")
	case filtered && d.all:
		return nil, usageError("--all and a filter were both given; only one of them can be")
	case len(keys) == 0 && !filtered && !d.all:
		return nil, usageError("nothing says what to delete; give keys, a filter such as --package, or --all")
	case len(keys) == 0 && !d.yes && !d.dryRun && !isTerminal(cmd.InOrStdin()):
		return nil, usageError("standard input is no terminal to ask on; look with --dry-run what would be deleted, and give --yes to delete it")
	}
	return filter, nil
}

// isTerminal says whether somebody can be asked who types what r reads.
func isTerminal(r io.Reader) bool {
	file, ok := r.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

func (d *deleteFlags) deleteMatching(cmd *cobra.Command, server remote, filter *client.Filter) error {
	filter.Scopes = d.scope.names()
	request := &client.DeleteRequest{Filter: filter, All: d.all, DryRun: true}
	plan, err := server.DeleteMatching(cmd.Context(), request)
	if err != nil {
		return interrupted(err)
	}
	planned := removals{}
	planned.add(plan.GetRemovals())
	if d.dryRun {
		return d.print(cmd, planned)
	}
	if !d.yes {
		if len(planned) == 0 {
			return d.print(cmd, planned)
		}
		if err := confirm(cmd, planned); err != nil {
			return err
		}
	}
	request.DryRun = false
	bar := progressFor(cmd, d.json)("deleting", planned.diskSize())
	deleted := removals{}
	for more := true; more && err == nil; {
		var part *client.Deleted
		part, err = server.DeleteMatching(cmd.Context(), request)
		if err == nil {
			more = part.GetMore()
			bar.add(deleted.add(part.GetRemovals()))
		}
	}
	bar.stop()
	if err != nil && len(deleted) == 0 {
		return deletedInPart(err)
	}
	return errors.Join(d.print(cmd, deleted), deletedInPart(err))
}

// deletedInPart says of an error what it leaves.
func deletedInPart(err error) error {
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted; more may be deleted than was printed")
	}
	return err
}

// confirm asks whether to delete what is planned.
func confirm(cmd *cobra.Command, planned removals) error {
	to := cmd.ErrOrStderr()
	if err := planned.print(to); err != nil {
		return err
	}
	fmt.Fprintf(to, "Delete %s, %s? [y/N] ", english.Plural(int(planned.artifacts()), "artifact", ""), formatSize(planned.diskSize()))
	answer, err := unlessDone(cmd.Context(), func() (string, error) { return bufio.NewReader(cmd.InOrStdin()).ReadString('\n') })
	if errors.Is(err, context.Canceled) {
		fmt.Fprintln(to)
		return errors.New("interrupted; nothing was deleted")
	}
	switch strings.ToLower(strings.TrimSpace(answer)) { // also what came before the end of the input
	case "y", "yes":
		return nil
	}
	return errors.New("nothing was deleted, since the answer was not y")
}

// print prints what was deleted, or would be.
func (d *deleteFlags) print(cmd *cobra.Command, deleted removals) error {
	if d.json {
		return printLine(cmd.OutOrStdout(), &client.Deleted{Removals: deleted.sorted()})
	}
	if len(deleted) == 0 {
		_, err := fmt.Fprintln(cmd.ErrOrStderr(), "no artifacts")
		return err
	}
	return deleted.print(cmd.OutOrStdout())
}
