package main

import (
	"fmt"
	"io"
	"iter"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/client"
)

const filesLong = `files lists the files in the artifact under KEY: their paths, sizes and SHA-256, in ascending
order of the bytes of their paths. The server verifies the whole artifact for it. A path with
characters that cannot be printed is shown quoted.

With --json it prints JSON lines, for each file an object on a line of its own with path, hash and
size, as they arrive: all files were listed only if the exit status is 0.

If the server has no artifact under KEY the exit status is 3.`

const filesExample = `  polykit-cache files 0123456789abcdef0123456789abcdef
  polykit-cache files 0123456789abcdef0123456789abcdef --json | jq -r .path`

func filesCommand() *cobra.Command {
	var flags remoteFlags
	cmd := &cobra.Command{
		Use:     "files KEY",
		Short:   "List the files in an artifact",
		Long:    filesLong,
		Example: filesExample,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			server, key, err := flags.connectFor(cmd.ErrOrStderr(), args[0])
			if err != nil {
				return err
			}
			defer server.Close()
			print := printFiles
			if flags.json {
				print = printLines
			}
			return explain(key, print(cmd.OutOrStdout(), server.Files(cmd.Context(), key)))
		},
	}
	flags.add(cmd.Flags())
	return cmd
}

func printFiles(w io.Writer, files iter.Seq2[*client.File, error]) error {
	table := newTable(w)
	for file, err := range files {
		if err != nil {
			return err
		}
		fmt.Fprintf(table, "%s\t%d\t%s\n", printable(file.GetPath()), file.GetSize(), printable(file.GetHash()))
	}
	return table.Flush()
}
