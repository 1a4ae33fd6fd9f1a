package auth

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// pattern is the name of a scope, or with a * at its end the beginning of names.
type pattern struct {
	scope  artifact.Scope // unless wild
	prefix string         // if wild
	wild   bool
}

// parsePattern returns the pattern that text writes.
func parsePattern(text string) (pattern, error) {
	prefix, wild := strings.CutSuffix(text, "*")
	if !wild {
		scope, err := artifact.ParseScope(text)
		return pattern{scope: scope}, err
	}
	if prefix != "" {
		if _, err := artifact.ParseScope(prefix); err != nil {
			return pattern{}, fmt.Errorf("%w; a * may stand only at the end", err)
		}
		if len(prefix) == artifact.MaxScopeLength {
			return pattern{}, errors.New("no name of a scope is that long")
		}
	}
	return pattern{prefix: prefix, wild: true}, nil
}

func (p pattern) matches(scope artifact.Scope) bool {
	if p.wild {
		return strings.HasPrefix(scope.String(), p.prefix)
	}
	return p.scope == scope
}

// readBy returns what a scope that belongs to the entry reads, in order.
func (e *ScopeEntry) readBy(scope artifact.Scope) []artifact.Scope {
	return append([]artifact.Scope{scope}, e.reads...)
}

// entryOf returns the entry that a scope belongs to, or nil if there is none.
func (p *Policy) entryOf(scope artifact.Scope) *ScopeEntry {
	if e := p.named[scope]; e != nil {
		return e
	}
	return p.patternOf(scope.String())
}

// patternOf returns the entry with the longest pattern that matches everything that begins with text.
func (p *Policy) patternOf(text string) *ScopeEntry {
	for _, e := range p.patterns {
		if strings.HasPrefix(text, e.pattern.prefix) {
			return e
		}
	}
	return nil
}

// byPrefix orders entries with patterns, the longest first.
func byPrefix(a, b *ScopeEntry) int { return cmp.Compare(len(b.pattern.prefix), len(a.pattern.prefix)) }

// coversAll says whether a grant is for every scope that there can be.
func (p *Policy) coversAll(g *Grant) bool {
	for i := range p.Scopes {
		covered := false
		e := &p.Scopes[i]
		for _, choice := range g.choices {
			if e.pattern == choice || choice.wild && (e.pattern.wild && strings.HasPrefix(e.pattern.prefix, choice.prefix) || !e.pattern.wild && choice.matches(e.pattern.scope)) {
				covered = true
			}
		}
		if !covered {
			return false
		}
	}
	return true
}
