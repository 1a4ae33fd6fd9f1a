package artifact

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

const (
	minKeyDigits = 32
	// MaxKeyDigits is how many hexadecimal digits the longest cache key has.
	MaxKeyDigits = 128
)

// ErrInvalidKey is wrapped by every error of ParseKey.
var ErrInvalidKey = errors.New("invalid cache key")

// Key names an artifact: 32 to 128 hexadecimal digits, a hash of everything that the task which
// made the artifact depends on. ParseKey is the only way to make one, so a Key that is not the zero
// Key is valid, lower-case, and safe as a file name.
type Key struct{ digits string }

// ParseKey returns the key that s names. Letters of either case name the same key.
func ParseKey(s string) (Key, error) {
	if len(s) < minKeyDigits || len(s) > MaxKeyDigits {
		return Key{}, fmt.Errorf("%w: it has %d characters; a key has %d to %d hexadecimal digits",
			ErrInvalidKey, len(s), minKeyDigits, MaxKeyDigits)
	}
	upper := false
	for i := range len(s) {
		c := s[i]
		upper = upper || 'A' <= c && c <= 'F'
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F') {
			return Key{}, fmt.Errorf("%w: character %d is %q; a key has %d to %d hexadecimal digits",
				ErrInvalidKey, i+1, c, minKeyDigits, MaxKeyDigits)
		}
	}
	// A copy, for s may be a part of a much longer text, and keys are kept for long.
	if upper {
		return Key{strings.Clone(strings.ToLower(s))}, nil
	}
	return Key{strings.Clone(s)}, nil
}

// String returns the key's digits, lower-case.
func (k Key) String() string { return k.digits }

// MarshalText returns the key's digits, lower-case.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.digits), nil }

// Digest is a SHA-256 digest (FIPS 180-4).
type Digest [32]byte

// ParseDigest returns the digest that s writes as 64 lower-case hexadecimal digits.
func ParseDigest(s string) (Digest, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(Digest{}) || strings.ToLower(s) != s {
		return Digest{}, errors.New("not 64 lower-case hexadecimal digits")
	}
	return Digest(b), nil
}

// String returns the digest as 64 lower-case hexadecimal digits.
func (d Digest) String() string {
	var digits [2 * len(d)]byte
	hex.Encode(digits[:], d[:])
	return string(digits[:])
}
