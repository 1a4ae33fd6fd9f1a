package main

import (
	"github.com/spf13/cobra"
)

const pinLong = `pin keeps the artifact under each KEY from being evicted, whatever the server's limits are, until
it is unpinned or deleted: those of a release, say. It is served, and listed, as any other. If
pinned artifacts alone take more than --max-storage, nothing else can be kept.

Pinning a pinned artifact does nothing. "polykit-cache list --pinned" lists what is pinned.

` + eachKeyHelp

const pinExample = `  polykit-cache pin 0123456789abcdef0123456789abcdef
  polykit-cache list --package web --stored-after 1h --limit 0 --json |
    jq -r .artifact.cache_key | xargs polykit-cache pin`

const unpinLong = `unpin takes back "polykit-cache pin" for the artifact under each KEY: it is evicted when its turn
comes.

Unpinning an artifact that is not pinned does nothing.

` + eachKeyHelp

const unpinExample = `  polykit-cache unpin 0123456789abcdef0123456789abcdef
  polykit-cache list --pinned --limit 0 --json | jq -r .artifact.cache_key | xargs polykit-cache unpin`

// eachKeyHelp is a part of the help of every command that is eachKey.
const eachKeyHelp = `Of the KEYs it prints those for which that is done, one a line, or with --json for each an object
on a line of its own with cache_key. If the server has no artifact under a KEY, it goes on with
the others, and the exit status is 3.`

func pinCommand() *cobra.Command {
	var flags remoteFlags
	cmd := &cobra.Command{
		Use:               "pin KEY...",
		Short:             "Keep artifacts from being evicted",
		Long:              pinLong,
		Example:           pinExample,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, args []string) error { return eachKey(cmd, &flags, args, remote.Pin) },
	}
	flags.add(cmd.Flags())
	return cmd
}

func unpinCommand() *cobra.Command {
	var flags remoteFlags
	cmd := &cobra.Command{
		Use:               "unpin KEY...",
		Short:             "Let pinned artifacts be evicted again",
		Long:              unpinLong,
		Example:           unpinExample,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, args []string) error { return eachKey(cmd, &flags, args, remote.Unpin) },
	}
	flags.add(cmd.Flags())
	return cmd
}
