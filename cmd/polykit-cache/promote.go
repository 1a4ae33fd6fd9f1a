package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/artifact"
)

const promoteLong = `promote stores the artifact under each KEY of the scope --from in the scope --to too, where builds
read it that do not trust the first one. Look at what you promote: from then on it is what they
get. No bytes are copied, and the artifact stays where it was.

--to must be more trusted than --from, and the token for an admin of both, or one that the
server's auth file lets promote between the two.

` + eachKeyHelp + `

If --to has an artifact under a KEY already, it ends there, and the exit status is 4.`

const promoteExample = `  polykit-cache promote --from nightly --to default 0123456789abcdef0123456789abcdef
  polykit-cache list --scope nightly --package web --limit 0 --json | jq -r .artifact.cache_key |
    xargs polykit-cache promote --from nightly --to default`

func promoteCommand() *cobra.Command {
	var flags remoteFlags
	var from, to scopeFlag
	cmd := &cobra.Command{
		Use:               "promote --from SCOPE --to SCOPE KEY...",
		Short:             "Let artifacts of a scope be those of a more trusted one",
		Long:              promoteLong,
		Example:           promoteExample,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !from.given || !to.given {
				return usageError("--from and --to are missing; give the scope that has the artifacts, and the one that is to have them too")
			}
			return eachKey(cmd, &flags, args, func(server remote, ctx context.Context, key artifact.Key) error {
				_, err := server.Promote(ctx, key, from.Scope, to.Scope)
				return err
			})
		},
	}
	f := cmd.Flags()
	f.Var(&from, "from", "scope that has the artifacts")
	f.Var(&to, "to", "scope that is to have them too")
	for _, name := range []string{"from", "to"} { // what is changed must be in sight
		notFromEnvironment(f.Lookup(name))
	}
	flags.add(f)
	return cmd
}
