package auth

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"go.yaml.in/yaml/v4"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Limits of an auth file. Each request is compared with all tokens, and may be with all rules.
const (
	// MaxFile is how many bytes an auth file, or a file with keys, may have.
	MaxFile = 1 << 20
	// MaxEntries is how many tokens, rules, scopes, promotions, and scopes of one credential there may be.
	MaxEntries = 1000
	// MaxIssuers is how many issuers there may be.
	MaxIssuers = 100
	// MaxClockSkew is how wrong clocks may be at most.
	MaxClockSkew = 10 * time.Minute

	defaultClockSkew = time.Minute
	longestAge       = 10 * 365 * 24 * time.Hour
)

// Parse returns the policy that an auth file of a name says. Its errors name the file and the line, one a line.
func Parse(file string, text []byte) (*Policy, error) {
	r := &reader{file: file}
	p := &Policy{file: file, named: map[artifact.Scope]*ScopeEntry{}}
	if len(text) > MaxFile {
		return nil, fmt.Errorf("%s has %d bytes; it can have %d", file, len(text), MaxFile)
	}
	var document yaml.Node
	if err := yaml.Load(text, &document); err != nil {
		return nil, loadError(file, err)
	}
	if len(document.Content) != 1 {
		return nil, &Problem{file, 1, "it is empty; without an auth file everything is open, with one something must be in it"}
	}
	r.policy(p, document.Content[0])
	for _, check := range r.later {
		check()
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	return p, nil
}

// loadError returns what the YAML library says, with the line in front.
func loadError(file string, err error) error {
	if e, ok := errors.AsType[*yaml.LoadError](err); ok {
		text := e.Message
		if e.ContextMsg != "" {
			text = e.ContextMsg + ": " + text
		}
		return &Problem{file, max(e.Mark.Line, 1), "it is no YAML: " + text}
	}
	return &Problem{file, 1, "it is no YAML: " + err.Error()}
}

func (r *reader) policy(p *Policy, n *yaml.Node) {
	names := map[string]*Grant{} // of tokens and rules
	noScopes := true
	r.fields(n, "the file",
		field{name: "anonymous", read: func(n *yaml.Node) { p.Anonymous = r.anonymous(p, n) }},
		field{name: "tokens", read: func(n *yaml.Node) {
			r.list(n, "tokens", MaxEntries, func(n *yaml.Node) { r.token(p, n, names) })
		}},
		field{name: "issuers", read: func(n *yaml.Node) { r.list(n, "issuers", MaxIssuers, func(n *yaml.Node) { r.issuer(p, n) }) }},
		field{name: "rules", read: func(n *yaml.Node) { r.list(n, "rules", MaxEntries, func(n *yaml.Node) { r.rule(p, n, names) }) }},
		field{name: "scopes", read: func(n *yaml.Node) {
			r.list(n, "scopes", MaxEntries, func(n *yaml.Node) {
				noScopes = false
				r.scope(p, n)
			})
		}},
		field{name: "promote", read: func(n *yaml.Node) {
			r.list(n, "promote", MaxEntries, func(n *yaml.Node) { r.promotion(p, n, names) })
		}},
	)
	if noScopes {
		p.Scopes = []ScopeEntry{{Name: artifact.DefaultScope.String(), pattern: pattern{scope: artifact.DefaultScope}}}
	}
	for i := range p.Scopes {
		if e := &p.Scopes[i]; e.pattern.wild {
			p.patterns = append(p.patterns, e)
		} else {
			p.named[e.pattern.scope] = e
		}
	}
	slices.SortStableFunc(p.patterns, byPrefix)
}

// role reads a role.
func (r *reader) role(n *yaml.Node) Role {
	name := r.text(n, "role", maxName)
	if name == "" {
		return 0
	}
	role, err := ParseRole(name)
	if err != nil {
		r.fail(n, "%v", err)
	}
	return role
}

// grant returns the fields of a grant. When all is read, done must be called with the whole entry.
func (r *reader) grant(p *Policy, g *Grant, what string, certificate, computed bool) (fields []field, done func(*yaml.Node)) {
	var first *yaml.Node
	fields = []field{
		{"role", true, func(n *yaml.Node) { g.Role = r.role(n) }},
		{"scope", false, func(n *yaml.Node) {
			first = n
			if text := r.text(n, "scope", maxExpression); text != "" {
				g.Scopes = append([]string{text}, g.Scopes...)
			}
		}},
	}
	if !computed {
		fields = append(fields, field{"scopes", false, func(n *yaml.Node) {
			if first != nil {
				r.fail(n, "%s has both scope and scopes; the first of scopes is the one that is used where none is asked for", what)
			}
			first = n
			r.list(n, "scopes", MaxEntries, func(n *yaml.Node) {
				if text := r.text(n, "a scope", maxName); text != "" {
					g.Scopes = append(g.Scopes, text)
				}
			})
			if len(g.Scopes) == 0 {
				r.fail(n, "scopes is empty; name a scope, or leave it out for %s", artifact.DefaultScope)
			}
		}})
	}
	return fields, func(n *yaml.Node) {
		if first != nil {
			n = first
		}
		g.line = n.Line
		if len(g.Scopes) == 0 {
			g.Scopes = []string{artifact.DefaultScope.String()}
		}
		r.later = append(r.later, func() { r.grantScopes(p, g, n, certificate, computed) })
	}
}

// grantScopes reads the scopes of a grant, when those of the file are known.
func (r *reader) grantScopes(p *Policy, g *Grant, n *yaml.Node, certificate, computed bool) {
	if computed && strings.ContainsAny(g.Scopes[0], "{}") {
		r.computedScope(p, g, n, certificate)
		return
	}
	for i, text := range g.Scopes {
		at := n
		if n.Kind == yaml.SequenceNode && i < len(n.Content) {
			at = n.Content[i]
		}
		choice, err := parsePattern(text)
		switch {
		case err != nil:
			r.fail(at, "scope %q: %v", shorten(text), err)
		case choice.wild && i == 0:
			r.fail(at, "scope %q is a pattern; the first scope is the one that is written to where none is asked for, so it must be one", text)
		case !choice.wild && p.entryOf(choice.scope) == nil:
			r.fail(at, "scope %q is not in scopes; add it there", text)
		default:
			g.choices = append(g.choices, choice)
		}
	}
}

func (r *reader) computedScope(p *Policy, g *Grant, n *yaml.Node, certificate bool) {
	t, err := parseTemplate(g.Scopes[0], certificate)
	if err != nil {
		r.fail(n, "scope: %v", err)
		return
	}
	prefix := t.texts[0]
	if prefix == "" {
		r.fail(n, "scope must begin with text, as in pr-{…}: else a claim could choose how much the scope is trusted")
		return
	}
	if _, err := artifact.ParseScope(prefix); err != nil {
		r.fail(n, "scope begins with %q: %v", shorten(prefix), err)
		return
	}
	if g.entry = p.patternOf(prefix); g.entry == nil {
		r.fail(n, "no pattern in scopes matches all that begins with %q; add %s* there", prefix, prefix)
		return
	}
	g.template = t
}

func (r *reader) anonymous(p *Policy, n *yaml.Node) *Grant {
	g := &Grant{}
	fields, done := r.grant(p, g, "anonymous", false, false)
	r.fields(n, "anonymous", fields...)
	done(n)
	g.line = n.Line
	return g
}

// unique fails a name that another token or rule has.
func (r *reader) unique(n *yaml.Node, names map[string]*Grant, name string, g *Grant) {
	if name == "" {
		return
	}
	if names[name] != nil {
		r.fail(n, "there are two tokens or rules with the name %q; names must differ, for logs and promote", name)
	}
	names[name] = g
}

func (r *reader) token(p *Policy, n *yaml.Node, names map[string]*Grant) {
	t := Token{Line: n.Line}
	g := &Grant{}
	fields, done := r.grant(p, g, "a token", false, false)
	r.fields(n, "a token", append([]field{
		{"name", true, func(n *yaml.Node) {
			t.Name = r.name(n, "name")
			r.unique(n, names, t.Name, g)
		}},
		{"sha256", true, func(n *yaml.Node) {
			t.SHA256 = r.text(n, "sha256", MaxFile)
			digest, err := artifact.ParseDigest(t.SHA256)
			switch {
			case t.SHA256 == "":
			case strings.HasPrefix(t.SHA256, TokenPrefix):
				t.SHA256 = ""
				r.fail(n, "sha256 is a token itself, which must not be in a file: make a new one, and put its SHA-256 here")
			case err != nil:
				r.fail(n, "sha256 is %v; polykit-cache token new prints a token and what goes here", err)
			case digest == sha256.Sum256(nil) || digest == sha256.Sum256([]byte("\n")):
				r.fail(n, "sha256 is that of nothing; was a variable not set?")
			case slices.ContainsFunc(p.Tokens, func(other Token) bool { return other.SHA256 == t.SHA256 }):
				r.fail(n, "sha256 is that of another token; each must have its own")
			}
			t.digest = digest
		}},
		{"expires", false, func(n *yaml.Node) { t.Expires = r.time(n) }},
	}, fields...)...)
	done(n)
	// The grant is completed when all is read, at its own place.
	i := len(p.Tokens)
	p.Tokens = append(p.Tokens, t)
	r.later = append(r.later, func() { p.Tokens[i].Grant = *g })
}

// time reads a date, which begins in UTC, or a time.
func (r *reader) time(n *yaml.Node) time.Time {
	text := r.text(n, "expires", maxName)
	if text == "" {
		return time.Time{}
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, text); err == nil {
			return t
		}
	}
	r.fail(n, "expires is %q; it must be a date such as 2027-01-31, which begins in UTC, or a time such as 2027-01-31T12:00:00Z", text)
	return time.Time{}
}

func (r *reader) issuer(p *Policy, n *yaml.Node) {
	issuer := Issuer{Line: n.Line, ClockSkew: defaultClockSkew}
	at := n
	r.fields(n, "an issuer",
		field{"name", true, func(n *yaml.Node) {
			issuer.Name = r.name(n, "name")
			if slices.ContainsFunc(p.Issuers, func(other Issuer) bool { return other.Name == issuer.Name }) {
				r.fail(n, "there are two issuers with the name %q", issuer.Name)
			}
		}},
		field{"url", true, func(n *yaml.Node) {
			at = n
			issuer.URL = r.text(n, "url", maxExpression)
			if slices.ContainsFunc(p.Issuers, func(other Issuer) bool { return other.URL == issuer.URL }) {
				r.fail(n, "there are two issuers with the same url")
			}
		}},
		field{"audience", true, func(n *yaml.Node) { issuer.Audience = r.name(n, "audience") }},
		field{"keys_file", false, func(n *yaml.Node) { issuer.KeysFile = r.text(n, "keys_file", maxExpression) }},
		field{"clock_skew", false, func(n *yaml.Node) { issuer.ClockSkew = r.duration(n, "clock_skew", 0, MaxClockSkew) }},
	)
	if issuer.URL != "" {
		if err := checkURL(issuer.URL, issuer.KeysFile != ""); err != nil {
			r.fail(at, "url is %q: %v", shorten(issuer.URL), err)
		}
	}
	p.Issuers = append(p.Issuers, issuer)
}

// checkURL says whether a URL can be that of an issuer. Keys that come over clear text can be anybody's.
func checkURL(text string, offline bool) error {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return errors.New("it must be a URL such as https://token.actions.githubusercontent.com")
	case u.Scheme == "https" || u.Scheme == "http" && (offline || loopback(u.Hostname())):
		return nil
	}
	return errors.New("it must begin with https://, since who can change the answer could sign any token; or give keys_file")
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// duration reads a duration: as in Go, or a number of days, as in 7d.
func (r *reader) duration(n *yaml.Node, what string, least, most time.Duration) time.Duration {
	text := r.text(n, what, maxName)
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if days, isDays := strings.CutSuffix(text, "d"); isDays {
		var count int
		count, err = strconv.Atoi(days)
		d = time.Duration(min(max(count, -1), math.MaxInt16)) * 24 * time.Hour
	}
	if err != nil {
		r.fail(n, "%s is %q; it must be a duration such as 90s, 12h or 7d", what, text)
	} else if d < least || d > most {
		r.fail(n, "%s is %s; it must be from %v to %v", what, text, least, most)
	}
	return d
}

func (r *reader) rule(p *Policy, n *yaml.Node, names map[string]*Grant) {
	rule := Rule{Line: n.Line}
	g := &Grant{}
	var when, issuer *yaml.Node
	// What an expression is about must be known before it is read, wherever it stands.
	for i := 0; i+1 < len(n.Content); i += 2 {
		rule.Certificate = rule.Certificate || n.Content[i].Value == "certificate"
	}
	fields, done := r.grant(p, g, "a rule", rule.Certificate, true)
	r.fields(n, "a rule", append([]field{
		{"name", true, func(n *yaml.Node) {
			rule.Name = r.name(n, "name")
			r.unique(n, names, rule.Name, g)
		}},
		{"issuer", false, func(n *yaml.Node) {
			issuer = n
			rule.Issuer = r.text(n, "issuer", maxName)
		}},
		{"certificate", false, func(n *yaml.Node) {
			if text := r.text(n, "certificate", maxName); text != "" && text != "true" {
				r.fail(n, "certificate is %q; it must be true, or left out", text)
			}
		}},
		{"when", true, func(n *yaml.Node) {
			when = n
			rule.When = strings.TrimSpace(r.text(n, "when", maxExpression))
		}},
	}, fields...)...)
	if rule.Certificate == (issuer != nil) {
		r.fail(n, "a rule must have either issuer, the name of one, or certificate: true")
	}
	if rule.When != "" {
		var wrong *compileError
		if rule.when, wrong = compile(rule.When, rule.Certificate, cel.BoolType); wrong != nil {
			at := *when
			at.Line += wrong.line - 1
			if when.Style&yaml.LiteralStyle != 0 { // which begins behind its |
				at.Line++
			}
			r.fail(&at, "when: %s", wrong.text)
		}
	}
	done(n)
	p.certificateRules = p.certificateRules || rule.Certificate
	i := len(p.Rules)
	p.Rules = append(p.Rules, rule)
	r.later = append(r.later, func() {
		p.Rules[i].Grant = *g
		if issuer != nil && !slices.ContainsFunc(p.Issuers, func(i Issuer) bool { return i.Name == rule.Issuer }) {
			r.fail(issuer, "issuer %q is not in issuers; add it there", rule.Issuer)
		}
	})
}

func (r *reader) scope(p *Policy, n *yaml.Node) {
	e := ScopeEntry{Line: n.Line, rank: len(p.Scopes)}
	r.fields(n, "a scope",
		field{"name", true, func(n *yaml.Node) {
			e.Name = r.text(n, "name", maxName)
			if e.Name == "" {
				return
			}
			var err error
			if e.pattern, err = parsePattern(e.Name); err != nil {
				r.fail(n, "name is %q: %v", shorten(e.Name), err)
			} else if slices.ContainsFunc(p.Scopes, func(other ScopeEntry) bool { return other.pattern == e.pattern }) {
				r.fail(n, "there are two scopes with the name %s", e.Name)
			}
		}},
		field{"reads", false, func(n *yaml.Node) {
			r.list(n, "reads", MaxEntries, func(n *yaml.Node) {
				name := r.text(n, "a scope in reads", maxName)
				if name == "" {
					return
				}
				e.Reads = append(e.Reads, name)
				r.later = append(r.later, func() { r.reads(p, n, e.rank, name) })
			})
		}},
	)
	p.Scopes = append(p.Scopes, e)
}

// reads checks that a scope of a rank may read another. This is what keeps what is written in a scope out of all that
// are more trusted.
func (r *reader) reads(p *Policy, n *yaml.Node, rank int, name string) {
	e := &p.Scopes[rank]
	other := slices.IndexFunc(p.Scopes, func(e ScopeEntry) bool { return e.Name == name })
	switch {
	case strings.HasSuffix(name, "*"):
		r.fail(n, "%s must not read %s: only single scopes can be read, each by its name", e.Name, name)
	case other < 0:
		r.fail(n, "reads names %q, which is not in scopes", shorten(name))
	case other == rank:
		r.fail(n, "%s names itself in reads; it always reads its own", e.Name)
	case other > rank:
		r.fail(n, "%s must not read %s, which stands below it and so is less trusted: scopes stand in the order of trust, the most trusted first", e.Name, name)
	case slices.Contains(e.reads, p.Scopes[other].pattern.scope):
		r.fail(n, "%s has %s twice in reads", e.Name, name)
	default:
		e.reads = append(e.reads, p.Scopes[other].pattern.scope)
	}
}

func (r *reader) promotion(p *Policy, n *yaml.Node, names map[string]*Grant) {
	promotion := Promotion{Line: n.Line}
	before := len(r.problems)
	var by []*yaml.Node
	r.fields(n, "an entry of promote",
		field{"from", true, func(n *yaml.Node) { promotion.From = r.text(n, "from", maxName) }},
		field{"to", true, func(n *yaml.Node) { promotion.To = r.text(n, "to", maxName) }},
		field{"by", true, func(n *yaml.Node) {
			r.list(n, "by", MaxEntries, func(n *yaml.Node) {
				by = append(by, n)
				promotion.By = append(promotion.By, r.text(n, "a name in by", maxName))
			})
			if len(promotion.By) == 0 {
				r.fail(n, "by is empty; name the tokens and rules whose callers may promote")
			}
		}},
	)
	if len(r.problems) > before {
		return
	}
	i := len(p.Promotions)
	p.Promotions = append(p.Promotions, promotion)
	r.later = append(r.later, func() {
		promotion := &p.Promotions[i]
		from := slices.IndexFunc(p.Scopes, func(e ScopeEntry) bool { return e.Name == promotion.From })
		to := slices.IndexFunc(p.Scopes, func(e ScopeEntry) bool { return e.Name == promotion.To })
		switch {
		case from < 0 || to < 0:
			r.fail(n, "from and to must be names in scopes")
			return
		case p.Scopes[to].pattern.wild:
			r.fail(n, "to is %s; an artifact is promoted to a single scope", promotion.To)
		case to >= from:
			r.fail(n, "%s is not more trusted than %s: an artifact can be promoted only to a scope that stands above its own", promotion.To, promotion.From)
		}
		promotion.from, promotion.to = p.Scopes[from].pattern, p.Scopes[to].pattern.scope
		for i, name := range promotion.By {
			switch grant := names[name]; {
			case grant == nil:
				r.fail(by[i], "by names %q, which is no token or rule", shorten(name))
			case grant.Role != 0 && grant.Role < Writer:
				r.fail(by[i], "%q is a reader, and must be a writer to promote", name)
			}
		}
	})
}
