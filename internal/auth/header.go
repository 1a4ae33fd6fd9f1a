package auth

import (
	"encoding/base64"
	"fmt"
	"strings"
)

// MaxAuthorization is how many bytes an Authorization header may have.
const MaxAuthorization = 16 << 10

// secretOf returns the token or JWT in the values of Authorization headers, or empty if there is no header.
func secretOf(values []string) (string, error) {
	if len(values) == 0 {
		return "", nil
	}
	if len(values) > 1 {
		return "", malformed("there is more than one Authorization header; send one")
	}
	if len(values[0]) > MaxAuthorization {
		return "", malformed(fmt.Sprintf("the Authorization header is longer than %d bytes", MaxAuthorization))
	}
	scheme, rest, _ := strings.Cut(strings.Trim(values[0], " \t"), " ")
	rest = strings.Trim(rest, " \t")
	switch strings.ToLower(scheme) {
	case "bearer":
	case "basic":
		text, err := base64.StdEncoding.DecodeString(rest)
		if err != nil {
			return "", malformed("what follows Basic in the Authorization header is not base64")
		}
		_, password, found := strings.Cut(string(text), ":")
		if !found {
			return "", malformed("there is no colon between user name and password in the Authorization header")
		}
		rest = password
	default:
		return "", malformed("the Authorization header is neither Bearer nor Basic")
	}
	if rest == "" {
		return "", malformed("there is no token in the Authorization header; with Basic it is the password, and the user name does not count")
	}
	for i := range len(rest) {
		if rest[i] <= ' ' || rest[i] > '~' {
			return "", malformed("the token in the Authorization header has a character that is no letter, digit or sign of ASCII")
		}
	}
	return rest, nil
}

// malformed returns the refusal of a header. What it says holds nothing of the header.
func malformed(what string) *Error {
	return &Error{Reason: ReasonMalformed, Detail: what, sentence: upper(what)}
}

// looksLikeJWT says whether a secret has the form of a signed JWT.
func looksLikeJWT(secret string) bool {
	return strings.Count(secret, ".") == 2 && strings.HasPrefix(secret, "ey") // a JSON object in base64
}
