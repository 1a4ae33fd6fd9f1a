package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cache"
)

// This file is who may do what. Every request, JSON method and call goes through admit before any of its body is
// read, and what it needs stands in one table.

// ScopeMetadata is the key of gRPC's metadata that names the scope that a call is about, if not the one that the
// caller's credential is for. Over REST it is the beginning of the path: /t/{scope}/v1/artifacts.
const ScopeMetadata = "polykit-cache-scope"

// scopeHeader is a header of that name.
var scopeHeader = http.CanonicalHeaderKey(ScopeMetadata)

// anyone is what needs no credential: to ask whether the server works, and what its API is.
const anyone = auth.Action(-1)

// actions are what calls do, and JSON methods, which are the same. One without an action is refused.
var actions = map[string]auth.Action{
	cachev1.ArtifactService_PutArtifact_FullMethodName:          auth.Write,
	cachev1.ArtifactService_GetArtifact_FullMethodName:          auth.Read,
	cachev1.ArtifactService_StatArtifact_FullMethodName:         auth.Read,
	cachev1.ArtifactService_ListArtifactFiles_FullMethodName:    auth.Read,
	cachev1.ArtifactService_FindMissingArtifacts_FullMethodName: auth.Read,
	cachev1.ArtifactService_ListArtifacts_FullMethodName:        auth.Read,
	cachev1.ArtifactService_GetCacheStats_FullMethodName:        auth.Read,
	cachev1.ArtifactService_PinArtifact_FullMethodName:          auth.Administrate,
	cachev1.ArtifactService_UnpinArtifact_FullMethodName:        auth.Administrate,
	cachev1.ArtifactService_DeleteArtifact_FullMethodName:       auth.Administrate,
	cachev1.ArtifactService_DeleteArtifacts_FullMethodName:      auth.Administrate,
	cachev1.ArtifactService_PromoteArtifact_FullMethodName:      auth.Write, // and what the method asks
	cachev1.ArtifactService_CollectGarbage_FullMethodName:       auth.Operate,
	cachev1.ArtifactService_ListQuarantine_FullMethodName:       auth.Operate,

	"/grpc.health.v1.Health/Check":                                   anyone,
	"/grpc.health.v1.Health/List":                                    anyone,
	"/grpc.health.v1.Health/Watch":                                   anyone,
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      anyone,
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": anyone,
}

// errNoScopes is told to who asks for a scope of a server that has only one.
var errNoScopes = errors.New("this server has no scopes: it was started without --auth-file")

// caller is who sent a request, and what of the cache it is about.
type caller struct {
	cache  *cache.Cache
	access *auth.Access // nil if everybody may do everything
	asked  bool         // the request names the scope that it is about
}

type callerKey struct{}

// caller returns who sent the request of a context. Of one that was not admitted, which would be a mistake of the program,
// it returns nil, with which nothing can be done, unless everybody may do everything.
func (s *Server) caller(ctx context.Context) *caller {
	if c, ok := ctx.Value(callerKey{}).(*caller); ok {
		return c
	}
	return s.everybody
}

// may says whether the caller may do something besides what was admitted.
func (c *caller) may(action auth.Action) bool {
	return c.access == nil || c.access.May(action) == nil
}

// all says whether the request is about all scopes: it names none, and the caller may see and change all.
func (c *caller) all() bool { return !c.asked && c.may(auth.Operate) }

// sees returns the scopes of which the caller is to see what is stored, or nil for all.
func (c *caller) sees() []artifact.Scope {
	switch {
	case c.all():
		return nil
	case c.access == nil:
		return []artifact.Scope{artifact.DefaultScope}
	}
	return c.access.Reads
}

// writes returns the scope that the caller changes.
func (c *caller) writes() artifact.Scope {
	if c.access == nil {
		return artifact.DefaultScope
	}
	return c.access.Scope
}

// changes returns the scopes of which artifacts are deleted by a filter, or nil for all: an admin of all scopes who
// names one means that one, and what is deleted in others would be gone.
func (c *caller) changes() []artifact.Scope {
	if c.all() {
		return nil
	}
	return []artifact.Scope{c.writes()}
}

// admit returns the context of a request that may do what it is about to do.
func (s *Server) admit(ctx context.Context, action auth.Action, credentials auth.Credentials) (context.Context, error) {
	switch {
	case action == 0:
		return nil, errors.New("nothing says who may do this")
	case action == anyone:
		return ctx, nil
	case s.config.Auth == nil && credentials.Scope == "":
		return ctx, nil
	case s.config.Auth == nil:
		if credentials.Scope != artifact.DefaultScope.String() {
			return nil, errNoScopes
		}
		if action == auth.Operate {
			return nil, auth.ErrAllScopes
		}
		return context.WithValue(ctx, callerKey{}, &caller{cache: s.cache, asked: true}), nil
	}
	access, err := s.config.Auth.Authenticate(ctx, credentials)
	if err == nil {
		err = access.May(action)
	}
	if err != nil {
		s.refusals.count(err)
		return nil, err
	}
	return context.WithValue(ctx, callerKey{}, &caller{s.cache.In(access.Scope, access.Reads...), access, credentials.Scope != ""}), nil
}

// admitted is a handler of requests that do something, for those who may.
func (s *Server) admitted(route route, handle http.HandlerFunc) http.HandlerFunc {
	method := s.config.Metrics.Method(protocolREST, methodName(route.call))
	return func(w http.ResponseWriter, r *http.Request) {
		record := recordOf(w)
		record.method, record.action = method, route.action
		if len(r.Header[scopeHeader]) > 0 { // or something would be done in all scopes instead
			s.refuse(w, r, fmt.Errorf("%w: a scope is named by the path, as in /t/nightly%s, and not by the header %s", errInvalidRequest, r.URL.Path, ScopeMetadata))
			return
		}
		credentials := auth.Credentials{Scope: scopeOf(r)}
		if s.config.Auth != nil {
			credentials.Authorization, credentials.Certificate = r.Header["Authorization"], ClientCertificate(r.Context())
		}
		ctx, err := s.admit(r.Context(), route.action, credentials)
		if err != nil {
			s.refuse(w, r, err)
			return
		}
		record.caller = s.caller(ctx)
		if ctx != r.Context() {
			r = r.WithContext(ctx)
		}
		handle(w, r)
	}
}

// admitCall is admit of a call.
func (s *Server) admitCall(ctx context.Context, method string) (context.Context, error) {
	named := metadata.ValueFromIncomingContext(ctx, ScopeMetadata)
	if len(named) > 1 {
		return nil, fmt.Errorf("%w: there is more than one %s in the metadata; send one", errInvalidRequest, ScopeMetadata)
	}
	if len(named) == 1 && named[0] == "" { // as of a variable that is not set: it must not stand for all scopes
		_, err := artifact.ParseScope(named[0])
		return nil, err
	}
	credentials := auth.Credentials{Scope: strings.Join(named, "")}
	if s.config.Auth != nil {
		credentials.Authorization, credentials.Certificate = metadata.ValueFromIncomingContext(ctx, "authorization"), ClientCertificate(ctx)
	}
	return s.admit(ctx, actions[method], credentials)
}

// admittedStream is the stream of a call that may be made.
type admittedStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (a *admittedStream) Context() context.Context { return a.ctx }

type scopeKey struct{}

// scopeOf returns the scope that the path of a request began with, if it did.
func scopeOf(r *http.Request) string {
	name, _ := r.Context().Value(scopeKey{}).(string)
	return name
}

// inScope takes the scope from the path of a request that begins with one, and says whether it could.
func inScope(r *http.Request) (*http.Request, bool) {
	name, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/t/"), "/")
	path = "/" + path
	if name == "" || !strings.HasPrefix(path, "/v1/") {
		return r, false
	}
	in := r.WithContext(context.WithValue(r.Context(), scopeKey{}, name))
	url := *r.URL
	url.Path = path
	if url.RawPath != "" {
		raw, cut := strings.CutPrefix(url.RawPath, "/t/"+name)
		if !cut || !strings.HasPrefix(raw, "/v1/") {
			return r, false // no scope has a name that must be escaped, and what is behind it begins with a slash
		}
		url.RawPath = raw
	}
	in.URL = &url
	return in, true
}

const (
	// refusalBurst is how many refusals for one reason are logged at once at the level info, and refusalInterval how often
	// one is after that: who guesses tokens must not fill the disk with what is said of it. At the level debug all are.
	refusalBurst    = 100
	refusalInterval = time.Second
)

// refusals counts requests that were refused for who sent them, by the reason.
type refusals struct {
	mu      sync.Mutex
	reasons map[auth.Reason]*refused
}

// refused is what there is to say of one reason.
type refused struct {
	count    int64
	lines    *rate.Limiter
	unlogged int64 // since the last line
}

// of returns what is known of a reason. It is called with r.mu locked.
func (r *refusals) of(reason auth.Reason) *refused {
	known := r.reasons[reason]
	if known == nil {
		known = &refused{lines: rate.NewLimiter(rate.Every(refusalInterval), refusalBurst)}
		if r.reasons == nil {
			r.reasons = map[auth.Reason]*refused{}
		}
		r.reasons[reason] = known
	}
	return known
}

func (r *refusals) count(err error) {
	refusal, ok := errors.AsType[*auth.Error](err)
	if !ok {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.of(refusal.Reason).count++
}

// log says whether a refusal is to be logged, and if so how many were not since the last one for this reason.
func (r *refusals) log(reason auth.Reason) (unlogged int64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.of(reason)
	if !known.lines.Allow() {
		known.unlogged++
		return 0, false
	}
	unlogged, known.unlogged = known.unlogged, 0
	return unlogged, true
}

// Refusals returns how many requests and calls were refused since the server started for who sent them, by the reason.
// All reasons are there.
func (s *Server) Refusals() map[auth.Reason]int64 {
	s.refusals.mu.Lock()
	defer s.refusals.mu.Unlock()
	counts := make(map[auth.Reason]int64, len(auth.Reasons))
	for _, reason := range auth.Reasons {
		counts[reason] = 0
	}
	for reason, known := range s.refusals.reasons {
		counts[reason] = known.count
	}
	return counts
}
