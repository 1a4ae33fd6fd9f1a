package auth_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
)

func mustMatch(t *testing.T, got, want string) {
	t.Helper()
	if !regexp.MustCompile(`^(?:` + want + `)$`).MatchString(got) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func claims(t testing.TB, text string) auth.Identity {
	t.Helper()
	c, err := auth.ParseClaims([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return auth.Identity{Issuer: "github", Claims: c}
}

func certificate(name string) auth.Identity {
	return auth.Identity{Certificate: &x509.Certificate{Subject: pkix.Name{CommonName: name}, NotAfter: now.Add(time.Hour)}}
}

// outcome says what is decided, in a line.
func outcome(d *auth.Decision) string {
	if d.Refused != nil {
		if e, ok := errors.AsType[*auth.Error](d.Refused); ok {
			return string(e.Reason)
		}
		return d.Refused.Error()
	}
	return fmt.Sprintf("%s as %s in %s reads %s", d.Access.Role, d.Access.Entry, d.Access.Scope, join(d.Access.Reads))
}

func join(scopes []artifact.Scope) string {
	var names []string
	for _, s := range scopes {
		names = append(names, s.String())
	}
	return strings.Join(names, " ")
}

func TestDecisions(t *testing.T) {
	p := parse(t, full)
	main := claims(t, `{"sub": "repo:octo/x", "ref": "refs/heads/main", "repository_owner": "octo", "event_name": "push"}`)
	pr := func(ref string) auth.Identity {
		return claims(t, `{"sub": "repo:octo/x:pull_request", "ref": "`+ref+`", "repository_owner": "octo", "event_name": "pull_request"}`)
	}
	for _, c := range []struct {
		name   string
		id     auth.Identity
		scope  string
		action auth.Action
		want   string
	}{
		{"anonymous reads", auth.Identity{}, "", auth.Read, "reader as anonymous in default reads default"},
		{"anonymous writes", auth.Identity{}, "", auth.Write, "missing"},
		{"anonymous elsewhere", auth.Identity{}, "nightly", auth.Read, "missing"},
		{"anonymous by name", auth.Identity{}, "default", auth.Read, "reader as anonymous in default reads default"},
		{"main", main, "", auth.Write, `writer as rule "main builds" in default reads default`},
		{"main administrates", main, "", auth.Administrate, "role"},
		{"main elsewhere", main, "nightly", auth.Write, "scope"},
		{"pull request", pr("refs/pull/7/merge"), "", auth.Write, `writer as rule "pull requests" in pr-7 reads pr-7 default nightly`},
		{"pull request by name", pr("refs/pull/7/merge"), "pr-7", auth.Write, `writer as rule "pull requests" in pr-7 reads pr-7 default nightly`},
		{"pull request into another", pr("refs/pull/7/merge"), "pr-8", auth.Write, "scope"},
		{"pull request into main", pr("refs/pull/7/merge"), "default", auth.Write, "scope"},
		{"pull request that would be more trusted", pr("refs/pull/special/merge"), "", auth.Write, "scope"},
		{"pull request of no scope", pr("refs/pull/../merge"), "", auth.Write, "scope"},
		{"pull request in upper case", pr("refs/pull/A/merge"), "", auth.Read, "scope"},
		{"pull request without a number", pr("refs"), "", auth.Read, "scope"},
		{"pull request with a long name", pr("refs/pull/" + strings.Repeat("7", 61) + "/merge"), "", auth.Read, "scope"},
		{"a scope that can't be", main, "A", auth.Read, "invalid scope: .*"},
		{"others", claims(t, `{"ref": "refs/heads/main", "repository_owner": "evil", "event_name": "push"}`), "", auth.Read, "no_rule"},
		{"no claims", claims(t, `{}`), "", auth.Read, "no_rule"},
		{"another issuer", auth.Identity{Issuer: "gitlab", Claims: main.Claims}, "", auth.Read, "no_rule"},
		{"machine", certificate("a.build.example"), "", auth.Write, `writer as rule "machines" in nightly reads nightly default`},
		{"another machine", certificate("a.build.example.evil"), "", auth.Read, "no_rule"},
	} {
		t.Run(c.name, func(t *testing.T) { mustMatch(t, outcome(p.Explain(c.id, c.scope, c.action)), c.want) })
	}
}

// A scope that is computed is a text or a whole number, and nothing else.
func TestComputedScopes(t *testing.T) {
	for _, c := range []struct{ scope, claims, want string }{
		{"pr-{claims.n}", `{"n": 7}`, "pr-7"},
		{"pr-{claims.n}", `{"n": "7"}`, "pr-7"},
		{"pr-{claims.n}", `{"n": 7.0}`, "scope"},
		{"pr-{claims.n}", `{"n": 7.5}`, "scope"},
		{"pr-{claims.n}", `{"n": -7}`, "pr--7"},
		{"pr-{claims.n}", `{"n": 12345678901234}`, "pr-12345678901234"},
		{"pr-{claims.n}", `{"n": true}`, "scope"},
		{"pr-{claims.n}", `{"n": null}`, "scope"},
		{"pr-{claims.n}", `{"n": [7]}`, "scope"},
		{"pr-{claims.n}", `{}`, "scope"},
		{"pr-{claims.n}", `{"n": ""}`, "pr-"},
		{"pr-{claims.n}", `{"n": "a/../b"}`, "scope"},
		{"pr-{claims.n}", `{"n": "a\n"}`, "scope"},
		{"pr-{claims.n}-{claims.m}.x", `{"n": 1, "m": 2}`, "pr-1-2.x"},
		{"pr-{claims.n.lowerAscii().replace('/', '-')}", `{"n": "Octo/X"}`, "pr-octo-x"},
	} {
		p := parse(t, "issuers:\n  - {name: github, url: https://i.example, audience: a}\nscopes:\n  - name: default\n  - name: pr-*\nrules:\n  - name: r\n    issuer: github\n    when: true\n    role: writer\n    scope: "+c.scope+"\n")
		d := p.Explain(claims(t, c.claims), "", auth.Write)
		got := outcome(d)
		if d.Access != nil {
			got = d.Access.Scope.String()
		}
		if got != c.want {
			t.Errorf("%s of %s: got %s, want %s (%v)", c.scope, c.claims, got, c.want, d.Refused)
		}
	}
}

// Explain says of every entry whether it decides, and why.
func TestExplainSays(t *testing.T) {
	p := parse(t, full)
	d := p.Explain(claims(t, `{"event_name": "pull_request", "repository_owner": "octo", "ref": "refs/pull/7/merge", "sub": "s"}`), "", auth.Administrate)
	var got []string
	for _, s := range d.Steps {
		got = append(got, fmt.Sprint(s.Entry, " ", s.Line, " ", s.Fits, " ", s.Why))
	}
	want := `rule "main builds" 23 false when is false
rule "pull requests" 27 true when is true`
	if strings.Join(got, "\n") != want {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
	if d.Allowed || d.Who != "oidc github: s" || d.Refused.Error() != "This needs the role admin, and the credential has writer" {
		t.Errorf("got %+v", d)
	}
	d = p.Explain(claims(t, `{"event_name": "push"}`), "", auth.Read)
	if why := d.Steps[0].Why; !strings.HasPrefix(why, "when can't be evaluated: no such key: ref") {
		t.Errorf("why: %s", why)
	}
	if e := d.Refused.(*auth.Error); !strings.Contains(e.Detail, `no rule fits; rule "main builds": when can't be evaluated: no such key`) {
		t.Errorf("detail: %s", e.Detail)
	}
}

// A certificate counts only where a rule is about certificates.
func TestCertificateWithoutRules(t *testing.T) {
	p := parse(t, "anonymous: {role: reader}\n")
	d := p.Explain(certificate("a"), "", auth.Read)
	if got := outcome(d); got != "reader as anonymous in default reads default" {
		t.Errorf("got %s", got)
	}
	if d.Steps[0].Why != "no rule is about certificates, so it is no credential here" {
		t.Errorf("got %+v", d.Steps)
	}
}

// Expressions see all of a certificate that is documented.
func TestCertificateFields(t *testing.T) {
	uri, err := url.Parse("spiffe://example/ci")
	if err != nil {
		t.Fatal(err)
	}
	id := auth.Identity{Certificate: &x509.Certificate{
		Subject:        pkix.Name{CommonName: "c", Organization: []string{"o"}, OrganizationalUnit: []string{"u"}},
		Issuer:         pkix.Name{CommonName: "ca"},
		DNSNames:       []string{"a.example"},
		EmailAddresses: []string{"a@b.example"},
		URIs:           []*url.URL{uri},
		IPAddresses:    []net.IP{net.IPv4(127, 0, 0, 1)},
		SerialNumber:   big.NewInt(77),
	}}
	for when, fits := range map[string]bool{
		`certificate.subject.common_name == "c"`:                                                    true,
		`certificate.subject.common_name == "d"`:                                                    false,
		`"o" in certificate.subject.organization && "u" in certificate.subject.organizational_unit`: true,
		`certificate.issuer.common_name == "ca"`:                                                    true,
		`"a.example" in certificate.dns_names`:                                                      true,
		`certificate.emails.exists(e, e.endsWith("@b.example"))`:                                    true,
		`certificate.uris == ["spiffe://example/ci"]`:                                               true,
		`certificate.ips[0] == "127.0.0.1"`:                                                         true,
		`certificate.serial == "77"`:                                                                true,
		`certificate.sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"`:  true,
		`certificate.dns_names[7] == "x"`:                                                           false,
	} {
		p := parse(t, "rules:\n  - name: r\n    certificate: true\n    role: reader\n    when: |\n      "+when+"\n")
		if d := p.Explain(id, "", auth.Read); d.Allowed != fits {
			t.Errorf("%s: %v, %+v", when, d.Allowed, d.Steps)
		}
	}
}

// What callers put into their claims can't make an expression slow.
func TestExpressionsAreBounded(t *testing.T) {
	p := parse(t, `
issuers:
  - {name: github, url: https://i.example, audience: a}
rules:
  - name: r
    issuer: github
    role: reader
    when: claims.l.all(a, claims.l.all(b, claims.l.all(c, a + b + c >= 0)))
`)
	small := p.Explain(claims(t, `{"l": [1, 2, 3]}`), "", auth.Read)
	if !small.Allowed {
		t.Errorf("got %v, %+v", small.Refused, small.Steps)
	}
	large := p.Explain(claims(t, `{"l": [`+strings.TrimSuffix(strings.Repeat("1,", 5000), ",")+`]}`), "", auth.Read)
	if large.Allowed || !strings.Contains(large.Steps[0].Why, "cost limit") {
		t.Errorf("got %+v", large.Steps)
	}
}

func TestOperateNeedsAllScopes(t *testing.T) {
	for _, c := range []struct {
		scopes, grant string
		want          bool
	}{
		{"", "default", true},
		{"scopes: [{name: default}, {name: x}]", "default", false},
		{"scopes: [{name: default}, {name: x}]", "default, x", true},
		{"scopes: [{name: default}, {name: x}]", "default, '*'", true},
		{"scopes: [{name: default}, {name: pr-*}]", "default, pr-*", true},
		{"scopes: [{name: default}, {name: pr-*}]", "default, p*", true},
		{"scopes: [{name: default}, {name: pr-*}]", "default, pr-1*", false},
		{"scopes: [{name: default}, {name: '*'}]", "default, pr-*", false},
	} {
		p := parse(t, c.scopes+"\nrules: [{name: r, certificate: true, when: true, role: admin}]\nanonymous: {role: admin, scopes: ["+c.grant+"]}\n")
		d := p.Explain(auth.Identity{}, "", auth.Operate)
		if d.Allowed != c.want {
			t.Errorf("%s with %s: %v", c.grant, c.scopes, d.Allowed)
		}
		if rule := p.Explain(certificate("x"), "", auth.Operate); rule.Allowed != (c.scopes == "") {
			t.Errorf("rule with %s: %v", c.scopes, rule.Allowed)
		}
	}
}

// A scope belongs to the entry that names it, or else to the longest pattern, wherever they stand.
func TestScopeBelongsToTheClosest(t *testing.T) {
	for _, order := range [][]string{{"a*", "ab", "ab*", "*"}, {"*", "ab*", "ab", "a*"}, {"ab", "*", "a*", "ab*"}} {
		p := parse(t, "scopes:\n  - name: \""+strings.Join(order, "\"\n  - name: \"")+"\"\n")
		for name, want := range map[string]string{"ab": "ab", "abc": "ab*", "ac": "a*", "a": "a*", "b": "*", "default": "*"} {
			if e := p.EntryOf(scope(t, name)); e == nil || e.Name != want {
				t.Errorf("in %v %s belongs to %+v, want %s", order, name, e, want)
			}
		}
	}
}

// An admin promotes only between scopes that it may use.
func TestAdminOfOneScopePromotesNothing(t *testing.T) {
	p := parse(t, "scopes: [{name: default}, {name: x}, {name: y}]\nanonymous: {role: reader}\nrules: [{name: r, certificate: true, when: true, role: admin, scope: x}]\n")
	d := p.Explain(certificate("a"), "", auth.Administrate)
	if !d.Allowed {
		t.Fatal(d.Refused)
	}
	for _, way := range [][2]string{{"x", "default"}, {"y", "x"}, {"y", "default"}} {
		if err := d.Access.MayPromote(scope(t, way[0]), scope(t, way[1])); err == nil {
			t.Errorf("it may promote from %s to %s", way[0], way[1])
		}
	}
}

func newAuthenticator(t testing.TB, text string, change func(*auth.Config)) *auth.Authenticator {
	t.Helper()
	path := filepath.Join(t.TempDir(), "auth.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	config := auth.Config{File: path, Log: newLog(), Now: nowFunc}
	if change != nil {
		change(&config)
	}
	a, err := auth.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestPromotion(t *testing.T) {
	a := newAuthenticator(t, full, nil)
	for _, c := range []struct {
		token, from, to, want string
	}{
		{"", "nightly", "default", "missing"},
		{ciToken, "nightly", "default", ""},
		{ciToken, "pr-7", "default", "role"},
		{ciToken, "default", "nightly", "scope"},
		{ciToken, "default", "default", "scope"},
		{ciToken, "nothing", "default", "scope"},
		{adminToken, "pr-7", "default", ""},
		{adminToken, "pr-7", "nightly", ""},
		{adminToken, "pr-7", "pr-8", "scope"},
		{adminToken, "pr-7", "pr-special", ""},
		{adminToken, "default", "pr-7", "scope"},
	} {
		var header []string
		if c.token != "" {
			header = []string{"Bearer " + c.token}
		}
		access, err := a.Authenticate(t.Context(), auth.Credentials{Authorization: header})
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if err := access.MayPromote(scope(t, c.from), scope(t, c.to)); err != nil {
			got = string(err.(*auth.Error).Reason)
		}
		if got != c.want {
			t.Errorf("%s from %s to %s: %q, want %q", c.token, c.from, c.to, got, c.want)
		}
	}
}
