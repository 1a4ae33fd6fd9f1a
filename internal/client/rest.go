package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
)

const (
	// expectOver is the size of an upload above which the client waits for the server to want it. A
	// smaller one is sent in less time than the question takes.
	expectOver = 1 << 20
	// expectTimeout is how long it waits; a server that does not know the question says nothing.
	expectTimeout = time.Second

	// notFoundSentence is what the server says of a miss. Status 404 alone may also come from
	// something in front of the server, or mean that the URL's path is wrong, and a build must not take
	// that for a miss for ever.
	notFoundSentence = "Artifact not found"
	// maxErrorSize is the most that is read of the body of a refusal.
	maxErrorSize = 64 << 10
)

// REST is a client of a server's REST API. The URL may have a path, for a server behind a proxy and for
// a scope, and a name and password, for HTTP's Basic authentication.
type REST struct {
	server *url.URL
	whole  *url.URL // server without a scope
	name   string
	http   *http.Client
}

// NewREST returns a client of the server at a URL of ParseServer. TLS is spoken as config says; nil means as is
// usual.
func NewREST(server *url.URL, config *tls.Config) *REST {
	base := *server
	base.Path = cmp.Or(base.Path, "/") // for JoinPath
	whole := base
	whole.Path, _ = splitScope(base.Path)
	whole.Path, whole.RawPath = cmp.Or(whole.Path, "/"), ""
	return &REST{server: &base, whole: &whole, name: serverName(server), http: &http.Client{
		Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: connectTimeout}).DialContext,
			TLSHandshakeTimeout:   connectTimeout,
			TLSClientConfig:       config,
			ResponseHeaderTimeout: answerTimeout,
			ExpectContinueTimeout: expectTimeout,
			DisableCompression:    true, // the bytes that were asked for, and no others
		},
		// Following would turn a PUT into a GET.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close closes the connections.
func (c *REST) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Put uploads an artifact of size bytes, or of UnknownSize, from r. If it succeeds it has read r to
// its end; if not, it may still use r.
func (c *REST) Put(ctx context.Context, key artifact.Key, size int64, r io.Reader) error {
	reading, stop := context.WithCancel(ctx)
	defer stop()
	body := newSource(reading, r, size)
	request := c.request(ctx, http.MethodPut, "v1", "artifacts", key.String())
	request.Body = body
	request.ContentLength = size
	if size == 0 {
		request.Body = http.NoBody // or the size would count as unknown
		body.Close()
	}
	if size > expectOver || size == UnknownSize {
		request.Header.Set("Expect", "100-continue")
	}
	response, err := c.do(request, http.StatusCreated)
	if fault := body.fault(); fault != nil {
		return fault
	}
	if err != nil {
		return err
	}
	response.Body.Close()
	<-body.closed
	return nil
}

// Get downloads an artifact from offset on if its hash is still the given one, else from its
// beginning. The caller must close the Body.
func (c *REST) Get(ctx context.Context, key artifact.Key, offset int64, hash artifact.Digest) (*Download, error) {
	request := c.request(ctx, http.MethodGet, "v1", "artifacts", key.String())
	if offset > 0 {
		request.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		request.Header.Set("If-Range", `"`+hash.String()+`"`)
	}
	response, err := c.do(request, http.StatusOK, http.StatusPartialContent)
	if err != nil {
		return nil, err
	}
	d := &Download{Size: response.ContentLength, Body: &body{response.Body, c, ctx}}
	d.Hash, err = artifact.ParseDigest(response.Header.Get("X-Artifact-Hash"))
	if err != nil {
		err = fmt.Errorf("%s sent an answer whose X-Artifact-Hash is %w: is this the address of a polykit-cache?", c.name, err)
	} else if response.StatusCode == http.StatusPartialContent {
		d.Offset, d.Size, err = parseContentRange(response.Header.Get("Content-Range"))
	}
	if err != nil {
		response.Body.Close()
		return nil, err
	}
	if d.Offset > 0 && d.Hash != hash { // something in between does not know If-Range
		response.Body.Close()
		return c.Get(ctx, key, 0, hash)
	}
	return d, nil
}

// parseContentRange returns the offset of a range and the size of the whole (RFC 9110, section
// 14.4).
func parseContentRange(text string) (offset, size int64, err error) {
	rest, isBytes := strings.CutPrefix(text, "bytes ")
	span, whole, hasWhole := strings.Cut(rest, "/")
	first, _, hasLast := strings.Cut(span, "-")
	offset, offsetErr := strconv.ParseInt(first, 10, 64)
	size, sizeErr := strconv.ParseInt(whole, 10, 64)
	if !isBytes || !hasWhole || !hasLast || errors.Join(offsetErr, sizeErr) != nil {
		return 0, 0, fmt.Errorf("the server answered with the malformed range %q", oneLine(text))
	}
	return offset, size, nil
}

// Stat returns what the server knows of an artifact.
func (c *REST) Stat(ctx context.Context, key artifact.Key) (*Artifact, error) {
	stat := &Artifact{}
	return stat, c.read(c.request(ctx, http.MethodGet, "v1", "artifacts", key.String(), "metadata"), stat)
}

// Files yields the files in an artifact, in ascending order of the bytes of their paths.
func (c *REST) Files(ctx context.Context, key artifact.Key) iter.Seq2[*File, error] {
	return pages(func(token string) ([]*File, string, error) {
		request := c.request(ctx, http.MethodGet, "v1", "artifacts", key.String(), "files")
		request.URL.RawQuery = url.Values{"page_size": {strconv.Itoa(filesPageSize)}, "page_token": {token}}.Encode()
		page := &cachev1.ListArtifactFilesResponse{}
		err := c.read(request, page)
		return page.GetFiles(), page.GetNextPageToken(), err
	})
}

// Ready returns an error that says why, if the server can't take uploads.
func (c *REST) Ready(ctx context.Context) error {
	request := c.request(ctx, http.MethodGet)
	request.URL = c.whole.JoinPath("readyz")
	response, err := c.do(request, http.StatusOK)
	if err != nil {
		return err
	}
	return response.Body.Close()
}

func (c *REST) request(ctx context.Context, method string, path ...string) *http.Request {
	request := &http.Request{
		Method:     method,
		URL:        c.server.JoinPath(path...),
		ProtoMajor: 1, // for a lower version net/http does not wait for "100 Continue"
		ProtoMinor: 1,
		Header:     http.Header{},
	}
	return request.WithContext(ctx)
}

// do sends a request. The answer has one of the given statuses; any other becomes an error.
func (c *REST) do(request *http.Request, want ...int) (*http.Response, error) {
	var reached atomic.Bool
	ctx := httptrace.WithClientTrace(request.Context(), &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { reached.Store(true) },
	})
	response, err := c.http.Do(request.WithContext(ctx))
	if err != nil {
		return nil, c.fault(ctx, reached.Load(), err)
	}
	for _, status := range want {
		if response.StatusCode == status {
			return response, nil
		}
	}
	defer response.Body.Close()
	return nil, refusal(response)
}

// read sends a request and reads the answer's JSON.
func (c *REST) read(request *http.Request, into proto.Message) error {
	response, err := c.do(request, http.StatusOK)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswerSize))
	if err != nil {
		return c.fault(request.Context(), true, err)
	}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s sent an answer that can't be understood: is this the address of a polykit-cache?", c.name)
	}
	return nil
}

// refusal reads the error that an answer says.
func refusal(response *http.Response) error {
	e := &Error{Status: response.StatusCode}
	if where := response.Header.Get("Location"); where != "" {
		e.Sentence = "it is at another address, " + oneLine(where)
		return e
	}
	var body struct {
		Error string `json:"error"`
	}
	if json.NewDecoder(io.LimitReader(response.Body, maxErrorSize)).Decode(&body) == nil {
		e.Sentence = oneLine(body.Error)
	}
	switch {
	case e.Status == http.StatusNotFound && e.Sentence == notFoundSentence:
		e.means = ErrNotFound
	case e.Status == http.StatusConflict && e.Sentence != "":
		e.means = ErrExists
	}
	return e
}

// fault returns the error that stands behind one of net/http's.
func (c *REST) fault(ctx context.Context, reached bool, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if outer, ok := errors.AsType[*url.Error](err); ok {
		err = outer.Err // the URL that it repeats may hold a password
	}
	return &TransportError{c.name, reached, err}
}

// body is the body of a download.
type body struct {
	io.ReadCloser
	rest *REST
	ctx  context.Context
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = b.rest.fault(b.ctx, true, err)
	}
	return n, err
}
