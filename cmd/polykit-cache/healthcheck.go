package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

const healthcheckLong = `healthcheck asks the server whether it is ready to take uploads: GET /readyz, or with --grpc
grpc.health.v1. The exit status is 0 if it is, else 1 and the error says why.

It is made for a container's HEALTHCHECK, where there may be no other program that could ask. If
the server listens elsewhere than on the default address, name it with --server or in the
environment.`

const healthcheckExample = `  polykit-cache healthcheck
  polykit-cache healthcheck --server https://cache.example.com --grpc --timeout 1s`

func healthcheckCommand() *cobra.Command {
	var flags remoteFlags
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:     "healthcheck",
		Short:   "Say whether the server is ready",
		Long:    healthcheckLong,
		Example: healthcheckExample,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if timeout <= 0 {
				return usageError("--timeout is %v; it must be more than 0", timeout)
			}
			server, err := flags.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer server.Close()
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, fmt.Errorf("no answer within %v", timeout))
			defer cancel()
			if err := server.Ready(ctx); err != nil {
				return fmt.Errorf("not ready: %w", err)
			}
			answer := "ready\n"
			if flags.json {
				answer = `{"status":"ready"}` + "\n"
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), answer)
			return err
		},
	}
	flags.add(cmd.Flags())
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "time in which the server must answer")
	return cmd
}
