package auth_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
)

const (
	ciToken    = "pkc_ci"
	adminToken = "pkc_admin"
	oldToken   = "pkc_old"
)

// full is an auth file with everything.
var full = `
anonymous:
  role: reader
tokens:
  - name: ci
    sha256: ` + auth.HashToken(ciToken) + `
    role: writer
    scopes: [default, nightly]
  - name: admin
    sha256: ` + auth.HashToken(adminToken) + `
    role: admin
    scopes: [default, "*"]
  - name: old
    sha256: ` + auth.HashToken(oldToken) + `
    role: writer
    expires: 2026-01-31
issuers:
  - name: github
    url: https://token.actions.githubusercontent.com
    audience: polykit-cache
    clock_skew: 30s
rules:
  - name: main builds
    issuer: github
    when: claims.ref == "refs/heads/main" && claims.repository_owner == "octo"
    role: writer
  - name: pull requests
    issuer: github
    when: |
      claims.event_name == "pull_request" &&
      claims.repository_owner == "octo"
    role: writer
    scope: pr-{claims.ref.split("/")[2]}
  - name: machines
    certificate: true
    when: certificate.subject.common_name.endsWith(".build.example")
    role: writer
    scope: nightly
scopes:
  - name: default
  - name: nightly
    reads: [default]
  - name: pr-special
  - name: pr-*
    reads: [default, nightly]
promote:
  - from: nightly
    to: default
    by: [ci]
`

// now is when tests take place.
var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func parse(t testing.TB, text string) *auth.Policy {
	t.Helper()
	p, err := auth.Parse("auth.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func scope(t testing.TB, name string) artifact.Scope {
	t.Helper()
	s, err := artifact.ParseScope(name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestParse(t *testing.T) {
	p := parse(t, full)
	if p.Anonymous.Role != auth.Reader || p.Anonymous.Scopes[0] != "default" {
		t.Errorf("anonymous: %+v", p.Anonymous)
	}
	if len(p.Tokens) != 3 || p.Tokens[0].Role != auth.Writer || strings.Join(p.Tokens[0].Scopes, " ") != "default nightly" || p.Tokens[0].Line != 5 {
		t.Errorf("tokens: %+v", p.Tokens)
	}
	if want := time.Date(2026, 1, 31, 0, 0, 0, 0, time.UTC); !p.Tokens[2].Expires.Equal(want) {
		t.Errorf("expires: %v", p.Tokens[2].Expires)
	}
	if len(p.Issuers) != 1 || p.Issuers[0].ClockSkew != 30*time.Second {
		t.Errorf("issuers: %+v", p.Issuers)
	}
	if len(p.Rules) != 3 || p.Rules[1].Scopes[0] != `pr-{claims.ref.split("/")[2]}` {
		t.Errorf("rules: %+v", p.Rules)
	}
	if len(p.Scopes) != 4 {
		t.Errorf("scopes: %+v", p.Scopes)
	}
	for name, want := range map[string]string{"default": "default", "nightly": "nightly", "pr-7": "pr-*", "pr-special": "pr-special", "pr-specials": "pr-*"} {
		if e := p.EntryOf(scope(t, name)); e == nil || e.Name != want {
			t.Errorf("%s belongs to %+v, want %s", name, e, want)
		}
	}
	if e := p.EntryOf(scope(t, "other")); e != nil {
		t.Errorf("other belongs to %+v", e)
	}
	if text, err := json.Marshal(p); err != nil || !strings.Contains(string(text), `"role":"admin"`) {
		t.Errorf("as JSON: %s, %v", text, err)
	}
}

// What is left out has defaults, and sections may be there without a value.
func TestParseLeast(t *testing.T) {
	p := parse(t, "tokens:\nrules:\nissuers:\n  - {name: x, url: https://x.example, audience: y}\n")
	if p.Anonymous != nil || len(p.Tokens) != 0 || len(p.Scopes) != 1 || p.Scopes[0].Name != "default" || p.Issuers[0].ClockSkew != time.Minute {
		t.Errorf("got %+v", p)
	}
}

// Every mistake is said with its line, and what to do.
func TestParseErrors(t *testing.T) {
	hash := auth.HashToken("x")
	token := func(rest string) string { return "tokens:\n  - name: a\n    sha256: " + hash + "\n" + rest }
	rule := func(rest string) string {
		return "issuers:\n  - {name: i, url: https://i.example, audience: a}\nscopes:\n  - name: default\n  - name: pr-*\nrules:\n  - name: r\n    issuer: i\n    role: writer\n" + rest
	}
	for _, c := range []struct{ name, text, want string }{
		{"nothing", "", "auth.yaml:1: it is no YAML: .*|auth.yaml:1: it is empty; without an auth file everything is open, with one something must be in it"},
		{"no YAML", "tokens: [\n", "auth.yaml:.: it is no YAML: .*"},
		{"two documents", "tokens:\n---\ntokens:\n", "auth.yaml:.: it is no YAML: .*"},
		{"a list", "- a\n", "auth.yaml:1: the file must be a mapping of fields to values"},
		{"unknown field", "anonymous:\n  role: reader\n  rolle: writer\n", `auth.yaml:3: anonymous has an unknown field "rolle"; it can have role, scope, scopes`},
		{"unknown section", "\n\ntoken: []\n", `auth.yaml:3: the file has an unknown field "token"; it can have anonymous, tokens, issuers, rules, scopes, promote`},
		{"twice", "tokens: []\ntokens: []\n", `auth.yaml:2: (the file has tokens twice|it is no YAML: .*)`},
		{"anchor", "anonymous: &a\n  role: reader\n", "auth.yaml:1: anonymous has an anchor or alias; write it out"},
		{"alias", "tokens: &a []\nrules: *a\n", "auth.yaml:1: tokens has an anchor or alias; write it out\nauth.yaml:2: rules has an anchor or alias; write it out"},
		{"tag", "anonymous: {role: !!str reader}\n", "auth.yaml:1: role has a tag; leave that out"},
		{"merge", "anonymous: {<<: {role: reader}}\n", `auth.yaml:1: anonymous has an unknown field "<<"; it can have role, scope, scopes
auth.yaml:1: anonymous has no role`},
		{"list for a value", "anonymous: {role: [reader]}\n", "auth.yaml:1: role must be a single value"},
		{"value for a list", "tokens: x\n", "auth.yaml:1: tokens must be a list"},
		{"empty text for a list", "tokens: ''\n", "auth.yaml:1: tokens must be a list"},
		{"no role", token(""), "auth.yaml:2: a token has no role"},
		{"wrong role", token("    role: root\n"), `auth.yaml:4: "root" is no role; use reader, writer or admin`},
		{"role in upper case", token("    role: Reader\n"), `auth.yaml:4: "Reader" is no role; use reader, writer or admin`},
		{"empty name", "tokens:\n  - name: ''\n    role: reader\n    sha256: " + hash + "\n", "auth.yaml:2: name is empty"},
		{"long name", "tokens:\n  - name: " + strings.Repeat("n", 101) + "\n    role: reader\n    sha256: " + hash + "\n", "auth.yaml:2: name has 101 characters; it can have 100"},
		{"name with a line break", "tokens:\n  - name: \"a\\nb\"\n    role: reader\n    sha256: " + hash + "\n", "auth.yaml:2: name has a character that can't be shown"},
		{"no hash", "tokens:\n  - {name: a, role: reader, sha256: 12}\n", "auth.yaml:2: sha256 is not 64 lower-case hexadecimal digits; polykit-cache token new prints a token and what goes here"},
		{"token for hash", "tokens:\n  - {name: a, role: reader, sha256: pkc_secret}\n", "auth.yaml:2: sha256 is a token itself, which must not be in a file: make a new one, and put its SHA-256 here"},
		{"hash of nothing", "tokens:\n  - {name: a, role: reader, sha256: " + auth.HashToken("") + "}\n", "auth.yaml:2: sha256 is that of nothing; was a variable not set\\?"},
		{"hash of a line break", "tokens:\n  - {name: a, role: reader, sha256: " + auth.HashToken("\n") + "}\n", "auth.yaml:2: sha256 is that of nothing; was a variable not set\\?"},
		{"same hash", token("    role: reader\n") + "  - {name: b, role: admin, sha256: " + hash + "}\n", "auth.yaml:5: sha256 is that of another token; each must have its own"},
		{"same name", token("    role: reader\n") + "  - {name: a, role: admin, sha256: " + auth.HashToken("y") + "}\n", `auth.yaml:5: there are two tokens or rules with the name "a"; names must differ, for logs and promote`},
		{"expires", token("    role: reader\n    expires: tomorrow\n"), `auth.yaml:5: expires is "tomorrow"; it must be a date such as 2027-01-31, which begins in UTC, or a time such as 2027-01-31T12:00:00Z`},
		{"scope and scopes", token("    role: reader\n    scope: default\n    scopes: [default]\n"), "auth.yaml:6: a token has both scope and scopes; .*"},
		{"no scopes", token("    role: reader\n    scopes: []\n"), "auth.yaml:5: scopes is empty; name a scope, or leave it out for default"},
		{"scope that is not there", token("    role: reader\n    scope: main\n"), `auth.yaml:5: scope "main" is not in scopes; add it there`},
		{"default is not there", "scopes:\n  - name: main\nanonymous:\n  role: reader\n", `auth.yaml:4: scope "default" is not in scopes; add it there`},
		{"scope that can't be", token("    role: reader\n    scope: Main\n"), `auth.yaml:5: scope "Main": invalid scope: character 1 of its name is 'M'; .*`},
		{"pattern first", token("    role: reader\n    scopes:\n      - pr-*\n"), `auth.yaml:6: scope "pr-\*" is a pattern; .*`},
		{"second scope", token("    role: reader\n    scopes:\n      - default\n      - x\n"), `auth.yaml:7: scope "x" is not in scopes; add it there`},
		{"computed scope of a token", token("    role: reader\n    scope: pr-{claims.x}\n"), `auth.yaml:5: scope "pr-{claims.x}": invalid scope: .*`},
		{"issuer without TLS", "issuers:\n  - {name: i, url: http://i.example, audience: a}\n", `auth.yaml:2: url is "http://i.example": it must begin with https://, since who can change the answer could sign any token; or give keys_file`},
		{"issuer without a host", "issuers:\n  - {name: i, url: 'https:', audience: a}\n", `auth.yaml:2: url is "https:": it must be a URL such as https://token.actions.githubusercontent.com`},
		{"issuer without audience", "issuers:\n  - {name: i, url: https://i.example}\n", `auth.yaml:2: an issuer has no audience`},
		{"same issuer", "issuers:\n  - {name: i, url: https://i.example, audience: a}\n  - {name: j, url: https://i.example, audience: b}\n", `auth.yaml:3: there are two issuers with the same url`},
		{"same issuer's name", "issuers:\n  - {name: i, url: https://i.example, audience: a}\n  - {name: i, url: https://j.example, audience: b}\n", `auth.yaml:3: there are two issuers with the name "i"`},
		{"clock skew", "issuers:\n  - {name: i, url: https://i.example, audience: a, clock_skew: 11m}\n", `auth.yaml:2: clock_skew is 11m; it must be from 0s to 10m0s`},
		{"clock skew of nothing", "issuers:\n  - {name: i, url: https://i.example, audience: a, clock_skew: 5}\n", `auth.yaml:2: clock_skew is "5"; it must be a duration such as 90s, 12h or 7d`},
		{"rule without when", rule(""), "auth.yaml:7: a rule has no when"},
		{"rule with both", rule("    when: 'true'\n    certificate: true\n"), "auth.yaml:7: a rule must have either issuer, the name of one, or certificate: true"},
		{"certificate: false", "rules:\n  - {name: r, certificate: false, when: true, role: reader}\n", `auth.yaml:2: certificate is "false"; it must be true, or left out`},
		{"unknown issuer", "rules:\n  - {name: r, issuer: x, when: true, role: reader}\n", `auth.yaml:2: issuer "x" is not in issuers; add it there`},
		{"when of another type", rule("    when: claims.ref\n"), `auth.yaml:10: when: it is dyn and not true or false; compare it with something`},
		{"when with a typing error", rule("    when: claim.ref == 'x'\n"), `auth.yaml:10: when: undeclared reference to 'claim' .*`},
		{"when that is no expression", rule("    when: |\n      claims.ref ==\n        'x' &&\n"), `auth.yaml:1[123]: when: .*`},
		{"when in the second line", rule("    when: |\n      claims.ref == 'x' ||\n      foo\n"), `auth.yaml:12: when: undeclared reference to 'foo'.*`},
		{"long when", rule("    when: claims.x == '" + strings.Repeat("x", 4100) + "'\n"), `auth.yaml:10: when has \d+ characters; it can have 4096`},
		{"claims in a rule for certificates", "rules:\n  - {name: r, certificate: true, when: claims.x == 'y', role: reader}\n", `auth.yaml:2: when: undeclared reference to 'claims'.*`},
		{"certificate in a rule for claims", rule("    when: certificate.subject.common_name == 'y'\n"), `auth.yaml:10: when: undeclared reference to 'certificate'.*`},
		{"unknown field of a certificate", "rules:\n  - {name: r, certificate: true, when: certificate.subject.cn == 'y', role: reader}\n", `auth.yaml:2: when: undefined field 'cn'`},
		{"another type of a field of a certificate", "rules:\n  - {name: r, certificate: true, when: certificate.dns_names == 'y', role: reader}\n", `auth.yaml:2: when: found no matching overload .*`},
		{"computed scope without text", rule("    when: true\n    scope: '{claims.x}'\n"), `auth.yaml:11: scope must begin with text, as in pr-\{…\}: else a claim could choose how much the scope is trusted`},
		{"computed scope without a pattern", rule("    when: true\n    scope: mr-{claims.x}\n"), `auth.yaml:11: no pattern in scopes matches all that begins with "mr-"; add mr-\* there`},
		{"computed scope that may be of several entries", rule("    when: true\n    scope: p{claims.x}\n"), `auth.yaml:11: no pattern in scopes matches all that begins with "p"; add p\* there`},
		{"computed scope that can't be", rule("    when: true\n    scope: PR-{claims.x}\n"), `auth.yaml:11: scope begins with "PR-": invalid scope: .*`},
		{"computed scope that does not end", rule("    when: true\n    scope: pr-{claims.x\n"), `auth.yaml:11: scope: there is a \{ without a \}; .*`},
		{"computed scope that does not begin", rule("    when: true\n    scope: pr-claims.x}\n"), `auth.yaml:11: scope: there is a \} without a \{`},
		{"computed scope with a typing error", rule("    when: true\n    scope: pr-{claim.x}\n"), `auth.yaml:11: scope: "claim.x": undeclared reference to 'claim' .*`},
		{"computed scope of another type", rule("    when: true\n    scope: pr-{claims.x == 'y'}\n"), `auth.yaml:11: scope: "claims.x == 'y'": it is bool and neither text nor a whole number`},
		{"reads below", "scopes:\n  - name: default\n    reads: [pr-7]\n  - name: pr-7\n", `auth.yaml:3: default must not read pr-7, which stands below it and so is less trusted: scopes stand in the order of trust, the most trusted first`},
		{"reads itself", "scopes:\n  - name: default\n    reads: [default]\n", `auth.yaml:3: default names itself in reads; it always reads its own`},
		{"reads a pattern", "scopes:\n  - name: pr-*\n  - name: x\n    reads: [pr-*]\n", `auth.yaml:4: x must not read pr-\*: only single scopes can be read, each by its name`},
		{"pattern reads itself", "scopes:\n  - name: pr-*\n    reads: [pr-*]\n", `auth.yaml:3: pr-\* must not read pr-\*: only single scopes can be read, each by its name`},
		{"reads one of a pattern", "scopes:\n  - name: pr-*\n  - name: x\n    reads: [pr-7]\n", `auth.yaml:4: reads names "pr-7", which is not in scopes`},
		{"reads twice", "scopes:\n  - name: default\n  - name: x\n    reads: [default, default]\n", `auth.yaml:4: x has default twice in reads`},
		{"same scope", "scopes:\n  - name: default\n  - name: default\n", `auth.yaml:3: there are two scopes with the name default`},
		{"star in the middle", "scopes:\n  - name: p*r\n", `auth.yaml:2: name is "p\*r": invalid scope: character 2 of its name is '\*'; .*`},
		{"two stars", "scopes:\n  - name: pr**\n", `auth.yaml:2: name is "pr\*\*": invalid scope: .*; a \* may stand only at the end`},
		{"promote down", "scopes:\n  - name: default\n  - name: x\npromote:\n  - {from: default, to: x, by: [a]}\n" + token("    role: writer\n"), `auth.yaml:5: x is not more trusted than default: .*`},
		{"promote to a pattern", "scopes:\n  - name: default\n  - name: y-*\n  - name: x\npromote:\n  - {from: x, to: y-*, by: [a]}\n" + token("    role: writer\n"), `auth.yaml:6: to is y-\*; an artifact is promoted to a single scope`},
		{"promote nowhere", "scopes:\n  - name: default\npromote:\n  - {from: x, to: default, by: [a]}\n" + token("    role: writer\n"), `auth.yaml:4: from and to must be names in scopes`},
		{"promote by nobody", "scopes:\n  - name: default\n  - name: x\npromote:\n  - {from: x, to: default, by: [b]}\n", `auth.yaml:5: by names "b", which is no token or rule`},
		{"promote by no one", "scopes:\n  - name: default\n  - name: x\npromote:\n  - {from: x, to: default, by: []}\n", `auth.yaml:5: by is empty; name the tokens and rules whose callers may promote`},
		{"promote by a reader", "scopes:\n  - name: default\n  - name: x\npromote:\n  - {from: x, to: default, by: [a]}\n" + token("    role: reader\n"), `auth.yaml:5: "a" is a reader, and must be a writer to promote`},
		{"several", "anonymous:\n  role: x\ntokens:\n  - {name: a}\n", "auth.yaml:2: \"x\" is no role; use reader, writer or admin\nauth.yaml:4: a token has no sha256\nauth.yaml:4: a token has no role"},
		{"too many tokens", "tokens:\n" + strings.Repeat("  - {}\n", 1001), "auth.yaml:2: tokens has 1001 entries; it can have 1000"},
		{"too many issuers", "issuers:\n" + strings.Repeat("  - {}\n", 101), "auth.yaml:2: issuers has 101 entries; it can have 100"},
		{"too large", "#" + strings.Repeat("x", 1<<20), "auth.yaml has 1048577 bytes; it can have 1048576"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := auth.Parse("auth.yaml", []byte(c.text))
			if err == nil || p != nil {
				t.Fatalf("got %+v, %v", p, err)
			}
			mustMatch(t, err.Error(), c.want)
		})
	}
}

// Of very many mistakes only the first are said.
func TestParseManyErrors(t *testing.T) {
	_, err := auth.Parse("a", []byte("tokens:\n"+strings.Repeat("  - {name: x}\n", 100)))
	if lines := strings.Split(fmt.Sprint(err), "\n"); len(lines) != 21 || !strings.HasPrefix(lines[20], "a: and ") {
		t.Errorf("got %v", err)
	}
}

func TestWarnings(t *testing.T) {
	p := parse(t, `
anonymous: {role: writer, scope: x}
tokens:
  - {name: a, sha256: `+auth.HashToken("a")+`, role: writer, scope: low, expires: 2026-02-01}
issuers:
  - {name: i, url: https://i.example, audience: a}
  - {name: j, url: https://j.example, audience: a}
rules:
  - {name: all, issuer: i, when: true, role: writer}
  - {name: some, issuer: i, when: claims.a == 'b', role: reader}
scopes:
  - name: default
  - name: x
  - name: never
  - name: low
promote:
  - {from: low, to: default, by: [a]}
`)
	var got []string
	for _, w := range p.Warnings(now) {
		got = append(got, w.Error())
	}
	want := []string{
		`auth.yaml:2: anyone who reaches the server may write in x: whoever reads it trusts all of them`,
		`auth.yaml:4: token "a" expired at 2026-02-01T00:00:00Z`,
		`auth.yaml:9: rule "all" lets everyone write to whom issuer "i" gives a token; compare a claim, such as the repository or its owner`,
		`auth.yaml:10: rule "some" never decides: whatever fits it fits rule "all" above`,
		`auth.yaml:7: no rule is about issuer "j", so its tokens are good for nothing`,
		`auth.yaml:14: nobody writes in scope never`,
		`auth.yaml:17: "a" may promote from low what it wrote there itself, so default trusts it as much as its own writers`,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if w := parse(t, "tokens: []\n").Warnings(now); len(w) != 1 || w[0].Text != "nobody may do anything; add tokens, rules or anonymous" {
		t.Errorf("got %v", w)
	}
}

// FuzzParse reads files: whatever they are, it returns a policy that can be used, or an error with a place.
func FuzzParse(f *testing.F) {
	f.Add(full)
	f.Add("anonymous: {role: reader}")
	f.Add("a: &a [*a]\n")
	f.Add("scopes: [{name: a}, {name: a*, reads: [a]}]\ntokens: [{name: a, role: writer, scopes: [a, a*]}]")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := auth.Parse("f", []byte(text))
		if err != nil {
			if p != nil || !strings.HasPrefix(err.Error(), "f") {
				t.Fatalf("got %v, %v", p, err)
			}
			return
		}
		p.Warnings(now)
		p.Explain(auth.Identity{}, "x", auth.Write)
		trust := map[string]int{}
		for i, e := range p.Scopes {
			trust[e.Name] = i
			for _, name := range e.Reads {
				if above, ok := trust[name]; !ok || above >= i {
					t.Errorf("%s reads %s, which is not more trusted", e.Name, name)
				}
			}
		}
	})
}
