package auth

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

const (
	// DefaultInterval is how often files are looked at.
	DefaultInterval = 2 * time.Second
	// rememberTokens is how many verified ID tokens are remembered, and rememberFor how long at most: a build has
	// thousands of requests with one, and verifying it takes longer than a small download.
	rememberTokens = 4096
	rememberFor    = 5 * time.Minute
)

// Config says how an Authenticator works.
type Config struct {
	// File is the auth file.
	File string
	// Log gets what happens to the file and to issuers.
	Log *slog.Logger
	// Now returns the time; time.Now if it is nil.
	Now func() time.Time
	// HTTPClient asks issuers; one of its own if it is nil. How long it may take is bounded in any case.
	HTTPClient *http.Client
	// Interval is how often files are looked at; DefaultInterval if it is 0. A change counts when it was seen twice,
	// so that a file is not taken while it is being written.
	Interval time.Duration
}

// Authenticator says who may do what, by an auth file that may change.
type Authenticator struct {
	config Config
	state  atomic.Pointer[state]
	mu     sync.Mutex // held while files are read
}

// state is what is in force between two changes of the files.
type state struct {
	policy     *Policy
	issuers    map[string]*trusted // by URL
	files      []fileContent
	remembered *lru.Cache[[sha256.Size]byte, remembered]
}

// trusted is an issuer with its keys.
type trusted struct {
	*Issuer
	keys *keySet
}

// fileContent is a file, and what was in it.
type fileContent struct {
	path string
	text []byte
}

// remembered is what was decided of an ID token.
type remembered struct {
	access     *Access
	until      time.Time
	keys       *keySet
	generation int
}

// New returns an Authenticator that goes by an auth file. It asks nobody yet. Run keeps it up to date.
func New(config Config) (*Authenticator, error) {
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.HTTPClient == nil {
		config.HTTPClient = &http.Client{}
	}
	if config.Interval == 0 {
		config.Interval = DefaultInterval
	}
	a := &Authenticator{config: config}
	s, err := a.load()
	if err != nil {
		return nil, err
	}
	a.state.Store(s)
	return a, nil
}

// Load returns the policy of an auth file. It reads the files with keys, too.
func Load(path string) (*Policy, error) {
	a, err := New(Config{File: path, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	return a.Policy(), nil
}

// Policy returns the policy that is in force.
func (a *Authenticator) Policy() *Policy { return a.state.Load().policy }

// load reads the files.
func (a *Authenticator) load() (*state, error) {
	text, err := readFile(a.config.File)
	if err != nil {
		return nil, fmt.Errorf("the auth file can't be read: %w", err)
	}
	policy, err := Parse(a.config.File, text)
	if err != nil {
		return nil, err
	}
	s := &state{policy: policy, issuers: map[string]*trusted{}, files: []fileContent{{a.config.File, text}}}
	s.remembered, err = lru.New[[sha256.Size]byte, remembered](rememberTokens)
	if err != nil {
		return nil, err
	}
	before := a.state.Load()
	for i := range policy.Issuers {
		issuer := &policy.Issuers[i]
		var keys *keySet
		if issuer.KeysFile != "" {
			path := issuer.KeysFile
			if !filepath.IsAbs(path) {
				path = filepath.Join(filepath.Dir(a.config.File), path)
			}
			text, err := readFile(path)
			if err == nil {
				keys, err = readKeys(text)
			}
			if err != nil {
				return nil, &Problem{a.config.File, issuer.Line, fmt.Sprintf("keys_file %s of issuer %q: %v", path, issuer.Name, err)}
			}
			s.files = append(s.files, fileContent{path, text})
		} else if before != nil && before.issuers[issuer.URL] != nil && before.issuers[issuer.URL].keys.issuer != "" {
			keys = before.issuers[issuer.URL].keys // so that they are not asked for again
		} else {
			keys = &keySet{issuer: issuer.URL, client: a.config.HTTPClient, now: a.config.Now, log: a.config.Log}
		}
		s.issuers[issuer.URL] = &trusted{issuer, keys}
	}
	return s, nil
}

// readFile returns what is in a file that is not too large. A pipe would be waited for, for ever if nobody writes, and a
// device may have no end.
func readFile(path string) ([]byte, error) {
	if stat, err := os.Stat(path); err == nil && !stat.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no file but a directory, a pipe or a device; it is read again and again, so it must be a file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, MaxFile+1))
	if err == nil && len(text) > MaxFile {
		return nil, fmt.Errorf("%s has more than %d bytes", path, MaxFile)
	}
	return text, err
}

// Reload reads the files again, as on SIGHUP. If something in them is wrong, what was in force stays, and the log says
// what to do; so it does not end the process.
func (a *Authenticator) Reload() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	s, err := a.load()
	if err != nil {
		a.config.Log.Error("the auth file is wrong, and what was in force stays: mend it, it is read again when it changes", "file", a.config.File, "error", err)
		return err
	}
	a.state.Store(s)
	a.config.Log.Info("the auth file was read", "file", a.config.File, "tokens", len(s.policy.Tokens), "issuers", len(s.policy.Issuers), "rules", len(s.policy.Rules))
	return nil
}

// Run looks at the files from time to time, and reloads them when they changed, until ctx is done. It compares what is
// in them and not their times, so it notices a directory or a symbolic link that is exchanged, as Kubernetes does it.
func (a *Authenticator) Run(ctx context.Context) {
	ticker := time.NewTicker(a.config.Interval)
	defer ticker.Stop()
	w := watch{a: a}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			w.look()
		}
	}
}

// watch is what Run knows.
type watch struct {
	a     *Authenticator
	seen  []byte // what was different in the last look, or nil
	wrong []byte // what was loaded in vain, or nil
}

// look looks at the files once.
func (w *watch) look() {
	// In a goroutine of its own nothing else keeps a panic from ending the process.
	defer func() {
		if p := recover(); p != nil {
			w.a.config.Log.Error("could not look at the auth file", "error", fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	now := w.a.changed()
	switch {
	case now == nil:
		w.seen, w.wrong = nil, nil
	case bytes.Equal(now, w.wrong): // it was said
	case !bytes.Equal(now, w.seen):
		w.seen = now // and wait whether it stays so
	default:
		if w.a.Reload() != nil {
			w.wrong = now
		}
	}
}

// changed returns a hash of what is in the files, or nil if it is as in force.
func (a *Authenticator) changed() []byte {
	hash := sha256.New()
	same := true
	for _, file := range a.state.Load().files {
		text, err := readFile(file.path)
		if err != nil {
			text = []byte(err.Error())
		}
		same = same && err == nil && bytes.Equal(text, file.text)
		digest := sha256.Sum256(text)
		hash.Write(digest[:])
	}
	if same {
		return nil
	}
	return hash.Sum(nil)
}

// Authenticate returns what the sender of a request may do, in the scope that it asks for if it does. It returns an
// *Error, or one that wraps artifact.ErrInvalidScope if there can be no such scope.
func (a *Authenticator) Authenticate(ctx context.Context, c Credentials) (*Access, error) {
	access, err := a.state.Load().authenticate(ctx, c, a.config.Now())
	if err != nil || c.Scope == "" {
		return access, err
	}
	return access.In(c.Scope)
}

func (s *state) authenticate(ctx context.Context, c Credentials, now time.Time) (*Access, error) {
	secret, err := secretOf(c.Authorization)
	if err != nil {
		return nil, err
	}
	if secret == "" {
		if err := s.checkCertificate(c.Certificate, now); err != nil {
			return nil, err
		}
		return s.policy.decide(Identity{Certificate: c.Certificate}, nil)
	}
	id, err := s.policy.identify(secret, now)
	if !errors.Is(err, errNoToken) {
		if err != nil {
			return nil, err
		}
		return s.policy.decide(id, nil)
	}
	digest := sha256.Sum256([]byte(secret))
	if r, ok := s.remembered.Get(digest); ok && now.Before(r.until) && r.generation == r.keys.current() {
		return r.access, nil
	}
	v, err := s.foreign(ctx, secret, now)
	if err != nil {
		return nil, err
	}
	access, err := s.policy.decide(v.id, nil)
	if err != nil {
		return nil, err
	}
	until := now.Add(rememberFor)
	if v.until.Before(until) {
		until = v.until
	}
	s.remembered.Add(digest, remembered{access, until, v.keys, v.generation})
	return access, nil
}

// checkCertificate returns an error if a certificate that counts is good no longer. It was when its connection was made,
// but that can be open for long.
func (s *state) checkCertificate(c *x509.Certificate, now time.Time) error {
	if c == nil || !s.policy.certificateRules || !now.After(c.NotAfter) {
		return nil
	}
	return &Error{
		Reason:   ReasonExpired,
		Detail:   fmt.Sprintf("%s expired at %s", Identity{Certificate: c}, c.NotAfter.UTC().Format(time.RFC3339)),
		sentence: sentenceExpired,
	}
}

// foreign returns who sends a secret that is no token of the file.
func (s *state) foreign(ctx context.Context, secret string, now time.Time) (*verified, error) {
	if len(s.issuers) == 0 || !looksLikeJWT(secret) {
		return nil, invalid(ReasonUnknownToken, "the auth file has no such token")
	}
	return s.verify(ctx, secret, now)
}

// Explain returns what is decided of a request, and why.
func (a *Authenticator) Explain(ctx context.Context, c Credentials, action Action) *Decision {
	s, now := a.state.Load(), a.config.Now()
	id := Identity{Certificate: c.Certificate}
	secret, err := secretOf(c.Authorization)
	if err == nil && secret == "" {
		err = s.checkCertificate(c.Certificate, now)
	}
	if err == nil && secret != "" {
		if id, err = s.policy.identify(secret, now); errors.Is(err, errNoToken) {
			var v *verified
			if v, err = s.foreign(ctx, secret, now); err == nil {
				id = v.id
			}
		}
	}
	if err != nil {
		return &Decision{Who: "nobody", Refused: err}
	}
	return s.policy.Explain(id, c.Scope, action)
}
