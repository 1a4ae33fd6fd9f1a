package server

import (
	"context"
	"errors"
	"net/http"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/index"
)

// errorDomain is the domain of every google.rpc.ErrorInfo.
const errorDomain = "polykit-cache"

// Faults that only the protocols know.
var (
	errInvalidRequest = errors.New("invalid request")
	errRange          = errors.New("range not satisfiable")
	errDraining       = errors.New("the server is shutting down")
	errNoRoute        = errors.New("there is nothing at this path")
	errMethod         = errors.New("the method is not allowed here")
	errCrossOrigin    = errors.New("a web page of another site must not change what is stored")
)

// fault is how clients are told of an error.
type fault struct {
	err    error // what it is told of: errors.Is
	code   codes.Code
	reason string // of google.rpc.ErrorInfo
	status int    // of HTTP
	// sentence is what a person can act on. Where it is empty the error's own text is fit for clients.
	sentence string
}

// faults is the one table of errors, for both protocols. The first row that fits is taken.
var faults = []fault{
	{artifact.ErrInvalidKey, codes.InvalidArgument, "INVALID_CACHE_KEY", http.StatusBadRequest, ""},
	{errInvalidRequest, codes.InvalidArgument, "INVALID_REQUEST", http.StatusBadRequest, ""},
	{auth.ErrAllScopes, codes.InvalidArgument, "INVALID_REQUEST", http.StatusBadRequest, ""},
	{cache.ErrSizeMismatch, codes.InvalidArgument, "INVALID_REQUEST", http.StatusBadRequest, ""},
	{auth.ErrUnauthenticated, codes.Unauthenticated, "UNAUTHENTICATED", http.StatusUnauthorized, ""},
	{auth.ErrForbidden, codes.PermissionDenied, "PERMISSION_DENIED", http.StatusForbidden, ""},
	{auth.ErrUnavailable, codes.Unavailable, "AUTHENTICATION_UNAVAILABLE", http.StatusServiceUnavailable, ""},
	{artifact.ErrInvalidScope, codes.InvalidArgument, "INVALID_SCOPE", http.StatusBadRequest, ""},
	{errNoScopes, codes.NotFound, "NO_SCOPES", http.StatusNotFound, ""},
	{errCrossOrigin, codes.PermissionDenied, "PERMISSION_DENIED", http.StatusForbidden, "A web page of another site must not change what is stored"},
	{cache.ErrNotFound, codes.NotFound, "ARTIFACT_NOT_FOUND", http.StatusNotFound, "Artifact not found"},
	{cache.ErrExists, codes.AlreadyExists, "ARTIFACT_EXISTS", http.StatusConflict, ""},
	{cache.ErrTooLarge, codes.ResourceExhausted, "ARTIFACT_TOO_LARGE", http.StatusRequestEntityTooLarge, ""},
	{errRange, codes.OutOfRange, "RANGE_NOT_SATISFIABLE", http.StatusRequestedRangeNotSatisfiable, ""},
	{artifact.ErrUnsound, codes.InvalidArgument, "VERIFICATION_FAILED", http.StatusUnprocessableEntity, ""},
	{cache.ErrNoSpace, codes.ResourceExhausted, "STORAGE_FULL", http.StatusInsufficientStorage, "The server has no space left for this artifact"},
	{index.ErrUnavailable, codes.Unavailable, "INDEX_UNAVAILABLE", http.StatusServiceUnavailable, ""},
	{errDraining, codes.Unavailable, "OVERLOADED", http.StatusServiceUnavailable, "The server is shutting down: try again"},
	{artifact.ErrBusy, codes.Unavailable, "OVERLOADED", http.StatusServiceUnavailable, "The server is overloaded: try again later"},
	{cache.ErrOverloaded, codes.Unavailable, "OVERLOADED", http.StatusServiceUnavailable, "The server is overloaded: try again later"},
	{errTooSlow, codes.DeadlineExceeded, "CLIENT_TOO_SLOW", http.StatusRequestTimeout, ""},
	// Nobody is there any more to read these two, but proxies and logs.
	{cache.ErrUploadAborted, codes.Canceled, "ABORTED_BY_CLIENT", http.StatusBadRequest, "The upload ended before the artifact did"},
	{context.Canceled, codes.Canceled, "ABORTED_BY_CLIENT", http.StatusBadRequest, "The request was cancelled"},
	{context.DeadlineExceeded, codes.DeadlineExceeded, "DEADLINE_EXCEEDED", http.StatusGatewayTimeout, "The request took longer than its deadline"},
	{errNoRoute, codes.Unimplemented, "NOT_FOUND", http.StatusNotFound, ""},
	{errMethod, codes.Unimplemented, "METHOD_NOT_ALLOWED", http.StatusMethodNotAllowed, ""},
}

// internal is told of every error that has no row of its own. The log says more.
var internal = fault{nil, codes.Internal, "INTERNAL", http.StatusInternalServerError, "internal error"}

// faultOf returns how clients are told of err.
func faultOf(err error) fault {
	for _, f := range faults {
		if !errors.Is(err, f.err) {
			continue
		}
		if f.sentence == "" {
			f.sentence = sentence(err)
		}
		return f
	}
	return internal
}

// sentence makes a sentence of the text of an error.
func sentence(err error) string {
	text := err.Error()
	if errors.Is(err, artifact.ErrUnsound) {
		text = "verification failed: " + text
	}
	return strings.ToUpper(text[:1]) + text[1:]
}

// grpcStatus returns the fault as gRPC says it.
func (f fault) grpcStatus() *status.Status {
	st := status.New(f.code, f.sentence)
	if detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: f.reason, Domain: errorDomain}); err == nil {
		return detailed
	}
	return st
}
