package server

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"sort"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

const (
	// maxMessageSize is the largest message that is accepted, and so bounds a chunk.
	maxMessageSize = 4 << 20
	// chunkSize is the most bytes of an artifact in one message that is sent.
	chunkSize = 256 << 10

	// watchInterval is how often the server looks whether it is ready while somebody watches.
	watchInterval = 5 * time.Second

	defaultPageSize = 1_000
	maxPageSize     = 10_000
)

// newGRPC returns the gRPC side of s behind net/http.
func (s *Server) newGRPC() *grpc.Server {
	server := grpc.NewServer(append(s.traceCalls(),
		grpc.MaxRecvMsgSize(maxMessageSize),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.StreamInterceptor(s.countCalls()),
		grpc.UnknownServiceHandler(s.unknownCall),
	)...)
	s.register(&streamRegistrar{server, s.serveBehindHTTP})
	return server
}

// serveBehindHTTP handles a call on a connection of net/http.
func (s *Server) serveBehindHTTP(method string, stream grpc.ServerStream, handle func(grpc.ServerStream) error) error {
	messages := stream.Context().Value(messagesKey{}).(*messages)
	return s.call(method, &messageStream{stream, messages}, handle)
}

// streamRegistrar registers services whose methods are all handled as streams. The handler of one that is no stream, and
// an interceptor of it, are called only when the whole request is there: whoever waits for it until then, and
// whoever sends it, who may not even be allowed to. Nor does gRPC call interceptors of streams for them, so that what
// must come before a call is part of its handler.
type streamRegistrar struct {
	*grpc.Server
	serve func(method string, stream grpc.ServerStream, handle func(grpc.ServerStream) error) error
}

// RegisterService implements grpc.ServiceRegistrar.
func (r *streamRegistrar) RegisterService(desc *grpc.ServiceDesc, service any) {
	streams := *desc
	streams.Methods, streams.Streams = nil, nil
	add := func(stream grpc.StreamDesc, handle grpc.StreamHandler) {
		method := "/" + desc.ServiceName + "/" + stream.StreamName
		stream.Handler = func(service any, stream grpc.ServerStream) error {
			return r.serve(method, stream, func(admitted grpc.ServerStream) error { return handle(service, admitted) })
		}
		streams.Streams = append(streams.Streams, stream)
	}
	for _, method := range desc.Methods {
		add(grpc.StreamDesc{StreamName: method.MethodName}, func(service any, stream grpc.ServerStream) error {
			response, err := method.Handler(service, stream.Context(), stream.RecvMsg, nil)
			if err != nil {
				return err
			}
			return stream.SendMsg(response)
		})
	}
	for _, stream := range desc.Streams {
		add(stream, stream.Handler)
	}
	r.Server.RegisterService(&streams, service)
}

// register registers the services: artifacts, health and reflection.
func (s *Server) register(server reflection.GRPCServer) {
	cachev1.RegisterArtifactServiceServer(server, &artifactService{server: s})
	healthpb.RegisterHealthServer(server, &healthService{s.health, s.Ready, s.draining})
	reflection.Register(server)
}

// call runs one gRPC call, if whoever makes it may. What it returns is a status for the client; the error itself goes
// into the record.
func (s *Server) call(method string, stream grpc.ServerStream, handle func(grpc.ServerStream) error) (err error) {
	ctx := stream.Context()
	rec := s.recordCall(method, stream)
	defer rec.end(ctx)
	defer func() {
		// Unlike net/http, gRPC lets a panic end the process.
		if p := recover(); p != nil {
			rec.panicked(p)
			err = rec.fault.grpcStatus().Err()
		}
		// An error that is a status is gRPC's own; one that wraps a status is not.
		if _, isStatus := err.(interface{ GRPCStatus() *status.Status }); err != nil && !isStatus {
			f := faultOf(err)
			rec.failed(f, err)
			err = f.grpcStatus().Err()
		} else if err != nil {
			rec.failed(fault{}, err) // gRPC's own, as that the client has gone
		}
		rec.code = status.Code(err)
	}()
	admitted, err := s.admitCall(ctx, method)
	if err != nil {
		return err
	}
	rec.caller = s.caller(admitted)
	return handle(&admittedStream{&recordedStream{stream, rec}, context.WithValue(admitted, recordKey{}, rec)})
}

// unknownCall refuses a call of a method that there is not.
func (s *Server) unknownCall(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	rec := s.recordCall(method, stream)
	defer rec.end(stream.Context())
	err := fmt.Errorf("%w: there is no method %s; reflection describes those that there are", errNoRoute, method)
	f := faultOf(err)
	rec.failed(f, err)
	rec.code = f.code
	return f.grpcStatus().Err()
}

// artifactService speaks for the cache. Its errors are not statuses yet, so that the gateway, which
// calls it directly, can say them in HTTP.
type artifactService struct {
	cachev1.UnimplementedArtifactServiceServer
	server *Server
}

// key returns the key that a call is about, if the server takes it.
func (a *artifactService) key(ctx context.Context, digits string) (artifact.Key, error) {
	if err := a.server.taking(); err != nil {
		return artifact.Key{}, err
	}
	key, err := artifact.ParseKey(digits)
	recordIn(ctx).key = key
	return key, err
}

func (a *artifactService) PutArtifact(stream grpc.ClientStreamingServer[cachev1.PutArtifactRequest, cachev1.PutArtifactResponse]) error {
	messages := &incoming{}
	defer messages.free()
	err := stream.RecvMsg(messages)
	if err == io.EOF {
		return fmt.Errorf("%w: the stream has no message; the first must be a header", errInvalidRequest)
	}
	if err != nil {
		return err
	}
	header := messages.request.GetHeader()
	if messages.isChunk || header == nil {
		return fmt.Errorf("%w: the first message must be a header", errInvalidRequest)
	}
	key, err := a.key(stream.Context(), header.GetCacheKey())
	if err != nil {
		return err
	}
	size := int64(cache.UnknownSize)
	if header.Size != nil {
		if size = header.GetSize(); size < 0 {
			return fmt.Errorf("%w: size is %d; it must not be negative", errInvalidRequest, size)
		}
	}
	chunks := &chunkReader{stream: stream, incoming: messages}
	info, err := a.server.caller(stream.Context()).cache.Put(stream.Context(), key, size, chunks)
	if chunks.invalid != nil {
		return chunks.invalid
	}
	if err != nil {
		return err
	}
	recordIn(stream.Context()).stored = &info
	a.server.comparisons.add(info)
	return stream.SendAndClose(&cachev1.PutArtifactResponse{Artifact: message(info)})
}

// chunkReader reads the chunks of an upload.
type chunkReader struct {
	stream grpc.ServerStream
	*incoming
	invalid error // what is wrong with the messages
}

func (c *chunkReader) Read(p []byte) (int, error) {
	for c.left() == 0 {
		if err := c.stream.RecvMsg(c.incoming); err != nil {
			return 0, err
		}
		if !c.isChunk {
			c.invalid = fmt.Errorf("%w: every message behind the header must be a chunk", errInvalidRequest)
			return 0, c.invalid
		}
	}
	return c.incoming.Read(p)
}

// Buffered is how many bytes are, or may be, there that were not read yet.
func (c *chunkReader) Buffered() int { return c.left() + c.ahead }

func (a *artifactService) GetArtifact(request *cachev1.GetArtifactRequest, stream grpc.ServerStreamingServer[cachev1.GetArtifactResponse]) error {
	key, err := a.key(stream.Context(), request.GetCacheKey())
	if err != nil {
		return err
	}
	offset, length := request.GetOffset(), request.GetLength()
	if offset < 0 || length < 0 {
		return fmt.Errorf("%w: offset is %d and length %d; neither must be negative", errInvalidRequest, offset, length)
	}
	file, info, err := a.server.caller(stream.Context()).cache.Get(stream.Context(), key)
	if err != nil {
		return err
	}
	defer file.Close()
	if offset > info.Size {
		return fmt.Errorf("%w: offset is %d, but the artifact has %d bytes", errRange, offset, info.Size)
	}
	rest := info.Size - offset
	if length == 0 || length > rest {
		length = rest
	}
	if _, err := file.Seek(offset, io.SeekStart); err != nil {
		return err
	}
	if err := stream.Send(&cachev1.GetArtifactResponse{Payload: &cachev1.GetArtifactResponse_Artifact{Artifact: message(info)}}); err != nil {
		return err
	}
	for left := length; left > 0; {
		size := min(left, chunkSize)
		chunk, err := readChunk(file, int(size))
		if err != nil {
			return fmt.Errorf("read artifact %s at its last %d bytes: %w", key, left, err)
		}
		if err := stream.SendMsg(chunk); err != nil {
			return err
		}
		left -= size
	}
	return nil
}

func (a *artifactService) StatArtifact(ctx context.Context, request *cachev1.StatArtifactRequest) (*cachev1.StatArtifactResponse, error) {
	key, err := a.key(ctx, request.GetCacheKey())
	if err != nil {
		return nil, err
	}
	info, err := a.server.caller(ctx).cache.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	return &cachev1.StatArtifactResponse{Artifact: message(info)}, nil
}

func (a *artifactService) ListArtifactFiles(ctx context.Context, request *cachev1.ListArtifactFilesRequest) (*cachev1.ListArtifactFilesResponse, error) {
	key, err := a.key(ctx, request.GetCacheKey())
	if err != nil {
		return nil, err
	}
	pageSize, err := pageSize("page_size", request.GetPageSize(), defaultPageSize, maxPageSize)
	if err != nil {
		return nil, err
	}
	// A page token is the last path of the page before.
	after, err := base64.RawURLEncoding.DecodeString(request.GetPageToken())
	if err != nil {
		return nil, fmt.Errorf("%w: page_token is not one that this server gave out", errInvalidRequest)
	}
	files, err := a.server.caller(ctx).cache.Files(ctx, key)
	if err != nil {
		return nil, err
	}
	if len(after) > 0 {
		files = files[sort.Search(len(files), func(i int) bool { return files[i].Path > string(after) }):]
	}
	response := &cachev1.ListArtifactFilesResponse{}
	if len(files) > pageSize {
		files = files[:pageSize]
		response.NextPageToken = base64.RawURLEncoding.EncodeToString([]byte(files[pageSize-1].Path))
	}
	for _, f := range files {
		response.Files = append(response.Files, &cachev1.ArtifactFile{Path: f.Path, Hash: f.Hash.String(), Size: f.Size})
	}
	return response, nil
}

// message returns what is known of an artifact as the wire contract says it.
func message(info artifact.Info) *cachev1.Artifact {
	return &cachev1.Artifact{
		CacheKey:         info.Key.String(),
		Scope:            info.Scope.String(),
		Hash:             info.Hash.String(),
		Size:             info.Size,
		UncompressedSize: info.UncompressedSize,
		FileCount:        int64(info.FileCount),
		PackageName:      info.PackageName,
		TaskName:         info.TaskName,
		Command:          info.Command,
		CreatedAt:        timestamppb.New(info.CreatedAt),
		StoredAt:         timestamppb.New(info.StoredAt),
	}
}

// healthService is grpc.health.v1 that looks whether the server is ready when it is asked.
type healthService struct {
	*health.Server
	ready    func(context.Context) error
	draining <-chan struct{}
}

func (h *healthService) Check(ctx context.Context, request *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	h.look(ctx)
	return h.Server.Check(ctx, request)
}

// Watch ends when the server drains, after it has said so, for it must not keep the server waiting.
func (h *healthService) Watch(request *healthpb.HealthCheckRequest, stream grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	h.look(ctx)
	ended := make(chan error, 1)
	go func() { ended <- h.Server.Watch(request, &watchStream{stream, ctx}) }()
	look := time.NewTicker(watchInterval)
	defer look.Stop()
	for draining := false; !draining; {
		select {
		case err := <-ended:
			return err
		case <-look.C:
			h.look(ctx)
		case <-h.draining:
			draining = true
		}
	}
	cancel()
	<-ended
	if err := stream.Send(&healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_NOT_SERVING}); err != nil {
		return err
	}
	return errDraining
}

// look finds out whether the server is ready.
func (h *healthService) look(ctx context.Context) {
	serving := healthpb.HealthCheckResponse_SERVING
	if h.ready(ctx) != nil {
		serving = healthpb.HealthCheckResponse_NOT_SERVING
	}
	h.SetServingStatus("", serving)
	h.SetServingStatus(cachev1.ArtifactService_ServiceDesc.ServiceName, serving)
}

// watchStream is a stream with a context that ends before the stream's own.
type watchStream struct {
	grpc.ServerStreamingServer[healthpb.HealthCheckResponse]
	ctx context.Context
}

func (w *watchStream) Context() context.Context { return w.ctx }
