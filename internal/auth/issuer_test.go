package auth_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// issuer is a real OIDC issuer, over TLS.
type issuer struct {
	*httptest.Server
	mu        sync.Mutex
	keys      map[string]crypto.Signer // by ID
	extra     []any                    // more entries of its key set
	discovery func(map[string]any)     // changes what it says of itself
	down      bool
	asked     atomic.Int64  // how often for its keys
	block     chan struct{} // if not nil, answers wait for it to be closed
}

func startIssuer(t testing.TB) *issuer {
	t.Helper()
	i := &issuer{keys: map[string]crypto.Signer{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		block := i.block
		i.mu.Unlock()
		if block != nil {
			<-block
		}
		i.mu.Lock()
		down, change := i.down, i.discovery
		i.mu.Unlock()
		if down {
			http.Error(w, "down", http.StatusBadGateway)
			return
		}
		say := map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/keys"}
		if change != nil {
			change(say)
		}
		json.NewEncoder(w).Encode(say)
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, r *http.Request) {
		i.asked.Add(1)
		w.Write(i.keySet())
	})
	mux.HandleFunc("GET /keys/moved", func(w http.ResponseWriter, r *http.Request) {
		to := r.FormValue("to")
		if to == "" {
			to = r.URL.Path
		}
		http.Redirect(w, r, to, http.StatusFound)
	})
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(func() {
		i.Client().CloseIdleConnections()
		i.Close()
	})
	i.rotate(t, "1")
	return i
}

// keySet returns what the issuer tells of its keys.
func (i *issuer) keySet() []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	keys := append([]any{}, i.extra...)
	for id, key := range i.keys {
		keys = append(keys, jose.JSONWebKey{Key: key.Public(), KeyID: id, Use: "sig"})
	}
	text, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		panic(err)
	}
	return text
}

// rotate gives the issuer new keys with some IDs, and takes the others.
func (i *issuer) rotate(t testing.TB, ids ...string) {
	t.Helper()
	keys := map[string]crypto.Signer{}
	for _, id := range ids {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[id] = key
	}
	i.set(func() { i.keys = keys })
}

func (i *issuer) set(change func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	change()
}

// token returns an ID token, signed with the key of an ID, whose claims are changed if change is not nil.
func (i *issuer) token(t testing.TB, id string, change map[string]any) string {
	t.Helper()
	i.mu.Lock()
	key := i.keys[id]
	i.mu.Unlock()
	claims := map[string]any{"iss": i.URL, "sub": "repo:octo/x", "aud": "polykit-cache", "iat": now.Unix(), "exp": now.Add(10 * time.Minute).Unix(),
		"ref": "refs/heads/main", "repository_owner": "octo"}
	maps.Copy(claims, change)
	maps.DeleteFunc(claims, func(_ string, value any) bool { return value == nil })
	return cachetest.SignToken(t, jose.SigningKey{Algorithm: algorithmOf(key), Key: jose.JSONWebKey{Key: key, KeyID: id}}, claims)
}

func algorithmOf(key crypto.Signer) jose.SignatureAlgorithm {
	switch key.(type) {
	case *rsa.PrivateKey:
		return jose.RS256
	case ed25519.PrivateKey:
		return jose.EdDSA
	}
	return jose.ES256
}

// clock is a time that a test moves on.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time          { return now.Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(d time.Duration) { c.offset.Add(int64(d)) }

// trusting is an auth file that trusts the issuer.
func (i *issuer) trusting(more string) string {
	return strings.Replace(full, "url: https://token.actions.githubusercontent.com", "url: "+i.URL+more, 1)
}

// world is an Authenticator with an issuer, whose log and time the test has.
type world struct {
	*auth.Authenticator
	*clock
	issuer *issuer
	log    *logText
	file   string
}

type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
	told chan struct{} // gets something for each line, if there is room
}

func (l *logText) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.told <- struct{}{}:
	default:
	}
	return l.text.Write(line)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// await waits until the log has a text so many times.
func (l *logText) await(text string, times int) {
	for strings.Count(l.String(), text) < times {
		<-l.told
	}
}

func startWorld(t testing.TB) *world {
	t.Helper()
	w := &world{clock: &clock{}, log: &logText{told: make(chan struct{}, 1)}}
	w.issuer = startIssuer(t)
	w.Authenticator = newAuthenticator(t, w.issuer.trusting(""), func(c *auth.Config) {
		c.Log = slog.New(slog.NewTextHandler(w.log, nil))
		c.Now = w.now
		c.HTTPClient = w.issuer.Client()
		w.file = c.File
	})
	return w
}

// as says who a token is let in as, or why it is not.
func (w *world) as(t testing.TB, token string) string {
	t.Helper()
	access, err := w.Authenticate(t.Context(), auth.Credentials{Authorization: []string{"Bearer " + token}})
	if err != nil {
		return describe(err)
	}
	return access.Who
}

const asMain = "oidc github: repo:octo/x"

func TestIDToken(t *testing.T) {
	w := startWorld(t)
	other := startIssuer(t)
	signed := func(change map[string]any) string { return w.issuer.token(t, "1", change) }
	in := func(d time.Duration) int64 { return now.Add(d).Unix() }
	secret := jose.SigningKey{Algorithm: jose.HS256, Key: jose.JSONWebKey{Key: w.issuer.keySet(), KeyID: "1"}}
	good := strings.Split(signed(nil), ".")
	unsigned := func(header string) string {
		return base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + good[1] + "."
	}
	for _, c := range []struct{ name, token, want string }{
		{"good", signed(nil), asMain},
		{"several audiences", signed(map[string]any{"aud": []string{"a", "polykit-cache"}}), asMain},
		{"expired within the skew", signed(map[string]any{"exp": in(-30 * time.Second)}), asMain},
		{"expired", signed(map[string]any{"exp": in(-31 * time.Second)}), "expired 401 The credential has expired: get a new one"},
		{"never expires", signed(map[string]any{"exp": nil}), "malformed 401 The credential is not valid here: .*"},
		{"expires in words", signed(map[string]any{"exp": "tomorrow"}), "malformed 401 The credential is not valid here: .*"},
		{"expires much too late", signed(map[string]any{"exp": 1e30}), "malformed 401 The credential is not valid here: .*"},
		{"not yet within the skew", signed(map[string]any{"nbf": in(30 * time.Second)}), asMain},
		{"not yet", signed(map[string]any{"nbf": in(31 * time.Second)}), "not_yet_valid 401 The credential is not valid yet: .*"},
		{"issued in the future", signed(map[string]any{"iat": in(31 * time.Second)}), "not_yet_valid 401 The credential is not valid yet: .*"},
		{"another audience", signed(map[string]any{"aud": "other"}), `audience 401 The token is for another audience: ask its issuer for one for "polykit-cache"`},
		{"no audience", signed(map[string]any{"aud": nil}), "audience 401 .*"},
		{"another audience in capitals", signed(map[string]any{"aud": nil, "AUD": "polykit-cache"}), "audience 401 .*"},
		{"no issuer", signed(map[string]any{"iss": nil}), "issuer 401 The credential is not valid here: .*"},
		{"another issuer", other.token(t, "1", nil), "issuer 401 The credential is not valid here: .*"},
		{"another issuer that says it is the first", other.token(t, "1", map[string]any{"iss": w.issuer.URL}), "signature 401 The credential is not valid here: .*"},
		{"no rule", signed(map[string]any{"repository_owner": "evil"}), "no_rule 403 The credential is valid, but no rule .*"},
		{"scope that can't be", signed(map[string]any{"event_name": "pull_request", "ref": "refs/pull/A/merge"}), "scope 403 .*"},
		{"alg none", unsigned(`{"alg":"none"}`), "(algorithm|malformed) 401 The credential is not valid here: .*"},
		{"alg None", unsigned(`{"alg":"None","kid":"1"}`), "(algorithm|malformed) 401 The credential is not valid here: .*"},
		{"no alg", unsigned(`{"kid":"1"}`), "(algorithm|malformed) 401 The credential is not valid here: .*"},
		{"signed with the public key as a secret", cachetest.SignToken(t, secret, map[string]any{"iss": w.issuer.URL, "aud": "polykit-cache", "exp": in(time.Hour), "ref": "refs/heads/main", "repository_owner": "octo"}), "algorithm 401 The credential is not valid here: .*"},
		{"no signature", good[0] + "." + good[1] + ".", "(signature|malformed) 401 The credential is not valid here: .*"},
		{"other claims", good[0] + "." + strings.Split(signed(map[string]any{"sub": "x"}), ".")[1] + "." + good[2], "signature 401 The credential is not valid here: .*"},
		{"a critical header", cachetest.SignToken(t, jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: w.issuer.keys["1"], KeyID: "9"}}, map[string]any{"iss": w.issuer.URL}), "unknown_key 401 .*"},
		{"four parts", strings.Join(good, ".") + ".x", "unknown_token 401 .*"},
		{"rubbish", "ey.ey.ey", "malformed 401 The credential is not valid here: .*"},
		{"claims that are no object", cachetest.SignToken(t, jose.SigningKey{Algorithm: jose.ES256, Key: w.issuer.keys["1"]}, nil), "issuer 401 .*"},
	} {
		t.Run(c.name, func(t *testing.T) { mustMatch(t, w.as(t, c.token), c.want) })
	}
	t.Run("basic", func(t *testing.T) {
		access, err := w.Authenticate(t.Context(), auth.Credentials{Authorization: []string{basic("oidc:" + signed(nil))}})
		if err != nil || access.Who != asMain {
			t.Errorf("got %+v, %v", access, err)
		}
	})
}

// A token is remembered no longer than it is good.
func TestRememberedTokenExpires(t *testing.T) {
	w := startWorld(t)
	token := w.issuer.token(t, "1", map[string]any{"exp": now.Add(time.Minute).Unix()})
	for range 2 {
		mustMatch(t, w.as(t, token), asMain)
	}
	w.advance(time.Minute + 29*time.Second)
	mustMatch(t, w.as(t, token), asMain)
	w.advance(2 * time.Second)
	mustMatch(t, w.as(t, token), "expired 401 .*")
}

// What is remembered of a token is not changed by a request that names a scope.
func TestRememberedTokenAndScope(t *testing.T) {
	i := startIssuer(t)
	a := newAuthenticator(t, fmt.Sprintf("issuers:\n  - {name: i, url: %s, audience: polykit-cache}\nrules:\n  - {name: r, issuer: i, role: admin, when: 'true'}\n", i.URL), func(c *auth.Config) {
		c.HTTPClient = i.Client()
	})
	token := i.token(t, "1", nil)
	for _, c := range []struct {
		scope string
		want  error
	}{{"", nil}, {"default", auth.ErrAllScopes}, {"", nil}} {
		access, err := a.Authenticate(t.Context(), auth.Credentials{Authorization: []string{"Bearer " + token}, Scope: c.scope})
		if err != nil {
			t.Fatal(err)
		}
		if err := access.May(auth.Operate); err != c.want {
			t.Errorf("in the scope %q: got %v, want %v", c.scope, err, c.want)
		}
	}
}

// New keys are known when a token first names one, old ones are forgotten, and strangers can't have the server ask
// more often than it does.
func TestKeyRotation(t *testing.T) {
	w := startWorld(t)
	first := w.issuer.token(t, "1", nil)
	mustMatch(t, w.as(t, first), asMain)
	unknown := func(n int) string {
		stranger := startIssuer(t)
		stranger.rotate(t, fmt.Sprint("x", n))
		return stranger.token(t, fmt.Sprint("x", n), map[string]any{"iss": w.issuer.URL})
	}
	for n := range 3 {
		mustMatch(t, w.as(t, unknown(n)), "unknown_key 401 The credential is not valid here: .*")
	}
	if n := w.issuer.asked.Load(); n != 1 {
		t.Errorf("the issuer was asked %d times, want 1", n)
	}

	w.issuer.rotate(t, "2", "3")
	second := w.issuer.token(t, "2", nil)
	mustMatch(t, w.as(t, second), "unknown_key 401 .*") // asked a moment ago
	mustMatch(t, w.as(t, first), asMain)
	w.advance(10 * time.Second)
	mustMatch(t, w.as(t, second), asMain)
	mustMatch(t, w.as(t, w.issuer.token(t, "3", nil)), asMain)
	if n := w.issuer.asked.Load(); n != 2 {
		t.Errorf("the issuer was asked %d times, want 2", n)
	}
	// The old key is gone, and so is what was remembered of tokens that it signed.
	mustMatch(t, w.as(t, first), "unknown_key 401 .*")
}

// Keys are asked for again after an hour, without anybody waiting, and not believed for more than a day.
func TestKeysGetOld(t *testing.T) {
	w := startWorld(t)
	good := func() string {
		return w.issuer.token(t, "1", map[string]any{"iat": nil, "exp": w.now().Add(time.Hour).Unix()})
	}
	mustMatch(t, w.as(t, good()), asMain)
	block := make(chan struct{})
	w.issuer.set(func() { w.issuer.block = block })
	w.advance(time.Hour)
	mustMatch(t, w.as(t, good()), asMain) // the issuer has not answered yet
	w.issuer.set(func() { w.issuer.block, w.issuer.down = nil, true })
	close(block)
	w.log.await("does not tell its keys", 1)
	w.advance(22 * time.Hour)
	mustMatch(t, w.as(t, good()), asMain)
	w.log.await("does not tell its keys", 2)
	w.advance(time.Hour)
	mustMatch(t, w.as(t, good()), "issuer_unavailable 503 The token can't be verified now, .*")
	w.issuer.set(func() { w.issuer.down = false })
	mustMatch(t, w.as(t, good()), "issuer_unavailable 503 .*") // asked a moment ago
	w.advance(10 * time.Second)
	mustMatch(t, w.as(t, good()), asMain)
}

// An issuer that is down keeps nobody from starting, nor tokens of the file from being good.
func TestIssuerDownAndBack(t *testing.T) {
	w := startWorld(t)
	w.issuer.set(func() { w.issuer.down = true })
	token := w.issuer.token(t, "1", nil)
	mustMatch(t, w.as(t, token), "issuer_unavailable 503 .*")
	mustMatch(t, w.as(t, ciToken), "token ci")
	if text := w.log.String(); !strings.Contains(text, "502 Bad Gateway") {
		t.Errorf("the log is %s", text)
	}
	w.issuer.set(func() { w.issuer.down = false })
	w.advance(10 * time.Second)
	mustMatch(t, w.as(t, token), asMain)
}

// A request that is given up does not wait for the issuer, and others get the same answer.
func TestIssuerIsSlow(t *testing.T) {
	w := startWorld(t)
	block := make(chan struct{})
	w.issuer.set(func() { w.issuer.block = block })
	token := w.issuer.token(t, "1", nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := w.Authenticate(ctx, auth.Credentials{Authorization: []string{"Bearer " + token}})
	mustMatch(t, describe(err), "issuer_unavailable 503 .*")
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() {
			if got := w.as(t, token); got != asMain {
				t.Errorf("got %s", got)
			}
		})
	}
	close(block)
	all.Wait()
	if n := w.issuer.asked.Load(); n != 1 {
		t.Errorf("the issuer was asked %d times, want 1", n)
	}
}

// panicking is what asks an issuer, and panics.
type panicking struct{}

func (panicking) RoundTrip(*http.Request) (*http.Response, error) { panic("on purpose") }

// A panic over what an issuer says does not end the process, and the issuer is asked again.
func TestPanicOverKeys(t *testing.T) {
	w := startWorld(t)
	transport := w.issuer.Client().Transport
	w.issuer.Client().Transport = panicking{}
	token := w.issuer.token(t, "1", nil)
	mustMatch(t, w.as(t, token), "issuer_unavailable 503 .*")
	w.log.await("panic: on purpose", 1)
	w.issuer.Client().Transport = transport
	w.advance(10 * time.Second)
	mustMatch(t, w.as(t, token), asMain)
}

// What an issuer says wrong is no key.
func TestIssuerSaysWrong(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(map[string]any)
		want   string
	}{
		{"another issuer", func(m map[string]any) { m["issuer"] = "https://evil.example" }, "it calls itself"},
		{"keys without TLS", func(m map[string]any) { m["jwks_uri"] = "http://keys.example/keys" }, "no URL that begins with https://"},
		{"no keys", func(m map[string]any) { delete(m, "jwks_uri") }, "no URL that begins with https://"},
		{"keys that are elsewhere without TLS", func(m map[string]any) { m["jwks_uri"] = m["jwks_uri"].(string) + "/moved?to=http://keys.example/keys" }, "no URL that begins with https://"},
		{"keys that move on and on", func(m map[string]any) { m["jwks_uri"] = m["jwks_uri"].(string) + "/moved" }, "more than 3 times"},
		{"more than is read", func(m map[string]any) { m["x"] = strings.Repeat("x", 1<<20) }, "more than 1048576 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := startWorld(t)
			w.issuer.set(func() { w.issuer.discovery = c.change })
			mustMatch(t, w.as(t, w.issuer.token(t, "1", nil)), "issuer_unavailable 503 .*")
			if n := w.issuer.asked.Load(); n != 0 {
				t.Errorf("its keys were asked for %d times", n)
			}
			w.log.await("does not tell its keys", 1)
			if text := w.log.String(); !strings.Contains(text, c.want) {
				t.Errorf("the log is %s", text)
			}
		})
	}
}

// Of a key set only what can verify a signature is used.
func TestKeysOfAllKinds(t *testing.T) {
	w := startWorld(t)
	large, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	secret := []byte("a secret that everybody can read")
	w.issuer.set(func() {
		w.issuer.keys["rsa"], w.issuer.keys["ed"] = large, edwards
		w.issuer.extra = []any{
			map[string]any{"kty": "unheard-of", "kid": "u"},
			map[string]any{"kty": "EC"},
			jose.JSONWebKey{Key: secret, KeyID: "secret", Algorithm: "HS256"},
			jose.JSONWebKey{Key: secret, KeyID: "plain"},
			jose.JSONWebKey{Key: private, KeyID: "private"},
			jose.JSONWebKey{Key: private.Public(), KeyID: "enc", Use: "enc"},
			jose.JSONWebKey{Key: large.Public(), KeyID: "other", Algorithm: "RS512"},
			jose.JSONWebKey{Key: small.Public(), KeyID: "small"},
		}
	})
	claims := map[string]any{"iss": w.issuer.URL, "sub": "repo:octo/x", "aud": "polykit-cache", "exp": now.Add(time.Minute).Unix(), "ref": "refs/heads/main", "repository_owner": "octo"}
	with := func(algorithm jose.SignatureAlgorithm, key any, id string) string {
		return cachetest.SignToken(t, jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{Key: key, KeyID: id}}, claims)
	}
	for _, c := range []struct{ name, token, want string }{
		{"RSA", w.issuer.token(t, "rsa", nil), asMain},
		{"RSA-PSS", with(jose.PS256, large, "rsa"), asMain},
		{"EdDSA", w.issuer.token(t, "ed", nil), asMain},
		{"ECDSA", w.issuer.token(t, "1", nil), asMain},
		{"the name of another key", with(jose.RS256, large, "ed"), "signature 401 .*"},
		{"no name of a key where there are several", with(jose.RS256, large, ""), "unknown_key 401 .*"},
		{"HMAC", with(jose.HS256, secret, "secret"), "algorithm 401 .*"},
		{"HMAC without alg", with(jose.HS256, secret, "plain"), "algorithm 401 .*"},
		{"private", with(jose.ES256, private, "private"), "unknown_key 401 .*"},
		{"a key for another algorithm", with(jose.RS256, large, "other"), "signature 401 .*"},
		{"a small key", with(jose.RS256, small, "small"), "unknown_key 401 .*"},
		{"for encryption", with(jose.ES256, private, "enc"), "unknown_key 401 .*"},
	} {
		t.Run(c.name, func(t *testing.T) { mustMatch(t, w.as(t, c.token), c.want) })
	}
}

// Where there is only one key, a token need not name it; and keys can be in a file.
func TestKeysFile(t *testing.T) {
	i := startIssuer(t)
	dir := t.TempDir()
	for name, text := range map[string][]byte{"jwks.json": i.keySet(), "auth.yaml": []byte(i.trusting("\n    keys_file: jwks.json")), "wrong.yaml": []byte(i.trusting("\n    keys_file: none.json"))} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a, err := auth.New(auth.Config{File: filepath.Join(dir, "auth.yaml"), Log: newLog(), Now: nowFunc})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Authenticator: a}
	mustMatch(t, w.as(t, i.token(t, "1", nil)), asMain)
	mustMatch(t, w.as(t, cachetest.SignToken(t, jose.SigningKey{Algorithm: jose.ES256, Key: i.keys["1"]}, map[string]any{
		"iss": i.URL, "sub": "repo:octo/x", "aud": "polykit-cache", "exp": now.Add(time.Minute).Unix(), "ref": "refs/heads/main", "repository_owner": "octo",
	})), asMain)
	i.rotate(t, "2")
	mustMatch(t, w.as(t, i.token(t, "2", nil)), "unknown_key 401 .*")
	if n := i.asked.Load(); n != 0 {
		t.Errorf("the issuer was asked %d times", n)
	}
	_, err = auth.Load(filepath.Join(dir, "wrong.yaml"))
	mustMatch(t, fmt.Sprint(err), `.*wrong.yaml:18: keys_file .*none.json of issuer "github": .*no such file.*`)
}
