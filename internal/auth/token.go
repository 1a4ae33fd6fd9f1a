package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/big"
)

const (
	// TokenPrefix begins every token of NewToken, so that those who look for lost secrets find it.
	TokenPrefix = "pkc_"
	// tokenDigits is how many digits of base 62 256 bits need.
	tokenDigits = 43
)

// NewToken returns a new token: pkc_ and 43 letters and digits, which are 256 random bits.
func NewToken() string {
	var bits [32]byte
	rand.Read(bits[:]) // never fails
	return TokenPrefix + fmt.Sprintf("%0*s", tokenDigits, new(big.Int).SetBytes(bits[:]).Text(62))
}

// HashToken returns what the auth file has of a token: its SHA-256, in hexadecimal digits.
func HashToken(token string) string {
	digest := sha256.Sum256([]byte(token))
	return hex.EncodeToString(digest[:])
}
