package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// putArtifact is PUT /v1/artifacts/{cache_key}.
func (s *Server) putArtifact(w http.ResponseWriter, r *http.Request) {
	key, err := artifact.ParseKey(r.PathValue("cache_key"))
	if err == nil {
		_, err = s.cache.Put(r.Context(), key, r.ContentLength, r.Body)
	}
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	w.WriteHeader(http.StatusCreated)
}

// getArtifact is GET /v1/artifacts/{cache_key}.
func (s *Server) getArtifact(w http.ResponseWriter, r *http.Request) {
	key, err := artifact.ParseKey(r.PathValue("cache_key"))
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	file, info, err := s.cache.Get(r.Context(), key)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	defer file.Close()
	s.serveContent(w, r, info, file)
}

// headArtifact is HEAD /v1/artifacts/{cache_key}: getArtifact without looking at the bytes.
func (s *Server) headArtifact(w http.ResponseWriter, r *http.Request) {
	key, err := artifact.ParseKey(r.PathValue("cache_key"))
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	info, err := s.cache.Stat(r.Context(), key)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	s.serveContent(w, r, info, io.NewSectionReader(nil, 0, info.Size))
}

// serveContent answers with the headers of an artifact and, unless the method is HEAD, its content,
// as ranges and preconditions (RFC 9110, sections 13 and 14) ask for.
func (s *Server) serveContent(w http.ResponseWriter, r *http.Request, info artifact.Info, content io.ReadSeeker) {
	hash := info.Hash.String()
	header := w.Header()
	header.Set("Content-Type", "application/zstd")
	header.Set("X-Artifact-Hash", hash)
	header.Set("ETag", `"`+hash+`"`)
	d := &download{ResponseWriter: w, refuse: func() {
		s.refuse(w, r, fmt.Errorf("%w: the artifact has %d bytes", errRange, info.Size))
	}}
	http.ServeContent(d, r, "", info.StoredAt, content)
	if r.Method == http.MethodHead || d.err() == nil {
		return
	}
	f := internal
	if size, err := content.Seek(0, io.SeekEnd); err == nil && size == info.Size {
		f = faultOf(context.Canceled) // the content is all there, so it was the client that left
	}
	s.logFault(r.Context(), r.Method+" "+r.URL.Path, f, d.err())
	panic(http.ErrAbortHandler) // a short answer must not look like a whole one
}

// download is a ResponseWriter that counts what of an artifact was sent.
type download struct {
	http.ResponseWriter
	refuse func() // answers a range that can't be satisfied

	refused  bool
	sent     int64
	writeErr error
}

func (d *download) WriteHeader(status int) {
	if status == http.StatusRequestedRangeNotSatisfiable {
		d.refused = true
		for _, name := range []string{"X-Artifact-Hash", "ETag", "Last-Modified"} {
			d.Header().Del(name) // of another answer
		}
		d.refuse()
		return
	}
	d.ResponseWriter.WriteHeader(status)
}

func (d *download) Write(p []byte) (int, error) {
	if d.refused {
		return len(p), nil
	}
	n, err := d.ResponseWriter.Write(p)
	d.count(int64(n), err)
	return n, err
}

// ReadFrom lets net/http use sendfile(2).
func (d *download) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(d.ResponseWriter, r)
	d.count(n, err)
	return n, err
}

func (d *download) count(n int64, err error) {
	d.sent += n
	if err != nil {
		d.writeErr = err
	}
}

// err returns an error if less was sent than the header says.
func (d *download) err() error {
	want, err := strconv.ParseInt(d.Header().Get("Content-Length"), 10, 64)
	if d.refused || err != nil || d.sent == want {
		return nil
	}
	return errors.Join(fmt.Errorf("sent %d of %d bytes", d.sent, want), d.writeErr)
}

// refuse answers a request with an error, and sees to it that a client which is still sending its
// body gets to read the answer.
//
// When a handler returns, net/http reads no more than 256 KiB of what is left of the body; if there
// is more it closes an HTTP/1 connection, which resets it, and resets an HTTP/2 stream. Many clients
// then lose the answer, since they do not look for one before they have sent everything. So the
// answer is sent first, and then the body is read and thrown away, within bounds.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	f := faultOf(err)
	s.logFault(r.Context(), r.Method+" "+r.URL.Path, f, err)
	if r.Body == http.NoBody {
		writeFault(w, f)
		return
	}
	connection := http.NewResponseController(w)
	connection.EnableFullDuplex() // or an HTTP/1 answer would wait for the body
	writeFault(w, f)
	connection.Flush()
	connection.SetReadDeadline(time.Now().Add(s.config.DrainTimeout))
	io.CopyN(io.Discard, r.Body, s.config.DrainSize)
}

// writeFault writes a fault as every error is written over REST.
func writeFault(w http.ResponseWriter, f fault) {
	if f.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, f.status, map[string]string{"error": f.sentence})
}

func writeJSON(w http.ResponseWriter, status int, value any) {
	body, err := json.Marshal(value)
	if err != nil {
		panic(err) // only values that can be marshalled are written
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}
