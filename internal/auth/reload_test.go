package auth_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
)

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

const with = "tokens:\n  - {name: %s, role: writer, sha256: %s}\n"

func only(name string) string { return fmt.Sprintf(with, name, auth.HashToken("pkc_"+name)) }

// A new file counts at once; a wrong one is said, and changes nothing.
func TestReload(t *testing.T) {
	w := startWorld(t)
	token := w.issuer.token(t, "1", nil)
	mustMatch(t, w.as(t, token), asMain)

	write(t, w.file, strings.Replace(w.issuer.trusting(""), "name: ci\n", "name: renamed\n", 1))
	if err := w.Reload(); err == nil {
		t.Error("a file in which a name is missing was taken")
	}
	mustMatch(t, w.as(t, ciToken), "token ci")
	mustMatch(t, w.as(t, token), asMain)
	if text := w.log.String(); strings.Count(text, "level=ERROR") != 1 || !strings.Contains(text, `by names \"ci\", which is no token or rule`) {
		t.Errorf("the log is %s", text)
	}

	write(t, w.file, strings.Replace(w.issuer.trusting(""), `"refs/heads/main"`, `"refs/heads/trunk"`, 1))
	if err := w.Reload(); err != nil {
		t.Fatal(err)
	}
	// What was remembered of the token does not count under the new rules.
	mustMatch(t, w.as(t, token), "no_rule 403 .*")
	mustMatch(t, w.as(t, w.issuer.token(t, "1", map[string]any{"ref": "refs/heads/trunk"})), asMain)
	if n := w.issuer.asked.Load(); n != 1 {
		t.Errorf("the issuer was asked %d times, want 1", n)
	}
	if err := os.Remove(w.file); err != nil {
		t.Fatal(err)
	}
	if err := w.Reload(); err == nil {
		t.Error("no error without a file")
	}
	mustMatch(t, w.as(t, ciToken), "token ci")
}

// Changes are noticed, however the file is exchanged: written in place, renamed, or as Kubernetes does it, by a link to
// another directory.
func TestRunNotices(t *testing.T) {
	dir := t.TempDir()
	for _, version := range []string{"1", "2"} {
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, version, "auth.yaml"), only(version))
	}
	link := func(from, to string) {
		temporary := filepath.Join(dir, "new")
		if err := os.Symlink(from, temporary); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(temporary, filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	link("1", "data")
	link("data/auth.yaml", "auth.yaml")
	log := &logText{told: make(chan struct{}, 1)}
	a, err := auth.New(auth.Config{File: filepath.Join(dir, "auth.yaml"), Log: newLogTo(log), Interval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Authenticator: a}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { a.Run(ctx) })
	defer running.Wait()
	defer cancel()
	mustMatch(t, w.as(t, "pkc_1"), "token 1")

	link("2", "data")
	log.await("the auth file was read", 1)
	mustMatch(t, w.as(t, "pkc_2"), "token 2")
	mustMatch(t, w.as(t, "pkc_1"), "unknown_token .*")

	write(t, filepath.Join(dir, "2", "auth.yaml"), "tokens: x")
	log.await("the auth file is wrong", 1)
	mustMatch(t, w.as(t, "pkc_2"), "token 2")

	write(t, filepath.Join(dir, "2", "auth.yaml"), only("3"))
	log.await("the auth file was read", 2)
	mustMatch(t, w.as(t, "pkc_3"), "token 3")

	if err := os.Rename(filepath.Join(dir, "1", "auth.yaml"), filepath.Join(dir, "2", "auth.yaml")); err != nil {
		t.Fatal(err)
	}
	log.await("the auth file was read", 3)
	mustMatch(t, w.as(t, "pkc_1"), "token 1")
}

// A change is taken when it stays, so that half a file is not, and a wrong one is said once.
func TestChangeIsTakenWhenItStays(t *testing.T) {
	w := startWorld(t)
	look := w.Watch()
	whole := only("a") + strings.TrimPrefix(only("b"), "tokens:\n")
	half := whole[:strings.Index(whole, "  - {name: b")]
	write(t, w.file, half)
	look()
	mustMatch(t, w.as(t, ciToken), "token ci")
	write(t, w.file, whole)
	look()
	mustMatch(t, w.as(t, ciToken), "token ci")
	look()
	mustMatch(t, w.as(t, "pkc_b"), "token b")
	for range 2 {
		write(t, w.file, "tokens: x")
		for range 5 {
			look()
		}
		mustMatch(t, w.as(t, "pkc_b"), "token b")
		write(t, w.file, whole) // and back, so that nothing is to be read
		look()
	}
	if text := w.log.String(); strings.Count(text, "the auth file is wrong") != 2 || strings.Count(text, "the auth file was read") != 1 {
		t.Errorf("the log is %s", text)
	}
}

// A file that is reloaded under load refuses nobody whom both versions let in.
func TestReloadUnderLoad(t *testing.T) {
	w := startWorld(t)
	token := w.issuer.token(t, "1", nil)
	stop := make(chan struct{})
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got := w.as(t, token); got != asMain {
					t.Errorf("got %s", got)
				}
				if got := w.as(t, ciToken); got != "token ci" {
					t.Errorf("got %s", got)
				}
			}
		})
	}
	for range 50 {
		if err := w.Reload(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	all.Wait()
}

// No secret is in the log, nor in what anybody is told.
func TestNoSecretIsTold(t *testing.T) {
	w := startWorld(t)
	secrets := []string{ciToken, oldToken, "pkc_unknownsecret", w.issuer.token(t, "1", nil), w.issuer.token(t, "1", map[string]any{"exp": now.Add(-time.Hour).Unix()}), w.issuer.token(t, "1", map[string]any{"aud": "x"})}
	stranger := startIssuer(t)
	secrets = append(secrets, stranger.token(t, "1", nil), stranger.token(t, "1", map[string]any{"iss": w.issuer.URL}))
	var told strings.Builder
	for _, secret := range secrets {
		for _, header := range []string{"Bearer " + secret, basic("x:" + secret), basic(secret + ":"), "Digest " + secret, secret, "Bearer " + secret + " x"} {
			for _, values := range [][]string{{header}, {header, header}} {
				access, err := w.Authenticate(t.Context(), auth.Credentials{Authorization: values, Scope: "nightly"})
				fmt.Fprintln(&told, access, err)
				if e, ok := err.(*auth.Error); ok {
					fmt.Fprintln(&told, e.Detail, e.Challenges())
				}
				fmt.Fprintf(&told, "%+v", w.Explain(t.Context(), auth.Credentials{Authorization: values}, auth.Write))
			}
		}
	}
	write(t, w.file, "tokens:\n  - {name: a, role: reader, sha256: pkc_unknownsecret}\n")
	fmt.Fprintln(&told, w.Reload())
	told.WriteString(w.log.String())
	for _, secret := range secrets {
		parts := append(strings.Split(secret, "."), secret)
		for _, part := range parts[len(parts)-min(len(parts), 2):] { // a signature alone is secret enough
			if strings.Contains(told.String(), part) {
				t.Errorf("%s is told", part)
			}
		}
	}
}

// What Explain says is what happens: of generated callers, scopes and actions.
func TestExplainAgrees(t *testing.T) {
	w := startWorld(t)
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(from ...string) string { return from[random.IntN(len(from))] }
	seen := map[string]int{}
	const cases = 10_000
	for range cases {
		var c auth.Credentials
		id := auth.Identity{}
		believed := true // whether the identity can be told apart from the credentials
		switch random.IntN(5) {
		case 0:
		case 1:
			c.Authorization = []string{"Bearer " + pick(ciToken, adminToken, oldToken, "x", "")}
			believed = false
		case 2:
			id = certificate(pick("a.build.example", "b"))
			c.Certificate = id.Certificate
		default:
			text := fmt.Sprintf(`{"ref": %q, "repository_owner": %q, "event_name": %q, "sub": "s"}`, pick("refs/heads/main", "refs/pull/7/merge", "refs/pull/special/merge", "refs/heads/x", "x"), pick("octo", "octo", "evil"), pick("push", "pull_request"))
			id = claims(t, text)
			change := map[string]any{}
			for name, value := range id.Claims {
				change[name] = value
			}
			c.Authorization = []string{"Bearer " + w.issuer.token(t, "1", change)}
		}
		c.Scope = pick("", "", "default", "nightly", "pr-7", "pr-8", "pr-special", "X")
		action := []auth.Action{auth.Read, auth.Write, auth.Administrate, auth.Operate}[random.IntN(4)]

		access, err := w.Authenticate(t.Context(), c)
		if err == nil {
			err = access.May(action)
		}
		check := func(d *auth.Decision) {
			if (err == nil) != d.Allowed || fmt.Sprint(err) != fmt.Sprint(d.Refused) {
				t.Fatalf("%+v %v: %v, but explained as %v", c, action, err, d.Refused)
			}
			if err == nil && (d.Access.Who != access.Who || d.Access.Scope != access.Scope || join(d.Access.Reads) != join(access.Reads) || d.Access.Role != access.Role || d.Access.Entry != access.Entry) {
				t.Fatalf("%+v %v: %+v, but explained as %+v", c, action, access, d.Access)
			}
		}
		check(w.Explain(t.Context(), c, action))
		if believed {
			check(w.Policy().Explain(id, c.Scope, action))
		}
		if err == nil {
			seen["allowed"]++
			mustBeSafe(t, w.Policy(), access)
		} else if e, ok := err.(*auth.Error); ok {
			seen[string(e.Reason)]++
		} else {
			seen["invalid scope"]++
		}
	}
	for _, kind := range []string{"allowed", "missing", "malformed", "unknown_token", "expired", "no_rule", "role", "scope", "invalid scope"} {
		if seen[kind] < 10 {
			t.Errorf("of %d cases %d are %s; the cases don't show enough: %v", cases, seen[kind], kind, seen)
		}
	}
}

// mustBeSafe checks what must hold whatever the file says: who writes in a scope is not trusted more than what the
// scope reads.
func mustBeSafe(t *testing.T, p *auth.Policy, access *auth.Access) {
	t.Helper()
	rank := func(s artifact.Scope) int {
		for i := range p.Scopes {
			if p.EntryOf(s) == &p.Scopes[i] {
				return i
			}
		}
		t.Fatalf("%s belongs to nothing", s)
		return 0
	}
	if access.Reads[0] != access.Scope {
		t.Fatalf("%+v does not read its own first", access)
	}
	for _, other := range access.Reads[1:] {
		if rank(other) >= rank(access.Scope) {
			t.Fatalf("%+v reads %s, which is not more trusted", access, other)
		}
	}
}

// BenchmarkAuthenticate says what a request costs.
func BenchmarkAuthenticate(b *testing.B) {
	w := startWorld(b)
	once := w.issuer.token(b, "1", nil)
	for name, header := range map[string]string{"anonymous": "", "token": "Bearer " + ciToken, "remembered": "Bearer " + once} {
		b.Run(name, func(b *testing.B) {
			c := auth.Credentials{}
			if header != "" {
				c.Authorization = []string{header}
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := w.Authenticate(b.Context(), c); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("verified", func(b *testing.B) { // Explain remembers nothing
		b.ReportAllocs()
		c := auth.Credentials{Authorization: []string{"Bearer " + once}}
		for b.Loop() {
			if d := w.Explain(b.Context(), c, auth.Write); !d.Allowed {
				b.Fatal(d.Refused)
			}
		}
	})
}
