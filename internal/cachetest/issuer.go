package cachetest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Issuer is a real OIDC issuer, over TLS, as far as those who verify its ID tokens ask it: discovery and keys.
type Issuer struct {
	*httptest.Server
	mu   sync.Mutex
	keys map[string]*ecdsa.PrivateKey // by ID
}

// StartIssuer starts an issuer, which ends with the test. It has a key with the ID 1.
func StartIssuer(t testing.TB) *Issuer {
	i := &Issuer{}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(map[string]string{"issuer": i.URL, "jwks_uri": i.URL + "/keys"})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		var set jose.JSONWebKeySet
		for id, key := range i.keys {
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: id, Use: "sig", Algorithm: string(jose.ES256)})
		}
		json.NewEncoder(w).Encode(set)
	})
	i.Rotate(t, "1")
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(func() {
		i.Client().CloseIdleConnections()
		i.Close()
	})
	return i
}

// Rotate gives the issuer new keys with some IDs, in place of those that it had.
func (i *Issuer) Rotate(t testing.TB, ids ...string) {
	t.Helper()
	keys := map[string]*ecdsa.PrivateKey{}
	for _, id := range ids {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[id] = key
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = keys
}

// Token returns an ID token for the audience polykit-cache that is good for ten minutes, signed with the key of an ID.
// Claims are added to its own, or take their place.
func (i *Issuer) Token(t testing.TB, id string, claims map[string]any) string {
	t.Helper()
	i.mu.Lock()
	key := i.keys[id]
	i.mu.Unlock()
	now := time.Now()
	all := map[string]any{"iss": i.URL, "sub": "somebody", "aud": "polykit-cache", "iat": now.Unix(), "exp": now.Add(10 * time.Minute).Unix()}
	maps.Copy(all, claims)
	return SignToken(t, jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}}, all)
}

// SignToken returns a JWT with claims that is signed with a key, whose ID its header has if the key is a jose.JSONWebKey.
func SignToken(t testing.TB, key jose.SigningKey, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}
