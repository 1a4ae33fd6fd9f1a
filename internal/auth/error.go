package auth

import "errors"

// Reason is why a request was refused: stable, for logs and metrics.
type Reason string

// What a Reason can be. But for those that say otherwise the caller has no valid credential.
const (
	// ReasonMissing: there is no credential, and anonymous callers may not do it.
	ReasonMissing Reason = "missing"
	// ReasonMalformed: the header or the token is not of a form that can be read.
	ReasonMalformed Reason = "malformed"
	// ReasonUnknownToken: the auth file has no such token.
	ReasonUnknownToken Reason = "unknown_token"
	// ReasonExpired: the token is good no longer.
	ReasonExpired Reason = "expired"
	// ReasonNotYetValid: the token is not good yet, or was issued in the future.
	ReasonNotYetValid Reason = "not_yet_valid"
	// ReasonAudience: the token is for somebody else.
	ReasonAudience Reason = "audience"
	// ReasonIssuer: the auth file has no such issuer.
	ReasonIssuer Reason = "issuer"
	// ReasonAlgorithm: the token is signed in a way that is not accepted, or not at all.
	ReasonAlgorithm Reason = "algorithm"
	// ReasonUnknownKey: the issuer has no such key.
	ReasonUnknownKey Reason = "unknown_key"
	// ReasonSignature: the token is not what the issuer signed.
	ReasonSignature Reason = "signature"
	// ReasonIssuerUnavailable: the token can't be verified now, since the issuer does not tell its keys. It is not
	// the caller's fault, so it is no 401: a client would throw a good token away.
	ReasonIssuerUnavailable Reason = "issuer_unavailable"
	// ReasonNoRule: the caller is known, but no rule fits. Forbidden.
	ReasonNoRule Reason = "no_rule"
	// ReasonRole: the caller's role does not allow it. Forbidden.
	ReasonRole Reason = "role"
	// ReasonScope: the caller may not use the scope, or has one that can't be. Forbidden.
	ReasonScope Reason = "scope"
)

// Reasons are all that there are.
var Reasons = []Reason{
	ReasonMissing, ReasonMalformed, ReasonUnknownToken, ReasonExpired, ReasonNotYetValid, ReasonAudience, ReasonIssuer, ReasonAlgorithm,
	ReasonUnknownKey, ReasonSignature, ReasonIssuerUnavailable, ReasonNoRule, ReasonRole, ReasonScope,
}

// An *Error wraps one of these.
var (
	// ErrUnauthenticated says that there is no valid credential. 401.
	ErrUnauthenticated = errors.New("no valid credential")
	// ErrForbidden says that the credential is valid, and does not allow it. 403.
	ErrForbidden = errors.New("not allowed")
	// ErrUnavailable says that it can't be decided now. 503.
	ErrUnavailable = errors.New("authentication is not available")
)

// ErrAllScopes says that something was asked for in one scope which can only be done in all. It is no *Error, since it
// is not about who asks.
var ErrAllScopes = errors.New("this is about all scopes together and can't be done in one: leave the scope out; what is kept in single scopes --scope-retention says")

// Error says that a request is refused.
type Error struct {
	// Reason is for logs and metrics.
	Reason Reason
	// Detail says more, for the log. It never holds a token, but may hold what others wrote.
	Detail string

	sentence string
}

// Error returns a sentence for the client. Of a credential that was not proved to be genuine it does not tell what
// is wrong with it.
func (e *Error) Error() string { return e.sentence }

// Unwrap returns ErrUnauthenticated, ErrForbidden or ErrUnavailable.
func (e *Error) Unwrap() error {
	switch e.Reason {
	case ReasonNoRule, ReasonRole, ReasonScope:
		return ErrForbidden
	case ReasonIssuerUnavailable:
		return ErrUnavailable
	}
	return ErrUnauthenticated
}

// Challenges returns the values of the WWW-Authenticate headers that belong to the refusal, if any.
func (e *Error) Challenges() []string {
	if !errors.Is(e, ErrUnauthenticated) {
		return nil
	}
	bearer := `Bearer realm="polykit-cache"`
	if e.Reason != ReasonMissing {
		bearer += `, error="invalid_token"`
	}
	return []string{bearer, `Basic realm="polykit-cache", charset="UTF-8"`}
}

const (
	sentenceMissing = `Authentication required: send the token as "Authorization: Bearer TOKEN", or as the password of HTTP Basic with any user name`
	// sentenceInvalid is told of all that was not proved to be genuine.
	sentenceInvalid     = "The credential is not valid here: get a new one, or ask those who run this server"
	sentenceExpired     = "The credential has expired: get a new one"
	sentenceNotYet      = "The credential is not valid yet: the clock of its issuer or that of this server is wrong"
	sentenceAudience    = "The token is for another audience: ask its issuer for one for %q"
	sentenceUnavailable = "The token can't be verified now, since its issuer does not answer: try again"
	sentenceNoRule      = "The credential is valid, but no rule of this server gives it a role"
	sentenceBadScope    = "The credential is valid, but the scope that the rules of this server give it can't be"
)

// invalid returns the refusal of what was not proved to be genuine.
func invalid(reason Reason, detail string) *Error {
	return &Error{Reason: reason, Detail: detail, sentence: sentenceInvalid}
}
