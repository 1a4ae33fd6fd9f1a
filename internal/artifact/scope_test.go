package artifact_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unsafe"

	"github.com/polykit/polykit-cache/internal/artifact"
)

func TestParseScope(t *testing.T) {
	longest := strings.Repeat("a", 63)
	for _, name := range []string{"default", "main", "pr-7", "0", "a.b_c-d", "a..b", "con", longest} {
		scope, err := artifact.ParseScope(name)
		if err != nil || scope.String() != name {
			t.Errorf("%q: got %q, %v", name, scope, err)
		}
		if (scope == artifact.DefaultScope) != (name == "default") {
			t.Errorf("%q: is it the default scope? %v", name, scope == artifact.DefaultScope)
		}
	}

	for _, c := range []struct{ name, want string }{
		{"", "invalid scope: its name has 0 characters; it must have 1 to 63"},
		{longest + "a", "invalid scope: its name has 64 characters; it must have 1 to 63"},
		{".", "invalid scope: its name begins with '.'; it must begin with a lower-case letter or a digit"},
		{"..", "invalid scope: its name begins with '.'; it must begin with a lower-case letter or a digit"},
		{"-a", "invalid scope: its name begins with '-'; it must begin with a lower-case letter or a digit"},
		{"_a", "invalid scope: its name begins with '_'; it must begin with a lower-case letter or a digit"},
		{"pr-7.", "invalid scope: its name ends with '.'; it must end with another character"},
		{"a/b", "invalid scope: character 2 of its name is '/'; use lower-case letters, digits, '.', '_' and '-'"},
		{`a\b`, `invalid scope: character 2 of its name is '\\'; use lower-case letters, digits, '.', '_' and '-'`},
		{"Main", "invalid scope: character 1 of its name is 'M'; use lower-case letters, digits, '.', '_' and '-'"},
		{"DEFAULT", "invalid scope: character 1 of its name is 'D'; use lower-case letters, digits, '.', '_' and '-'"},
		{"a b", "invalid scope: character 2 of its name is ' '; use lower-case letters, digits, '.', '_' and '-'"},
		{"a\n", `invalid scope: character 2 of its name is '\n'; use lower-case letters, digits, '.', '_' and '-'`},
		{"a\x00", `invalid scope: character 2 of its name is '\x00'; use lower-case letters, digits, '.', '_' and '-'`},
		{"pr-*", "invalid scope: character 4 of its name is '*'; use lower-case letters, digits, '.', '_' and '-'"},
		{"é", "invalid scope: character 1 of its name is 'Ã'; use lower-case letters, digits, '.', '_' and '-'"},
	} {
		scope, err := artifact.ParseScope(c.name)
		if !errors.Is(err, artifact.ErrInvalidScope) || err.Error() != c.want || scope != artifact.DefaultScope {
			t.Errorf("%q: got %q, %v; want %s", c.name, scope, err, c.want)
		}
	}
}

// TestScopeKeepsNoText proves that a scope does not keep the text that its name was a part of.
func TestScopeKeepsNoText(t *testing.T) {
	text := strings.Clone("pr-7" + strings.Repeat(" ", 1000))
	scope, err := artifact.ParseScope(text[:4])
	if err != nil {
		t.Fatal(err)
	}
	if unsafe.StringData(scope.String()) == unsafe.StringData(text) {
		t.Error("the scope's name is a part of the text")
	}
}

// TestScopeAsText proves that a scope is shown by its name, in a log of JSON too.
func TestScopeAsText(t *testing.T) {
	scope, err := artifact.ParseScope("pr-7")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := json.Marshal([]artifact.Scope{scope, artifact.DefaultScope}); string(text) != `["pr-7","default"]` || err != nil {
		t.Errorf("got %s, %v", text, err)
	}
}
