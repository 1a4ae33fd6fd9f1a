package auth

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// Problem is something wrong or odd in an auth file.
type Problem struct {
	File string
	Line int // from 1
	Text string
}

func (p *Problem) Error() string { return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Text) }

// mostProblems is how many problems of a file are told.
const mostProblems = 20

// reader reads the nodes of an auth file and gathers what is wrong with them. It takes plain YAML only: no anchors
// and aliases, which would let a small file be large, and no tags.
type reader struct {
	file     string
	problems []*Problem
	later    []func() // what is checked when all is read
}

func (r *reader) fail(n *yaml.Node, format string, args ...any) {
	r.problems = append(r.problems, &Problem{r.file, max(n.Line, 1), fmt.Sprintf(format, args...)})
}

// err returns what is wrong with the file, in the order of its lines.
func (r *reader) err() error {
	slices.SortStableFunc(r.problems, func(a, b *Problem) int { return a.Line - b.Line })
	var errs []error
	for i, p := range r.problems {
		if i == mostProblems {
			errs = append(errs, fmt.Errorf("%s: and %d more", r.file, len(r.problems)-i))
			break
		}
		errs = append(errs, p)
	}
	return errors.Join(errs...)
}

// plain says whether a node is of a kind, and fails it if it is not.
func (r *reader) plain(n *yaml.Node, what string, kind yaml.Kind) bool {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		r.fail(n, "%s has an anchor or alias; write it out", what)
	case n.Style&yaml.TaggedStyle != 0:
		r.fail(n, "%s has a tag; leave that out", what)
	case n.Kind != kind:
		r.fail(n, "%s must be %s", what, map[yaml.Kind]string{
			yaml.MappingNode: "a mapping of fields to values", yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value",
		}[kind])
	default:
		return true
	}
	return false
}

// field is one that a mapping may have.
type field struct {
	name     string
	required bool
	read     func(*yaml.Node)
}

// fields reads a mapping. It returns whether it has all that it must have, and nothing else.
func (r *reader) fields(n *yaml.Node, what string, fields ...field) bool {
	if !r.plain(n, what, yaml.MappingNode) {
		return false
	}
	before := len(r.problems)
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := slices.IndexFunc(fields, func(f field) bool { return key.Kind == yaml.ScalarNode && f.name == key.Value })
		switch {
		case at < 0:
			var known []string
			for _, f := range fields {
				known = append(known, f.name)
			}
			r.fail(key, "%s has an unknown field %q; it can have %s", what, shorten(key.Value), strings.Join(known, ", "))
		case seen[key.Value]:
			r.fail(key, "%s has %s twice", what, key.Value)
		default:
			seen[key.Value] = true
			fields[at].read(value)
		}
	}
	for _, f := range fields {
		if f.required && !seen[f.name] {
			r.fail(n, "%s has no %s", what, f.name)
		}
	}
	return len(r.problems) == before
}

// list reads each element of a list, of at most a number. One that is empty may be left without a value.
func (r *reader) list(n *yaml.Node, what string, most int, read func(*yaml.Node)) {
	if n.Kind == yaml.ScalarNode && n.Value == "" || !r.plain(n, what, yaml.SequenceNode) {
		if n.Kind == yaml.ScalarNode && n.Style != 0 {
			r.fail(n, "%s must be a list", what)
		}
		return
	}
	if len(n.Content) > most {
		r.fail(n, "%s has %d entries; it can have %d", what, len(n.Content), most)
		return
	}
	for _, element := range n.Content {
		read(element)
	}
}

// text reads a single value as it is written, whatever type YAML makes of it.
func (r *reader) text(n *yaml.Node, what string, most int) string {
	if !r.plain(n, what, yaml.ScalarNode) {
		return ""
	}
	switch {
	case strings.TrimSpace(n.Value) == "":
		r.fail(n, "%s is empty", what)
		return ""
	case len(n.Value) > most:
		r.fail(n, "%s has %d characters; it can have %d", what, len(n.Value), most)
		return ""
	}
	return n.Value
}

// maxName is how many bytes a name may have.
const maxName = 100

// name reads a name that is shown in logs and tables.
func (r *reader) name(n *yaml.Node, what string) string {
	name := r.text(n, what, maxName)
	if !utf8.ValidString(name) || strings.ContainsFunc(name, func(c rune) bool { return !unicode.IsPrint(c) }) {
		r.fail(n, "%s has a character that can't be shown", what)
		return ""
	}
	return name
}
