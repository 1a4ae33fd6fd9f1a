package server

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// greetedConn is a connection as net/http has it, to which one with TLS looks like one without: net/http
// hands HTTP/2 over a *tls.Conn to a part of itself that could not be given what has been read already. It
// has the methods of a TCPConn by which net/http sends files with sendfile(2).
type greetedConn struct {
	net.Conn
	greeter   *greeter
	greeting  *greeting            // nil when what comes is net/http's as it is
	delivered atomic.Bool          // to gRPC, and so net/http's no more, which reads the end
	held      *[]byte              // what is to be written together, nil if nothing is held
	tls       *tls.ConnectionState // nil in clear text, and until the handshake is made
	resets    resets
}

// heldBytes are buffers for what is held.
var heldBytes = sync.Pool{New: func() any { return new([]byte) }}

// hold keeps what is written until release writes it at once.
func (c *greetedConn) hold() { c.held = heldBytes.Get().(*[]byte) }

func (c *greetedConn) release() error {
	held := c.held
	c.held = nil
	_, err := c.write(*held)
	if err != nil {
		c.Close() // for net/http takes all of it for sent, and would go on behind a part
	}
	*held = (*held)[:0]
	heldBytes.Put(held)
	return err
}

func (c *greetedConn) Write(p []byte) (int, error) {
	passed := c.resets.pass(p)
	if c.held != nil {
		*c.held = append(*c.held, passed...)
		return len(p), nil
	}
	if len(passed) == len(p) {
		return c.write(passed)
	}
	if len(passed) > 0 {
		if _, err := c.write(passed); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func (c *greetedConn) write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil && c.tls != nil {
		cut(c.Conn)
	}
	return n, err
}

// copyBuffers are for files that can't be sent with sendfile(2).
var copyBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// ReadFrom implements io.ReaderFrom.
func (c *greetedConn) ReadFrom(r io.Reader) (int64, error) {
	if to, ok := c.Conn.(io.ReaderFrom); ok {
		return to.ReadFrom(r)
	}
	buf := copyBuffers.Get().(*[64 << 10]byte)
	defer copyBuffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{r}, buf[:])
}

func (c *greetedConn) Read(p []byte) (int, error) {
	if c.greeting == nil {
		return c.Conn.Read(p)
	}
	return c.greeting.read(p)
}

// CloseWrite tells the client that nothing more comes.
func (c *greetedConn) CloseWrite() error {
	if conn, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return conn.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close implements net.Conn.
func (c *greetedConn) Close() error {
	c.greeter.known(c)
	if c.delivered.Load() {
		return nil
	}
	return c.Conn.Close()
}

// SetReadDeadline implements net.Conn.
func (c *greetedConn) SetReadDeadline(t time.Time) error {
	if c.delivered.Load() {
		return nil
	}
	return c.Conn.SetReadDeadline(t)
}

// SetWriteDeadline implements net.Conn.
func (c *greetedConn) SetWriteDeadline(t time.Time) error {
	if c.delivered.Load() {
		return nil
	}
	return c.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (c *greetedConn) SetDeadline(t time.Time) error {
	if c.delivered.Load() {
		return nil
	}
	return c.Conn.SetDeadline(t)
}
