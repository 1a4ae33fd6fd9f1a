package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// clientCommands returns the commands that do not serve.
func clientCommands() []*cobra.Command {
	commands := []*cobra.Command{
		putCommand(), getCommand(), statCommand(), filesCommand(), packCommand(), healthcheckCommand(), benchCommand(),
		listCommand(), deleteCommand(), missingCommand(), statsCommand(), pinCommand(), unpinCommand(), promoteCommand(), quarantineCommand(), gcCommand(),
	}
	for _, cmd := range commands {
		cmd.Flags().SortFlags = false
	}
	return commands
}

// remote is a running server.
type remote interface {
	Put(ctx context.Context, key artifact.Key, size int64, r io.Reader) error
	Get(ctx context.Context, key artifact.Key, offset int64, hash artifact.Digest) (*client.Download, error)
	Stat(ctx context.Context, key artifact.Key) (*client.Artifact, error)
	Files(ctx context.Context, key artifact.Key) iter.Seq2[*client.File, error]
	List(ctx context.Context, request *client.ListRequest) iter.Seq2[*client.Stored, error]
	Delete(ctx context.Context, key artifact.Key) error
	DeleteMatching(ctx context.Context, request *client.DeleteRequest) (*client.Deleted, error)
	Missing(ctx context.Context, keys []artifact.Key) ([]string, error)
	Pin(ctx context.Context, key artifact.Key) error
	Unpin(ctx context.Context, key artifact.Key) error
	Promote(ctx context.Context, key artifact.Key, from, to artifact.Scope) (*client.Artifact, error)
	Stats(ctx context.Context, maxTasks int) (*client.Stats, error)
	CollectGarbage(ctx context.Context, request *client.CollectRequest) (*client.Collected, error)
	Quarantine(ctx context.Context) iter.Seq2[*client.Quarantined, error]
	Ready(ctx context.Context) error
	Close() error
}

// remoteFlags are the flags of every command that talks to a server.
type remoteFlags struct {
	server    string
	tokenFile string
	scope     scopeFlag
	tls       clientTLSFlags
	grpc      bool
	json      bool
}

func (r *remoteFlags) add(f *pflag.FlagSet) {
	f.StringVar(&r.server, "server", "http://127.0.0.1:8080", "`URL` of the server; a user name and password in it are sent as HTTP Basic")
	f.StringVar(&r.tokenFile, "token-file", "", "`file` with the token or ID token to send to the server; in the environment the token itself may be in POLYKIT_CACHE_TOKEN")
	f.Var(&r.scope, "scope", "scope that this is about, if not the one that the token is for")
	r.tls.add(f)
	f.BoolVar(&r.grpc, "grpc", false, "speak gRPC instead of REST")
	addJSON(f, &r.json)
}

func addJSON(f *pflag.FlagSet, value *bool) {
	f.BoolVar(value, "json", false, "print JSON")
}

// connect returns the server that the flags name. The caller must close it. What people should know of it, but need not
// stop for, is written to warnings.
func (r *remoteFlags) connect(warnings io.Writer) (remote, error) {
	server, err := client.ParseServer(r.server)
	if err != nil {
		return nil, usageError("--server is %w", err)
	}
	config, err := r.tls.config(server)
	if err != nil {
		return nil, err
	}
	if server, err = r.address(server, warnings); err != nil {
		return nil, err
	}
	if !r.grpc {
		return client.NewREST(server, config), nil
	}
	conn, err := client.NewGRPC(server, config)
	if err != nil {
		return nil, usageError("--server does not fit --grpc: %w", err)
	}
	return conn, nil
}

// address returns the URL of a server with the token and the scope of the flags. If the token would go over a network in
// clear text, it says so on warnings.
func (r *remoteFlags) address(server *url.URL, warnings io.Writer) (*url.URL, error) {
	token := os.Getenv("POLYKIT_CACHE_TOKEN")
	if r.tokenFile != "" {
		text, err := os.ReadFile(r.tokenFile)
		if err != nil {
			return nil, usageError("--token-file: %w", err)
		}
		if token = strings.TrimSpace(string(text)); token == "" {
			return nil, usageError("--token-file: %s is empty", r.tokenFile)
		}
	}
	if token != "" && server.User != nil {
		if r.tokenFile != "" {
			return nil, usageError("--server has a password and --token-file a token; give one of them")
		}
		token = "" // what is in sight counts
	}
	if token != "" {
		with := *server
		with.User = url.UserPassword("token", token)
		server = &with
	}
	if server.User != nil && server.Scheme == "http" && !isLoopback(server.Hostname()) {
		fmt.Fprintf(warnings, "polykit-cache: warning: the token goes to %s in clear text, and whoever is on the way can read it; give a --server that begins with https://\n", printable(server.Host))
	}
	if r.scope.given {
		server = client.InScope(server, r.scope.Scope)
	}
	return server, nil
}

// ofAllScopes returns an error if a scope was given for something that is about all of them.
func (r *remoteFlags) ofAllScopes(cmd *cobra.Command) error {
	if !r.scope.given {
		return nil
	}
	return usageError("%s is about all scopes together: leave out --scope, and POLYKIT_CACHE_SCOPE of the environment", cmd.Name())
}

// isLoopback says whether a host is this machine, as far as its name tells.
func isLoopback(host string) bool {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	return host == "localhost" || strings.HasSuffix(host, ".localhost") || net.ParseIP(host).IsLoopback()
}

// scopeFlag is a scope.
type scopeFlag struct {
	artifact.Scope
	given bool
}

func (s *scopeFlag) String() string {
	if !s.given {
		return ""
	}
	return s.Scope.String()
}

func (s *scopeFlag) Set(text string) (err error) {
	s.Scope, err = artifact.ParseScope(text)
	s.given = err == nil
	return err
}

func (s *scopeFlag) Type() string { return "name" }

// names returns the scope for a filter: that of the flag alone, or none if it was not given.
func (s *scopeFlag) names() []string {
	if !s.given {
		return nil
	}
	return []string{s.Scope.String()}
}

// formatKey returns a key as tables have it: with the scope before it, if that is not the default one.
func formatKey(scope, key string) string {
	if scope == "" || scope == artifact.DefaultScope.String() {
		return printable(key)
	}
	return printable(scope + "/" + key)
}

// connectFor is connect for a command about the artifact under a key.
func (r *remoteFlags) connectFor(warnings io.Writer, digits string) (remote, artifact.Key, error) {
	key, err := parseKey(digits)
	if err != nil {
		return nil, key, err
	}
	server, err := r.connect(warnings)
	return server, key, err
}

// completeChoices lets a shell complete the value of a flag that is one of a few words.
func completeChoices(cmd *cobra.Command, flag string, choices []string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(choices, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // there is no such flag
	}
}

// parseKey returns the key that an argument or a flag names.
func parseKey(text string) (artifact.Key, error) {
	key, err := artifact.ParseKey(text)
	if err != nil {
		return key, usageError("%w", err)
	}
	return key, nil
}

// explain returns an error of a command about the artifact under key as people and scripts are to
// be told of it.
func explain(key artifact.Key, err error) error {
	switch {
	case errors.Is(err, client.ErrNotFound):
		return &exitError{exitMiss, fmt.Errorf("the server has no artifact under %s", key)}
	case errors.Is(err, client.ErrExists):
		return &exitError{exitExists, fmt.Errorf("the server has an artifact under %s already, and an artifact never changes once it is stored", key)}
	}
	return interrupted(err)
}

// interrupted is explain for a command that is about no key.
func interrupted(err error) error {
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted")
	}
	return err
}

// unlessDone returns what read returns, or the error of ctx if that is done first. read may go on then: nothing
// ends a read of a terminal.
func unlessDone[T any](ctx context.Context, read func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := read()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// result is what a command did, for --json. Its members are called as in the REST API.
type result struct {
	CacheKey  string `json:"cache_key"`
	Hash      string `json:"hash"`
	Size      int64  `json:"size,string"`
	FileCount int    `json:"file_count,string,omitempty"`
	Output    string `json:"output,omitempty"`
}

func (r result) print(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(r)
}

// printLine prints what a server said as JSON, on a line.
func printLine(w io.Writer, message proto.Message) error {
	line, err := client.JSON(message)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", line)
	return err
}

// printLines prints each message on a line, up to an error.
func printLines[M proto.Message](w io.Writer, messages iter.Seq2[M, error]) error {
	out := bufio.NewWriter(w)
	for message, err := range messages {
		if err == nil {
			err = printLine(out, message)
		}
		if err != nil {
			out.Flush()
			return err
		}
	}
	return out.Flush()
}

// newTable returns a table of cells that end with a tab, but for the last in a row.
func newTable(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 0, 2, ' ', 0) }

// formatSize returns a number of bytes as people read it.
func formatSize[N int | int64](n N) string { return humanize.IBytes(uint64(max(n, 0))) }

// formatAge returns how long ago something was, as people read it, or "-" if that is not known.
func formatAge(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return humanize.Time(t.AsTime())
}

// orDash is printable of what may not be known.
func orDash(text string) string { return cmp.Or(printable(text), "-") }

// maxNameLength is how many characters of a name are in a table: clients chose it, and a long one would push the
// columns behind it out of sight.
const maxNameLength = 60

// formatName is orDash of a name in a table. What is left out of a long one an ellipsis stands for.
func formatName(name string) string {
	name = orDash(name)
	if runes := []rune(name); len(runes) > maxNameLength {
		return string(runes[:maxNameLength-1]) + "…"
	}
	return name
}

// printable returns text that somebody else wrote, without what a terminal might obey.
func printable(text string) string {
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) }
	if !utf8.ValidString(text) || strings.ContainsFunc(text, unprintable) {
		return strconv.Quote(text)
	}
	return text
}
