package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/auth"
)

const authLong = `auth looks at auth files, which say who may do what on a server (--auth-file). Its commands need
no server: "auth check" says whether a file is right, and "auth explain" what a server with that
file would decide of a request, and why.

"polykit-cache token new" makes a token, and prints what goes into the file.`

const authExample = `  polykit-cache auth check /etc/polykit-cache/auth.yaml
  polykit-cache auth explain --auth-file auth.yaml PUT 0123456789abcdef0123456789abcdef`

func authCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "auth",
		Short:   "Look at who may do what",
		Long:    authLong,
		Example: authExample,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError("auth needs a command: check or explain; see auth --help")
		},
	}
	cmd.AddCommand(authCheckCommand(), authExplainCommand())
	return cmd
}

const authCheckLong = `check reads an auth file as a server does, with the files with keys that it names, and prints
what it says: tokens, issuers, rules, and the scopes in the order of trust with what they read.
It asks no issuer.

The exit status is 1 if the file is wrong; each mistake is said on standard error with its line.
What is allowed, and odd, is said there as a warning, and changes nothing.

With --json it prints one object with anonymous, tokens, issuers, rules, scopes and promote, as
they are in the file, and warnings.`

const authCheckExample = `  polykit-cache auth check /etc/polykit-cache/auth.yaml
  polykit-cache auth check auth.yaml --json | jq -r '.tokens[].name'`

func authCheckCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "check FILE",
		Short:   "Say whether an auth file is right, and what it says",
		Long:    authCheckLong,
		Example: authCheckExample,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, err := auth.Load(args[0])
			if err != nil {
				return err
			}
			warnings := policy.Warnings(time.Now())
			slices.SortStableFunc(warnings, func(a, b *auth.Problem) int { return cmp.Compare(a.Line, b.Line) })
			if asJSON {
				return printPolicyJSON(cmd.OutOrStdout(), policy, warnings)
			}
			for _, w := range warnings {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s:%d: warning: %s\n", w.File, w.Line, w.Text)
			}
			return printPolicy(cmd.OutOrStdout(), policy)
		},
	}
	addJSON(cmd.Flags(), &asJSON)
	return cmd
}

// warningLine is a warning in JSON.
type warningLine struct {
	Line    int    `json:"line"`
	Warning string `json:"warning"`
}

func printPolicyJSON(w io.Writer, policy *auth.Policy, warnings []*auth.Problem) error {
	lines := make([]warningLine, 0, len(warnings))
	for _, w := range warnings {
		lines = append(lines, warningLine{w.Line, w.Text})
	}
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(struct {
		*auth.Policy
		Warnings []warningLine `json:"warnings"`
	}{policy, lines})
}

// printPolicy prints what an auth file says, a table for each section that has entries.
func printPolicy(w io.Writer, p *auth.Policy) error {
	table := newTable(w)
	anonymous := "nothing"
	if p.Anonymous != nil {
		anonymous = p.Anonymous.Role.String() + " in " + strings.Join(p.Anonymous.Scopes, ", ")
	}
	fmt.Fprintf(table, "Callers without a credential: %s\n", anonymous)
	if len(p.Tokens) > 0 {
		fmt.Fprintln(table, "\nTOKEN\tROLE\tSCOPES\tEXPIRES")
	}
	for i := range p.Tokens {
		t := &p.Tokens[i]
		expires := "never"
		if !t.Expires.IsZero() {
			expires = t.Expires.Format(time.RFC3339)
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", t.Name, t.Role, strings.Join(t.Scopes, ", "), expires)
	}
	if len(p.Issuers) > 0 {
		fmt.Fprintln(table, "\nISSUER\tURL\tAUDIENCE\tKEYS")
	}
	for i := range p.Issuers {
		issuer := &p.Issuers[i]
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", issuer.Name, printable(issuer.URL), issuer.Audience, cmp.Or(printable(issuer.KeysFile), "from discovery"))
	}
	if len(p.Rules) > 0 {
		fmt.Fprintln(table, "\nRULE\tFOR\tROLE\tSCOPE\tWHEN")
	}
	for i := range p.Rules {
		rule := &p.Rules[i]
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", rule.Name, cmp.Or(rule.Issuer, "certificates"), rule.Role, printable(rule.Scopes[0]), strings.Join(strings.Fields(rule.When), " "))
	}
	fmt.Fprintln(table, "\nSCOPE\tREADS")
	for i := range p.Scopes {
		s := &p.Scopes[i]
		fmt.Fprintf(table, "%s\t%s\n", s.Name, strings.Join(append([]string{"its own"}, s.Reads...), ", "))
	}
	if len(p.Promotions) > 0 {
		fmt.Fprintln(table, "\nPROMOTE FROM\tTO\tBY")
	}
	for i := range p.Promotions {
		promotion := &p.Promotions[i]
		fmt.Fprintf(table, "%s\t%s\t%s\n", promotion.From, promotion.To, strings.Join(promotion.By, ", "))
	}
	return table.Flush()
}
