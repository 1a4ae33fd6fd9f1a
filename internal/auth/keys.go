package auth

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	// keysEvery is how old an issuer's keys are when they are asked for again, while the old ones are used.
	keysEvery = time.Hour
	// keysAtMost is how old an issuer's keys may be. If it tells none for that long, its tokens are no longer
	// verified: it may have withdrawn a key that was stolen.
	keysAtMost = 24 * time.Hour
	// askEvery is the least time between two questions to an issuer. Anybody can make a token that names an unknown
	// key, so it bounds what strangers can have the server ask; a new key is known after that at the latest.
	askEvery = 10 * time.Second
	// askTimeout is how long an issuer may take for its answers.
	askTimeout = 10 * time.Second
	// waitForKeys is how long a request waits for them.
	waitForKeys = 5 * time.Second
	// maxKeys is how many keys of an issuer are taken.
	maxKeys = 100
)

var (
	errUnknownKey  = errors.New("the issuer has no such key")
	errUnavailable = errors.New("the issuer does not tell its keys")
)

// keySet has the keys of an issuer: those of a file, or those that discovery leads to. They are asked for when they
// are first needed, when they are old, and when a token names one that is not known.
type keySet struct {
	issuer string // its URL; empty if the keys are from a file
	client *http.Client
	now    func() time.Time
	log    *slog.Logger

	mu         sync.Mutex
	keys       []jose.JSONWebKey
	fetched    time.Time     // when the keys were told
	asked      time.Time     // when they were last asked for
	err        error         // why they were not told then, or nil
	fetching   chan struct{} // closed when the question in flight is answered; nil if there is none
	generation int           // changes when the keys do
}

// find returns the keys that a token with a key ID, or with none, may be signed with, and the generation of the keys.
func (k *keySet) find(ctx context.Context, id string) ([]jose.JSONWebKey, int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	found := k.named(id)
	if k.issuer == "" {
		if len(found) == 0 {
			return nil, 0, errUnknownKey
		}
		return found, k.generation, nil
	}
	age := k.now().Sub(k.fetched)
	if len(found) > 0 && age < keysAtMost {
		if age >= keysEvery {
			k.ask() // and don't wait for it
		}
		return found, k.generation, nil
	}
	answered := k.ask()
	if answered != nil {
		timer := time.NewTimer(waitForKeys)
		defer timer.Stop()
		k.mu.Unlock()
		select {
		case <-answered:
		case <-ctx.Done():
		case <-timer.C:
		}
		k.mu.Lock()
	}
	found = k.named(id)
	switch {
	case len(found) > 0 && k.now().Sub(k.fetched) < keysAtMost:
		return found, k.generation, nil
	case k.err != nil:
		return nil, 0, fmt.Errorf("%w: %w", errUnavailable, k.err)
	case k.fetched.IsZero() || k.fetching != nil:
		return nil, 0, fmt.Errorf("%w: no answer yet", errUnavailable)
	}
	return nil, 0, errUnknownKey
}

// named returns the keys with an ID. A token need not name its key if there is only one.
func (k *keySet) named(id string) []jose.JSONWebKey {
	if id == "" && len(k.keys) == 1 {
		return k.keys
	}
	var found []jose.JSONWebKey
	for _, key := range k.keys {
		if id != "" && key.KeyID == id {
			found = append(found, key)
		}
	}
	return found
}

// ask asks for the keys, unless it did so lately. It returns a channel that is closed when a question that is in flight
// is answered, or nil if there is none. The caller holds the lock.
func (k *keySet) ask() <-chan struct{} {
	if k.fetching != nil {
		return k.fetching
	}
	if now := k.now(); k.asked.IsZero() || now.Sub(k.asked) >= askEvery || now.Before(k.asked) {
		k.asked = now
		k.fetching = make(chan struct{})
		go k.fetch()
		return k.fetching
	}
	return nil
}

// fetch asks for the keys.
func (k *keySet) fetch() {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	keys, err := k.discover(ctx)
	if err != nil {
		defer k.log.Warn("an OIDC issuer does not tell its keys; it is asked again when they are next needed", "issuer", k.issuer, "error", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.err = err
	if err == nil {
		k.fetched = k.now()
		if !sameKeys(k.keys, keys) {
			k.keys = keys
			k.generation++
		}
	}
	close(k.fetching)
	k.fetching = nil
}

// current returns the generation of the keys.
func (k *keySet) current() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.generation
}

// discover asks an issuer where its keys are, and for them (OpenID Connect Discovery 1.0, sections 4 and 3).
func (k *keySet) discover(ctx context.Context) (keys []jose.JSONWebKey, err error) {
	// In a goroutine of its own nothing else keeps a panic from ending the process, and what others wrote is taken apart here.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	text, err := k.get(ctx, strings.TrimSuffix(k.issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return nil, err
	}
	var provider struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(text, &provider); err != nil {
		return nil, fmt.Errorf("what it says of itself is no JSON: %w", err)
	}
	if provider.Issuer != k.issuer {
		return nil, fmt.Errorf("it calls itself %q; url must be exactly that", shorten(provider.Issuer))
	}
	if err := checkKeysURL(provider.JWKSURI); err != nil {
		return nil, err
	}
	if text, err = k.get(ctx, provider.JWKSURI); err != nil {
		return nil, err
	}
	return parseKeys(text)
}

func checkKeysURL(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.Scheme != "https" && !(u.Scheme == "http" && loopback(u.Hostname())) {
		return fmt.Errorf("its keys are at %q, which is no URL that begins with https://", shorten(text))
	}
	return nil
}

// get returns what is at a URL.
func (k *keySet) get(ctx context.Context, address string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	client := *k.client
	client.CheckRedirect = func(request *http.Request, via []*http.Request) error {
		if len(via) >= 3 {
			return errors.New("it redirects more than 3 times")
		}
		return checkKeysURL(request.URL.String())
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", address, response.Status)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, MaxFile+1))
	if err == nil && len(text) > MaxFile {
		err = fmt.Errorf("%s answers with more than %d bytes", address, MaxFile)
	}
	return text, err
}

// parseKeys returns the keys of a JWK set that can verify a signature. As RFC 7517 has it, those that are not known
// are left out: others may use them.
func parseKeys(text []byte) ([]jose.JSONWebKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(text, &set); err != nil {
		return nil, fmt.Errorf("its keys are no JSON: %w", err)
	}
	var keys []jose.JSONWebKey
	for _, text := range set.Keys {
		var key jose.JSONWebKey
		if err := json.Unmarshal(text, &key); err == nil && verifies(&key) && len(keys) < maxKeys {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("none of its %d keys can verify a signature", len(set.Keys))
	}
	return keys, nil
}

// verifies says whether a key is a public one for signatures.
func verifies(key *jose.JSONWebKey) bool {
	if key.Use != "" && key.Use != "sig" || !key.Valid() || key.Algorithm != "" && !slices.Contains(algorithms, jose.SignatureAlgorithm(key.Algorithm)) {
		return false
	}
	switch public := key.Key.(type) {
	case *rsa.PublicKey:
		return public.N.BitLen() >= 2048
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return true
	}
	return false // a private or a symmetric one
}

func sameKeys(a, b []jose.JSONWebKey) bool {
	return slices.EqualFunc(a, b, func(a, b jose.JSONWebKey) bool {
		x, errX := a.MarshalJSON()
		y, errY := b.MarshalJSON()
		return errX == nil && errY == nil && string(x) == string(y)
	})
}
