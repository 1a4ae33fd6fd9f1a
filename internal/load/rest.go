package load

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// bufferSize is how much is read at once of what is thrown away.
const bufferSize = 256 << 10

// restConn is one connection of HTTP/1.1. It writes requests that are made beforehand but for the key,
// since a client of net/http costs more than the server.
type restConn struct {
	server    *url.URL
	keepAlive bool
	base      string // of the path, up to the key
	headers   string // of every request

	conn net.Conn
	in   *bufio.Reader
	buf  []byte
}

func newREST(server *url.URL, keepAlive bool) *restConn {
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
		return (&tls.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(c.server.Hostname(), port))
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
		if c.conn, err = c.dial(ctx); err != nil {
			return 0, 0, err
		}
		c.in.Reset(c.conn)
	}
	conn := c.conn // which may be closed, and forgotten, before ctx is done
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	defer func() {
		if err != nil || !c.keepAlive {
			c.close()
		}
	}()
	if err := c.send(method, key, body); err != nil {
		// A server that refuses may have answered before it read everything.
		if response, answered := http.ReadResponse(c.in, nil); answered == nil {
			c.close() // the rest of the body would pass for the next request
			return response.StatusCode, 0, nil
		}
		return 0, 0, err
	}
	response, err := http.ReadResponse(c.in, &http.Request{Method: method})
	if err != nil {
		return 0, 0, err
	}
	n, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{response.Body}, c.buf)
	if response.Close {
		c.close()
	}
	return response.StatusCode, n, err
}

func (c *restConn) send(method string, key artifact.Key, body [][]byte) error {
	request := make([]byte, 0, 512)
	request = append(request, method+" "+c.base+key.String()+c.headers...)
	if method == http.MethodPut {
		length := 0
		for _, part := range body {
			length += len(part)
		}
		request = append(request, "Content-Length: "+strconv.Itoa(length)+"\r\n"...)
	}
	request = append(request, "\r\n"...)
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
		c.conn.Close()
		c.conn = nil
	}
}
