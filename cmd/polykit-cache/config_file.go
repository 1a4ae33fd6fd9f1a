package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v4"
)

// A configuration file is one mapping in YAML from the names of the server's flags to values, which are written as on
// the command line. It is read once, when a command starts. What it says is set by way of the flags, and checked by
// them, so that a flag need not be named here to be one that can stand in a file.
//
// All of a file is checked against the flags of a server, whichever command reads it, and also what the environment or
// the command line overrides: so a file is right or wrong for all commands and machines alike. A command takes those of
// its own flags from it that it shares with the server.
//
// Values are taken as they are written, whatever type YAML makes of them, so that 8080 and "8080" are the same, and
// there is no surprise in no, 1e3 or C:\cache. What could be a surprise is refused: a number that begins with 0, which
// YAML has read as octal and as decimal; a name without a value, which could mean the default or nothing; control
// characters, which are what double quotes make of "C:\new"; anchors, aliases and tags.

const (
	// maxConfigFile is how many bytes a configuration file may have.
	maxConfigFile = 1 << 20

	// mostConfigProblems is how many problems of a file are told.
	mostConfigProblems = 20
)

// addConfig adds the flag for the configuration file, of which the command takes those of its flags that a server has too.
func addConfig(f *pflag.FlagSet) {
	f.String("config", "", "YAML `file` with settings of the server, named as its flags; the environment and flags win over it; read once, at the start")
}

// isSetting says whether a flag of a server can be set in a configuration file.
func isSetting(f *pflag.Flag) bool { return hasEnvironment(f) && f.Name != "config" }

// serverSettings returns the flags of a server, by themselves: nothing comes of setting them.
func serverSettings() *pflag.FlagSet { return serveCommand().Flags() }

// setFromFile sets the flags that neither the command line nor the environment does, if the command has --config.
func setFromFile(flags *pflag.FlagSet) error {
	config := flags.Lookup("config")
	if config == nil || config.Value.String() == "" {
		return nil
	}
	path := config.Value.String()
	text, err := readConfigFile(path)
	if err != nil {
		return usageError("--config can't be read: %w", err)
	}
	file := &configFile{path: printable(path), known: serverSettings(), flags: flags}
	file.read(text)
	if len(file.problems) > 0 {
		return usageError("%w", errors.Join(file.problems...))
	}
	return nil
}

func readConfigFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err == nil && len(text) > maxConfigFile {
		err = fmt.Errorf("%s has more than %d bytes, which no configuration needs; is it the right file?", printable(path), maxConfigFile)
	}
	return text, err
}

// configFile is a configuration file that is read.
type configFile struct {
	path     string
	known    *pflag.FlagSet // what can stand in it
	flags    *pflag.FlagSet // what is to be set
	problems []error        // in the order of the lines, but for an end
}

func (c *configFile) fail(line int, format string, args ...any) {
	switch len(c.problems) {
	case mostConfigProblems:
		c.problems = append(c.problems, fmt.Errorf("%s: and more", c.path))
	case mostConfigProblems + 1:
	default:
		c.problems = append(c.problems, fmt.Errorf("%s:%d: %w", c.path, max(line, 1), fmt.Errorf(format, args...)))
	}
}

func (c *configFile) read(text []byte) {
	loader, err := yaml.NewLoader(bytes.NewReader(text))
	var document, second yaml.Node
	if err == nil {
		err = loader.Load(&document)
	}
	switch {
	case errors.Is(err, io.EOF): // nothing, or comments only
		return
	case err != nil:
		c.failYAML(err)
		return
	}
	if err := loader.Load(&second); err == nil {
		c.fail(second.Line, "a second document begins here; a configuration file has one")
		return
	} else if !errors.Is(err, io.EOF) {
		c.failYAML(err)
		return
	}
	for _, root := range document.Content {
		if isNull(root) {
			continue
		}
		if c.plain(root, "the file", yaml.MappingNode) {
			c.mapping(root)
		}
	}
}

func (c *configFile) failYAML(err error) {
	line, text := 1, err.Error()
	if e, ok := errors.AsType[*yaml.LoadError](err); ok {
		line, text = e.Mark.Line, e.Message
		if e.ContextMsg != "" { // then the mistake is more likely where that begins than where it is noticed
			line, text = e.ContextMark.Line, e.ContextMsg+": "+text
		}
	}
	c.fail(line, "it is no YAML: %s", text)
}

// mapping reads the lines of a file.
func (c *configFile) mapping(root *yaml.Node) {
	lines := map[string]int{} // of the names that were there
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		if !c.plain(key, "a name", yaml.ScalarNode) {
			continue
		}
		name := key.Value
		setting := c.known.Lookup(name)
		switch {
		case setting == nil || !isSetting(setting):
			c.unknown(key)
			continue
		case lines[name] > 0:
			c.fail(key.Line, "%s stands in line %d already; take one of them away", name, lines[name])
			continue
		}
		lines[name] = key.Line
		before := len(c.problems)
		c.set(setting, value)
		f := c.flags.Lookup(name)
		if len(c.problems) > before || f == nil || f.Changed || !isSetting(f) {
			continue
		}
		c.set(f, value)
		f.Changed = true
		setOrigin(f, fmt.Sprintf("%s:%d", c.path, key.Line))
	}
}

func (c *configFile) unknown(key *yaml.Node) {
	var names []string
	c.known.VisitAll(func(f *pflag.Flag) {
		if isSetting(f) {
			names = append(names, f.Name)
		}
	})
	if name := nearest(key.Value, names); name != "" {
		c.fail(key.Line, "%s is no setting of the server; did you mean %s?", shortQuoted(key.Value), name)
		return
	}
	c.fail(key.Line, "%s is no setting of the server; \"polykit-cache config\" prints all that there are", shortQuoted(key.Value))
}

// set sets a flag to a value.
func (c *configFile) set(f *pflag.Flag, n *yaml.Node) {
	list, isList := f.Value.(pflag.SliceValue)
	if !isList || n.Kind != yaml.SequenceNode {
		c.scalar(f, n, f.Value.Set)
		return
	}
	if !c.plain(n, f.Name, yaml.SequenceNode) {
		return
	}
	if err := list.Replace(nil); err != nil { // what a list in a file says replaces the default
		c.fail(n.Line, "%s: %w", f.Name, err)
		return
	}
	for _, element := range n.Content {
		c.scalar(f, element, list.Append)
	}
}

// octal matches numbers that YAML 1.1 reads in another way than YAML 1.2.
var octal = regexp.MustCompile(`^[-+]?0[0-9_]+$`)

// scalar sets a flag, by set, to a single value.
func (c *configFile) scalar(f *pflag.Flag, n *yaml.Node, set func(string) error) {
	if !c.plain(n, f.Name, yaml.ScalarNode) {
		return
	}
	switch {
	case isNull(n):
		c.fail(n.Line, "%s has no value; give it one, or take the line away for the default", f.Name)
	case strings.ContainsFunc(n.Value, func(r rune) bool { return r < ' ' || r == 0x7f }):
		c.fail(n.Line, `%s has a control character; in double quotes \ begins one, so write a Windows path without quotes or in single ones`, f.Name)
	case f.Value.Type() != "string" && octal.MatchString(n.Value):
		c.fail(n.Line, "%s is %s, which some would read as octal; write it without a 0 in front, or with 0o", f.Name, formatValue(f, n.Value))
	default:
		if err := set(n.Value); err != nil {
			c.fail(n.Line, "%w", invalidValue(f, n.Value, f.Name, err))
		}
	}
}

// plain says whether a node is of a kind, without what YAML can have besides, and fails it if it is not.
func (c *configFile) plain(n *yaml.Node, what string, kind yaml.Kind) bool {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		c.fail(n.Line, "%s has an anchor or alias; write it out", what)
	case n.Style&yaml.TaggedStyle != 0:
		c.fail(n.Line, "%s has a tag; leave that out", what)
	case n.Kind == kind:
		return true
	case kind == yaml.MappingNode:
		c.fail(n.Line, "%s must have lines of a name, a colon and a value, such as port: 8080", what)
	default:
		c.fail(n.Line, "%s must be a single value, and not %s", what, map[yaml.Kind]string{
			yaml.MappingNode: "a mapping of its own", yaml.SequenceNode: "a list",
		}[n.Kind])
	}
	return false
}

// isNull says whether a node has no value: nothing is written there, or ~ or null without quotes.
func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// invalidValue returns err, which a flag said of a value, with what was set.
func invalidValue(f *pflag.Flag, value, name string, err error) error {
	if isSecret(f) {
		return fmt.Errorf("invalid value of %s, which is a secret and so not shown", name)
	}
	if f.Value.Type() == "bool" {
		err = errors.New("not true or false")
	}
	return fmt.Errorf("invalid value %s of %s: %w", formatValue(f, value), name, err)
}

// formatValue returns a value that somebody wrote as an error shows it.
func formatValue(f *pflag.Flag, value string) string {
	if isSecret(f) {
		return "(hidden)"
	}
	return shortQuoted(value)
}

// shortQuoted returns text in quotes. What is left out of a long one an ellipsis stands for.
func shortQuoted(text string) string {
	if runes := []rune(text); len(runes) > maxNameLength {
		text = string(runes[:maxNameLength-1]) + "…"
	}
	return strconv.Quote(text)
}
