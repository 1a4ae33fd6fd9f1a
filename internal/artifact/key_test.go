package artifact_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unsafe"

	"github.com/polykit/polykit-cache/internal/artifact"
)

func TestParseKey(t *testing.T) {
	const digits = "0123456789abcdef0123456789abcdef" // the fewest

	for _, c := range []struct{ name, in, want string }{
		{"32 digits", digits, digits},
		{"33 digits", digits + "0", digits + "0"},
		{"128 digits", strings.Repeat(digits, 4), strings.Repeat(digits, 4)},
		{"upper case", "0123456789ABCDEF0123456789ABCDEF", digits},
		{"both cases", "0123456789aBcDeF0123456789AbCdEf", digits},
	} {
		key, err := artifact.ParseKey(c.in)
		if err != nil || key.String() != c.want {
			t.Errorf("%s: got %q, %v; want %q", c.name, key, err, c.want)
		}
	}

	for _, c := range []struct{ name, in, want string }{
		{"empty", "", "invalid cache key: it has 0 characters; a key has 32 to 128 hexadecimal digits"},
		{"31 digits", digits[1:], "invalid cache key: it has 31 characters; a key has 32 to 128 hexadecimal digits"},
		{"129 digits", strings.Repeat(digits, 4) + "0", "invalid cache key: it has 129 characters; a key has 32 to 128 hexadecimal digits"},
		{"a g", digits[1:] + "g", "invalid cache key: character 32 is 'g'; a key has 32 to 128 hexadecimal digits"},
		{"a slash", "../" + digits, "invalid cache key: character 1 is '.'; a key has 32 to 128 hexadecimal digits"},
		{"a blank", " " + digits, "invalid cache key: character 1 is ' '; a key has 32 to 128 hexadecimal digits"},
		{"a line break", digits + "\n", `invalid cache key: character 33 is '\n'; a key has 32 to 128 hexadecimal digits`},
		{"a NUL", digits + "\x00", `invalid cache key: character 33 is '\x00'; a key has 32 to 128 hexadecimal digits`},
		{"0x", "0x" + digits, "invalid cache key: character 2 is 'x'; a key has 32 to 128 hexadecimal digits"},
		{"digits of another script", strings.Repeat("٣", 32), "invalid cache key: character 1 is 'Ù'; a key has 32 to 128 hexadecimal digits"},
		{"a letter that folds to a digit", digits + "ﬀ", "invalid cache key: character 33 is 'ï'; a key has 32 to 128 hexadecimal digits"},
	} {
		key, err := artifact.ParseKey(c.in)
		if !errors.Is(err, artifact.ErrInvalidKey) || err.Error() != c.want || key != (artifact.Key{}) {
			t.Errorf("%s: got %q, %v; want %s", c.name, key, err, c.want)
		}
	}
}

// TestKeyKeepsNoText proves that a key does not keep the text that it was a part of.
func TestKeyKeepsNoText(t *testing.T) {
	for _, digits := range []string{strings.Repeat("0123456789abcdef", 4), strings.Repeat("0123456789ABCDEF", 4)} {
		text := strings.Clone(digits + strings.Repeat(" ", 1000))
		key, err := artifact.ParseKey(text[:len(digits)])
		if err != nil {
			t.Fatal(err)
		}
		if unsafe.StringData(key.String()) == unsafe.StringData(text) {
			t.Errorf("the key of %s is a part of the text", digits)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add("0123456789abcdef0123456789ABCDEF")
	f.Add("../../../../../../../../etc/passwd")
	f.Fuzz(func(t *testing.T, s string) {
		key, err := artifact.ParseKey(s)
		if err != nil {
			if !errors.Is(err, artifact.ErrInvalidKey) || key != (artifact.Key{}) {
				t.Fatalf("got %q, %v", key, err)
			}
			return
		}
		text := key.String()
		if strings.Trim(text, "0123456789abcdef") != "" || len(text) < 32 || len(text) > 128 || !strings.EqualFold(text, s) {
			t.Fatalf("key %q of %q is not a lower-case key", text, s)
		}
		if again, err := artifact.ParseKey(text); again != key || err != nil {
			t.Fatalf("key %q does not parse to itself: %v", text, err)
		}
	})
}

func TestParseDigest(t *testing.T) {
	const digits = "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8"
	if d, err := artifact.ParseDigest(digits); err != nil || d.String() != digits {
		t.Errorf("got %s, %v", d, err)
	}
	for _, s := range []string{"", digits[1:], digits + "00", digits[1:] + "g", digits[1:] + " ", strings.ToUpper(digits), strings.Repeat("K", 64)} {
		if d, err := artifact.ParseDigest(s); err == nil || d != (artifact.Digest{}) {
			t.Errorf("%q: got %s, %v; want an error", s, d, err)
		}
	}
}

// TestKeyAsText proves that a key is shown by its digits, in a log of JSON too.
func TestKeyAsText(t *testing.T) {
	key, err := artifact.ParseKey("0123456789ABCDEF0123456789abcdef")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := json.Marshal(map[string]any{"key": key}); string(text) != `{"key":"0123456789abcdef0123456789abcdef"}` || err != nil {
		t.Errorf("got %s, %v", text, err)
	}
}

// TestName proves that names tell scopes apart, and how they are shown.
func TestName(t *testing.T) {
	key, err := artifact.ParseKey("0123456789abcdef0123456789abcdef")
	if err != nil {
		t.Fatal(err)
	}
	scope, err := artifact.ParseScope("pr-7")
	if err != nil {
		t.Fatal(err)
	}
	name, other := key.In(artifact.DefaultScope), key.In(scope)
	if name == other || name != (artifact.Name{Key: key}) || (artifact.Info{Scope: scope, Key: key}).Name() != other {
		t.Errorf("%v and %v are not told apart", name, other)
	}
	if name.String() != key.String() || other.String() != "pr-7/"+key.String() {
		t.Errorf("got %v and %v", name, other)
	}
}

func TestAgreement(t *testing.T) {
	a, b := artifact.Digest{1}, artifact.Digest{2}
	for _, c := range []struct {
		one, other artifact.Info
		want       artifact.Agreement
	}{
		{artifact.Info{Hash: a, Manifest: a}, artifact.Info{Hash: b, Manifest: a}, artifact.AgreementSame},
		{artifact.Info{Hash: a, Manifest: a}, artifact.Info{Hash: b, Manifest: b}, artifact.AgreementDifferent},
		{artifact.Info{Hash: a}, artifact.Info{Hash: b, Manifest: b}, artifact.AgreementUnknown},
		{artifact.Info{Hash: a}, artifact.Info{Hash: b}, artifact.AgreementUnknown},
		{artifact.Info{Hash: a}, artifact.Info{Hash: a, Manifest: b}, artifact.AgreementSame},
		{artifact.Info{}, artifact.Info{}, artifact.AgreementUnknown},
	} {
		if got := c.one.Agreement(c.other); got != c.want {
			t.Errorf("%+v and %+v are %s, want %s", c.one, c.other, got, c.want)
		}
		if got := c.other.Agreement(c.one); got != c.want {
			t.Errorf("%+v and %+v are %s, want %s", c.other, c.one, got, c.want)
		}
	}
}
