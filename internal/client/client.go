// Package client talks to a running server, over REST or over gRPC.
//
// REST and GRPC have the same methods, and a call does the same over either. What the server refuses
// is an *Error, what goes wrong on the way to it or back a *TransportError.
package client

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
)

const (
	// connectTimeout bounds the time in which a connection must stand.
	connectTimeout = 10 * time.Second
	// answerTimeout bounds the time in which a server must begin to answer once it has the whole
	// request. It may have to verify a large artifact first. Nothing bounds the time of a transfer,
	// which takes as long as it takes.
	answerTimeout = 2 * time.Minute

	// filesPageSize is the most files in a page that the server sends; it decodes the artifact for each.
	filesPageSize = 10_000
	// maxAnswerSize bounds a page of files: the server accepts at most 32 MiB of paths in an artifact
	// if it is not told otherwise.
	maxAnswerSize = 256 << 20
)

// UnknownSize stands for a size that is not known beforehand.
const UnknownSize = -1

// Artifact is what a server knows of an artifact, and File what it knows of a file in one.
type (
	Artifact = cachev1.Artifact
	File     = cachev1.ArtifactFile
)

// JSON returns what a server said, such as an Artifact or a File, on one line, as the REST API writes it.
func JSON(message proto.Message) ([]byte, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(message)
	if err != nil {
		return nil, err
	}
	var line bytes.Buffer // protojson varies its white space on purpose
	err = json.Compact(&line, text)
	return line.Bytes(), err
}

// Download is an artifact, or the rest of one, on its way.
type Download struct {
	// Hash is the SHA-256 of the whole artifact, as the server says.
	Hash artifact.Digest
	// Size is the number of bytes of the whole artifact, or UnknownSize.
	Size int64
	// Offset is the place of the first byte of Body in the artifact.
	Offset int64
	// Body ends with io.EOF only if it is complete; else with a *TransportError.
	Body io.ReadCloser
}

// ErrNotFound and ErrExists are wrapped by the Errors that mean them.
var (
	ErrNotFound = errors.New("artifact not found")
	ErrExists   = errors.New("artifact already exists")
)

// Error is a server's refusal.
type Error struct {
	// Status is the status of HTTP; 0 over gRPC.
	Status int
	// Code is the code of gRPC; OK over REST.
	Code codes.Code
	// Reason is the stable word for what is wrong, which only gRPC has. It is empty as well if something
	// before the server answered.
	Reason string
	// Sentence is what the server says to people. It is empty if the answer is not a polykit-cache's.
	Sentence string

	means error
}

func (e *Error) Error() string {
	status := e.Code.String()
	if e.Status != 0 {
		status = strings.TrimSpace(fmt.Sprint(e.Status, " ", http.StatusText(e.Status)))
	}
	if e.Reason != "" {
		status += " (" + e.Reason + ")"
	}
	if e.Sentence == "" {
		return fmt.Sprintf("the server answered %s, but not as a polykit-cache does: is this its address?", status)
	}
	return fmt.Sprintf("the server answered %s: %s", status, e.Sentence)
}

// Unwrap returns ErrNotFound or ErrExists if the refusal means one of them.
func (e *Error) Unwrap() error { return e.means }

// Temporary says whether the same request may succeed soon.
func (e *Error) Temporary() bool {
	switch e.Status {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return e.Code == codes.Unavailable
}

// TransportError is a fault between the client and the server.
type TransportError struct {
	// Server is the address of the server.
	Server string
	// Reached says whether a connection stood.
	Reached bool
	// Err is the fault.
	Err error
}

func (e *TransportError) Error() string {
	if strings.Contains(e.Err.Error(), "failed to verify certificate") { // over gRPC there is only the text
		return fmt.Sprintf("cannot trust %s: %v; if it is the right one, --ca-cert must name the certificate of the authority that issued its own", e.Server, e.Err)
	}
	if e.Reached {
		return fmt.Sprintf("the connection to %s broke: %v; try again", e.Server, e.Err)
	}
	return fmt.Sprintf("cannot reach %s: %v; is the server running?", e.Server, e.Err)
}

func (e *TransportError) Unwrap() error { return e.Err }

// ParseServer returns the URL of a server. Its errors do not repeat the text, which may hold a
// password.
func ParseServer(text string) (*url.URL, error) {
	server, err := url.Parse(text)
	if fault, ok := errors.AsType[*url.Error](err); ok {
		err = fault.Err
	}
	switch {
	case err != nil:
	case server.Scheme != "http" && server.Scheme != "https":
		err = errors.New("it does not begin with http:// or https://")
	case server.Hostname() == "":
		err = errors.New("it names no host")
	case server.RawQuery != "" || server.ForceQuery || server.Fragment != "":
		err = errors.New("it has something behind its path")
	}
	if err != nil {
		return nil, fmt.Errorf("not the URL of a server, such as http://127.0.0.1:8080: %w", err)
	}
	return server, nil
}

// InScope returns the URL of a server for what is about a scope, of which server must have none.
func InScope(server *url.URL, scope artifact.Scope) *url.URL {
	base := *server
	base.Path = cmp.Or(base.Path, "/") // for JoinPath
	return base.JoinPath("t", scope.String())
}

// splitScope returns the path of a server's URL without the scope at its end, and that if there is one.
func splitScope(path string) (rest, scope string) {
	path = strings.TrimSuffix(path, "/")
	i := strings.LastIndex(path, "/t/")
	if i < 0 || strings.Contains(path[i+len("/t/"):], "/") {
		return path, ""
	}
	return path[:i], path[i+len("/t/"):]
}

// serverName returns the address of a server as errors show it, without the password.
func serverName(server *url.URL) string {
	shown := *server
	shown.User = nil
	return shown.String()
}

// oneLine returns a server's text as it can be shown in a line.
func oneLine(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.TrimSpace(text))
}

// pages yields the entries of all pages. page returns those of one, and the token of the next, if there is one.
func pages[T any](page func(token string) (entries []T, next string, err error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for token := ""; ; {
			entries, next, err := page(token)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, entry := range entries {
				if !yield(entry, nil) {
					return
				}
			}
			if token = next; token == "" {
				return
			}
		}
	}
}

// source is what an upload is read from. It remembers the reader's own fault, which the transports
// report as one of theirs, and that the reader is not used any more.
//
// Its Read returns when ctx is done even if the reader's does not, as when standard input has nothing
// to say: net/http does not give a request up before its body's Read has returned.
type source struct {
	ctx    context.Context
	r      io.Reader
	buf    []byte
	size   int64 // or UnknownSize
	n      int64
	closed chan struct{}
	close  func()

	mu  sync.Mutex
	err error // the reader's
}

func newSource(ctx context.Context, r io.Reader, size int64) *source {
	s := &source{ctx: ctx, r: r, size: size, closed: make(chan struct{})}
	s.close = sync.OnceFunc(func() { close(s.closed) })
	return s
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.read(p)
	s.n += int64(n)
	switch {
	case s.size == UnknownSize:
	case s.n > s.size, err == io.EOF && s.n < s.size:
		err = fmt.Errorf("what was to be sent had %d bytes, and has another size now: did something write to it?", s.size)
	}
	if err != nil && err != io.EOF {
		s.mu.Lock()
		s.err = err
		s.mu.Unlock()
	}
	return n, err
}

// read reads in another goroutine, and waits for it no longer than until ctx is done.
func (s *source) read(p []byte) (int, error) {
	if len(s.buf) < len(p) {
		s.buf = make([]byte, len(p)) // not p, which is the caller's again when this has returned
	}
	type result struct {
		n   int
		err error
	}
	buf, done := s.buf[:len(p)], make(chan result, 1)
	go func() {
		n, err := s.r.Read(buf)
		done <- result{n, err}
	}()
	select {
	case read := <-done:
		return copy(p, buf[:read.n]), read.err
	case <-s.ctx.Done():
		return 0, s.ctx.Err()
	}
}

// fault returns the reader's own fault.
func (s *source) fault() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close tells that the reader is not used any more. It does not close it.
func (s *source) Close() error {
	s.close()
	return nil
}
