package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/auth"
)

const authExplainLong = `explain says what a server with an auth file would decide of a request, and why: who the caller
is, which entries of the file were looked at and which one decides, the scope that would be
written to, and the scopes that would be read, in order.

METHOD is that of the request over REST: GET or HEAD to download, PUT to upload, DELETE to
delete; POST is collecting garbage and what else is about all scopes, and so takes none. KEY is
the artifact's; no decision depends on it, and it may be left out.

The caller is one of
  --token-file   a file with a token or an ID token, or - for standard input. An ID token is
                 verified, for which its issuer is asked. There is no flag for the token itself,
                 since others on the machine see what is on a command line.
  --claims       a file with the claims of an ID token, in JSON, or - for standard input. They
                 are believed: neither signature nor expiry nor audience is checked. --issuer
                 names the issuer, which can be left out if the file has only one.
  --certificate  a file with a client certificate, in PEM. It is believed, too.
and without any of them one without a credential.

The exit status is 0 if the request is allowed, and 1 if it is refused or the file is wrong.

With --json it prints one object with allowed, who, entry, role, scope, reads, reason and error
as far as they are known, and steps.`

const authExplainExample = `  polykit-cache auth explain --auth-file auth.yaml GET 0123456789abcdef0123456789abcdef
  polykit-cache auth explain --auth-file auth.yaml --token-file - PUT < token
  echo '{"ref": "refs/pull/7/merge", "event_name": "pull_request"}' |
    polykit-cache auth explain --auth-file auth.yaml --claims - PUT
  polykit-cache auth explain --auth-file auth.yaml --certificate client.pem --scope nightly PUT`

// actions are what requests do, by method.
var actions = map[string]auth.Action{
	"GET": auth.Read, "HEAD": auth.Read, "PUT": auth.Write, "DELETE": auth.Administrate, "POST": auth.Operate,
}

// explainFlags are the flags of auth explain.
type explainFlags struct {
	file        string
	tokenFile   string
	claims      string
	issuer      string
	certificate string
	scope       string
	json        bool
}

func authExplainCommand() *cobra.Command {
	var flags explainFlags
	cmd := &cobra.Command{
		Use:     "explain METHOD [KEY]",
		Short:   "Say what would be decided of a request, and why",
		Long:    authExplainLong,
		Example: authExplainExample,
		Args:    cobra.RangeArgs(1, 2),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return []string{"GET", "HEAD", "PUT", "DELETE", "POST"}, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			action, known := actions[strings.ToUpper(args[0])]
			if !known {
				return usageError("METHOD is %q; it must be GET, HEAD, PUT, DELETE or POST", printable(args[0]))
			}
			if len(args) > 1 {
				if _, err := parseKey(args[1]); err != nil {
					return err
				}
			}
			return flags.explain(cmd, action)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&flags.file, "auth-file", "", "the auth `file`")
	f.StringVar(&flags.tokenFile, "token-file", "", "`file` with the caller's token or ID token, or - for standard input")
	f.StringVar(&flags.claims, "claims", "", "`file` with the claims of the caller's ID token, or - for standard input")
	f.StringVar(&flags.issuer, "issuer", "", "`name` in the auth file of the issuer of --claims")
	f.StringVar(&flags.certificate, "certificate", "", "`file` with the caller's certificate")
	f.StringVar(&flags.scope, "scope", "", "`name` of the scope that the request asks for, if it does")
	for _, name := range []string{"token-file", "claims", "issuer", "certificate", "scope"} { // who the caller is must be in sight
		notFromEnvironment(f.Lookup(name))
	}
	addJSON(f, &flags.json)
	return cmd
}

func (e *explainFlags) explain(cmd *cobra.Command, action auth.Action) error {
	callers := 0
	for _, name := range []string{"token-file", "claims", "certificate"} {
		if cmd.Flags().Changed(name) {
			callers++
		}
	}
	switch {
	case e.file == "":
		return usageError("--auth-file is missing; give the file that decides")
	case callers > 1:
		return usageError("--token-file, --claims and --certificate exclude each other; give one")
	case e.issuer != "" && e.claims == "":
		return usageError("--issuer says whose --claims are; give them, too")
	}
	decision, err := e.decide(cmd.Context(), cmd.InOrStdin(), slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)), action)
	if err != nil {
		return interrupted(err)
	}
	print := printDecision
	if e.json {
		print = printDecisionJSON
	}
	if err := print(cmd.OutOrStdout(), decision); err != nil {
		return err
	}
	if !decision.Allowed {
		return fmt.Errorf("refused: %w", decision.Refused)
	}
	return nil
}

// decide returns what is decided of the caller whom the flags name.
func (e *explainFlags) decide(ctx context.Context, stdin io.Reader, log *slog.Logger, action auth.Action) (*auth.Decision, error) {
	a, err := auth.New(auth.Config{File: e.file, Log: log})
	if err != nil {
		return nil, err
	}
	read := func(path string) ([]byte, error) {
		if path == "-" {
			return unlessDone(ctx, func() ([]byte, error) { return io.ReadAll(io.LimitReader(stdin, auth.MaxFile)) })
		}
		return os.ReadFile(path)
	}
	switch {
	case e.tokenFile != "":
		text, err := read(e.tokenFile)
		if err != nil {
			return nil, err
		}
		token := strings.TrimSpace(string(text))
		return a.Explain(ctx, auth.Credentials{Authorization: []string{"Bearer " + token}, Scope: e.scope}, action), nil
	case e.claims != "":
		text, err := read(e.claims)
		if err != nil {
			return nil, err
		}
		id, err := e.identity(a.Policy(), text)
		if err != nil {
			return nil, err
		}
		return a.Policy().Explain(id, e.scope, action), nil
	case e.certificate != "":
		text, err := read(e.certificate)
		if err != nil {
			return nil, err
		}
		block, _ := pem.Decode(text)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----", e.certificate)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.certificate, err)
		}
		return a.Policy().Explain(auth.Identity{Certificate: certificate}, e.scope, action), nil
	}
	return a.Policy().Explain(auth.Identity{}, e.scope, action), nil
}

// identity returns the identity of who has claims.
func (e *explainFlags) identity(policy *auth.Policy, text []byte) (auth.Identity, error) {
	claims, err := auth.ParseClaims(text)
	if err != nil {
		return auth.Identity{}, fmt.Errorf("%s is no JSON object of claims: %w", e.claims, err)
	}
	var names []string
	for i := range policy.Issuers {
		names = append(names, policy.Issuers[i].Name)
		if policy.Issuers[i].Name == e.issuer || e.issuer == "" && len(policy.Issuers) == 1 {
			return auth.Identity{Issuer: policy.Issuers[i].Name, Claims: claims}, nil
		}
	}
	if len(names) == 0 {
		return auth.Identity{}, usageError("%s has no issuers, so no claims count", e.file)
	}
	return auth.Identity{}, usageError("--issuer is %q; %s has %s", printable(e.issuer), e.file, strings.Join(names, ", "))
}

func printDecision(w io.Writer, d *auth.Decision) error {
	verdict := "allowed"
	if !d.Allowed {
		verdict = "refused"
	}
	table := newTable(w)
	fmt.Fprintf(table, "decision\t%s\n", verdict)
	fmt.Fprintf(table, "caller\t%s\n", printable(d.Who))
	if d.Access != nil {
		fmt.Fprintf(table, "decided by\t%s\n", d.Access.Entry)
		fmt.Fprintf(table, "role\t%s\n", d.Access.Role)
		if d.Access.Role >= auth.Writer {
			fmt.Fprintf(table, "writes to\t%s\n", d.Access.Scope)
		}
		fmt.Fprintf(table, "reads\t%s\n", strings.Join(readsOf(d.Access), ", "))
	}
	if e, ok := errors.AsType[*auth.Error](d.Refused); ok {
		fmt.Fprintf(table, "reason\t%s\n", e.Reason)
		fmt.Fprintf(table, "detail\t%s\n", printable(e.Detail))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if len(d.Steps) > 0 {
		fmt.Fprintln(table, "\nLINE\tENTRY\tFITS\tWHY")
	}
	for _, step := range d.Steps {
		line, fits := "-", "no"
		if step.Line > 0 {
			line = fmt.Sprint(step.Line)
		}
		if step.Fits {
			fits = "yes"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", line, step.Entry, fits, printable(step.Why))
	}
	return table.Flush()
}

func readsOf(a *auth.Access) []string {
	var names []string
	for _, scope := range a.Reads {
		names = append(names, scope.String())
	}
	return names
}

// decisionLine is a decision in JSON.
type decisionLine struct {
	Allowed bool        `json:"allowed"`
	Who     string      `json:"who"`
	Entry   string      `json:"entry,omitempty"`
	Role    string      `json:"role,omitempty"`
	Scope   string      `json:"scope,omitempty"`
	Reads   []string    `json:"reads,omitempty"`
	Reason  auth.Reason `json:"reason,omitempty"`
	Error   string      `json:"error,omitempty"`
	Steps   []auth.Step `json:"steps"`
}

func printDecisionJSON(w io.Writer, d *auth.Decision) error {
	line := decisionLine{Allowed: d.Allowed, Who: d.Who, Steps: d.Steps}
	if d.Access != nil {
		line.Entry, line.Role, line.Scope, line.Reads = d.Access.Entry, d.Access.Role.String(), d.Access.Scope.String(), readsOf(d.Access)
	}
	if d.Refused != nil {
		line.Error = d.Refused.Error()
	}
	if e, ok := errors.AsType[*auth.Error](d.Refused); ok {
		line.Reason = e.Reason
	}
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(line)
}
