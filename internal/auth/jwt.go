package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"
)

// algorithms are those that a token may be signed with. All have a public key: with others whoever can verify a token
// could make one.
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// verified is an ID token that was verified.
type verified struct {
	id         Identity
	until      time.Time // when it is good no longer
	keys       *keySet
	generation int // of keys
}

// ParseClaims returns the claims in a JSON object. Whole numbers are int64, others float64.
func ParseClaims(text []byte) (map[string]any, error) {
	decoder := josejson.NewDecoder(strings.NewReader(string(text))) // which refuses a member that is there twice
	decoder.SetNumberType(josejson.UnmarshalJSONNumber)
	var claims map[string]any
	if err := decoder.Decode(&claims); err != nil {
		return nil, err
	}
	if claims == nil {
		return nil, errors.New("not a JSON object")
	}
	if decoder.More() {
		return nil, errors.New("there is something behind the JSON object")
	}
	return plainNumbers(claims).(map[string]any), nil
}

// plainNumbers replaces the numbers in a value.
func plainNumbers(value any) any {
	switch v := value.(type) {
	case josejson.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		n, err := v.Float64()
		if err != nil {
			return string(v)
		}
		return n
	case map[string]any:
		for name, member := range v {
			v[name] = plainNumbers(member)
		}
	case []any:
		for i, element := range v {
			v[i] = plainNumbers(element)
		}
	}
	return value
}

// verify verifies an ID token.
func (s *state) verify(ctx context.Context, secret string, now time.Time) (*verified, error) {
	signed, err := jose.ParseSignedCompact(secret, algorithms)
	if err != nil {
		if e, ok := errors.AsType[*jose.ErrUnexpectedSignatureAlgorithm](err); ok {
			return nil, invalid(ReasonAlgorithm, fmt.Sprintf("the token's algorithm is %q", shorten(string(e.Got))))
		}
		return nil, invalid(ReasonMalformed, "the token is no JWT")
	}
	// Nothing of this is believed but where to look for the key.
	var unproved struct {
		Issuer string `json:"iss"`
	}
	if err := josejson.Unmarshal(signed.UnsafePayloadWithoutVerification(), &unproved); err != nil {
		return nil, invalid(ReasonMalformed, "the token's claims are no JSON object")
	}
	issuer := s.issuers[unproved.Issuer]
	if issuer == nil {
		return nil, invalid(ReasonIssuer, fmt.Sprintf("the token is of the issuer %q", shorten(unproved.Issuer)))
	}
	header := signed.Signatures[0].Header
	keys, generation, err := issuer.keys.find(ctx, header.KeyID)
	switch {
	case errors.Is(err, errUnavailable):
		return nil, &Error{Reason: ReasonIssuerUnavailable, Detail: "issuer " + issuer.Name + ": " + err.Error(), sentence: sentenceUnavailable}
	case err != nil:
		return nil, invalid(ReasonUnknownKey, fmt.Sprintf("issuer %s has no key %q", issuer.Name, shorten(header.KeyID)))
	}
	var payload []byte
	for i := range keys {
		if keys[i].Algorithm != "" && keys[i].Algorithm != header.Algorithm {
			continue
		}
		if payload, err = signed.Verify(&keys[i]); err == nil {
			break
		}
	}
	if payload == nil {
		return nil, invalid(ReasonSignature, fmt.Sprintf("issuer %s did not sign the token with key %q", issuer.Name, shorten(header.KeyID)))
	}
	v := &verified{id: Identity{Issuer: issuer.Name}, keys: issuer.keys, generation: generation}
	return v, issuer.accept(v, payload, now)
}

// accept checks the claims of a token that the issuer did sign.
func (i *trusted) accept(v *verified, payload []byte, now time.Time) error {
	var registered jwt.Claims
	err := josejson.Unmarshal(payload, &registered)
	if err == nil {
		v.id.Claims, err = ParseClaims(payload)
	}
	if err == nil && registered.Expiry == nil {
		err = errors.New("there is no exp")
	}
	if err != nil {
		return invalid(ReasonMalformed, "claims of issuer "+i.Name+": "+shorten(err.Error()))
	}
	err = registered.ValidateWithLeeway(jwt.Expected{AnyAudience: jwt.Audience{i.Audience}, Time: now}, i.ClockSkew)
	refuse := func(reason Reason, detail, sentence string) error {
		return &Error{Reason: reason, Detail: v.id.String() + ": " + detail, sentence: sentence}
	}
	switch {
	case errors.Is(err, jwt.ErrInvalidAudience):
		return refuse(ReasonAudience, fmt.Sprintf("the audience is %q", shorten(strings.Join(registered.Audience, " "))), fmt.Sprintf(sentenceAudience, i.Audience))
	case errors.Is(err, jwt.ErrExpired):
		return refuse(ReasonExpired, "expired at "+registered.Expiry.Time().UTC().Format(time.RFC3339), sentenceExpired)
	case errors.Is(err, jwt.ErrNotValidYet), errors.Is(err, jwt.ErrIssuedInTheFuture):
		return refuse(ReasonNotYetValid, "not before, or issued, in the future", sentenceNotYet)
	case err != nil:
		return invalid(ReasonMalformed, v.id.String()+": "+err.Error())
	}
	v.until = registered.Expiry.Time().Add(i.ClockSkew)
	return nil
}

// readKeys returns the keys of a file.
func readKeys(text []byte) (*keySet, error) {
	if !json.Valid(text) {
		return nil, errors.New("it is no JSON")
	}
	keys, err := parseKeys(text)
	return &keySet{keys: keys}, err
}
