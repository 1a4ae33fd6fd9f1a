// Command polykit-cache is a remote cache for build artifacts, and a client of one.
//
// Alone it serves; its commands talk to a server that runs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// The first signal ends the command in good order. Before anybody learns of it, the second one has its
	// default effect again, and ends the process at once.
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		signal.Stop(signals)
		cancel()
	}()
	limitHeap()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// Exit statuses. The help of the root command documents them.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
	exitMiss    = 3
	exitExists  = 4
)

// exitError is an error with an exit status of its own.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// usageError returns an error that says what is wrong with a setting or an argument.
func usageError(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// run runs the command line and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.InitDefaultCompletionCmd() // not before, since it keeps what it writes to
	explainArgs(root)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	err = withOrigins(err, cmd.Flags())
	fmt.Fprintln(stderr, "polykit-cache:", err)
	if e, ok := errors.AsType[*exitError](err); ok {
		return e.status
	}
	return exitFailure
}
