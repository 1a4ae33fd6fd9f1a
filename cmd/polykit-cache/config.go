package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v4"
)

const configLong = `config prints the settings that a server would have which was started in its place: with the same
flags, in the same environment, with the same --config. It checks them as the server does, but for
what is in other files that they name, and starts nothing.

What it prints is a configuration file. Behind each setting stands where it is from: a line of the
file, the environment, a flag, or nowhere, which is the default; where that depends on other
settings or on the machine, what comes of it. Secrets are left out, as are names and passwords in
URLs.

The file, for --config, is YAML: names of flags without the dashes, and their values. Values are
written as on the command line, and those of flags that can be given several times may be lists:

  storage-dir: /var/lib/polykit-cache
  max-storage: 100GiB
  scope-retention: ["pr-*:max-age=168h", "nightly:keep-last=3"]

A flag wins over the environment, which wins over the file. Paths are relative to the working
directory. The server reads the file once, at its start: SIGHUP does not read it again. verify,
import and gc take those settings from it that they have flags for, but gc not storage-dir;
healthcheck takes from it where the server is.

With --json it prints an object that has, for each setting, its value and its origin.

The exit status is 2 if a setting is wrong.`

const configExample = `  polykit-cache config > polykit-cache.yaml
  polykit-cache config --config polykit-cache.yaml
  polykit-cache config --json | jq -r '."max-connections".value'`

func configCommand() *cobra.Command {
	var asJSON bool
	cmd := commandOfServer(func(cmd *cobra.Command, _ *serveConfig) error {
		for _, warning := range environmentWarnings(os.Environ()) {
			fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", warning)
		}
		settings := settingsOf(cmd.Flags(), serverSettings())
		if asJSON {
			return printSettingsJSON(cmd.OutOrStdout(), settings)
		}
		return printSettings(cmd.OutOrStdout(), settings)
	})
	cmd.Use = "config"
	cmd.Short = "Print the settings of a server, and where they are from"
	cmd.Long = configLong
	cmd.Example = configExample
	cmd.ValidArgsFunction = cobra.NoFileCompletions
	addJSON(cmd.Flags(), &asJSON)
	return cmd
}

// setting is what a flag is set to.
type setting struct {
	name   string
	values []string // one, if it is no list
	list   bool
	text   bool   // the value is text, even if it looks like a number
	unset  bool   // it has no value, and there is none to set it to that
	hidden bool   // nobody is to see the value
	origin string // where it is from
}

// settingsOf returns what those flags are set to that can be set in a file. known are the same flags, to try values on.
func settingsOf(flags, known *pflag.FlagSet) []setting {
	var settings []setting
	flags.VisitAll(func(f *pflag.Flag) {
		try := known.Lookup(f.Name)
		if try == nil || !isSetting(f) {
			return
		}
		s := setting{name: f.Name, text: f.Value.Type() == "string", origin: originOf(f)}
		if list, isList := f.Value.(pflag.SliceValue); isList {
			s.list, s.text = true, true
			s.values = list.GetSlice()
		} else {
			s.values = []string{f.Value.String()}
			s.unset = s.values[0] == "" && try.Value.Set("") != nil
		}
		s.hidden = isSecret(f) && strings.Join(s.values, "") != ""
		for _, value := range s.values {
			s.hidden = s.hidden || hasUserInfo(value)
		}
		settings = append(settings, s)
	})
	return settings
}

// hasUserInfo says whether a value is a URL with a user's name or password, or one that can't be told to have none.
func hasUserInfo(value string) bool {
	if !strings.Contains(value, "://") || !strings.Contains(value, "@") {
		return false
	}
	u, err := url.Parse(value)
	return err != nil || u.User != nil
}

// printSettings prints settings as a configuration file.
func printSettings(w io.Writer, settings []setting) error {
	for _, s := range settings {
		var line string
		switch {
		case s.hidden:
			line = fmt.Sprintf("# %s: hidden, from %s", s.name, s.origin)
		case s.unset:
			line = fmt.Sprintf("# %s: not set", s.name)
		default:
			value, err := s.yaml()
			if err != nil {
				return err
			}
			line = fmt.Sprintf("%s: %s # %s", s.name, value, s.origin)
		}
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
	}
	return nil
}

// yaml returns the value of a setting in YAML, on one line.
func (s *setting) yaml() (string, error) {
	node := &yaml.Node{Kind: yaml.SequenceNode, Style: yaml.FlowStyle}
	for _, value := range s.values {
		node.Content = append(node.Content, s.scalar(value))
	}
	if !s.list {
		node = node.Content[0]
	}
	text, err := yaml.Dump(node, yaml.WithLineWidth(-1))
	return strings.TrimSuffix(string(text), "\n"), err
}

func (s *setting) scalar(value string) *yaml.Node {
	node := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: value}
	switch {
	case s.number(value):
		node.Tag = ""
	case printable(value) != value:
		node.Style = yaml.DoubleQuotedStyle // on one line
	}
	return node
}

var number = regexp.MustCompile(`^(-?(0|[1-9][0-9]*)|true|false)$`)

// number says whether a value of a setting is a number or boolean, in YAML and JSON.
func (s *setting) number(value string) bool { return !s.text && number.MatchString(value) }

// printSettingsJSON prints settings as one object.
func printSettingsJSON(w io.Writer, settings []setting) error {
	type member struct {
		Value  any    `json:"value"` // null if it has none, or is hidden
		Origin string `json:"origin"`
		Hidden bool   `json:"hidden,omitempty"`
	}
	members := map[string]member{}
	for _, s := range settings {
		m := member{Origin: s.origin, Hidden: s.hidden}
		switch {
		case s.hidden || s.unset:
		case s.list:
			m.Value = append([]string{}, s.values...) // which is never null
		case s.number(s.values[0]):
			m.Value = json.RawMessage(s.values[0])
		default:
			m.Value = s.values[0]
		}
		members[s.name] = m
	}
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(members)
}
