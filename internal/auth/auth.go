// Package auth decides who may do what.
//
//	Credentials ── who is it? ── Identity ── which entry of the auth file? ── Access ── may it? ── Action
//	  Authorization │              token      tokens, rules, anonymous          role
//	  certificate   │              claims                                       scopes
//	                └ 401                     └ 403                                     └ 403
//
// A Policy is what the auth file says; it is made once by Parse and never changes. An Authenticator keeps the
// policy that is in force, the keys of OIDC issuers, and what it verified lately. What it decides and what
// Explain says come from the same functions.
//
// # Credentials
//
// A token is any text whose SHA-256 the file has; NewToken makes one that can't be guessed. It is sent as Bearer,
// or as the password of HTTP Basic with any user name. An ID token (JWT) of an OIDC issuer is sent in the same
// ways. A client certificate was verified by TLS before; it counts only where a rule is about certificates. A
// caller with an Authorization header is who the header says, and nobody if it is wrong, whatever certificate or
// right of anonymous callers there may be: a typo must be noticed and not end up as less access than was meant.
//
// # Scopes
//
// The scopes of the file stand in the order of trust, the most trusted first. A scope reads its own artifacts, and
// then those of scopes that stand above it: Parse refuses anything else, and so nothing that is written in a scope
// is ever read in a more trusted one. A name that ends with * stands for all scopes that begin with it; they don't
// read each other. A scope belongs to the entry that names it, or else to the longest pattern that matches.
//
// A rule may compute a scope from claims, as in "pr-{claims.number}". Claims are often chosen by those who must
// not be trusted, so they can't choose a level of trust: the text before the first brace decides at load which
// pattern the scope belongs to, and a scope that comes out to belong to another entry is refused.
//
// # What is written anew here
//
// JWTs are parsed and verified by go-jose. Discovery and the keys of an issuer are in keys.go instead of a library,
// since those at hand fetch keys again for each token that names an unknown one, which anybody can make, without a
// bound on how often or how much, and tell the reasons of a refusal by text alone.
package auth

import (
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Role is what a caller is to a scope. Each includes those before it.
type Role int

const (
	// Reader may download, and see what is stored.
	Reader Role = iota + 1
	// Writer may upload, too.
	Writer
	// Admin may delete, pin and promote, too.
	Admin
)

var roleNames = []string{"", "reader", "writer", "admin"}

// ParseRole returns the role of a name.
func ParseRole(name string) (Role, error) {
	if i := slices.Index(roleNames, name); i > 0 {
		return Role(i), nil
	}
	return 0, fmt.Errorf("%q is no role; use reader, writer or admin", shorten(name))
}

// String returns the role's name.
func (r Role) String() string { return roleNames[r] }

// MarshalText returns the role's name.
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// Action is what a caller wants to do. Every route and call needs one.
type Action int

const (
	// Read is to download, or to see what is stored, in the scopes that the caller reads.
	Read Action = iota + 1
	// Write is to upload into the caller's scope.
	Write
	// Administrate is to delete, pin or promote in the caller's scope.
	Administrate
	// Operate is to see or change what belongs to no one scope: to collect garbage, or to list what is in
	// quarantine. It needs an admin of all scopes.
	Operate
)

// String returns what the action is called in sentences and logs.
func (a Action) String() string {
	return [...]string{"", "read", "write", "administrate", "operate"}[a]
}

// role returns the least role that may do it.
func (a Action) role() Role { return [...]Role{0, Reader, Writer, Admin, Admin}[a] }

// Credentials are what a request brings.
type Credentials struct {
	// Authorization has the values of all Authorization headers.
	Authorization []string
	// Certificate is the leaf that the client proved to own and that was verified against the authorities that are
	// trusted with that, or nil.
	Certificate *x509.Certificate
	// Scope is the name of the scope that the request asks for, or empty if it names none.
	Scope string
}

// Identity is who a caller was proved to be. The zero Identity is anonymous.
type Identity struct {
	// Issuer is the name in the auth file of the issuer that vouches for Claims.
	Issuer string
	// Claims are those of an ID token, as from ParseClaims.
	Claims map[string]any
	// Certificate is a verified one.
	Certificate *x509.Certificate

	token *Token
}

// String returns what the identity is called in logs. It holds no secret.
func (id Identity) String() string {
	switch {
	case id.token != nil:
		return "token " + id.token.Name
	case id.Issuer != "":
		subject, _ := id.Claims["sub"].(string)
		return "oidc " + id.Issuer + ": " + shorten(subject)
	case id.Certificate != nil:
		return "certificate " + shorten(id.Certificate.Subject.CommonName)
	}
	return "anonymous"
}

func (id Identity) anonymous() bool {
	return id.token == nil && id.Issuer == "" && id.Certificate == nil
}

// Access is what one caller may do. It never changes.
type Access struct {
	// Who is the caller, for logs: "token ci", "oidc github: repo:octo/x:ref:refs/heads/main",
	// "certificate host.example" or "anonymous".
	Who string
	// Entry is what in the auth file decided: `token "ci"`, `rule "main builds"` or "anonymous".
	Entry string
	// Role is the caller's role in Scope.
	Role Role
	// Scope is the one scope that the caller writes to.
	Scope artifact.Scope
	// Reads are the scopes that the caller reads, in order; Scope is the first.
	Reads []artifact.Scope

	policy    *Policy
	grant     *Grant
	name      string // of the token or rule
	anonymous bool
	asked     bool // for Scope
}

// May returns nil if the caller may do it, or an *Error. It returns ErrAllScopes for Operate where a scope was asked
// for: who names one must not have something done in all.
func (a *Access) May(action Action) error {
	need := action.role()
	if a.Role < need {
		return a.refuse(ReasonRole, fmt.Sprintf("this needs the role %s, and the credential has %s", need, a.Role))
	}
	if action == Operate && !a.policy.coversAll(a.grant) {
		return a.refuse(ReasonScope, "this needs an admin of all scopes")
	}
	if action == Operate && a.asked {
		return ErrAllScopes
	}
	return nil
}

// In returns the caller's access where a scope of a name was asked for. It returns an *Error if the caller may not
// use the scope, and one that wraps artifact.ErrInvalidScope if there can be none of that name.
func (a *Access) In(name string) (*Access, error) {
	scope, err := artifact.ParseScope(name)
	if err != nil {
		return nil, err
	}
	if scope == a.Scope {
		in := *a
		in.asked = true
		return &in, nil
	}
	for _, allowed := range a.grant.choices {
		entry := a.policy.entryOf(scope)
		if allowed.matches(scope) && entry != nil {
			in := *a
			in.Scope, in.asked = scope, true
			in.Reads = entry.readBy(scope)
			return &in, nil
		}
	}
	// Whether there is such a scope is not told.
	return nil, a.refuse(ReasonScope, fmt.Sprintf("the credential may not use the scope %s", scope))
}

// MayPromote returns nil if the caller may let an artifact of one scope be one of another, too, or an *Error. An
// artifact can be promoted only to a more trusted scope: by an admin of both scopes, or by whom the auth file says.
func (a *Access) MayPromote(from, to artifact.Scope) error {
	source, target := a.policy.entryOf(from), a.policy.entryOf(to)
	if source == nil || target == nil || target.rank >= source.rank {
		return a.refuse(ReasonScope, fmt.Sprintf("an artifact can't be promoted from %s to %s, which is not a more trusted scope", from, to))
	}
	if a.Role >= Admin && a.uses(from) && a.uses(to) {
		return nil
	}
	for i := range a.policy.Promotions {
		if p := &a.policy.Promotions[i]; p.to == to && p.from.matches(from) && slices.Contains(p.By, a.name) {
			return nil
		}
	}
	return a.refuse(ReasonRole, fmt.Sprintf("the credential may not promote from %s to %s", from, to))
}

// uses says whether the caller may use a scope.
func (a *Access) uses(scope artifact.Scope) bool {
	_, err := a.In(scope.String())
	return err == nil
}

// refuse returns why the caller may not do something. One that showed no credential is told to show one.
func (a *Access) refuse(reason Reason, sentence string) error {
	if a.anonymous {
		return &Error{Reason: ReasonMissing, Detail: sentence, sentence: sentenceMissing}
	}
	return &Error{Reason: reason, Detail: a.Who + " by " + a.Entry + ": " + sentence, sentence: upper(sentence)}
}

// upper returns text with its first letter in upper case.
func upper(text string) string { return strings.ToUpper(text[:1]) + text[1:] }

// shorten returns text that others wrote, without what would be too long for a log.
func shorten(text string) string {
	const most = 200
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}
