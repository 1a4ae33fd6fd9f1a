package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

// way is a way to talk to a server. What the server answers is a status as REST has it, whatever the
// protocol; an error means that there was no whole answer.
type way interface {
	// put uploads size bytes, or client.UnknownSize.
	put(key artifact.Key, size int64, body io.Reader) (status int, err error)
	// get downloads an artifact, and returns what the server says it is.
	get(key artifact.Key, to io.Writer) (said content, status int, err error)
	// stat asks what the artifact is.
	stat(key artifact.Key) (said content, status int, err error)
	close()
}

// newWays returns all ways to talk to the server at an address.
func newWays(address string) []way {
	server := &url.URL{Scheme: "http", Host: address}
	grpc, err := client.NewGRPC(server, nil)
	if err != nil {
		panic(err) // the address is not one
	}
	ways := []way{grpcWay{grpc}}
	for _, http2 := range []bool{false, true} {
		transport := &http.Transport{Protocols: &http.Protocols{}, DisableCompression: true}
		transport.Protocols.SetHTTP1(!http2)
		transport.Protocols.SetUnencryptedHTTP2(http2)
		ways = append(ways, restWay{server, transport})
	}
	return ways
}

// restWay is REST, by net/http itself and not by package client, to see the headers.
type restWay struct {
	server    *url.URL
	transport *http.Transport
}

func (w restWay) do(method string, key artifact.Key, size int64, body io.Reader, to io.Writer) (*http.Response, error) {
	request, err := http.NewRequest(method, w.server.JoinPath("v1", "artifacts", key.String()).String(), body)
	if err != nil {
		return nil, err
	}
	request.ContentLength = size
	response, err := w.transport.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		to = io.Discard
	}
	if _, err := io.Copy(to, response.Body); err != nil {
		return nil, err
	}
	if response.StatusCode == http.StatusServiceUnavailable && response.Header.Get("Retry-After") == "" {
		return nil, errors.New("status 503 without Retry-After")
	}
	return response, nil
}

func (w restWay) put(key artifact.Key, size int64, body io.Reader) (int, error) {
	response, err := w.do(http.MethodPut, key, size, body, io.Discard)
	if err != nil {
		return 0, err
	}
	return response.StatusCode, nil
}

func (w restWay) get(key artifact.Key, to io.Writer) (content, int, error) {
	return said(w.do(http.MethodGet, key, 0, nil, to))
}

func (w restWay) stat(key artifact.Key) (content, int, error) {
	return said(w.do(http.MethodHead, key, 0, nil, io.Discard))
}

// said returns what the headers of an answer say of an artifact.
func said(response *http.Response, err error) (content, int, error) {
	if err != nil || response.StatusCode != http.StatusOK {
		return content{}, statusOf(response), err
	}
	hash, err := artifact.ParseDigest(response.Header.Get("X-Artifact-Hash"))
	return content{hash, response.ContentLength}, response.StatusCode, err
}

func statusOf(response *http.Response) int {
	if response == nil {
		return 0
	}
	return response.StatusCode
}

func (w restWay) close() { w.transport.CloseIdleConnections() }

type grpcWay struct{ *client.GRPC }

func (w grpcWay) put(key artifact.Key, size int64, body io.Reader) (int, error) {
	return grpcStatus(http.StatusCreated, w.Put(context.Background(), key, size, body))
}

func (w grpcWay) get(key artifact.Key, to io.Writer) (content, int, error) {
	download, err := w.Get(context.Background(), key, 0, artifact.Digest{})
	if err == nil {
		defer download.Body.Close()
		_, err = io.Copy(to, download.Body)
	}
	status, err := grpcStatus(http.StatusOK, err)
	if status != http.StatusOK {
		return content{}, status, err
	}
	return content{download.Hash, download.Size}, status, nil
}

func (w grpcWay) stat(key artifact.Key) (content, int, error) {
	found, err := w.Stat(context.Background(), key)
	status, err := grpcStatus(http.StatusOK, err)
	if status != http.StatusOK {
		return content{}, status, err
	}
	hash, err := artifact.ParseDigest(found.GetHash())
	return content{hash, found.GetSize()}, status, err
}

// grpcStatus returns the status of a call that has this one if it succeeds.
func grpcStatus(success int, err error) (int, error) {
	if err == nil {
		return success, nil
	}
	refused, ok := errors.AsType[*client.Error](err)
	if !ok {
		return 0, err
	}
	status := map[string]int{
		"ARTIFACT_NOT_FOUND":  http.StatusNotFound,
		"ARTIFACT_EXISTS":     http.StatusConflict,
		"VERIFICATION_FAILED": http.StatusUnprocessableEntity,
		"OVERLOADED":          http.StatusServiceUnavailable,
	}[refused.Reason]
	if status == 0 {
		return 0, err
	}
	return status, nil
}

func (w grpcWay) close() { w.Close() }

// session is clients of one life of a server, and checks all that it answers.
type session struct {
	*ledger
	ways []way
	// cutters are for uploads that the client cuts, which must not share a connection with others: net/http
	// gives a connection to the next request before it gives the answer to the last one, and loses the
	// answer if that request breaks the connection at once.
	cutters []way
	// event is called when a piece of a body goes, or comes, and when an answer does.
	event func()
	// mayBreak says whether the server may be dead.
	mayBreak func() bool
}

func (s *session) anyWay(random *rand.Rand) way { return s.ways[random.IntN(len(s.ways))] }

func (s *session) close() {
	for _, way := range slices.Concat(s.ways, s.cutters) {
		way.close()
	}
}

// put uploads a whole artifact, and returns the status.
func (s *session) put(way way, key artifact.Key, data []byte, declared bool) int {
	whole := content{sha256.Sum256(data), int64(len(data))}
	before := s.sending(key, whole)
	size := whole.size
	if !declared {
		size = client.UnknownSize
	}
	status, err := way.put(key, size, &body{data: data, session: s})
	s.answered("upload", key, status, err)
	switch status {
	case http.StatusCreated:
		s.ledger.acknowledged(key, whole, before)
	case http.StatusConflict:
		s.exists(key)
	case http.StatusUnprocessableEntity:
		s.violate("%s: a sound artifact was refused as unsound", key)
	}
	return status
}

// putPart uploads the beginning of an artifact: it is cut there or, if it is to pass for the whole, ends.
// The way is one of the cutters if it is cut.
func (s *session) putPart(way way, key artifact.Key, data []byte, part int, declared, pass bool) {
	s.sending(key)
	size := int64(client.UnknownSize)
	from := &body{data: data[:part], session: s}
	switch {
	case !pass:
		from.end = errCut
		if declared {
			size = int64(len(data))
		}
	case declared:
		size = int64(part)
	}
	status, err := way.put(key, size, from)
	if errors.Is(err, errCut) {
		s.count("upload of a part: cut by the client")
		return
	}
	s.answered("upload of a part", key, status, err)
	if status == http.StatusCreated || status == http.StatusConflict || status == http.StatusUnprocessableEntity && !pass {
		s.violate("%s: the upload of %d of %d bytes was answered with %d", key, part, len(data), status)
	}
}

// read downloads an artifact, or only asks for it, and returns the status.
func (s *session) read(way way, key artifact.Key, download bool) int {
	before := s.known(key)
	var c content
	var status int
	var err error
	if download {
		to := &sink{session: s, hash: sha256.New()}
		c, status, err = way.get(key, to)
		if got := to.content(); err == nil && status == http.StatusOK && got != c {
			s.violate("%s: a download had %v, but was said to have %v", key, got, c)
		}
		s.answered("download", key, status, err)
	} else {
		c, status, err = way.stat(key)
		s.answered("stat", key, status, err)
	}
	switch status {
	case http.StatusOK:
		s.served(key, c)
	case http.StatusNotFound:
		s.missing(key, before)
	case http.StatusCreated, http.StatusConflict, http.StatusUnprocessableEntity:
		s.violate("%s: a request to read was answered with %d", key, status)
	}
	return status
}

// answered takes note of an answer, or that none came.
func (s *session) answered(what string, key artifact.Key, status int, err error) {
	s.event()
	switch {
	case err != nil && s.mayBreak():
		s.count(what + ": cut by the end of the server")
	case err != nil:
		s.violate("%s: %s: no answer, though the server should live: %v", key, what, err)
	case status == http.StatusOK, status == http.StatusCreated, status == http.StatusNotFound, status == http.StatusConflict,
		status == http.StatusUnprocessableEntity, status == http.StatusServiceUnavailable:
		s.count(fmt.Sprintf("%s: %d", what, status))
	default:
		s.violate("%s: %s: status %d", key, what, status)
	}
}

// body is the body of an upload.
type body struct {
	session *session
	data    []byte
	end     error // instead of io.EOF
}

// errCut ends an upload that its client gives up.
var errCut = errors.New("cut by the client")

func (b *body) Read(p []byte) (int, error) {
	b.session.event()
	if len(b.data) == 0 {
		if b.end != nil {
			return 0, b.end
		}
		return 0, io.EOF
	}
	n := copy(p, b.data[:min(len(b.data), pieceSize)])
	b.data = b.data[n:]
	return n, nil
}

// pieceSize is the most bytes of an upload between two events.
const pieceSize = 16 << 10

// sink is what a download is written to.
type sink struct {
	session *session
	hash    hash.Hash
	size    int64
}

func (s *sink) Write(p []byte) (int, error) {
	s.session.event()
	s.size += int64(len(p))
	return s.hash.Write(p)
}

func (s *sink) content() content { return content{artifact.Digest(s.hash.Sum(nil)), s.size} }
