package main

import (
	"runtime/debug"

	"github.com/spf13/cobra"
)

const rootLong = `polykit-cache is a self-hosted remote cache for build artifacts.

Without a command it serves: REST for Polykit and gRPC for other tools, on one port, over artifacts
that were proved sound before they can be seen. The commands talk to a server that runs, but for pack,
verify, import, auth, token, config and completion, which need none:

  put, get, stat, files                     upload and download artifacts, and look into them
  list, stats, missing, quarantine          see what is stored
  delete, pin, unpin, promote, gc           change it
  import                                    take artifacts over from elsewhere
  auth, token                               say who may do what, and make tokens
  config                                    print the settings that a server would have
  healthcheck, bench                        say whether a server is ready, and how fast it is

A flag whose help names a variable can be set in the environment too; a flag on the command line wins.
Those of the server can also stand in a file, --config, over which both win; see config --help.
The server sends traces where the variables of OpenTelemetry say, OTEL_*.

"polykit-cache completion SHELL" prints what lets bash, zsh, fish or PowerShell complete commands and flags;
"polykit-cache completion SHELL --help" says how to load it.

Exit status:
  0  success
  1  failure
  2  wrong usage or a wrong setting
  3  miss: the server has no artifact under the key
  4  the server has an artifact under the key already`

const rootExample = `  polykit-cache --storage-dir /var/cache/polykit --max-size 2GiB
  polykit-cache put 0123456789abcdef0123456789abcdef dist/
  polykit-cache get 0123456789abcdef0123456789abcdef --extract dist/
  polykit-cache list --package web
  source <(polykit-cache completion bash)`

// rootCommand returns the whole command line.
func rootCommand() *cobra.Command {
	root := serveCommand()
	root.Long = rootLong
	root.Example = rootExample
	root.Version = version()
	root.SilenceErrors = true // run says them
	root.SilenceUsage = true
	root.SetVersionTemplate("polykit-cache {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError("%w", err) })
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := setFromEnvironment(cmd.Flags()); err != nil {
			return err
		}
		return setFromFile(cmd.Flags())
	}
	root.AddCommand(clientCommands()...)
	root.AddCommand(verifyCommand(), importCommand(), authCommand(), tokenCommand(), configCommand())
	for _, cmd := range withBelow(root) {
		describeEnvironment(cmd.Flags())
	}
	return root
}

// withBelow returns a command and all those below it.
func withBelow(cmd *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{cmd}
	for _, below := range cmd.Commands() {
		all = append(all, withBelow(below)...)
	}
	return all
}

// explainArgs makes usage errors of what a command says of its arguments, and those below it.
func explainArgs(cmd *cobra.Command) {
	for _, below := range cmd.Commands() {
		explainArgs(below)
	}
	args := cmd.Args
	if args == nil {
		return
	}
	cmd.Args = func(cmd *cobra.Command, given []string) error {
		if err := args(cmd, given); err != nil {
			return usageError("%w; see %s --help", err, cmd.CommandPath())
		}
		return nil
	}
}

// stamp is a version for a build that can't ask git for one, as from a source archive. The linker sets it:
// -ldflags "-X main.stamp=v1.2.3".
var stamp string

// version returns the version that the binary was built from: a tag, or else the commit and its time.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := info.Main.Version
	if version == "(devel)" && stamp != "" {
		version = stamp
	}
	return version + " " + info.GoVersion
}
