package artifact

import (
	"errors"
	"fmt"
	"strings"
)

// MaxScopeLength is how many characters the longest name of a scope has.
const MaxScopeLength = 63

// ErrInvalidScope is wrapped by every error of ParseScope.
var ErrInvalidScope = errors.New("invalid scope")

// Scope is a store within the store, of those who trust each other: what is written in one scope is not seen
// in another, unless that one reads from it. The zero Scope is the default one. ParseScope is the only way to
// make another, so a Scope is valid, lower-case, and safe as a file name.
type Scope struct{ name string }

// DefaultScope is the scope of those who name none.
var DefaultScope Scope

const defaultScopeName = "default"

// ParseScope returns the scope of a name: 1 to 63 lower-case letters, digits, dots, underscores and hyphens, of
// which the first is a letter or a digit and the last is no dot, which Windows would leave out. The name of the
// default scope is default.
func ParseScope(name string) (Scope, error) {
	if name == "" || len(name) > MaxScopeLength {
		return Scope{}, fmt.Errorf("%w: its name has %d characters; it must have 1 to %d", ErrInvalidScope, len(name), MaxScopeLength)
	}
	for i := range len(name) {
		c := name[i]
		switch {
		case 'a' <= c && c <= 'z' || '0' <= c && c <= '9':
		case c == '.' || c == '_' || c == '-':
			if i == 0 {
				return Scope{}, fmt.Errorf("%w: its name begins with %q; it must begin with a lower-case letter or a digit", ErrInvalidScope, c)
			}
		default:
			return Scope{}, fmt.Errorf("%w: character %d of its name is %q; use lower-case letters, digits, '.', '_' and '-'", ErrInvalidScope, i+1, c)
		}
	}
	if name[len(name)-1] == '.' {
		return Scope{}, fmt.Errorf("%w: its name ends with '.'; it must end with another character", ErrInvalidScope)
	}
	if name == defaultScopeName {
		return DefaultScope, nil
	}
	// A copy, for name may be a part of a much longer text, and scopes are kept for long.
	return Scope{strings.Clone(name)}, nil
}

// String returns the scope's name.
func (s Scope) String() string {
	if s.name == "" {
		return defaultScopeName
	}
	return s.name
}

// MarshalText returns the scope's name.
func (s Scope) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
