package server_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// methodCases are those of the JSON methods. What they answer over REST when they succeed is
// JSON, whose spaces mean nothing, so TestMetadata and TestFiles look at that.
func methodCases() []apiCase {
	miss := apiCase{
		status: 404, code: codes.NotFound, reason: "ARTIFACT_NOT_FOUND",
		header:   map[string]string{"Content-Length": "30"},
		sentence: "Artifact not found",
	}
	metadata, files := miss, miss
	metadata.name, metadata.rest, metadata.grpc = "metadata of a miss", get(keyA+"/metadata"), stat(keyA)
	files.name, files.rest, files.grpc = "files of a miss", get(keyA+"/files"), list(keyA, 0, "")

	invalid := func(name, query string, grpc grpcCall, sentence string) apiCase {
		return apiCase{
			name: name, given: havingA,
			rest: get(keyA + "/files?" + query), grpc: grpc,
			status: 400, code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: " + sentence,
		}
	}
	return []apiCase{
		metadata,
		files,
		invalid("files: a negative page size", "page_size=-1", list(keyA, -1, ""),
			"page_size is -1; it must not be negative"),
		invalid("files: the most negative page size", "page_size=-2147483648", list(keyA, -1<<31, ""),
			"page_size is -2147483648; it must not be negative"),
		invalid("files: a page size that is no number", "page_size=many", nil,
			`parsing field "page_size": strconv.ParseInt: parsing "many": invalid syntax`),
		invalid("files: a page size that is no int32", "page_size=2147483648", nil,
			`parsing field "page_size": strconv.ParseInt: parsing "2147483648": value out of range`),
		invalid("files: two page sizes", "page_size=1&page_size=2", nil,
			`too many values for field "page_size": 1, 2`),
		invalid("files: a page token that is none", "page_token=..%2F", list(keyA, 0, "../"),
			"page_token is not one that this server gave out"),
		invalid("files: a query that is none", "page_size=%zz", nil,
			`invalid URL escape "%zz"`),
	}
}

// TestMetadata pins what is said of an artifact as JSON, name by name, and over gRPC.
func TestMetadata(t *testing.T) {
	tests := []struct {
		name  string
		files map[string]string
		json  string // but for hash and size, which depend on the compression
		want  *cachev1.Artifact
	}{
		{
			name:  "of three files",
			files: map[string]string{"dist/index.js": "console.log(1)\n", "stderr.txt": "", "stdout.txt": "built\n"},
			json: `{"cache_key":"` + keyA + `","hash":"<hash>","size":"<size>","uncompressed_size":"21","file_count":"3",` +
				`"package_name":"web","task_name":"build","command":"npm run build",` +
				`"created_at":"2023-11-14T22:13:20Z","stored_at":"<stored_at>","scope":"default"}`,
			want: &cachev1.Artifact{UncompressedSize: 21, FileCount: 3},
		},
		{
			name: "of no files",
			json: `{"cache_key":"` + keyA + `","hash":"<hash>","size":"<size>","uncompressed_size":"0","file_count":"0",` +
				`"package_name":"web","task_name":"build","command":"npm run build",` +
				`"created_at":"2023-11-14T22:13:20Z","stored_at":"<stored_at>","scope":"default"}`,
			want: &cachev1.Artifact{},
		},
	}
	for _, test := range tests {
		content := cachetest.Sound(cachetest.Key("a"), test.files)
		for _, m := range mouths {
			t.Run(test.name+"/"+m.name, func(t *testing.T) {
				t.Parallel()
				s := startServer(t, setup{})
				s.put(t, cachetest.Key("a"), content)
				info, err := s.cache.Stat(t.Context(), cachetest.Key("a"))
				if err != nil {
					t.Fatal(err)
				}
				if m.grpc != nil {
					got, err := stat(keyA)(t.Context(), cachev1.NewArtifactServiceClient(m.grpc(t, s)))
					want := proto.CloneOf(test.want)
					want.CacheKey, want.Hash, want.Size = keyA, hashOf(content), int64(len(content))
					want.PackageName, want.TaskName, want.Command = "web", "build", "npm run build"
					want.CreatedAt = &timestamppb.Timestamp{Seconds: 1700000000}
					want.StoredAt, want.Scope = timestamppb.New(info.StoredAt), "default"
					if err != nil || !proto.Equal(got.artifact, want) {
						t.Errorf("got %v, %v; want %v", got.artifact, err, want)
					}
					return
				}
				storedAt, err := protojson.Marshal(timestamppb.New(info.StoredAt)) // with as many digits as it takes
				if err != nil {
					t.Fatal(err)
				}
				want := strings.NewReplacer("<hash>", hashOf(content), "<size>", fmt.Sprint(len(content)), `"<stored_at>"`, string(storedAt)).Replace(test.json)
				transport := m.rest(t, s)
				if got := getJSON(t, s, transport, get(keyA+"/metadata")); string(got) != want {
					t.Errorf("got %s; want %s", got, want)
				}
				if got := getJSON(t, s, transport, get(strings.ToUpper(keyA)+"/metadata?unknown=1")); string(got) != want {
					t.Errorf("for the key in upper case got %s; want %s", got, want)
				}
			})
		}
	}
}

// getJSON returns the JSON answer to a request without its spaces.
func getJSON(t *testing.T, s *testServer, transport http.RoundTripper, request *restRequest) []byte {
	t.Helper()
	response, body := request.do(t, s, transport)
	if response.StatusCode != 200 || response.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%s: %s %s with Content-Type %q", request.target, response.Status, body, response.Header.Get("Content-Type"))
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, body); err != nil {
		t.Errorf("%s: %v in %s", request.target, err, body)
	}
	return compact.Bytes()
}

// lister lists a page of the files of keyA.
type lister func(t *testing.T, pageSize int32, token string) (paths []string, next string)

// openLister returns a lister that uses a mouth.
func openLister(t *testing.T, s *testServer, m mouth) lister {
	if m.grpc != nil {
		client := cachev1.NewArtifactServiceClient(m.grpc(t, s))
		return func(t *testing.T, pageSize int32, token string) (paths []string, next string) {
			t.Helper()
			got, err := list(keyA, pageSize, token)(t.Context(), client)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range got.files {
				paths = append(paths, f.GetPath())
			}
			return paths, got.next
		}
	}
	transport := m.rest(t, s)
	return func(t *testing.T, pageSize int32, token string) (paths []string, next string) {
		t.Helper()
		query := url.Values{"page_token": {token}}
		if pageSize != 0 {
			query.Set("page_size", fmt.Sprint(pageSize))
		}
		var page struct {
			Files []struct{ Path string }
			Next  *string `json:"next_page_token"`
		}
		if err := json.Unmarshal(getJSON(t, s, transport, get(keyA+"/files?"+query.Encode())), &page); err != nil {
			t.Fatal(err)
		}
		if page.Files == nil || page.Next == nil {
			t.Error("a member is missing in the answer; want it there though it is empty")
			return nil, ""
		}
		for _, f := range page.Files {
			paths = append(paths, f.Path)
		}
		return paths, *page.Next
	}
}

// TestFiles pins the list of the files in an artifact, name by name.
func TestFiles(t *testing.T) {
	a := cachetest.Key("a")
	content := cachetest.Sound(a, map[string]string{"stdout.txt": "built\n", "empty": "", "dist/index.js": "console.log(1)\n"})
	for _, m := range mouths {
		t.Run(m.name, func(t *testing.T) {
			s := startServer(t, setup{})
			s.put(t, a, content)
			if m.grpc != nil {
				got, err := list(keyA, 0, "")(t.Context(), cachev1.NewArtifactServiceClient(m.grpc(t, s)))
				want := []*cachev1.ArtifactFile{
					{Path: "dist/index.js", Hash: "3879a5d930ae1999b278a3a498f7de3fd83ba8dae59330fcfa2db31c103ac21d", Size: 15},
					{Path: "empty", Hash: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", Size: 0},
					{Path: "stdout.txt", Hash: "56f6e6304d02d413bb7d5d463ac5cdc58551266dc7269b467fc385815f39b913", Size: 6},
				}
				if err != nil || !slices.EqualFunc(got.files, want, func(a, b *cachev1.ArtifactFile) bool { return proto.Equal(a, b) }) || got.next != "" {
					t.Errorf("got %v, %v; want %v", got, err, want)
				}
				return
			}
			const want = `{"files":[` +
				`{"path":"dist/index.js","hash":"3879a5d930ae1999b278a3a498f7de3fd83ba8dae59330fcfa2db31c103ac21d","size":"15"},` +
				`{"path":"empty","hash":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":"0"},` +
				`{"path":"stdout.txt","hash":"56f6e6304d02d413bb7d5d463ac5cdc58551266dc7269b467fc385815f39b913","size":"6"}],` +
				`"next_page_token":""}`
			if got := getJSON(t, s, m.rest(t, s), get(keyA+"/files")); string(got) != want {
				t.Errorf("got %s; want %s", got, want)
			}
		})
	}
}

// TestFilePages walks through all pages, of every size.
func TestFilePages(t *testing.T) {
	a := cachetest.Key("a")
	// In the order of their bytes, which is neither that of the directories nor that of the letters.
	paths := []string{"B", "a", "a b", "a-b", "a/1", "a/b/c", "ab", "é", "日本"}
	files := map[string]string{}
	for _, path := range paths {
		files[path] = path
	}
	delete(files, "a") // is a directory
	paths = slices.DeleteFunc(paths, func(path string) bool { return path == "a" })
	content := cachetest.Sound(a, files)
	for _, m := range mouths {
		t.Run(m.name, func(t *testing.T) {
			s := startServer(t, setup{})
			s.put(t, a, content)
			list := openLister(t, s, m)
			for size := range int32(len(paths) + 2) {
				if size == 0 {
					continue // means 1,000
				}
				var got []string
				pages := 0
				for token := ""; ; pages++ {
					page, next := list(t, size, token)
					got = append(got, page...)
					if next == "" {
						break
					}
					if len(page) != int(size) || pages > len(paths) {
						t.Fatalf("a page of %d has %d files and is not the last", size, len(page))
					}
					token = next
				}
				if !slices.Equal(got, paths) || pages != (len(paths)-1)/int(size) {
					t.Errorf("pages of %d: got %q after turning %d pages", size, got, pages)
				}
			}
		})
	}
}

// TestFilePageSize pins the bounds of a page.
func TestFilePageSize(t *testing.T) {
	a := cachetest.Key("a")
	for _, test := range []struct {
		files int
		size  int32
		want  int
		more  bool
	}{
		{1_000, 0, 1_000, false},
		{1_001, 0, 1_000, true},
		{10_000, 1<<31 - 1, 10_000, false},
		{10_001, 10_001, 10_000, true},
	} {
		t.Run(fmt.Sprintf("%d of %d", test.size, test.files), func(t *testing.T) {
			t.Parallel()
			files := map[string]string{}
			for i := range test.files {
				files[fmt.Sprintf("%05d", i)] = ""
			}
			s := startServer(t, setup{})
			s.put(t, a, cachetest.Sound(a, files))
			for _, m := range []mouth{restMouths()[0], grpcMouths()[0]} {
				got, next := openLister(t, s, m)(t, test.size, "")
				if len(got) != test.want || (next != "") != test.more {
					t.Errorf("%s: got %d files and the token %q; want %d files", m.name, len(got), next, test.want)
				}
			}
		})
	}
}

// TestFilesOfNone proves that an artifact without files has an empty list, and not none.
func TestFilesOfNone(t *testing.T) {
	for _, m := range mouths {
		t.Run(m.name, func(t *testing.T) {
			s := startServer(t, setup{})
			s.put(t, cachetest.Key("a"), cachetest.Sound(cachetest.Key("a"), nil))
			if got, next := openLister(t, s, m)(t, 0, ""); len(got) != 0 || next != "" {
				t.Errorf("got %q and the token %q; want nothing", got, next)
			}
		})
	}
}

// TestFilesOfDamaged proves that an artifact which is found damaged when it is listed is a miss from
// then on, and that its key can be uploaded again.
func TestFilesOfDamaged(t *testing.T) {
	for _, m := range mouths {
		t.Run(m.name, func(t *testing.T) {
			memory := &cachetest.Memory{}
			s := startServer(t, setup{store: memory})
			s.put(t, cachetest.Key("a"), artifactA)
			memory.Damage(cachetest.Key("a"), artifactA[:1000])
			rest, grpc := get(keyA+"/files"), list(keyA, 0, "")
			miss := apiCase{
				rest: rest, grpc: grpc,
				status: 404, code: codes.NotFound, reason: "ARTIFACT_NOT_FOUND", sentence: "Artifact not found",
			}
			if m.rest != nil {
				transport := m.rest(t, s)
				response, body := rest.do(t, s, transport)
				miss.checkREST(t, response, body)
				miss.rest = get(keyA)
				response, body = miss.rest.do(t, s, transport)
				miss.checkREST(t, response, body)
			} else {
				client := cachev1.NewArtifactServiceClient(m.grpc(t, s))
				got, err := grpc(t.Context(), client)
				miss.checkGRPC(t, got, err)
				got, err = download(keyA, 0, 0)(t.Context(), client)
				miss.checkGRPC(t, got, err)
			}
			s.put(t, cachetest.Key("a"), artifactA)
			var unsound *artifact.UnsoundError
			if reasons := memory.Quarantined(); len(reasons) != 1 || !errors.As(reasons[0], &unsound) {
				t.Errorf("quarantined for %v; want one unsound artifact", reasons)
			}
		})
	}
}
