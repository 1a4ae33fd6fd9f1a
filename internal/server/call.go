package server

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/polykit/polykit-cache/internal/cache"
)

// call is a call on a connection of a gRPC client. It bounds how long the client may keep the server
// waiting for a message, and how long it may leave untaken what is sent to it.
type call struct {
	grpc.ServerStream
	server    *Server
	conn      *nativeConn
	receiving *pace
	sending   *pace

	isUpload bool         // of which a message was received
	mark     int64        // how much of what came on the connection was looked at
	credited atomic.Int64 // how much of that for the message that is waited for

	mu       sync.Mutex
	owed     int  // bytes that were sent and not taken
	answered bool // the client is told how the call ended, though it may not have been handled to its end
	handled  bool // no more will be sent
	lost     bool // what is owed will never be taken
	over     bool
}

// serveCall handles one call.
func (s *Server) serveCall(method string, stream grpc.ServerStream, handle func(grpc.ServerStream) error) error {
	ctx := stream.Context()
	client, _ := peer.FromContext(ctx)
	s.requests.Add(1)
	c := &call{ServerStream: stream, server: s, conn: client.AuthInfo.(connInfo).conn}
	c.receiving = newPace(s.config.StallTimeout, s.config.MinUploadRate, c.sendsTooSlowly)
	c.receiving.progress = c.progress
	c.sending = newPace(s.config.StallTimeout, s.config.MinDownloadRate, c.takesTooSlowly)
	c.conn.begin(c)
	defer c.end()
	return s.call(method, c, handle)
}

// RecvMsg implements grpc.ServerStream.
func (c *call) RecvMsg(message any) error {
	c.conn.waiting.Add(1)
	c.mark = c.conn.received.Load()
	c.credited.Store(0)
	c.receiving.begin(0)
	err := c.ServerStream.RecvMsg(message)
	in, isUpload := message.(*incoming)
	size := 0
	if isUpload && err == nil {
		size = max(0, in.size-int(c.credited.Load()))
		in.ahead = streamWindow
	}
	c.receiving.end(size)
	c.conn.waiting.Add(-1)
	if err != nil {
		c.failed(err)
		if slow := c.receiving.stop("send"); slow != nil {
			err = slow
		}
		return err
	}
	c.isUpload = isUpload
	if c.conn.tiny.Load() > 0 {
		c.conn.tiny.Add(-2)
	}
	return nil
}

// progress returns how much of the message that is waited for came since this was asked before. gRPC
// keeps that to itself, so what came on the connection is divided among the calls that wait, up to what a
// message may have.
func (c *call) progress() int {
	received := c.conn.received.Load()
	n := min((received-c.mark)/max(1, c.conn.waiting.Load()), maxMessageSize-c.credited.Load())
	c.mark = received
	c.credited.Add(n)
	return int(n)
}

// sendsTooSlowly gives up a client that keeps the server waiting.
func (c *call) sendsTooSlowly(time.Time) error {
	err := c.receiving.tooSlow("send")
	if c.isUpload {
		err = fmt.Errorf("%w: %w", cache.ErrUploadAborted, err)
	}
	go c.giveUp(err)
	return nil
}

// takesTooSlowly gives up a client that does not take what is sent to it.
func (c *call) takesTooSlowly(time.Time) error {
	go func() {
		c.giveUp(c.sending.tooSlow("take"))
		c.conn.end(c, true)
		c.lose()
	}()
	return nil
}

// giveUp ends the stream with an error, so that RecvMsg and SendMsg return. Were they just to return, gRPC
// would tell the client an error of its own before the handler can tell it this one.
func (c *call) giveUp(err error) {
	c.setAnswered()
	stream, ok := grpc.ServerTransportStreamFromContext(c.Context()).(interface{ WriteStatus(*status.Status) error })
	if !ok || stream.WriteStatus(faultOf(err).grpcStatus()) != nil {
		c.conn.cut()
	}
}

// SendMsg implements grpc.ServerStream.
func (c *call) SendMsg(message any) error {
	out, ok := message.(*outgoing)
	if !ok {
		out = &outgoing{message: message.(proto.Message)}
	}
	out.call = c
	err := c.ServerStream.SendMsg(out)
	if err != nil {
		c.failed(err)
		if slow := c.sending.stop("take"); slow != nil {
			err = slow
		}
	}
	return err
}

// failed is told of what gRPC says of a message that could not be received or sent. Unless the reason is
// that the call has ended already, gRPC has told the client.
func (c *call) failed(err error) {
	if err != io.EOF && status.Code(err) != codes.Canceled {
		c.setAnswered()
	}
}

func (c *call) setAnswered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answered = true
}

// sent says that n bytes are on their way to the client.
func (c *call) sent(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.owed > 0 {
		c.sending.end(0)
	}
	c.owed += n
	c.sending.begin(c.owed)
}

// Get implements mem.BufferPool.
func (c *call) Get(length int) *[]byte { return buffers.Get(length) }

// Put implements mem.BufferPool. gRPC calls it when it has sent a message, or knows that it will not.
func (c *call) Put(buf *[]byte) {
	n := len(*buf)
	buffers.Put(buf)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sending.end(n)
	c.owed -= n
	if c.owed > 0 {
		c.sending.begin(c.owed)
	}
	c.settle()
}

// end says that the call was handled. If the client has reset it, or is gone, gRPC drops what it has to
// send, and some of that without telling.
func (c *call) end() {
	c.receiving.stop("send")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.handled = true
	c.lost = c.lost || !c.answered && c.Context().Err() == context.Canceled
	c.settle()
}

// lose says that what is owed will never be taken.
func (c *call) lose() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lost = true
	c.sending.stop("take") // or its timer would keep all that was to be sent
	c.settle()
}

// settle ends the call when all of it was sent, or lost: until then it is in flight. It is called with c.mu
// locked.
func (c *call) settle() {
	if c.handled && (c.owed == 0 || c.lost) && !c.over {
		c.over = true
		c.sending.stop("take")
		c.conn.end(c, false)
		c.server.requestDone()
	}
}
