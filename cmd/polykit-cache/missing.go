package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

const missingLong = `missing asks the server for many keys at once which of them have no artifact, and prints these,
one a line, lower-case and each once, in the order in which they were given. Without a KEY, or if
it is "-", it reads keys from standard input, one a line.

Those that have an artifact count as used now, so that they are not evicted before they are
downloaded. Of one that another server stored and nobody asked for yet, the server first finds
out whether it is sound, which may take a while.

With --json it prints one object with missing_cache_keys.

The exit status is 0 also if keys are missing: what is printed is the answer.`

const missingExample = `  polykit-cache missing 0123456789abcdef0123456789abcdef 123456789abcdef0123456789abcdef0
  list-keys-somehow | polykit-cache missing
  test -z "$(polykit-cache missing 0123456789abcdef0123456789abcdef)" && echo "it is there"`

func missingCommand() *cobra.Command {
	var flags remoteFlags
	cmd := &cobra.Command{
		Use:               "missing [KEY...]",
		Short:             "Say which of many keys have no artifact",
		Long:              missingLong,
		Example:           missingExample,
		Args:              cobra.ArbitraryArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			keys, err := parseKeys(args)
			if len(args) == 0 || slices.Equal(args, []string{"-"}) {
				keys, err = unlessDone(cmd.Context(), func() ([]artifact.Key, error) { return readKeys(cmd.InOrStdin()) })
			}
			if err != nil {
				return interrupted(err)
			}
			server, err := flags.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer server.Close()
			return interrupted(printMissing(cmd.Context(), cmd.OutOrStdout(), server, keys, flags.json))
		},
	}
	flags.add(cmd.Flags())
	return cmd
}

// readKeys reads keys, one a line. Empty lines are none.
func readKeys(r io.Reader) ([]artifact.Key, error) {
	var keys []artifact.Key
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" {
			continue
		}
		key, err := artifact.ParseKey(text)
		if err != nil {
			return nil, usageError("line %d of standard input is %s: %w", n, printable(text), err)
		}
		keys = append(keys, key)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read keys from standard input: %w", err)
	}
	return keys, nil
}

// printMissing prints those of some keys that have no artifact.
func printMissing(ctx context.Context, w io.Writer, server remote, keys []artifact.Key, asJSON bool) error {
	all := struct {
		MissingCacheKeys []string `json:"missing_cache_keys"`
	}{[]string{}}
	for batch := range slices.Chunk(distinct(keys), client.MaxKeys) {
		missing, err := server.Missing(ctx, batch)
		if err != nil {
			return err
		}
		if asJSON {
			all.MissingCacheKeys = append(all.MissingCacheKeys, missing...)
			continue
		}
		for _, key := range missing {
			if _, err := fmt.Fprintln(w, printable(key)); err != nil {
				return err
			}
		}
	}
	if !asJSON {
		return nil
	}
	return json.NewEncoder(w).Encode(all)
}

// distinct returns keys without those that are there already.
func distinct(keys []artifact.Key) []artifact.Key {
	seen := make(map[artifact.Key]bool, len(keys))
	return slices.DeleteFunc(slices.Clone(keys), func(key artifact.Key) bool {
		again := seen[key]
		seen[key] = true
		return again
	})
}
