package server_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/server"
)

// noKeys are keys that are none, and what is said of them.
var noKeys = []struct {
	name, key string
	target    string // in a path, if it needs escapes there
	sentence  string
}{
	{"31 digits", strings.Repeat("a", 31), "", "Invalid cache key: it has 31 characters; a key has 32 to 128 hexadecimal digits"},
	{"129 digits", strings.Repeat("a", 129), "", "Invalid cache key: it has 129 characters; a key has 32 to 128 hexadecimal digits"},
	{"a letter behind f", keyA[:63] + "g", "", "Invalid cache key: character 64 is 'g'; a key has 32 to 128 hexadecimal digits"},
	{"a colon", keyA[:40] + ":metadata", "", "Invalid cache key: character 41 is ':'; a key has 32 to 128 hexadecimal digits"},
	{"a slash", keyA[:8] + "/" + keyA[8:], keyA[:8] + "%2F" + keyA[8:], "Invalid cache key: character 9 is '/'; a key has 32 to 128 hexadecimal digits"},
	{"an escape that is escaped", keyA[:8] + "%61" + keyA[8:], keyA[:8] + "%2561" + keyA[8:], "Invalid cache key: character 9 is '%'; a key has 32 to 128 hexadecimal digits"},
	{"a NUL", keyA + "\x00", keyA + "%00", `Invalid cache key: character 65 is '\x00'; a key has 32 to 128 hexadecimal digits`},
	{"a space", " " + keyA, "%20" + keyA, "Invalid cache key: character 1 is ' '; a key has 32 to 128 hexadecimal digits"},
	{"a full-width digit", keyA + "\uff11", keyA + "%EF%BC%91", "Invalid cache key: character 65 is 'ï'; a key has 32 to 128 hexadecimal digits"},
}

func getCases() []apiCase {
	a := cachetest.Key("a")
	etag := `"` + hashOf(artifactA) + `"`
	const lastModified = lastModifiedOfA
	whole := map[string]string{
		"Content-Type":     "application/zstd",
		"Content-Length":   "5641",
		"Content-Range":    "",
		"X-Artifact-Hash":  hashOf(artifactA),
		"ETag":             etag,
		"Last-Modified":    lastModified,
		"Accept-Ranges":    "bytes",
		"Content-Encoding": "",
		"Retry-After":      "",
	}
	part := func(contentRange, length string) map[string]string {
		return with(whole, "Content-Range", contentRange, "Content-Length", length)
	}
	notModified := with(whole, "Content-Type", "", "Content-Length", "", "Accept-Ranges", "", "Last-Modified", "")
	known := knownOfA()
	known.StoredAt = &timestamppb.Timestamp{Seconds: 1706933106}

	// isA checks the answer to a download of a range.
	isA := func(from, to int, chunks ...int) func(*testing.T, answer) {
		return func(t *testing.T, got answer) {
			if !proto.Equal(got.artifact, known) {
				t.Errorf("the first message is %v; want %v", got.artifact, known)
			}
			if string(got.content()) != string(artifactA[from:to]) {
				t.Errorf("got %d bytes; want those from %d to %d", len(got.content()), from, to)
			}
			checkChunks(t, got, chunks)
		}
	}
	miss := apiCase{
		status: 404, code: codes.NotFound, reason: "ARTIFACT_NOT_FOUND",
		header:   map[string]string{"Content-Length": "30", "ETag": "", "X-Artifact-Hash": "", "Accept-Ranges": ""},
		sentence: "Artifact not found",
	}
	missed := func(name string, rest *restRequest, grpc grpcCall) apiCase {
		c := miss
		c.name, c.rest, c.grpc = name, rest, grpc
		return c
	}

	large := cachetest.Random(a, 600_000)
	havingLarge := func(t *testing.T, s *testServer) { s.put(t, a, large) }
	isLarge := func(from, to int, chunks ...int) func(*testing.T, answer) {
		return func(t *testing.T, got answer) {
			if string(got.content()) != string(large[from:to]) {
				t.Errorf("got %d bytes; want those from %d to %d", len(got.content()), from, to)
			}
			checkChunks(t, got, chunks)
		}
	}

	cases := []apiCase{
		{
			name: "get", given: havingA,
			rest:   get(keyA),
			grpc:   download(keyA, 0, 0),
			status: 200, header: whole, body: artifactA,
			answer: isA(0, 5641, 5641),
		},
		{
			name: "get of a key in upper case", given: havingA,
			rest:   get(strings.ToUpper(keyA)),
			grpc:   download(strings.ToUpper(keyA), 0, 0),
			status: 200, header: whole, body: artifactA,
			answer: isA(0, 5641, 5641),
		},
		{
			name: "get by a client that accepts encodings", given: havingA,
			rest:   get(keyA, "Accept-Encoding", "gzip, zstd, br", "Accept", "text/html"),
			status: 200, header: whole, body: artifactA,
		},
		{
			name: "get of what does not fit into one message", given: havingLarge,
			rest:   get(keyA),
			grpc:   download(keyA, 0, 0),
			status: 200, body: large,
			answer: isLarge(0, len(large), 262144, 262144, len(large)-2*262144),
		},
		{
			name: "get of exactly two messages", given: havingLarge,
			rest:   get(keyA, "Range", "bytes=1000-525287"),
			grpc:   download(keyA, 1000, 524288),
			status: 206, body: large[1000:525288],
			answer: isLarge(1000, 525288, 262144, 262144),
		},
		{
			name: "head", given: havingA,
			rest:   head(keyA),
			grpc:   stat(keyA),
			status: 200, header: whole,
			answer: func(t *testing.T, got answer) {
				if !proto.Equal(got.artifact, known) {
					t.Errorf("got %v; want %v", got.artifact, known)
				}
			},
		},

		missed("get of a miss", get(keyA), download(keyA, 0, 0)),
		missed("get of a part of a miss", get(keyA, "Range", "bytes=1-2"), download(keyA, 1, 2)),
		missed("get of a miss that is known by its tag", get(keyA, "If-None-Match", "*"), nil),
		missed("head of a miss", head(keyA), stat(keyA)),

		{
			name: "the first bytes", given: havingA,
			rest:   get(keyA, "Range", "bytes=0-9"),
			grpc:   download(keyA, 0, 10),
			status: 206, header: part("bytes 0-9/5641", "10"), body: artifactA[:10],
			answer: isA(0, 10, 10),
		},
		{
			name: "bytes from the middle", given: havingA,
			rest:   get(keyA, "Range", "bytes=1000-2999"),
			grpc:   download(keyA, 1000, 2000),
			status: 206, header: part("bytes 1000-2999/5641", "2000"), body: artifactA[1000:3000],
			answer: isA(1000, 3000, 2000),
		},
		{
			name: "bytes to the end", given: havingA,
			rest:   get(keyA, "Range", "bytes=5000-"),
			grpc:   download(keyA, 5000, 0),
			status: 206, header: part("bytes 5000-5640/5641", "641"), body: artifactA[5000:],
			answer: isA(5000, 5641, 641),
		},
		{
			name: "the last byte", given: havingA,
			rest:   get(keyA, "Range", "bytes=5640-5640"),
			grpc:   download(keyA, 5640, 1),
			status: 206, header: part("bytes 5640-5640/5641", "1"), body: artifactA[5640:],
			answer: isA(5640, 5641, 1),
		},
		{
			name: "bytes over the end", given: havingA,
			rest:   get(keyA, "Range", "bytes=5000-1000000"),
			grpc:   download(keyA, 5000, 1<<62),
			status: 206, header: part("bytes 5000-5640/5641", "641"), body: artifactA[5000:],
			answer: isA(5000, 5641, 641),
		},
		{
			name: "the last bytes", given: havingA,
			rest:   get(keyA, "Range", "bytes=-7"),
			status: 206, header: part("bytes 5634-5640/5641", "7"), body: artifactA[5634:],
		},
		{
			name: "head of a range", given: havingA,
			rest:   head(keyA, "Range", "bytes=1000-2999"),
			status: 206, header: part("bytes 1000-2999/5641", "2000"),
		},
		{
			name: "an empty range at the end", given: havingA,
			grpc:   download(keyA, 5641, 0),
			answer: isA(5641, 5641),
		},
		{
			name: "a range behind the end", given: havingA,
			rest:   get(keyA, "Range", "bytes=5642-"),
			grpc:   download(keyA, 5642, 0),
			status: 416, code: codes.OutOfRange, reason: "RANGE_NOT_SATISFIABLE",
			header: map[string]string{
				"Content-Range": "bytes */5641", "ETag": "", "X-Artifact-Hash": "", "Last-Modified": "", "Accept-Ranges": "", "X-Content-Type-Options": "",
			},
			sentence:     "Range not satisfiable: offset is 5642, but the artifact has 5641 bytes",
			restSentence: "Range not satisfiable: the artifact has 5641 bytes",
		},
		{
			name: "a range at the end", given: havingA,
			rest:   get(keyA, "Range", "bytes=5641-"),
			status: 416, header: map[string]string{"Content-Range": "bytes */5641"},
			sentence: "Range not satisfiable: the artifact has 5641 bytes",
		},
		{
			name: "head of a range behind the end", given: havingA,
			rest:   head(keyA, "Range", "bytes=5641-"),
			status: 416, header: map[string]string{"Content-Range": "bytes */5641"},
			sentence: "Range not satisfiable: the artifact has 5641 bytes",
		},
		{
			name: "a range of another unit", given: havingA,
			rest:   get(keyA, "Range", "files=0-9"),
			status: 200, header: whole, body: artifactA,
		},
		{
			name: "a range of no unit", given: havingA,
			rest:   get(keyA, "Range", "0-9"),
			status: 200, header: whole, body: artifactA,
		},
		{
			name: "head of a range of another unit", given: havingA,
			rest:   head(keyA, "Range", "files=9999-"),
			status: 200, header: whole,
		},
		{
			name: "a range of bytes in capitals", given: havingA,
			rest:   get(keyA, "Range", "BYTES=0-9"),
			status: 206, header: part("bytes 0-9/5641", "10"), body: artifactA[:10],
		},
		{
			name: "the last 0 bytes", given: havingA,
			rest:   get(keyA, "Range", "bytes=-0"),
			status: 416, header: map[string]string{"Content-Range": "bytes */5641"},
			sentence: "Range not satisfiable: the artifact has 5641 bytes",
		},
		{
			name: "the last 0 bytes, and the first ones", given: havingA,
			rest:   get(keyA, "Range", "bytes= -00 ,0-9"),
			status: 206, header: part("bytes 0-9/5641", "10"), body: artifactA[:10],
		},
		{
			name: "a range that is malformed", given: havingA,
			rest:   get(keyA, "Range", "bytes=9-0"),
			status: 416, header: map[string]string{"Content-Range": ""},
			sentence: "Range not satisfiable: the artifact has 5641 bytes",
		},

		{
			name: "a negative offset", given: havingA,
			grpc: download(keyA, -1, 0),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: offset is -1 and length 0; neither must be negative",
		},
		{
			name: "a negative length", given: havingA,
			grpc: download(keyA, 0, -1),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: offset is 0 and length -1; neither must be negative",
		},

		{
			name: "a range if the artifact is still the same", given: havingA,
			rest:   get(keyA, "Range", "bytes=0-9", "If-Range", etag),
			status: 206, header: part("bytes 0-9/5641", "10"), body: artifactA[:10],
		},
		{
			name: "a range if the artifact is still that old", given: havingA,
			rest:   get(keyA, "Range", "bytes=0-9", "If-Range", lastModified),
			status: 206, header: part("bytes 0-9/5641", "10"), body: artifactA[:10],
		},
		{
			name: "a range if the artifact is another", given: havingA,
			rest:   get(keyA, "Range", "bytes=0-9", "If-Range", `"`+strings.Repeat("0", 64)+`"`),
			status: 200, header: whole, body: artifactA,
		},
		{
			name: "a range if the artifact is older", given: havingA,
			rest:   get(keyA, "Range", "bytes=0-9", "If-Range", "Sat, 03 Feb 2024 04:05:05 GMT"),
			status: 200, header: whole, body: artifactA,
		},
		{
			name: "get if it is another", given: havingA,
			rest:   get(keyA, "If-None-Match", etag),
			status: 304, header: notModified,
		},
		{
			name: "get if it is none of several", given: havingA,
			rest:   get(keyA, "If-None-Match", `"1", W/`+etag),
			status: 304, header: notModified,
		},
		{
			name: "get if it is another, and it is", given: havingA,
			rest:   get(keyA, "If-None-Match", `"1"`),
			status: 200, header: whole, body: artifactA,
		},
		{
			name: "head if it is another", given: havingA,
			rest:   head(keyA, "If-None-Match", etag),
			status: 304, header: notModified,
		},
		{
			name: "get if it is newer", given: havingA,
			rest:   get(keyA, "If-Modified-Since", lastModified),
			status: 304, header: notModified,
		},
		{
			name: "get if it is newer, and it is", given: havingA,
			rest:   get(keyA, "If-Modified-Since", "Sat, 03 Feb 2024 04:05:05 GMT"),
			status: 200, header: whole, body: artifactA,
		},
		{
			name: "get if it is the same", given: havingA,
			rest:   get(keyA, "If-Match", etag),
			status: 200, header: whole, body: artifactA,
		},
		{
			name: "get if it is the same, and it is not", given: havingA,
			rest:   get(keyA, "If-Match", `"1"`),
			status: 412, header: map[string]string{"Content-Length": "0"},
		},
		{
			name: "get if it is not newer, and it is", given: havingA,
			rest:   get(keyA, "If-Unmodified-Since", "Sat, 03 Feb 2024 04:05:05 GMT"),
			status: 412, header: map[string]string{"Content-Length": "0"},
		},
	}
	for _, k := range noKeys {
		target := k.target
		if target == "" {
			target = k.key
		}
		bad := apiCase{status: 400, code: codes.InvalidArgument, reason: "INVALID_CACHE_KEY", sentence: k.sentence}
		for _, c := range []struct {
			name string
			rest *restRequest
			grpc grpcCall
		}{
			{"put", put(target, artifactA), uploadAll(k.key, artifactA)},
			{"put of an undeclared size", putUndeclared(target, artifactA), upload(headerWithSize(k.key, 5641))},
			{"get", get(target), download(k.key, 0, 0)},
			{"head", head(target), nil},
			{"metadata", get(target + "/metadata"), stat(k.key)},
			{"files", get(target + "/files"), list(k.key, 0, "")},
		} {
			bad.name, bad.rest, bad.grpc = fmt.Sprintf("%s of a key with %s", c.name, k.name), c.rest, c.grpc
			cases = append(cases, bad)
		}
	}
	return cases
}

// with returns header with changes, given as pairs of name and value.
func with(header map[string]string, changes ...string) map[string]string {
	changed := map[string]string{}
	for name, value := range header {
		changed[name] = value
	}
	for i := 0; i < len(changes); i += 2 {
		changed[changes[i]] = changes[i+1]
	}
	return changed
}

func checkChunks(t *testing.T, got answer, want []int) {
	t.Helper()
	var sizes []int
	for _, chunk := range got.chunks {
		sizes = append(sizes, len(chunk))
	}
	if !slices.Equal(sizes, want) {
		t.Errorf("the chunks have %v bytes; want %v", sizes, want)
	}
}

// TestSeveralRanges proves that several ranges come as a multipart body.
func TestSeveralRanges(t *testing.T) {
	for _, m := range restMouths() {
		t.Run(m.name, func(t *testing.T) {
			s := startServer(t, setup{})
			havingA(t, s)
			response, body := get(keyA, "Range", "bytes=0-9,1000-1999,-1").do(t, s, m.rest(t, s))
			if response.StatusCode != 206 || response.ContentLength != int64(len(body)) || response.Header.Get("X-Artifact-Hash") != hashOf(artifactA) {
				t.Errorf("got %s with %v and %d bytes", response.Status, response.Header, len(body))
			}
			mediaType, parameters, err := mime.ParseMediaType(response.Header.Get("Content-Type"))
			if mediaType != "multipart/byteranges" || err != nil {
				t.Fatalf("Content-Type is %q; want multipart/byteranges", response.Header.Get("Content-Type"))
			}
			parts := multipart.NewReader(strings.NewReader(string(body)), parameters["boundary"])
			for _, want := range []struct {
				contentRange string
				content      []byte
			}{
				{"bytes 0-9/5641", artifactA[:10]},
				{"bytes 1000-1999/5641", artifactA[1000:2000]},
				{"bytes 5640-5640/5641", artifactA[5640:]},
			} {
				part, err := parts.NextPart()
				if err != nil {
					t.Fatal(err)
				}
				content, err := io.ReadAll(part)
				if err != nil || string(content) != string(want.content) || part.Header.Get("Content-Range") != want.contentRange || part.Header.Get("Content-Type") != "application/zstd" {
					t.Errorf("got %d bytes with %v, %v; want %s", len(content), part.Header, err, want.contentRange)
				}
			}
			if _, err := parts.NextPart(); err != io.EOF {
				t.Errorf("there is a part too many, or %v", err)
			}
		})
	}
}

// TestSendfile proves that net/http is given files in the form in which it sends them by sendfile(2),
// that is, as http.ServeContent gives them.
func TestSendfile(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(artifactA); err != nil {
		t.Fatal(err)
	}
	w := &fileSender{ResponseRecorder: httptest.NewRecorder()}
	http.ServeContent(server.Download(w), httptest.NewRequest("GET", "/", nil), "", time.Time{}, file)
	part, ok := w.from.(*io.LimitedReader)
	if !ok || part.R != io.Reader(file) {
		t.Errorf("the content came from %T; want an *io.LimitedReader of the file", w.from)
	}
}

// fileSender remembers what it was to read from.
type fileSender struct {
	*httptest.ResponseRecorder
	from io.Reader
}

func (f *fileSender) ReadFrom(r io.Reader) (int64, error) {
	f.from = r
	return io.Copy(f.ResponseRecorder, r)
}

// TestPipelined asks for artifacts of many sizes on one connection without waiting, and gets them in order:
// from memory, where a small one is sent together with its header, and from files.
func TestPipelined(t *testing.T) {
	for name, config := range map[string]setup{"memory": {store: &cachetest.Memory{}}, "files": {}} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, config)
			var artifacts [][]byte
			var requests strings.Builder
			for _, size := range []int{0, 1, 500, 510, 900, 2500, 3000, 12000, 14000, 14500, 15000, 16000, 16384, 20000, 70000, 1} {
				key := cachetest.Key(fmt.Sprint(len(artifacts)))
				artifacts = append(artifacts, cachetest.Random(key, size))
				s.put(t, key, artifacts[len(artifacts)-1])
				fmt.Fprintf(&requests, "GET /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\n\r\n", key)
			}
			conn := dial(t, s)
			conn.send(requests.String())
			in := bufio.NewReader(conn)
			for _, want := range artifacts {
				response, err := http.ReadResponse(in, nil)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(response.Body)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("got %d bytes, %v; want the %d of the artifact", len(got), err, len(want))
				}
			}
		})
	}
}
