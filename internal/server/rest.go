package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
)

// putArtifact is PUT /v1/artifacts/{cache_key}.
func (s *Server) putArtifact(w http.ResponseWriter, r *http.Request) {
	key, err := artifact.ParseKey(r.PathValue("cache_key"))
	record := recordOf(w)
	var info artifact.Info
	if err == nil {
		record.key = key
		body := s.paceBody(w, r)
		info, err = s.caller(r.Context()).cache.Put(r.Context(), key, r.ContentLength, body)
		body.pace.stop("send")
	}
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	w.WriteHeader(http.StatusCreated)
	record.stored = &info
	s.comparisons.add(info)
}

// getArtifact is GET /v1/artifacts/{cache_key}.
func (s *Server) getArtifact(w http.ResponseWriter, r *http.Request) {
	key, err := artifact.ParseKey(r.PathValue("cache_key"))
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	recordOf(w).key = key
	file, info, err := s.caller(r.Context()).cache.Get(r.Context(), key)
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
	recordOf(w).key = key
	info, err := s.caller(r.Context()).cache.Stat(r.Context(), key)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	s.serveContent(w, r, info, io.NewSectionReader(nil, 0, info.Size))
}

// serveContent answers with the headers of an artifact and, unless the method is HEAD, its content,
// as ranges and preconditions (RFC 9110, sections 13 and 14) ask for.
func (s *Server) serveContent(w http.ResponseWriter, r *http.Request, info artifact.Info, content io.ReadSeeker) {
	etag := `"` + info.Hash.String() + `"`
	setHeaders(w, "Content-Type", "application/zstd", "X-Artifact-Hash", etag[1:len(etag)-1], "Etag", etag)
	d := &download{ResponseWriter: w}
	if asksForWhole(r) {
		d.sendWhole(r, info, content)
	} else {
		d.refuse = func(status int) {
			err := errors.New("seek in the artifact")
			if status == http.StatusRequestedRangeNotSatisfiable {
				err = fmt.Errorf("%w: the artifact has %d bytes", errRange, info.Size)
			}
			s.refuse(w, r, err)
		}
		http.ServeContent(d, inBytes(r, info.Size), "", info.StoredAt, content)
	}
	if r.Method == http.MethodHead {
		return
	}
	err := d.cutShort()
	if err == nil {
		return
	}
	f := internal
	if d.left {
		f = faultOf(context.Canceled)
	}
	recordOf(w).failed(f, err)
	panic(http.ErrAbortHandler) // a short answer must not look like a whole one
}

// asksForWhole says whether a request has neither a range nor a precondition.
func asksForWhole(r *http.Request) bool {
	for _, name := range []string{"Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"} {
		if _, asked := r.Header[name]; asked {
			return false
		}
	}
	return true
}

// sendWhole does what http.ServeContent does if the whole artifact is asked for, which nearly always is
// so. Content that is in memory is sent from there, which http.ServeContent would copy first.
func (d *download) sendWhole(r *http.Request, info artifact.Info, content io.ReadSeeker) {
	setHeaders(d, "Last-Modified", info.StoredAt.UTC().Format(http.TimeFormat), "Accept-Ranges", "bytes", "Content-Length", strconv.FormatInt(info.Size, 10))
	d.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return
	}
	if file, ok := content.(*os.File); ok {
		io.CopyN(d, file, info.Size)
	} else {
		io.Copy(d, content)
	}
}

// inBytes returns a request as http.ServeContent is to see it for content of size bytes. That refuses
// a range of another unit than "bytes", but such a range has to be ignored, and the name of a unit may
// be in either case. And it answers the last 0 bytes with a part that ends before it begins, but there
// is no such part (RFC 9110, sections 14.1 and 14.2).
func inBytes(r *http.Request, size int64) *http.Request {
	asked := r.Header.Get("Range")
	if asked == "" {
		return r
	}
	unit, set, _ := strings.Cut(asked, "=")
	ranges := strings.Split(set, ",")
	for i, part := range ranges {
		first, last, _ := strings.Cut(part, "-")
		if n, err := strconv.Atoi(strings.TrimSpace(last)); err == nil && n == 0 && strings.TrimSpace(first) == "" {
			ranges[i] = fmt.Sprintf("%d-", size) // which there is not either
		}
	}
	r = r.WithContext(r.Context()) // the header of the original must not change
	r.Header = r.Header.Clone()
	if strings.EqualFold(unit, "bytes") {
		r.Header.Set("Range", "bytes="+strings.Join(ranges, ","))
	} else {
		r.Header.Del("Range")
	}
	return r
}

// download is a ResponseWriter that counts what of an artifact was sent.
type download struct {
	http.ResponseWriter
	refuse func(status int) // answers instead of http.ServeContent

	refused bool
	sent    int64
	err     error // of sending the content
	left    bool  // the error is the client's, not the store's
}

func (d *download) WriteHeader(status int) {
	if status == http.StatusRequestedRangeNotSatisfiable || status == http.StatusInternalServerError {
		d.refused = true
		for _, name := range []string{"X-Artifact-Hash", "ETag", "Last-Modified", "X-Content-Type-Options"} {
			d.Header().Del(name) // of another answer
		}
		d.refuse(status)
		return
	}
	d.ResponseWriter.WriteHeader(status)
}

func (d *download) Write(p []byte) (int, error) {
	if d.refused {
		return len(p), nil
	}
	n, err := d.ResponseWriter.Write(p)
	d.sent += int64(n)
	if err != nil {
		d.err, d.left = err, true
	}
	return n, err
}

// ReadFrom lets net/http use sendfile(2) where it can. Where it can't, Write tells which errors are
// the client's.
func (d *download) ReadFrom(r io.Reader) (n int64, err error) {
	file := fileOf(r)
	if file == nil {
		n, err = io.Copy(struct{ io.Writer }{d}, r)
	} else {
		n, err = io.Copy(d.ResponseWriter, r)
		d.sent += n
		if err != nil {
			_, unreadable := file.Read(make([]byte, 1)) // where the sending stopped
			d.left = unreadable == nil
		}
	}
	if err != nil {
		d.err = err
	}
	return n, err
}

// fileOf returns the file that http.ServeContent copies from, or nil if it is something else.
func fileOf(r io.Reader) *os.File {
	if part, ok := r.(*io.LimitedReader); ok {
		r = part.R
	}
	file, _ := r.(*os.File)
	return file
}

// cutShort returns an error if less was sent than the header says.
func (d *download) cutShort() error {
	want, err := strconv.ParseInt(d.Header().Get("Content-Length"), 10, 64)
	if d.refused || err != nil || d.sent == want {
		return nil
	}
	return errors.Join(fmt.Errorf("sent %d of %d bytes", d.sent, want), d.err)
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
	recordOf(w).failed(f, err)
	if refusal, ok := errors.AsType[*auth.Error](err); ok && f.status == http.StatusUnauthorized {
		w.Header()["Www-Authenticate"] = refusal.Challenges()
	}
	if errors.Is(err, errTooSlow) && r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close")
	}
	if r.Body == http.NoBody || errors.Is(err, errTooSlow) {
		writeFault(w, f)
		return
	}
	connection := http.NewResponseController(w)
	connection.EnableFullDuplex() // or an HTTP/1 answer would wait for the body
	defer r.Body.Close()          // or net/http would read what is left of it beside reading the next request
	writeFault(w, f)
	connection.Flush()

	pause := drainPause
	if r.ProtoMajor > 1 || r.Header.Get("Expect") != "" {
		pause = drainShortPause
	}
	end := time.Now().Add(s.config.DrainTimeout)
	buf := make([]byte, drainBuffer)
	for left := s.config.DrainSize; left > 0; {
		deadline := time.Now().Add(pause)
		if deadline.After(end) {
			deadline = end
		}
		connection.SetReadDeadline(deadline)
		n, err := r.Body.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) && r.ProtoMajor == 1 {
			// net/http would take what may still come for the next request.
			panic(http.ErrAbortHandler)
		}
		if err != nil {
			return
		}
		left -= int64(n)
	}
}

const (
	drainBuffer = 32 << 10
	// drainPause is how long a refused client may be silent before it is taken to send no more.
	drainPause = 5 * time.Second
	// drainShortPause is the same for clients that may well have read the answer: those that asked
	// whether to send the body, and those that speak HTTP/2, some of which stop in the middle of the
	// body and wait for the end of the stream, which net/http sends only when the handler returns.
	drainShortPause = 500 * time.Millisecond
)

// writeFault writes a fault as every error is written over REST.
func writeFault(w http.ResponseWriter, f fault) {
	if f.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, f.status, struct {
		Error string `json:"error"`
	}{f.sentence})
}

func writeJSON(w http.ResponseWriter, status int, value any) {
	body, err := json.Marshal(value)
	if err != nil {
		panic(err) // only values that can be marshalled are written
	}
	setHeaders(w, "Content-Type", "application/json", "Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

// setHeaders sets headers, each given as a name in canonical form and a value.
func setHeaders(w http.ResponseWriter, pairs ...string) {
	header := w.Header()
	values := make([]string, 0, len(pairs)/2) // of all, for each would be allocated by Set
	for i := 0; i < len(pairs); i += 2 {
		values = append(values, pairs[i+1])
		header[pairs[i]] = values[i/2 : i/2+1 : i/2+1]
	}
}
