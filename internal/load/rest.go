package load

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// bufferSize is how much is read at once of what is thrown away.
const bufferSize = 256 << 10

// restConn is one connection of HTTP/1.1. It writes requests that are made beforehand but for the key, and
// looks at three headers of an answer, since a client of net/http costs more than the server.
type restConn struct {
	server    *url.URL
	tls       *tls.Config
	keepAlive bool
	base      string // of the path, up to the key
	headers   string // of every request

	conn    net.Conn
	stop    func() bool // lets go of the context that conn ends with
	in      *bufio.Reader
	request []byte
	buf     []byte
}

func newREST(server *url.URL, config *tls.Config, keepAlive bool) *restConn {
	headers := " HTTP/1.1\r\nHost: " + server.Host + "\r\n"
	if server.User != nil {
		password, _ := server.User.Password()
		headers += "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(server.User.Username()+":"+password)) + "\r\n"
	}
	if !keepAlive {
		headers += "Connection: close\r\n"
	}
	return &restConn{
		server:    server,
		tls:       config,
		keepAlive: keepAlive,
		base:      strings.TrimSuffix(server.EscapedPath(), "/") + "/v1/artifacts/",
		headers:   headers,
		in:        bufio.NewReaderSize(nil, 64<<10),
		buf:       make([]byte, bufferSize),
	}
}

func (c *restConn) dial(ctx context.Context) (net.Conn, error) {
	port := c.server.Port()
	if c.server.Scheme == "https" {
		if port == "" {
			port = "443"
		}
		return (&tls.Dialer{Config: c.tls}).DialContext(ctx, "tcp", net.JoinHostPort(c.server.Hostname(), port))
	}
	if port == "" {
		port = "80"
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(c.server.Hostname(), port))
}

func (c *restConn) put(ctx context.Context, key artifact.Key, head, rest []byte) error {
	status, _, err := c.do(ctx, http.MethodPut, key, head, rest)
	return expect(http.StatusCreated, status, err)
}

func (c *restConn) get(ctx context.Context, key artifact.Key) (int64, error) {
	status, n, err := c.do(ctx, http.MethodGet, key)
	return n, expect(http.StatusOK, status, err)
}

func (c *restConn) head(ctx context.Context, key artifact.Key) error {
	status, _, err := c.do(ctx, http.MethodHead, key)
	return expect(http.StatusOK, status, err)
}

func (c *restConn) miss(ctx context.Context, key artifact.Key) error {
	status, _, err := c.do(ctx, http.MethodGet, key)
	return expect(http.StatusNotFound, status, err)
}

func expect(want, got int, err error) error {
	if err == nil && got != want {
		err = fmt.Errorf("the server answered %d %s, not %d %s", got, http.StatusText(got), want, http.StatusText(want))
	}
	return err
}

// do sends a request and reads the answer to its end.
func (c *restConn) do(ctx context.Context, method string, key artifact.Key, body ...[]byte) (status int, n int64, err error) {
	if c.conn == nil {
		conn, err := c.dial(ctx)
		if err != nil {
			return 0, 0, err
		}
		c.conn, c.stop = conn, context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
		c.in.Reset(conn)
	}
	if err := c.send(method, key, body); err != nil {
		defer c.close() // the rest of the body would pass for the next request
		// A server that refuses may have answered before it read everything.
		if answer, answered := readAnswer(c.in); answered == nil {
			return answer.status, 0, nil
		}
		return 0, 0, err
	}
	answer, err := readAnswer(c.in)
	if err == nil && method != http.MethodHead {
		n, err = answer.discard(c.in, c.buf)
	}
	if err != nil || answer.close || !c.keepAlive {
		c.close()
	}
	return answer.status, n, err
}

func (c *restConn) send(method string, key artifact.Key, body [][]byte) error {
	request := append(c.request[:0], method...)
	request = append(request, ' ')
	request = append(request, c.base...)
	request = append(request, key.String()...)
	request = append(request, c.headers...)
	if method == http.MethodPut {
		length := 0
		for _, part := range body {
			length += len(part)
		}
		request = append(request, "Content-Length: "...)
		request = append(strconv.AppendInt(request, int64(length), 10), "\r\n"...)
	}
	request = append(request, "\r\n"...)
	c.request = request
	if len(body) == 0 {
		_, err := c.conn.Write(request)
		return err
	}
	parts := net.Buffers(append([][]byte{request}, body...))
	_, err := parts.WriteTo(c.conn)
	return err
}

func (c *restConn) close() {
	if c.conn != nil {
		c.stop()
		c.conn.Close()
		c.conn = nil
	}
}

// answer is the head of a response of HTTP/1.1, as far as it is looked at.
type answer struct {
	status  int
	length  int64 // of the body; unknown if it is up to the end
	chunked bool
	close   bool // nothing follows on the connection
}

const unknown = -1

// readAnswer reads the head of a response, and those of informational ones before it.
func readAnswer(in *bufio.Reader) (answer, error) {
	for {
		a, err := readHead(in)
		if err != nil || a.status >= 200 {
			return a, err
		}
	}
}

func readHead(in *bufio.Reader) (answer, error) {
	line, err := readLine(in)
	if err != nil {
		return answer{}, err
	}
	a := answer{length: unknown}
	version, rest, _ := bytes.Cut(line, []byte(" "))
	digits, _, _ := bytes.Cut(rest, []byte(" "))
	if a.status, err = strconv.Atoi(string(digits)); err != nil || !bytes.HasPrefix(version, []byte("HTTP/1.")) {
		return answer{}, fmt.Errorf("the server does not speak HTTP/1.1: it answered %q", line)
	}
	a.close = string(version) == "HTTP/1.0"
	for {
		line, err := readLine(in)
		if err != nil {
			return answer{}, err
		}
		if len(line) == 0 {
			if a.status == http.StatusNoContent || a.status == http.StatusNotModified {
				a.length = 0
			}
			return a, nil
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		switch value = bytes.TrimSpace(value); {
		case bytes.EqualFold(name, []byte("Content-Length")):
			if a.length, err = strconv.ParseInt(string(value), 10, 64); err != nil || a.length < 0 {
				return answer{}, fmt.Errorf("the server answered with a Content-Length of %q", value)
			}
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			a.chunked = bytes.EqualFold(value, []byte("chunked"))
		case bytes.EqualFold(name, []byte("Connection")):
			a.close = a.close || bytes.EqualFold(value, []byte("close"))
		}
	}
}

// readLine returns a line without its end, up to the next read.
func readLine(in *bufio.Reader) ([]byte, error) {
	line, err := in.ReadSlice('\n')
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return bytes.TrimRight(line, "\r\n"), err
}

// discard reads the body of an answer and returns how many bytes it had.
func (a *answer) discard(in *bufio.Reader, buf []byte) (n int64, err error) {
	var body io.Reader = in
	switch {
	case a.chunked:
		body = httputil.NewChunkedReader(in)
	case a.length == unknown:
		a.close = true
	default:
		body = &io.LimitedReader{R: in, N: a.length}
	}
	n, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{body}, buf)
	switch {
	case err != nil:
	case a.chunked:
		for { // trailers, and the empty line behind them
			line, err := readLine(in)
			if err != nil || len(line) == 0 {
				return n, err
			}
		}
	case a.length != unknown && n < a.length:
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
