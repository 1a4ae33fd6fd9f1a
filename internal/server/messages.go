package server

import (
	"context"
	"encoding/binary"
	"io"
	"net/http"
	"sync"

	"google.golang.org/grpc"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
)

const (
	// messagePrefix is the length of what stands before each message of gRPC over HTTP/2: a flag and
	// the length of the message.
	messagePrefix = 5
	// messagesAhead is how many messages may be read before they are asked for. A call that is not a
	// stream asks for none, but has one and then looks for the end.
	messagesAhead = 2
)

// messages is the body of a gRPC call on a connection of net/http, read message by message.
//
// Behind ServeHTTP, grpc-go reads the body as fast as it comes and keeps all of it until it is asked
// for: a client that sends faster than artifacts are verified would fill the memory. It also spends a
// buffer of 16 KiB on each read, however little that brings. So a message is read only when it is
// about to be asked for, and each read but a message's last fills its buffer. HTTP/2's own flow
// control then makes the client wait.
//
// The client must send at the least rate of an upload, while it is waited for.
type messages struct {
	io.ReadCloser
	pace   *pace
	slow   chan error    // that the client was too slow
	left   int64         // bytes of the message that are still to be read
	wanted chan struct{} // holds one for each message that may be read
	closed chan struct{}
	close  func()
}

type messagesKey struct{}

// readByMessage returns a call of which the body is read message by message, when the server's
// handlers ask for them.
func readByMessage(r *http.Request, pace *pace) *http.Request {
	m := &messages{
		ReadCloser: r.Body,
		pace:       pace,
		slow:       make(chan error, 1),
		wanted:     make(chan struct{}, messagesAhead+1),
		closed:     make(chan struct{}),
	}
	m.close = sync.OnceFunc(func() { close(m.closed) })
	if r.URL.Path != cachev1.ArtifactService_PutArtifact_FullMethodName { // which asks for each message
		for range messagesAhead {
			m.want()
		}
	}
	r = r.WithContext(context.WithValue(r.Context(), messagesKey{}, m))
	r.Body = m
	return r
}

// want lets one more message be read.
func (m *messages) want() {
	select {
	case m.wanted <- struct{}{}:
	default: // it may already, since a message was asked for that did not come
	}
}

// Read reads into a buffer that has room for a prefix at least, as all of grpc-go's have.
func (m *messages) Read(p []byte) (int, error) {
	if m.left == 0 {
		select {
		case <-m.wanted:
		case <-m.closed:
			return 0, io.ErrUnexpectedEOF // and not the end, for a handler may still wait for a message
		}
		n, err := m.fill(p[:messagePrefix])
		if n == messagePrefix {
			m.left = int64(binary.BigEndian.Uint32(p[1:]))
		}
		return n, err
	}
	if m.left > maxMessageSize { // grpc-go refuses it for its prefix
		<-m.closed
		return 0, io.EOF
	}
	n, err := m.fill(p[:min(int64(len(p)), m.left)])
	m.left -= int64(n)
	return n, err
}

// fill reads until p is full.
func (m *messages) fill(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var more int
		m.pace.begin(0)
		more, err = m.ReadCloser.Read(p[n:])
		m.pace.end(more)
		n += more
	}
	switch {
	case n == len(p):
		return n, nil
	case n > 0 && err == io.EOF:
		return n, io.ErrUnexpectedEOF
	case err != nil && err != io.EOF:
		if slow := m.pace.stop("send"); slow != nil {
			// grpc-go would make a status of its own of any error.
			m.slow <- slow
			<-m.closed
			return 0, io.EOF
		}
	}
	return n, err
}

func (m *messages) Close() error {
	m.close()
	m.pace.stop("send")
	return m.ReadCloser.Close()
}

// messageStream is a stream that says when it asks for a message.
type messageStream struct {
	grpc.ServerStream
	messages *messages
}

func (s *messageStream) RecvMsg(message any) error {
	s.messages.want()
	received := make(chan error, 1)
	go func() { received <- s.ServerStream.RecvMsg(message) }()
	select {
	case err := <-received:
		return err
	case slow := <-s.messages.slow:
		return slow
	}
}
