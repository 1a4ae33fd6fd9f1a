package auth

import (
	"fmt"
	"time"
)

// Warnings returns what is allowed in the auth file, and odd, in no order.
func (p *Policy) Warnings(now time.Time) []*Problem {
	var problems []*Problem
	warn := func(line int, format string, args ...any) {
		problems = append(problems, &Problem{p.file, line, fmt.Sprintf(format, args...)})
	}
	grants := map[string]*Grant{}
	written := map[*ScopeEntry]bool{}
	write := func(g *Grant) {
		if g.Role < Writer {
			return
		}
		if g.entry != nil {
			written[g.entry] = true
		}
		for i := range p.Scopes {
			e := &p.Scopes[i]
			for _, choice := range g.choices {
				if choice.wild && e.pattern.wild && choice.prefix == e.pattern.prefix || !choice.wild && p.entryOf(choice.scope) == e || choice.wild && !e.pattern.wild && choice.matches(e.pattern.scope) {
					written[e] = true
				}
			}
		}
	}
	if p.Anonymous != nil {
		write(p.Anonymous)
		if p.Anonymous.Role >= Writer {
			warn(p.Anonymous.line, "anyone who reaches the server may write in %s: whoever reads it trusts all of them", p.Anonymous.Scopes[0])
		}
	} else if len(p.Tokens)+len(p.Rules) == 0 {
		warn(1, "nobody may do anything; add tokens, rules or anonymous")
	}
	for i := range p.Tokens {
		t := &p.Tokens[i]
		grants[t.Name] = &t.Grant
		write(&t.Grant)
		if !t.Expires.IsZero() && !now.Before(t.Expires) {
			warn(t.Line, "token %q expired at %s", t.Name, t.Expires.Format(time.RFC3339))
		}
	}
	used := map[string]bool{}
	for i := range p.Rules {
		rule := &p.Rules[i]
		grants[rule.Name] = &rule.Grant
		write(&rule.Grant)
		used[rule.Issuer] = true
		for j := range p.Rules[:i] {
			before := &p.Rules[j]
			if before.Issuer == rule.Issuer && before.Certificate == rule.Certificate && (before.When == "true" || before.When == rule.When) {
				warn(rule.Line, "rule %q never decides: whatever fits it fits rule %q above", rule.Name, before.Name)
				break
			}
		}
		if rule.When == "true" && rule.Role >= Writer && !rule.Certificate {
			warn(rule.Line, "rule %q lets everyone write to whom issuer %q gives a token; compare a claim, such as the repository or its owner", rule.Name, rule.Issuer)
		}
	}
	for i := range p.Issuers {
		if !used[p.Issuers[i].Name] {
			warn(p.Issuers[i].Line, "no rule is about issuer %q, so its tokens are good for nothing", p.Issuers[i].Name)
		}
	}
	for i := range p.Scopes {
		if e := &p.Scopes[i]; !written[e] && e.Line > 0 {
			warn(e.Line, "nobody writes in scope %s", e.Name)
		}
	}
	for i := range p.Promotions {
		promotion := &p.Promotions[i]
		for _, name := range promotion.By {
			g := grants[name]
			writes := g.entry != nil && g.entry.Name == promotion.From
			for _, choice := range g.choices {
				writes = writes || choice == promotion.from || !choice.wild && promotion.from.matches(choice.scope)
			}
			if writes {
				warn(promotion.Line, "%q may promote from %s what it wrote there itself, so %s trusts it as much as its own writers", name, promotion.From, promotion.To)
			}
		}
	}
	return problems
}
