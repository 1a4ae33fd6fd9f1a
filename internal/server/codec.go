package server

import (
	"io"
	"slices"
	"sync"

	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
)

const (
	// chunkField is the number of the field chunk, in PutArtifactRequest and in GetArtifactResponse.
	chunkField = 2
	// chunkPrefix is the most bytes that stand before a chunk in its message: a tag, and the length.
	chunkPrefix = 1 + 5
)

// buffers are what messages are read into and sent from. Unlike those of gRPC they are not zeroed before
// each use, and none is four times as large as a chunk.
var buffers bufferPool

// bufferSizes are those of HTTP/2 frames and of chunks, and two for what is smaller. gRPC counts the
// references to a buffer only if it has more than 1 KiB.
var bufferSizes = [...]int{2 << 10, 8 << 10, 16 << 10, 64 << 10, chunkSize + 64}

type bufferPool [len(bufferSizes)]sync.Pool

// Get implements mem.BufferPool.
func (b *bufferPool) Get(length int) *[]byte {
	for i, size := range bufferSizes {
		if length > size {
			continue
		}
		if buf, ok := b[i].Get().(*[]byte); ok {
			*buf = (*buf)[:length]
			return buf
		}
		buf := make([]byte, length, size)
		return &buf
	}
	buf := make([]byte, length)
	return &buf
}

// Put implements mem.BufferPool.
func (b *bufferPool) Put(buf *[]byte) {
	if i := slices.Index(bufferSizes[:], cap(*buf)); i >= 0 {
		b[i].Put(buf)
	}
}

// codec is that of protobuf, which neither copies the chunks of artifacts nor makes messages of them.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(protocodec.Name)} }

// outgoing is a message of a call.
type outgoing struct {
	call    *call         // which is told how far the message is; nil on a connection of net/http
	message proto.Message // nil if it is encoded already
	encoded *[]byte       // from buffers
}

// readChunk returns the next length bytes of an artifact as a GetArtifactResponse.
func readChunk(r io.Reader, length int) (*outgoing, error) {
	var prefix [chunkPrefix]byte
	head := protowire.AppendVarint(protowire.AppendTag(prefix[:0], chunkField, protowire.BytesType), uint64(length))
	buf := buffers.Get(len(head) + length)
	copy(*buf, head)
	if _, err := io.ReadFull(r, (*buf)[len(head):]); err != nil {
		buffers.Put(buf)
		return nil, err
	}
	return &outgoing{encoded: buf}, nil
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(message any) (mem.BufferSlice, error) {
	out, ok := message.(*outgoing)
	if !ok {
		return c.CodecV2.Marshal(message)
	}
	if out.encoded == nil {
		out.encoded = buffers.Get(proto.Size(out.message))
		if _, err := (proto.MarshalOptions{UseCachedSize: true}).MarshalAppend((*out.encoded)[:0], out.message); err != nil {
			return nil, err
		}
	}
	if out.call == nil {
		return mem.BufferSlice{mem.NewBuffer(out.encoded, &buffers)}, nil
	}
	out.call.sent(len(*out.encoded))
	return mem.BufferSlice{mem.NewBuffer(out.encoded, out.call)}, nil
}

// incoming is a PutArtifactRequest. If it has a chunk and nothing else, this is not copied.
type incoming struct {
	request cachev1.PutArtifactRequest // if it is another
	size    int                        // of the message
	ahead   int                        // how much may be there of what comes behind it
	isChunk bool
	chunk   mem.BufferSlice // what of it was not read yet; each buffer is freed when it was
	start   int             // where that begins in the first buffer
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, message any) error {
	in, ok := message.(*incoming)
	if !ok {
		return c.CodecV2.Unmarshal(data, message)
	}
	in.free()
	in.size = data.Len()
	if start := chunkStart(data, in.size); start > 0 {
		data.Ref()
		in.isChunk, in.chunk, in.start = true, data, start
		return nil
	}
	in.request.Reset()
	if err := c.CodecV2.Unmarshal(data, &in.request); err != nil {
		return err
	}
	in.isChunk = false
	if chunk, ok := in.request.GetPayload().(*cachev1.PutArtifactRequest_Chunk); ok {
		in.isChunk, in.chunk, in.start = true, mem.BufferSlice{mem.SliceBuffer(chunk.Chunk)}, 0
	}
	return nil
}

// chunkStart returns where in a message the chunk begins, 0 if the message is not just a chunk, or its
// beginning is in pieces.
func chunkStart(data mem.BufferSlice, size int) int {
	if len(data) == 0 {
		return 0
	}
	first := data[0].ReadOnlyData()
	number, kind, tag := protowire.ConsumeTag(first)
	if tag < 0 || number != chunkField || kind != protowire.BytesType {
		return 0
	}
	length, n := protowire.ConsumeVarint(first[tag:])
	if n < 0 || length != uint64(size-tag-n) {
		return 0
	}
	return tag + n
}

// Read reads the chunk.
func (in *incoming) Read(p []byte) (n int, err error) {
	for len(in.chunk) > 0 && n < len(p) {
		data := in.chunk[0].ReadOnlyData()[in.start:]
		copied := copy(p[n:], data)
		n += copied
		in.start += copied
		if copied == len(data) {
			in.chunk[0].Free()
			in.chunk, in.start = in.chunk[1:], 0
		}
	}
	if n == 0 {
		err = io.EOF
	}
	return n, err
}

// left is how many bytes of the chunk were not read yet.
func (in *incoming) left() int { return in.chunk.Len() - in.start }

// free lets go of what was not read.
func (in *incoming) free() {
	in.chunk.Free()
	in.chunk, in.start = nil, 0
}
