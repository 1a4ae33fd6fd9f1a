package load

import (
	"bufio"
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
	c := newREST(&url.URL{Scheme: "http", Host: "localhost"}, nil, true)
	for answer, want := range map[string]string{
		"HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 0\r\n\r\n": "the server answered 413 Request Entity Too Large, not 201 Created",
		"": "broken pipe",
	} {
		conn := &refusing{answer: strings.NewReader(answer)}
		c.conn, c.stop = conn, func() bool { return true }
		c.in.Reset(conn)
		if err := c.put(t.Context(), m.key(1), head, rest); err == nil || err.Error() != want {
			t.Errorf("put returned %v; want %s", err, want)
		}
		if c.conn != nil || !conn.closed {
			t.Error("the connection would be used again")
		}
	}
}

// TestAnswers reads every kind of body that HTTP/1.1 has, to its end and no further.
func TestAnswers(t *testing.T) {
	for text, want := range map[string]struct {
		answer answer
		n      int64
		left   string
		err    string
	}{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP":                                     {answer{200, 3, false, false}, 3, "HTTP", ""},
		"HTTP/1.1 404 Not Found\r\ncontent-length:0\r\nconnection: Close\r\n\r\n":                 {answer{404, 0, false, true}, 0, "", ""},
		"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n":          {answer{201, 0, false, false}, 0, "", ""},
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\nHTTP": {answer{200, unknown, true, false}, 3, "HTTP", ""},
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nSum: 1\r\n\r\nHTTP":  {answer{200, unknown, true, false}, 1, "HTTP", ""},
		"HTTP/1.1 200 OK\r\n\r\nabc":                                   {answer{200, unknown, false, true}, 3, "", ""},
		"HTTP/1.0 200 OK\nContent-Length: 1\n\na":                      {answer{200, 1, false, true}, 1, "", ""},
		"HTTP/1.1 204 No Content\r\n\r\nHTTP":                          {answer{204, 0, false, false}, 0, "HTTP", ""},
		"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc":              {answer{200, 4, false, false}, 3, "", "unexpected EOF"},
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab": {answer{200, unknown, true, false}, 2, "", "unexpected EOF"},
		"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n":                {answer{}, 0, "", `the server answered with a Content-Length of "-1"`},
		"HTTP/1.1 200 OK\r\nContent-":                                  {answer{}, 0, "", "unexpected EOF"},
		"SSH-2.0-OpenSSH\r\n":                                          {answer{}, 0, "", `the server does not speak HTTP/1.1: it answered "SSH-2.0-OpenSSH"`},
		"":                                                             {answer{}, 0, "", "unexpected EOF"},
	} {
		in := bufio.NewReader(strings.NewReader(text))
		answer, err := readAnswer(in)
		var n int64
		if err == nil {
			n, err = answer.discard(in, make([]byte, 2))
		}
		left, _ := io.ReadAll(in)
		if err == nil {
			err = errors.New("")
		}
		if answer != want.answer || n != want.n || err.Error() != want.err || want.err == "" && string(left) != want.left {
			t.Errorf("%q: got %+v with %d bytes, %q left, error %v; want %+v", text, answer, n, left, err, want)
		}
	}
}
