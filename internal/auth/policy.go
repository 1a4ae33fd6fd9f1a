package auth

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Policy is what an auth file says. It must not be changed.
type Policy struct {
	// Anonymous is what a caller without a credential may do, or nil for nothing.
	Anonymous *Grant `json:"anonymous,omitempty"`
	// Tokens, Issuers and Rules are in the order of the file.
	Tokens  []Token  `json:"tokens"`
	Issuers []Issuer `json:"issuers"`
	Rules   []Rule   `json:"rules"`
	// Scopes are in the order of trust, the most trusted first. There is at least one.
	Scopes []ScopeEntry `json:"scopes"`
	// Promotions are what those who are no admins may promote.
	Promotions []Promotion `json:"promote"`

	file             string
	named            map[artifact.Scope]*ScopeEntry // the entries that are no patterns
	patterns         []*ScopeEntry                  // the others, those with the longest prefix first
	certificateRules bool                           // whether a rule is about certificates
}

// Grant is a role in some scopes.
type Grant struct {
	Role Role `json:"role"`
	// Scopes are as in the file: the first is the one that is written to where none is asked for, the others are
	// those, and patterns of those, that can be asked for.
	Scopes []string `json:"scopes"`

	choices  []pattern   // the scopes that can be asked for, the first one among them unless it is computed
	template *template   // of the first scope, or nil if it is not computed
	entry    *ScopeEntry // what a computed scope must belong to
	line     int
}

// Token is one that the file has.
type Token struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
	Grant
	// Expires is when the token is good no longer, or zero for never.
	Expires time.Time `json:"expires,omitzero"`
	// Line is where in the file it is.
	Line int `json:"line"`

	digest [sha256.Size]byte
}

// Issuer is an OIDC issuer whose ID tokens are credentials.
type Issuer struct {
	Name string `json:"name"`
	// URL is the issuer's, as in the claim iss, and where discovery begins.
	URL string `json:"url"`
	// Audience must be in the claim aud.
	Audience string `json:"audience"`
	// KeysFile is a file with the issuer's keys (a JWK set), relative to the auth file; empty if they are asked for.
	KeysFile string `json:"keys_file,omitempty"`
	// ClockSkew is how wrong clocks may be, from 0 to 10 minutes.
	ClockSkew time.Duration `json:"clock_skew"`
	Line      int           `json:"line"`
}

// Rule gives a role to those whom an expression fits.
type Rule struct {
	Name string `json:"name"`
	// Issuer is the name of an issuer whose tokens the rule is about, or empty if it is about certificates.
	Issuer      string `json:"issuer,omitempty"`
	Certificate bool   `json:"certificate,omitempty"`
	// When is the expression, in CEL.
	When string `json:"when"`
	Grant
	Line int `json:"line"`

	when *expression
}

// ScopeEntry is a scope, or with a * at the end of its name a pattern of scopes.
type ScopeEntry struct {
	Name string `json:"name"`
	// Reads are the names of the more trusted scopes that it reads, in order.
	Reads []string `json:"reads"`
	Line  int      `json:"line"`

	pattern pattern
	reads   []artifact.Scope
	rank    int // 0 is the most trusted
}

// Promotion lets some promote artifacts.
type Promotion struct {
	// From is the name or the pattern of the scopes to promote from, and To the more trusted one to promote to.
	From string `json:"from"`
	To   string `json:"to"`
	// By are the names of the tokens and rules whose callers may.
	By   []string `json:"by"`
	Line int      `json:"line"`

	from pattern
	to   artifact.Scope
}

// Matches says whether a scope belongs to the entry, if there is no closer one in the policy.
func (e *ScopeEntry) Matches(scope artifact.Scope) bool { return e.pattern.matches(scope) }

// EntryOf returns the entry that a scope belongs to, or nil if the policy has none.
func (p *Policy) EntryOf(scope artifact.Scope) *ScopeEntry { return p.entryOf(scope) }

// Step is an entry of the auth file that was looked at for a decision.
type Step struct {
	// Entry is what it is: `token "ci"`, `rule "main builds"` or "anonymous".
	Entry string `json:"entry"`
	// Line is where in the file it is, or 0 if it is not there.
	Line int `json:"line,omitempty"`
	// Fits says whether it decides.
	Fits bool `json:"fits"`
	// Why says why it does or does not.
	Why string `json:"why"`
}

// Decision is what is decided of a request, and why.
type Decision struct {
	Who     string
	Allowed bool
	// Access is what the caller may do, or nil if it got that far not.
	Access *Access
	// Refused is why the request is refused, or nil. It may be another error than an *Error, as those of Access.In.
	Refused error
	// Steps are the entries that were looked at, in order.
	Steps []Step
}

// Explain returns what is decided of a caller who asks for a scope, or for none if it is empty, to do something. It
// believes the identity.
func (p *Policy) Explain(id Identity, scope string, action Action) *Decision {
	d := &Decision{Who: id.String()}
	d.Access, d.Refused = p.decide(id, &d.Steps)
	if d.Refused == nil && scope != "" {
		d.Access, d.Refused = d.Access.In(scope)
	}
	if d.Refused == nil {
		d.Refused = d.Access.May(action)
	}
	d.Allowed = d.Refused == nil
	return d
}

// decide returns what an identity may do where no scope was asked for. If steps is not nil, it gets the entries that
// were looked at.
func (p *Policy) decide(id Identity, steps *[]Step) (*Access, error) {
	note := func(entry string, line int, fits bool, why string) {
		if steps != nil {
			*steps = append(*steps, Step{entry, line, fits, why})
		}
	}
	if id.Certificate != nil && !p.certificateRules {
		note("certificate", 0, false, "no rule is about certificates, so it is no credential here")
		id = Identity{}
	}
	switch {
	case id.token != nil:
		entry := "token " + strconv.Quote(id.token.Name)
		note(entry, id.token.Line, true, "its SHA-256 is that of the token")
		return p.access(id, entry, id.token.Name, &id.token.Grant, nil)
	case id.anonymous():
		if p.Anonymous == nil {
			note("anonymous", 0, false, "callers without a credential may do nothing")
			return nil, &Error{Reason: ReasonMissing, Detail: "callers without a credential may do nothing", sentence: sentenceMissing}
		}
		note("anonymous", p.Anonymous.line, true, "there is no credential")
		return p.access(id, "anonymous", "", p.Anonymous, nil)
	}
	variables := id.variables()
	failed := ""
	for i := range p.Rules {
		rule := &p.Rules[i]
		entry := "rule " + strconv.Quote(rule.Name)
		if rule.Certificate != (id.Certificate != nil) || rule.Issuer != id.Issuer {
			note(entry, rule.Line, false, "it is about other credentials")
			continue
		}
		fits, err := rule.when.fits(variables)
		switch {
		case err != nil:
			why := "when can't be evaluated: " + shorten(err.Error())
			failed += "; " + entry + ": " + why
			note(entry, rule.Line, false, why)
		case !fits:
			note(entry, rule.Line, false, "when is false")
		default:
			note(entry, rule.Line, true, "when is true")
			return p.access(id, entry, rule.Name, &rule.Grant, variables)
		}
	}
	return nil, &Error{Reason: ReasonNoRule, Detail: id.String() + ": no rule fits" + shorten(failed), sentence: sentenceNoRule}
}

// access returns what a grant gives to an identity.
func (p *Policy) access(id Identity, entry, name string, grant *Grant, variables map[string]any) (*Access, error) {
	a := &Access{
		Who: id.String(), Entry: entry, Role: grant.Role,
		policy: p, grant: grant, name: name, anonymous: id.anonymous(),
	}
	if grant.template == nil {
		a.Scope = grant.choices[0].scope
		a.Reads = p.entryOf(a.Scope).readBy(a.Scope)
		return a, nil
	}
	refuse := func(what string) error {
		return &Error{Reason: ReasonScope, Detail: a.Who + " by " + entry + ": " + what, sentence: sentenceBadScope}
	}
	text, err := grant.template.text(variables)
	if err != nil {
		return nil, refuse("the scope can't be evaluated: " + shorten(err.Error()))
	}
	if a.Scope, err = artifact.ParseScope(text); err != nil {
		return nil, refuse(fmt.Sprintf("the scope is %q: %v", shorten(text), err))
	}
	if p.entryOf(a.Scope) != grant.entry {
		return nil, refuse(fmt.Sprintf("the scope is %s, which is not one of %s", a.Scope, grant.entry.Name))
	}
	a.Reads = grant.entry.readBy(a.Scope)
	return a, nil
}

// identify returns the identity of who has a token, or an error if it is not in the file.
func (p *Policy) identify(secret string, now time.Time) (Identity, error) {
	digest := sha256.Sum256([]byte(secret))
	// All are compared in full, so that how long it takes tells nothing.
	found := -1
	for i := range p.Tokens {
		same := subtle.ConstantTimeCompare(digest[:], p.Tokens[i].digest[:])
		found = subtle.ConstantTimeSelect(same, i, found)
	}
	if found < 0 {
		return Identity{}, errNoToken
	}
	token := &p.Tokens[found]
	if !token.Expires.IsZero() && !now.Before(token.Expires) {
		return Identity{}, &Error{
			Reason:   ReasonExpired,
			Detail:   fmt.Sprintf("token %s expired at %s", token.Name, token.Expires.Format(time.RFC3339)),
			sentence: sentenceExpired,
		}
	}
	return Identity{token: token}, nil
}

// errNoToken says that a secret is no token of the file.
var errNoToken = errors.New("no token of the auth file")
