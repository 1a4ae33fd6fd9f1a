package main

import (
	"errors"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// eachFlag calls f with every flag that can be set in the environment.
func eachFlag(f func(cmd *cobra.Command, flag *pflag.Flag)) {
	for _, cmd := range withBelow(rootCommand()) {
		cmd.Flags().VisitAll(func(flag *pflag.Flag) {
			if hasEnvironment(flag) {
				f(cmd, flag)
			}
		})
	}
}

func TestEnvironmentNames(t *testing.T) {
	t.Parallel()
	for flag, want := range map[string]string{
		"port":              "POLYKIT_CACHE_PORT_NUMBER",
		"storage-dir":       "POLYKIT_CACHE_STORAGE_DIR",
		"max-unpacked-size": "POLYKIT_CACHE_MAX_UNPACKED_SIZE",
		"server":            "POLYKIT_CACHE_SERVER",
		"grpc":              "POLYKIT_CACHE_GRPC",
		"json":              "POLYKIT_CACHE_JSON",
	} {
		if got := environmentName(flag); got != want {
			t.Errorf("--%s has %s, want %s", flag, got, want)
		}
	}
}

// Beside a Kubernetes Service called polykit-cache, or polykit-cache-ANYTHING, a container has
// variables of these names.
func TestEnvironmentNamesAreNotThoseOfKubernetes(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"POLYKIT_CACHE_PORT":                   true,
		"POLYKIT_CACHE_PORT_8080_TCP":          true,
		"POLYKIT_CACHE_PORT_8080_TCP_ADDR":     true,
		"POLYKIT_CACHE_SERVICE_HOST":           true,
		"POLYKIT_CACHE_SERVICE_PORT":           true,
		"POLYKIT_CACHE_SERVICE_PORT_HTTP":      true,
		"POLYKIT_CACHE_MAX_SERVICE_PORT":       true,
		"POLYKIT_CACHE_METRICS_PORT":           true,
		"POLYKIT_CACHE_METRICS_PORT_1_UDP_TCP": true,
		"POLYKIT_CACHE_PORT_NUMBER":            false,
		"POLYKIT_CACHE_SERVER":                 false,
	} {
		if got := serviceLinks.MatchString(name); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	flags := 0
	eachFlag(func(cmd *cobra.Command, flag *pflag.Flag) {
		flags++
		if name := environmentName(flag.Name); serviceLinks.MatchString(name) {
			t.Errorf("%s --%s reads %s, which Kubernetes may set", cmd.Name(), flag.Name, name)
		}
	})
	if flags < 20 {
		t.Errorf("looked at %d flags only", flags)
	}
}

func TestHelpNamesTheEnvironmentOfEveryFlag(t *testing.T) {
	t.Parallel()
	eachFlag(func(cmd *cobra.Command, flag *pflag.Flag) {
		args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
		_, stdout, _ := polykit(t, args...)
		line := regexp.MustCompile(`(?m)--` + flag.Name + `\b.*\[\$` + environmentName(flag.Name) + `\]`)
		if !line.MatchString(stdout) {
			t.Errorf("%s does not name %s", strings.Join(args, " "), environmentName(flag.Name))
		}
	})
}

func TestEveryCommandHasHelp(t *testing.T) {
	t.Parallel()
	commands := clientCommands()
	for _, cmd := range []*cobra.Command{authCommand(), tokenCommand(), configCommand()} {
		commands = append(commands, withBelow(cmd)...)
	}
	for _, cmd := range commands {
		if cmd.Short == "" || cmd.Long == "" || cmd.Example == "" {
			t.Errorf("%s lacks a part of its help", cmd.Name())
		}
		for line := range strings.Lines(cmd.Long) {
			if len(line) > 99 {
				t.Errorf("%s: a line of its help is too long: %s", cmd.Name(), line)
			}
		}
	}
}

func TestErrorsSayWhereSettingsAreFrom(t *testing.T) {
	t.Parallel()
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Int("least", 0, "")
	flags.Int("most", 0, "")
	setOrigin(flags.Lookup("least"), "x.yaml:1")
	err := withOrigins(usageError("--least is 2; it must be less than --most, 1: change --least or --other"), flags)
	if want := "--least is 2; it must be less than --most, 1: change --least or --other (--least is from x.yaml:1)"; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
	if e, ok := errors.AsType[*exitError](err); !ok || e.status != exitUsage {
		t.Errorf("%v has no exit status %d", err, exitUsage)
	}
	// what has another status keeps it
	for _, err := range []error{errors.New("--least is wrong"), &exitError{exitMiss, errors.New("--least is wrong")}} {
		if got := withOrigins(err, flags); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
}

func TestPrefixesFlag(t *testing.T) {
	for text, want := range map[string]string{
		"10.0.0.0/8":               "10.0.0.0/8",
		"10.1.2.3/8, 127.0.0.1":    "10.0.0.0/8,127.0.0.1/32",
		"2001:db8::1":              "2001:db8::1/128",
		"::ffff:10.0.0.0/104":      "10.0.0.0/8", // as addresses over IPv4 are compared
		"":                         "",
		"10.0.0.0/33":              "",
		"localhost":                "",
		"10.0.0.1,":                "",
		"10.0.0.1-10.0.0.9":        "",
		"fe80::1%eth0":             "",
		"10.0.0.1:80":              "",
		"10.0.0.0/8,192.168.0.0/x": "",
	} {
		var f prefixesFlag
		err := f.Set(text)
		if (err != nil) != (want == "") || err == nil && f.String() != want {
			t.Errorf("%q: %q, %v; want %q", text, f.String(), err, want)
		}
	}
}
