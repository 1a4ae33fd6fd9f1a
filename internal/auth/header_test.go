package auth_test

import (
	"encoding/base64"
	"errors"
	"io"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/auth"
)

func newLog() *slog.Logger { return newLogTo(io.Discard) }

func newLogTo(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

func nowFunc() time.Time { return now }

func basic(text string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(text)) }

func TestAuthorization(t *testing.T) {
	a := newAuthenticator(t, full, nil)
	for _, c := range []struct {
		name   string
		values []string
		scope  string
		want   string
	}{
		{"none", nil, "", "anonymous"},
		{"bearer", []string{"Bearer " + ciToken}, "", "token ci"},
		{"bearer in other letters", []string{"bEARER " + ciToken}, "", "token ci"},
		{"bearer with blanks", []string{" Bearer   " + ciToken + " "}, "", "token ci"},
		{"basic", []string{basic("x:" + ciToken)}, "", "token ci"},
		{"basic without a user", []string{basic(":" + ciToken)}, "", "token ci"},
		{"basic with any user", []string{strings.ToLower(basic("")) + base64.StdEncoding.EncodeToString([]byte("ad min:"+adminToken))}, "", "token admin"},
		{"another scope", []string{"Bearer " + ciToken}, "nightly", "token ci"},
		{"a wrong scope", []string{"Bearer " + ciToken}, "pr-7", "scope 403 The credential may not use the scope pr-7"},
		{"a scope by pattern", []string{"Bearer " + adminToken}, "pr-7", "token admin"},
		{"a scope that is none", []string{"Bearer " + adminToken}, "other", "scope 403 The credential may not use the scope other"},
		{"empty", []string{""}, "", "malformed 401 The Authorization header is neither Bearer nor Basic"},
		{"two", []string{"Bearer " + ciToken, "Bearer " + ciToken}, "", "malformed 401 There is more than one Authorization header; send one"},
		{"another scheme", []string{"Digest x=y"}, "", "malformed 401 The Authorization header is neither Bearer nor Basic"},
		{"the token alone", []string{ciToken}, "", "malformed 401 The Authorization header is neither Bearer nor Basic"},
		{"bearer without a token", []string{"Bearer"}, "", "malformed 401 There is no token in the Authorization header; .*"},
		{"basic without a password", []string{basic(ciToken + ":")}, "", "malformed 401 There is no token in the Authorization header; with Basic it is the password, .*"},
		{"basic without a colon", []string{basic(ciToken)}, "", "malformed 401 There is no colon between user name and password .*"},
		{"basic of something else", []string{"Basic " + ciToken + "!"}, "", "malformed 401 What follows Basic in the Authorization header is not base64"},
		{"two tokens", []string{"Bearer " + ciToken + " " + ciToken}, "", "malformed 401 The token in the Authorization header has a character .*"},
		{"long", []string{"Bearer " + strings.Repeat("x", 16<<10)}, "", "malformed 401 The Authorization header is longer than 16384 bytes"},
		{"as long as it can be", []string{"Bearer " + strings.Repeat("x", 16<<10-7)}, "", "unknown_token 401 The credential is not valid here: .*"},
		{"unknown", []string{"Bearer pkc_other"}, "", "unknown_token 401 The credential is not valid here: .*"},
		{"part of a token", []string{"Bearer " + ciToken[:len(ciToken)-1]}, "", "unknown_token 401 .*"},
		{"expired", []string{"Bearer " + oldToken}, "", "expired 401 The credential has expired: get a new one"},
		{"the hash", []string{"Bearer " + auth.HashToken(ciToken)}, "", "unknown_token 401 .*"},
	} {
		t.Run(c.name, func(t *testing.T) {
			access, err := a.Authenticate(t.Context(), auth.Credentials{Authorization: c.values, Scope: c.scope})
			got := ""
			if err == nil {
				got = access.Who
			} else {
				got = describe(err)
			}
			mustMatch(t, got, c.want)
		})
	}
}

// describe says reason, status and sentence of a refusal.
func describe(err error) string {
	e, ok := errors.AsType[*auth.Error](err)
	if !ok {
		return err.Error()
	}
	status := map[error]string{auth.ErrUnauthenticated: "401", auth.ErrForbidden: "403", auth.ErrUnavailable: "503"}[errors.Unwrap(e)]
	return string(e.Reason) + " " + status + " " + e.Error()
}

// A header decides, if there is one, whatever the certificate is.
func TestHeaderBeforeCertificate(t *testing.T) {
	a := newAuthenticator(t, full, nil)
	good := certificate("a.build.example").Certificate
	for header, want := range map[string]string{"": "certificate a.build.example", "Bearer " + ciToken: "token ci", "Bearer x": "unknown_token 401 .*", "x": "malformed 401 .*"} {
		c := auth.Credentials{Certificate: good}
		if header != "" {
			c.Authorization = []string{header}
		}
		access, err := a.Authenticate(t.Context(), c)
		if err != nil {
			mustMatch(t, describe(err), want)
		} else {
			mustMatch(t, access.Who, want)
		}
	}
}

// A certificate that expires while its connection is open is good no longer, and one that counts for nothing does not
// matter then either.
func TestCertificateExpires(t *testing.T) {
	c := &clock{}
	a := newAuthenticator(t, full, func(config *auth.Config) { config.Now = c.now })
	credentials := auth.Credentials{Certificate: certificate("a.build.example").Certificate}
	who := func() string {
		access, err := a.Authenticate(t.Context(), credentials)
		explained := a.Explain(t.Context(), credentials, auth.Read)
		if (err == nil) != explained.Allowed {
			t.Errorf("got %v, but explained is %v", err, explained.Refused)
		}
		if err != nil {
			return describe(err)
		}
		return access.Who
	}
	c.advance(time.Hour)
	mustMatch(t, who(), "certificate a.build.example")
	c.advance(time.Nanosecond)
	mustMatch(t, who(), "expired 401 The credential has expired: get a new one")
	credentials.Authorization = []string{"Bearer " + ciToken}
	mustMatch(t, who(), "token ci")
	credentials.Authorization = nil
	a = newAuthenticator(t, "anonymous: {role: reader}\n", func(config *auth.Config) { config.Now = c.now })
	mustMatch(t, who(), "anonymous")
}

// The date on which a token expires is the first moment at which it is not valid.
func TestTokenExpires(t *testing.T) {
	for at, want := range map[time.Time]bool{
		time.Date(2026, 1, 30, 23, 59, 59, 999, time.UTC): true,
		time.Date(2026, 1, 31, 0, 0, 0, 0, time.UTC):      false,
	} {
		a := newAuthenticator(t, full, func(c *auth.Config) { c.Now = func() time.Time { return at } })
		_, err := a.Authenticate(t.Context(), auth.Credentials{Authorization: []string{"Bearer " + oldToken}})
		if (err == nil) != want {
			t.Errorf("at %v: %v", at, err)
		}
	}
}

func TestChallenges(t *testing.T) {
	a := newAuthenticator(t, "tokens:\n", nil)
	for header, want := range map[string]string{
		"":         `Bearer realm="polykit-cache", Basic realm="polykit-cache", charset="UTF-8"`,
		"Bearer x": `Bearer realm="polykit-cache", error="invalid_token", Basic realm="polykit-cache", charset="UTF-8"`,
	} {
		var values []string
		if header != "" {
			values = []string{header}
		}
		_, err := a.Authenticate(t.Context(), auth.Credentials{Authorization: values})
		if got := strings.Join(err.(*auth.Error).Challenges(), ", "); got != want {
			t.Errorf("%q: got %s, want %s", header, got, want)
		}
	}
}

func TestNewToken(t *testing.T) {
	form := regexp.MustCompile(`^pkc_[0-9A-Za-z]{43}$`)
	seen := map[string]bool{}
	for range 1000 {
		token := auth.NewToken()
		if !form.MatchString(token) || seen[token] {
			t.Fatalf("got %s", token)
		}
		seen[token] = true
	}
	if got := auth.HashToken("test"); got != "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08" {
		t.Errorf("got %s", got)
	}
}

// FuzzAuthorization sends headers: whatever they are, who is let in has a token, and no refusal holds what was sent.
func FuzzAuthorization(f *testing.F) {
	f.Add("Bearer "+ciToken, "")
	f.Add(basic("x:"+adminToken), "")
	f.Add("Bearer eyJhbGciOiJub25lIn0.eyJpc3MiOiJodHRwczovL3Rva2VuLmFjdGlvbnMuZ2l0aHVidXNlcmNvbnRlbnQuY29tIn0.", "")
	f.Add("Bearer eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJ4In0.AAAA", "Bearer x")
	policy := strings.Replace(full, "https://token.actions.githubusercontent.com", "https://127.0.0.1:1", 1)
	a := newAuthenticator(f, policy, nil)
	f.Fuzz(func(t *testing.T, first, second string) {
		values := []string{first}
		if second != "" {
			values = append(values, second)
		}
		access, err := a.Authenticate(t.Context(), auth.Credentials{Authorization: values})
		if err == nil {
			if !regexp.MustCompile(`^token (ci|admin)$`).MatchString(access.Who) || len(values) > 1 {
				t.Fatalf("%q let in %s", values, access.Who)
			}
			return
		}
		e, ok := errors.AsType[*auth.Error](err)
		if !ok || len(e.Error()) < 20 || strings.ContainsAny(e.Error(), "\r\n") {
			t.Fatalf("got %v", err)
		}
		if _, secret, _ := strings.Cut(first, " "); len(secret) > 20 && strings.Contains(e.Error()+e.Detail, secret) {
			t.Errorf("%q is told: %s, %s", secret, e, e.Detail)
		}
	})
}
