package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// clientCommands returns the commands that do not serve.
func clientCommands() []*cobra.Command {
	commands := []*cobra.Command{
		putCommand(), getCommand(), statCommand(), filesCommand(), packCommand(), healthcheckCommand(), benchCommand(),
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
	Ready(ctx context.Context) error
	Close() error
}

// remoteFlags are the flags of every command that talks to a server.
type remoteFlags struct {
	server string
	grpc   bool
	json   bool
}

func (r *remoteFlags) add(f *pflag.FlagSet) {
	f.StringVar(&r.server, "server", "http://127.0.0.1:8080", "`URL` of the server; a user name and password in it are sent as HTTP Basic")
	f.BoolVar(&r.grpc, "grpc", false, "speak gRPC instead of REST")
	addJSON(f, &r.json)
}

func addJSON(f *pflag.FlagSet, value *bool) {
	f.BoolVar(value, "json", false, "print JSON")
}

// connect returns the server that the flags name. The caller must close it.
func (r *remoteFlags) connect() (remote, error) {
	server, err := client.ParseServer(r.server)
	if err != nil {
		return nil, usageError("--server is %w", err)
	}
	if !r.grpc {
		return client.NewREST(server), nil
	}
	conn, err := client.NewGRPC(server)
	if err != nil {
		return nil, usageError("--server does not fit --grpc: %w", err)
	}
	return conn, nil
}

// connectFor is connect for a command about the artifact under a key.
func (r *remoteFlags) connectFor(digits string) (remote, artifact.Key, error) {
	key, err := parseKey(digits)
	if err != nil {
		return nil, key, err
	}
	server, err := r.connect()
	return server, key, err
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
	case errors.Is(err, context.Canceled):
		return errors.New("interrupted")
	}
	return err
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

// formatSize returns a number of bytes as people read it.
func formatSize[N int | int64](n N) string { return humanize.IBytes(uint64(max(n, 0))) }

// printable returns text that somebody else wrote, without what a terminal might obey.
func printable(text string) string {
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) }
	if !utf8.ValidString(text) || strings.ContainsFunc(text, unprintable) {
		return strconv.Quote(text)
	}
	return text
}
