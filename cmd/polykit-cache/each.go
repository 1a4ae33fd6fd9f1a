package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// eachKey does something with the artifact under each of some keys, and prints the keys for which it is
// done. A miss does not keep it from going on with the others; the error tells of all.
func eachKey(cmd *cobra.Command, flags *remoteFlags, args []string, do func(server remote, ctx context.Context, key artifact.Key) error) error {
	keys, err := parseKeys(args)
	if err != nil {
		return err
	}
	server, err := flags.connect(cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer server.Close()
	var misses []string
	for _, key := range keys {
		err := do(server, cmd.Context(), key)
		if errors.Is(err, client.ErrNotFound) {
			misses = append(misses, key.String())
			continue
		}
		if err != nil {
			return explain(key, err)
		}
		line := key.String()
		if flags.json {
			line = fmt.Sprintf(`{"cache_key":%q}`, key)
		}
		if _, err := fmt.Fprintln(cmd.OutOrStdout(), line); err != nil {
			return err
		}
	}
	if len(misses) > 0 {
		return &exitError{exitMiss, fmt.Errorf("the server has no artifact under %s", strings.Join(misses, ", "))}
	}
	return nil
}
