package load

import (
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"
)

// refusing is a connection to a server that answers and takes no more.
type refusing struct {
	net.Conn
	answer io.Reader
	closed bool
}

func (r *refusing) Write(p []byte) (int, error) { return len(p) / 2, errors.New("broken pipe") }
func (r *refusing) Read(p []byte) (int, error)  { return r.answer.Read(p) }
func (r *refusing) SetDeadline(time.Time) error { return nil }
func (r *refusing) Close() error                { r.closed = true; return nil }

// TestRefusedInTheMiddle has a server that answers before it has read an upload. The answer is read, and the
// connection, in which half of a request is, used no more.
func TestRefusedInTheMiddle(t *testing.T) {
	m, err := newMaker(1000, false)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, err := m.artifact(m.key(1))
	if err != nil {
		t.Fatal(err)
	}
	c := newREST(&url.URL{Scheme: "http", Host: "localhost"}, true)
	for answer, want := range map[string]string{
		"HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 0\r\n\r\n": "the server answered 413 Request Entity Too Large, not 201 Created",
		"": "broken pipe",
	} {
		conn := &refusing{answer: strings.NewReader(answer)}
		c.conn = conn
		c.in.Reset(conn)
		if err := c.put(t.Context(), m.key(1), head, rest); err == nil || err.Error() != want {
			t.Errorf("put returned %v; want %s", err, want)
		}
		if c.conn != nil || !conn.closed {
			t.Error("the connection would be used again")
		}
	}
}
