package server_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/server"
)

// FuzzRange asks for ranges of an artifact: whatever they are, what comes is all of it, or the bytes
// that the answer says, or a refusal.
func FuzzRange(f *testing.F) {
	etag := `"` + hashOf(artifactA) + `"`
	for _, asked := range []string{
		"bytes=0-9", "bytes=0-0", "bytes=5640-", "bytes=-1", "bytes=-0", "bytes=-+0", "bytes=- 0", "bytes=-5641", "bytes=-9999", "bytes=0-99999", "bytes=5641-", "bytes=5641-5642",
		"bytes=0-9,1000-1999,-1", "bytes=0-5640,0-5640", "bytes=9-0", "bytes=", "bytes=,", "bytes= 0-1 , 5-6 ,", "bytes=0-1,9999-", "bytes=9999-,9998-",
		"bytes=+1-2", "bytes=0x1-2", "bytes=--1", "bytes=1--2", "bytes=9223372036854775807-9223372036854775808", "bytes=18446744073709551616-",
		"BYTES=1-2", "bytes =1-2", "files=1-2", "bytes", "=", "", "bytes=1-2=3", strings.Repeat("bytes=0-0", 2),
		"bytes=" + strings.Repeat("0-0,", 300) + "1-1", "bytes=" + strings.Repeat("0-,", 300) + "1-1",
	} {
		f.Add(asked, "")
	}
	for _, condition := range []string{
		etag, "W/" + etag, `"1"`, "*", lastModifiedOfA, "Sat, 03 Feb 2024 04:05:05 GMT", "Saturday, 03-Feb-24 04:05:06 GMT", "yesterday", `"`, "W/",
	} {
		f.Add("bytes=1-2", condition)
		f.Add("bytes=1-2,3-4", condition)
	}
	s := startServer(f, setup{})
	s.putA(f)
	handler := s.Handler()
	f.Fuzz(func(t *testing.T, asked, condition string) {
		s.log.clear()
		request := httptest.NewRequest("GET", "/v1/artifacts/"+keyA, nil)
		request.Header["Range"] = []string{asked}
		if condition != "" {
			request.Header["If-Range"] = []string{condition}
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, request)
		if lines := s.log.find(slog.LevelWarn, ""); len(lines) > 0 {
			t.Errorf("logged %v", lines)
		}
		if at, err := http.ParseTime(condition); w.Code != 200 && condition != "" && condition != etag && (err != nil || at.Unix() != storedOfA) {
			t.Errorf("got %d though the condition does not hold", w.Code)
		}
		unit, _, _ := strings.Cut(asked, "=")
		if w.Code != 200 && strings.ToLower(unit) != "bytes" {
			t.Errorf("got %d for a range that has to be ignored", w.Code)
		}
		checkRanges(t, w.Result(), w.Body.Bytes())
	})
}

// checkRanges checks that an answer has the bytes of artifactA that it says.
func checkRanges(t *testing.T, response *http.Response, body []byte) {
	t.Helper()
	contentRange := response.Header.Get("Content-Range")
	if response.StatusCode == 416 {
		if contentRange != "" && contentRange != "bytes */5641" {
			t.Errorf("Content-Range is %q", contentRange)
		}
		checkErrorBody(t, "GET", response, body, "Range not satisfiable: the artifact has 5641 bytes")
		return
	}
	if got := response.Header.Get("X-Artifact-Hash"); got != hashOf(artifactA) {
		t.Errorf("X-Artifact-Hash is %q", got)
	}
	if got := response.Header.Get("Content-Length"); got != strconv.Itoa(len(body)) {
		t.Errorf("Content-Length is %s; the body has %d bytes", got, len(body))
	}
	switch mediaType, parameters, _ := mime.ParseMediaType(response.Header.Get("Content-Type")); {
	case response.StatusCode == 200:
		if contentRange != "" || !bytes.Equal(body, artifactA) {
			t.Errorf("got %d bytes with Content-Range %q; want all", len(body), contentRange)
		}
	case response.StatusCode != 206:
		t.Errorf("got %s %.200q", response.Status, body)
	case mediaType == "multipart/byteranges":
		parts := multipart.NewReader(bytes.NewReader(body), parameters["boundary"])
		for n := 0; ; n++ {
			part, err := parts.NextRawPart()
			if err == io.EOF && n > 1 {
				break
			}
			if err != nil {
				t.Fatalf("part %d: %v", n, err)
			}
			content, err := io.ReadAll(part)
			if err != nil {
				t.Fatal(err)
			}
			checkRange(t, part.Header.Get("Content-Range"), content)
		}
	default:
		checkRange(t, contentRange, body)
	}
}

func checkRange(t *testing.T, contentRange string, content []byte) {
	t.Helper()
	var first, last int
	_, err := fmt.Sscanf(contentRange, "bytes %d-%d/5641", &first, &last)
	if err != nil || fmt.Sprintf("bytes %d-%d/5641", first, last) != contentRange || first < 0 || last < first || last > 5640 {
		t.Errorf("Content-Range is %q", contentRange)
	} else if !bytes.Equal(content, artifactA[first:last+1]) {
		t.Errorf("got %d bytes, which are not %s", len(content), contentRange)
	}
}

// FuzzREST sends requests: whatever they are, the answers are those that are documented, and no upload
// leaves anything behind that was not stored. In the input, words in braces stand for what a mutation
// does not find by itself: {a} is a key that is stored, {b} one that is not, {B} a sound artifact for
// it of {x} bytes in hexadecimal digits, and {n} the length of the body.
//
// Each input is sent twice: as it is, on a socket, and if net/http takes it for a request, also to the
// handler alone.
func FuzzREST(f *testing.F) {
	const upload = "Content-Length: {n}"
	for _, seed := range []struct{ method, target, header, body string }{
		{"PUT", "/v1/artifacts/{b}", upload, "{B}"},
		{"PUT", "/v1/artifacts/{b}", upload, "{B}x"},
		{"PUT", "/v1/artifacts/{b}", "Transfer-Encoding: chunked", "{x};x=y\r\n{B}\r\n0\r\nX: y\r\n\r\n"},
		{"PUT", "/v1/artifacts/{b}", "Content-Length: 1000000000000", "{B}"},
		{"PUT", "/v1/artifacts/{b}", upload + "\r\nExpect: 100-continue", "{B}"},
		{"PUT", "/v1/artifacts/{a}", upload, "{B}"},
		{"PUT", "/v1/artifacts/{b}", upload, "\x28\xB5\x2F\xFD\x00\x58\x01\x00\x00"},
		{"PUT", "/v1/artifacts/{b}", upload, ""},
		{"PUT", "/v1/artifacts/{b}", "", ""},
		{"PUT", "/v1/artifacts/none", upload, "{B}"},
		{"PUT", "/v1/artifacts/{b}", upload + "\r\nContent-Length: 5", "{B}"},
		{"PUT", "/v1/artifacts/{b}", "Transfer-Encoding: gzip", "{B}"},
		{"GET", "/v1/artifacts/{a}", "", ""},
		{"GET", "/v1/artifacts/{a}", "Range: bytes=1-2\r\nIf-None-Match: *\r\nIf-Match: \"1\"", ""},
		{"GET", "/v1/artifacts/{a}", "If-Unmodified-Since: Sat, 03 Feb 2001 04:05:06 GMT", ""},
		{"GET", "/v1/artifacts/{a}", "Range: bytes=9999-", ""},
		{"HEAD", "/v1/artifacts/{a}", "If-Modified-Since: Sat, 03 Feb 2100 04:05:06 GMT", ""},
		{"GET", "/v1/artifacts/{b}", "", ""},
		{"GET", "/v1/artifacts/{a}/metadata", "Accept: text/html", ""},
		{"HEAD", "/v1/artifacts/{a}/metadata", "", ""},
		{"GET", "/v1/artifacts/{a}/metadata?cache_key={b}&x=y", "Grpc-Timeout: 1n", ""},
		{"GET", "/v1/artifacts/{a}/files?page_size=1&page_token=YQ", "Grpc-Metadata-X: y", ""},
		{"GET", "/v1/artifacts/{a}/files?page_size=-1", "", ""},
		{"GET", "/v1/artifacts/{a}/files?page_size=x&page_token=%zz", "", ""},
		{"GET", "/v1/artifacts/{b}/files", "Content-Type: application/grpc", ""},
		{"DELETE", "/v1/artifacts/{a}", "", ""},
		{"POST", "/v1/artifacts/{a}/files", upload, "page_size=1"},
		{"GET", "/v1/artifacts//{a}/../x%2F%00", "", ""},
		{"GET", "/healthz", "Connection: close", ""},
		{"GET", "/readyz", "", "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"OPTIONS", "*", "", ""},
		{"CONNECT", "x:1", "", ""},
		{"GET", "http://x/v1/artifacts/{a}", "Host: y", ""},
		{"PRI", "*", "", "SM\r\n\r\n"},
	} {
		f.Add(seed.method, seed.target, seed.header, seed.body)
	}

	b := cachetest.Key("b")
	sound := string(cachetest.Sound(b, map[string]string{"b": "beta"}))
	words := strings.NewReplacer("{a}", keyA, "{b}", b.String(), "{B}", sound, "{x}", strconv.FormatInt(int64(len(sound)), 16))
	s := startServer(f, setup{change: func(c *server.Config) { c.IdleTimeout = patience }})
	s.putA(f)
	handler := s.Handler()
	f.Fuzz(func(t *testing.T, method, target, header, body string) {
		s.log.clear()
		body = words.Replace(body)
		header = strings.ReplaceAll(words.Replace(header), "{n}", strconv.Itoa(len(body)))
		raw := method + " " + words.Replace(target) + " HTTP/1.1\r\nHost: x\r\n" + header + "\r\n\r\n" + body

		conn := dial(t, s)
		defer conn.Close()
		// The server may close the connection before all is sent.
		io.WriteString(conn, raw)
		conn.Conn.(interface{ CloseWrite() error }).CloseWrite()
		answer, err := io.ReadAll(conn)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("no end of the answer: %.500q", answer)
		}
		checkAnswers(t, raw, answer, err)
		check := func() {
			t.Helper()
			waitUntil(t, "no request is in flight", func() bool { return s.Requests() == 0 })
			if n := s.uploadsInProgress(); n != 0 {
				t.Errorf("%d temporary files are left", n)
			}
			if lines := s.log.find(slog.LevelError, ""); len(lines) > 0 {
				t.Errorf("logged as errors: %v", lines)
			}
			for _, path := range []string{s.path(b), strings.TrimSuffix(s.path(b), "zst") + "json"} {
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Fatal(err)
				}
			}
		}
		check()

		request, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
		if err != nil || strings.Contains(header, "Grpc-Timeout") {
			return
		}
		w := httptest.NewRecorder()
		func() {
			defer func() {
				// This is how a handler cuts an answer. For a fault there is a line in the log.
				if p := recover(); p != nil && p != http.ErrAbortHandler {
					panic(p)
				}
			}()
			handler.ServeHTTP(w, request)
		}()
		checkDocumented(t, request.Method, w.Result(), w.Body.Bytes())
		check()
	})
}

// checkAnswers checks each of the answers to what was sent on a connection.
func checkAnswers(t *testing.T, raw string, answers []byte, cut error) {
	t.Helper()
	if strings.HasPrefix(raw, "PRI * HTTP/2.0") {
		return
	}
	requests := bufio.NewReader(strings.NewReader(raw))
	for in := bufio.NewReader(bytes.NewReader(answers)); ; {
		request, err := http.ReadRequest(requests)
		if err != nil {
			request = &http.Request{Method: "GET"}
		} else {
			io.Copy(io.Discard, request.Body)
		}
		response, err := http.ReadResponse(in, request)
		for err == nil && response.StatusCode == 100 {
			response, err = http.ReadResponse(in, request)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return
		}
		if err != nil {
			t.Fatalf("got no response: %v\n%.500q", err, answers)
		}
		body, err := io.ReadAll(response.Body)
		if err != nil && cut == nil {
			t.Errorf("the body of %s ends with %v", response.Status, err)
		}
		checkDocumented(t, request.Method, response, body)
		if strings.HasPrefix(response.Header.Get("Content-Type"), "text/plain") {
			return // net/http's own, the last one, and with a body whatever the method
		}
	}
}

// documented are the statuses over REST that need no trouble on the server's side.
var documented = []int{200, 201, 206, 304, 400, 404, 405, 409, 412, 413, 416, 422, 504}

// checkDocumented holds any answer to the form that is documented.
func checkDocumented(t *testing.T, method string, response *http.Response, body []byte) {
	t.Helper()
	code, contentType := response.StatusCode, response.Header.Get("Content-Type")
	// What is no request that HTTP knows, net/http answers itself.
	if strings.HasPrefix(contentType, "text/plain") && slices.Contains([]int{400, 431, 501, 505}, code) || code == 417 && len(body) == 0 {
		return
	}
	if !slices.Contains(documented, code) {
		t.Errorf("%s got %s, which is not documented, with %.200q", method, response.Status, body)
	}
	if code < 400 || code == 412 {
		return
	}
	if contentType != "application/json" {
		t.Errorf("%s got %s with Content-Type %q", method, response.Status, contentType)
	}
	if method == http.MethodHead {
		return
	}
	var members map[string]string
	if err := json.Unmarshal(body, &members); err != nil || len(members) != 1 || len(members["error"]) < 10 || strings.ContainsAny(members["error"], "\n\r") {
		t.Errorf("%s got %s with %.500q", method, response.Status, body)
	}
}
