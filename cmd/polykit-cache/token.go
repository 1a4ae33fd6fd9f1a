package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
)

const tokenLong = `token makes tokens: secrets by which a server knows who sends a request. See token new.`

const tokenExample = `  polykit-cache token new --name ci --role writer > token`

func tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "token",
		Short:   "Make tokens",
		Long:    tokenLong,
		Example: tokenExample,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError("token needs a command: new; see token --help")
		},
	}
	cmd.AddCommand(tokenNewCommand())
	return cmd
}

const tokenNewLong = `new makes a token and prints it on standard output, this once: nobody can find it out again. On
standard error it prints the lines that go into the auth file of the server, under tokens. They
hold only the token's SHA-256, from which it can't be told.

A token is pkc_ and 43 letters and digits, which are 256 random bits; those who look for lost
secrets find it by ^pkc_[0-9A-Za-z]{43}$. It is sent as "Authorization: Bearer TOKEN", or as the
password of HTTP Basic with any user name, as in https://x:TOKEN@cache.example.com.

With --json it prints one object on standard output, with token, name, sha256, role and scope.`

const tokenNewExample = `  polykit-cache token new --name ci --role writer
  polykit-cache token new --name laptops --role reader > token
  polykit-cache token new --json | jq -r .sha256`

func tokenNewCommand() *cobra.Command {
	role := choiceFlag{"reader", []string{"reader", "writer", "admin"}}
	var name, scopeName string
	var asJSON bool
	cmd := &cobra.Command{
		Use:               "new",
		Short:             "Make a token",
		Long:              tokenNewLong,
		Example:           tokenNewExample,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			scope, err := artifact.ParseScope(scopeName)
			if err != nil {
				return usageError("--scope is %q: %w", printable(scopeName), err)
			}
			token := auth.NewToken()
			quoted, err := json.Marshal(name) // as YAML has it, too
			if err != nil {
				return err
			}
			entry := fmt.Sprintf("  - name: %s\n    sha256: %s\n    role: %s\n    scope: %s\n", quoted, auth.HashToken(token), role.value, scope)
			if _, err := auth.Parse("the entry", []byte("scopes:\n  - name: "+scope.String()+"\ntokens:\n"+entry)); err != nil {
				return usageError("--name is %q, and can't be: %w", printable(name), err)
			}
			if asJSON {
				return printToken(cmd, token, name, role.value, scope)
			}
			if _, err := fmt.Fprintln(cmd.OutOrStdout(), token); err != nil {
				return err
			}
			_, err = fmt.Fprint(cmd.ErrOrStderr(), entry)
			return err
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&name, "name", "new", "what the token is called in the auth file and in logs")
	f.Var(&role, "role", "what its owner may do: download (reader), upload, too (writer), or delete, pin and promote, too (admin)")
	f.StringVar(&scopeName, "scope", artifact.DefaultScope.String(), "`name` of the scope")
	for _, flag := range []string{"name", "role", "scope"} {
		notFromEnvironment(f.Lookup(flag))
	}
	addJSON(f, &asJSON)
	completeChoices(cmd, "role", role.choices)
	return cmd
}

func printToken(cmd *cobra.Command, token, name, role string, scope artifact.Scope) error {
	encoder := json.NewEncoder(cmd.OutOrStdout())
	encoder.SetEscapeHTML(false)
	return encoder.Encode(struct {
		Token  string         `json:"token"`
		Name   string         `json:"name"`
		SHA256 string         `json:"sha256"`
		Role   string         `json:"role"`
		Scope  artifact.Scope `json:"scope"`
	}{token, name, auth.HashToken(token), role, scope})
}
