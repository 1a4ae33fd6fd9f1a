package client

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
)

const (
	// chunkSize is the most bytes of an upload in one message.
	chunkSize = 256 << 10
	// errorDomain is the domain of the google.rpc.ErrorInfo of every error of the server.
	errorDomain = "polykit-cache"
)

// errSilent says that the server did not answer in time.
var errSilent = fmt.Errorf("no answer within %v", answerTimeout)

// GRPC is a client of a server's gRPC service.
type GRPC struct {
	name      string
	conn      *grpc.ClientConn
	artifacts cachev1.ArtifactServiceClient
	health    healthpb.HealthClient
}

// NewGRPC returns a client of the server at a URL of ParseServer, as DialGRPC connects to it.
func NewGRPC(server *url.URL, config *tls.Config) (*GRPC, error) {
	conn, err := DialGRPC(server, config)
	if err != nil {
		return nil, err
	}
	return &GRPC{
		name:      serverName(server),
		conn:      conn,
		artifacts: cachev1.NewArtifactServiceClient(conn),
		health:    healthpb.NewHealthClient(conn),
	}, nil
}

// DialGRPC returns a connection to the server at a URL of ParseServer: over TLS if it begins with
// https://, as config says or, if it is nil, as is usual, and with Basic authentication if it has a name and
// password. It must not have a path but that of a scope.
func DialGRPC(server *url.URL, config *tls.Config, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	path, scope := splitScope(server.Path)
	if strings.Trim(path, "/") != "" {
		return nil, errors.New("the URL of a server has no path over gRPC: give http://host:port or https://host:port")
	}
	port, secure := "80", credentials.TransportCredentials(insecure.NewCredentials())
	if server.Scheme == "https" {
		port, secure = "443", credentials.NewTLS(config) // nil is as is usual there too
	}
	if server.Port() != "" {
		port = server.Port()
	}
	options = append([]grpc.DialOption{
		grpc.WithTransportCredentials(secure),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: connectTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswerSize)),
	}, options...)
	if server.User != nil {
		password, _ := server.User.Password()
		options = append(options, grpc.WithPerRPCCredentials(basic{server.User.Username(), password}))
	}
	if scope != "" {
		options = append(options, grpc.WithPerRPCCredentials(inScope(scope)))
	}
	return grpc.NewClient(net.JoinHostPort(server.Hostname(), port), options...)
}

// scopeMetadata is what names the scope that a call is about.
const scopeMetadata = "polykit-cache-scope"

// inScope adds a scope to each call.
type inScope string

func (s inScope) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{scopeMetadata: string(s)}, nil
}

// RequireTransportSecurity says no, since it is no secret.
func (inScope) RequireTransportSecurity() bool { return false }

// Close closes the connection.
func (c *GRPC) Close() error { return c.conn.Close() }

// basic is HTTP's Basic authentication (RFC 7617).
type basic struct{ name, password string }

func (b basic) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{
		"authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte(b.name+":"+b.password)),
	}, nil
}

// RequireTransportSecurity says no, as REST does: who writes http:// means it.
func (basic) RequireTransportSecurity() bool { return false }

// Put uploads an artifact of size bytes, or of UnknownSize, from r. If it succeeds it has read r to
// its end; if not, it may still use r.
func (c *GRPC) Put(ctx context.Context, key artifact.Key, size int64, r io.Reader) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := c.artifacts.PutArtifact(ctx)
	if err != nil {
		return c.fault(ctx, err)
	}
	// The answer may come while r is still to be waited for, and so is not awaited behind it.
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		if err := send(stream, key, size, newSource(ctx, r, size)); err != nil {
			cancel(err)
			return
		}
		timer := time.AfterFunc(answerTimeout, func() { cancel(c.silent()) })
		context.AfterFunc(ctx, func() { timer.Stop() })
	}()
	if err := stream.RecvMsg(new(cachev1.PutArtifactResponse)); err != nil {
		return c.fault(ctx, err)
	}
	<-sent
	return nil
}

// send sends all of an upload. Its errors are those of body: the stream's own come with its answer.
func send(stream grpc.ClientStreamingClient[cachev1.PutArtifactRequest, cachev1.PutArtifactResponse], key artifact.Key, size int64, body *source) error {
	header := &cachev1.PutArtifactHeader{CacheKey: key.String()}
	if size != UnknownSize {
		header.Size = &size
	}
	if stream.Send(&cachev1.PutArtifactRequest{Payload: &cachev1.PutArtifactRequest_Header{Header: header}}) != nil {
		return nil
	}
	for {
		chunk := make([]byte, chunkSize) // gRPC may still hold the one before
		n, err := io.ReadFull(body, chunk)
		if fault := body.fault(); fault != nil {
			return fault
		}
		if n > 0 && stream.Send(&cachev1.PutArtifactRequest{Payload: &cachev1.PutArtifactRequest_Chunk{Chunk: chunk[:n]}}) != nil {
			return nil
		}
		if err != nil { // the end
			stream.CloseSend()
			return nil
		}
	}
}

// Get downloads an artifact from offset on if its hash is still the given one, else from its
// beginning. The caller must close the Body.
func (c *GRPC) Get(ctx context.Context, key artifact.Key, offset int64, hash artifact.Digest) (*Download, error) {
	d, err := c.get(ctx, key, offset)
	if offset == 0 {
		return d, err
	}
	refused, _ := errors.AsType[*Error](err)
	if refused != nil && refused.Code == codes.OutOfRange {
		return c.get(ctx, key, 0) // another artifact, and a smaller one
	}
	if err != nil || d.Hash == hash {
		return d, err
	}
	d.Body.Close()
	return c.get(ctx, key, 0)
}

func (c *GRPC) get(ctx context.Context, key artifact.Key, offset int64) (*Download, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(answerTimeout, func() { cancel(c.silent()) })
	defer timer.Stop()
	fail := func(err error) (*Download, error) {
		defer cancel(nil)
		return nil, c.fault(ctx, err)
	}
	stream, err := c.artifacts.GetArtifact(ctx, &cachev1.GetArtifactRequest{CacheKey: key.String(), Offset: offset})
	if err != nil {
		return fail(err)
	}
	first, err := stream.Recv()
	if err != nil {
		return fail(err)
	}
	info := first.GetArtifact()
	hash, err := artifact.ParseDigest(info.GetHash())
	if err != nil || info.GetSize() < offset {
		cancel(nil)
		return nil, fmt.Errorf("%s sent an answer that can't be understood: is this the address of a polykit-cache?", c.name)
	}
	return &Download{
		Hash:   hash,
		Size:   info.GetSize(),
		Offset: offset,
		Body:   &chunks{grpc: c, ctx: ctx, cancel: cancel, stream: stream, left: info.GetSize() - offset},
	}, nil
}

// chunks is the body of a download.
type chunks struct {
	grpc   *GRPC
	ctx    context.Context
	cancel context.CancelCauseFunc
	stream grpc.ServerStreamingClient[cachev1.GetArtifactResponse]
	chunk  []byte
	left   int64 // bytes that are to come behind chunk
}

func (b *chunks) Read(p []byte) (int, error) {
	for len(b.chunk) == 0 {
		response, err := b.stream.Recv()
		if err == io.EOF && b.left > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err == io.EOF {
			return 0, io.EOF
		}
		if err != nil {
			return 0, b.grpc.fault(b.ctx, err)
		}
		b.chunk = response.GetChunk()
		if b.left -= int64(len(b.chunk)); b.left < 0 {
			return 0, &TransportError{b.grpc.name, true, errors.New("more bytes than the artifact has")}
		}
	}
	n := copy(p, b.chunk)
	b.chunk = b.chunk[n:]
	return n, nil
}

func (b *chunks) Close() error {
	b.cancel(nil)
	return nil
}

// Stat returns what the server knows of an artifact.
func (c *GRPC) Stat(ctx context.Context, key artifact.Key) (*Artifact, error) {
	response, err := call(ctx, c, c.artifacts.StatArtifact, &cachev1.StatArtifactRequest{CacheKey: key.String()})
	return response.GetArtifact(), err
}

// Files yields the files in an artifact, in ascending order of the bytes of their paths.
func (c *GRPC) Files(ctx context.Context, key artifact.Key) iter.Seq2[*File, error] {
	return pages(func(token string) ([]*File, string, error) {
		page, err := call(ctx, c, c.artifacts.ListArtifactFiles, &cachev1.ListArtifactFilesRequest{
			CacheKey:  key.String(),
			PageSize:  filesPageSize,
			PageToken: token,
		})
		return page.GetFiles(), page.GetNextPageToken(), err
	})
}

// call calls a method that is no stream. With an error it returns nil.
func call[Request, Response any](
	ctx context.Context, c *GRPC, method func(context.Context, *Request, ...grpc.CallOption) (*Response, error), request *Request,
) (*Response, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, c.silent())
	defer cancel()
	response, err := method(ctx, request)
	if err != nil {
		return nil, c.fault(ctx, err)
	}
	return response, nil
}

// Ready returns an error that says why, if the server can't take uploads. Over gRPC the server says
// only that it is so.
func (c *GRPC) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, c.silent())
	defer cancel()
	response, err := c.health.Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return c.fault(ctx, err)
	}
	if response.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("the server answered %s; its log, or the same question over REST, says why", response.GetStatus())
	}
	return nil
}

func (c *GRPC) silent() error { return &TransportError{c.name, true, errSilent} }

// fault returns the error that stands behind one of grpc's.
func (c *GRPC) fault(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	st, ok := status.FromError(err)
	if !ok {
		return &TransportError{c.name, true, err}
	}
	e := &Error{Code: st.Code(), Sentence: oneLine(st.Message())}
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == errorDomain {
			e.Reason = info.GetReason()
		}
	}
	switch e.Reason {
	case "ARTIFACT_NOT_FOUND":
		e.means = ErrNotFound
	case "ARTIFACT_EXISTS":
		e.means = ErrExists
	case "":
		return c.transportFault(e)
	}
	return e
}

// transportFault tells the statuses that gRPC makes of a broken transport from the answers of
// something that is not the server.
func (c *GRPC) transportFault(e *Error) error {
	switch e.Code {
	case codes.Unavailable, codes.Internal, codes.Unknown, codes.Canceled, codes.DeadlineExceeded:
	default:
		return e
	}
	text, unreached := strings.CutPrefix(e.Sentence, "connection error: desc = ")
	if plain, err := strconv.Unquote(text); err == nil {
		text = plain
	}
	text = strings.TrimPrefix(strings.TrimPrefix(text, "transport: "), "Error while dialing: ")
	return &TransportError{c.name, !unreached, errors.New(text)}
}
