package load

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/url"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// chunkSize is the most bytes of an artifact in one message.
const chunkSize = 256 << 10

// grpcConn makes calls over one connection, which many share. Messages are made beforehand as far as can
// be, and what comes is counted and not looked into.
type grpcConn struct{ conn *grpc.ClientConn }

func newGRPC(server *url.URL, config *tls.Config) (*grpcConn, error) {
	conn, err := client.DialGRPC(server, config, grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{})))
	if err != nil {
		return nil, err
	}
	return &grpcConn{conn}, nil
}

// rawCodec sends messages that are encoded already, *mem.BufferSlice, and counts the bytes of those that
// come in an *int64.
type rawCodec struct{}

// Name is that of the codec of protobuf, which the server knows.
func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(message any) (mem.BufferSlice, error) {
	return *message.(*mem.BufferSlice), nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, count any) error {
	*count.(*int64) += int64(data.Len())
	return nil
}

// encoded returns a message as rawCodec sends it.
func encoded(message proto.Message) (*mem.BufferSlice, error) {
	text, err := proto.Marshal(message)
	return &mem.BufferSlice{mem.SliceBuffer(text)}, err
}

var putStream = &grpc.StreamDesc{ClientStreams: true}
var getStream = &grpc.StreamDesc{ServerStreams: true}

func (c *grpcConn) put(ctx context.Context, key artifact.Key, head, rest []byte) error {
	stream, err := c.conn.NewStream(ctx, putStream, cachev1.ArtifactService_PutArtifact_FullMethodName)
	if err != nil {
		return err
	}
	size := int64(len(head) + len(rest))
	header, err := encoded(&cachev1.PutArtifactRequest{Payload: &cachev1.PutArtifactRequest_Header{
		Header: &cachev1.PutArtifactHeader{CacheKey: key.String(), Size: &size},
	}})
	if err != nil {
		return err
	}
	err = stream.SendMsg(header)
	for _, part := range [][]byte{head, rest} {
		for len(part) > 0 && err == nil {
			n := min(len(part), chunkSize)
			prefix := protowire.AppendTag(make([]byte, 0, 8), 2, protowire.BytesType) // PutArtifactRequest.chunk
			prefix = protowire.AppendVarint(prefix, uint64(n))
			err = stream.SendMsg(&mem.BufferSlice{mem.SliceBuffer(prefix), mem.SliceBuffer(part[:n])})
			part = part[n:]
		}
	}
	if err != nil && err != io.EOF { // which is that the server has answered
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return stream.RecvMsg(new(int64))
}

func (c *grpcConn) get(ctx context.Context, key artifact.Key) (received int64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.conn.NewStream(ctx, getStream, cachev1.ArtifactService_GetArtifact_FullMethodName)
	if err != nil {
		return 0, err
	}
	request, err := encoded(&cachev1.GetArtifactRequest{CacheKey: key.String()})
	if err != nil {
		return 0, err
	}
	if err := stream.SendMsg(request); err != nil && err != io.EOF {
		return 0, err
	}
	if err := stream.CloseSend(); err != nil {
		return 0, err
	}
	for {
		if err := stream.RecvMsg(&received); err == io.EOF {
			return received, nil
		} else if err != nil {
			return received, err
		}
	}
}

func (c *grpcConn) head(ctx context.Context, key artifact.Key) error {
	request, err := encoded(&cachev1.StatArtifactRequest{CacheKey: key.String()})
	if err != nil {
		return err
	}
	return c.conn.Invoke(ctx, cachev1.ArtifactService_StatArtifact_FullMethodName, request, new(int64))
}

func (c *grpcConn) miss(ctx context.Context, key artifact.Key) error {
	_, err := c.get(ctx, key)
	switch {
	case err == nil:
		return errors.New("the server has an artifact that nobody uploaded")
	case status.Code(err) == codes.NotFound:
		return nil
	}
	return fmt.Errorf("a miss: %w", err)
}

func (c *grpcConn) close() { c.conn.Close() }
