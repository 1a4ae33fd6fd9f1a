package server_test

import (
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// keyA is the key of cachetest.Key("a"), in the digits that it has on the wire.
const keyA = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"

// artifactA has 5641 bytes for keyA, whatever the compression, for it is stored without any.
var artifactA = cachetest.Random(cachetest.Key("a"), 2000)

// largestChunk fills a message of gRPC to exactly 4 MiB, with the five bytes that say what it is.
const largestChunk = 4<<20 - 5

var unsoundArtifacts = sync.OnceValue(func() []cachetest.Unsound {
	return cachetest.UnsoundArtifacts(cachetest.Key("a"))
})

func putCases() []apiCase {
	digits := strings.Repeat("0123456789abcdef", 9)
	shortest, longest := digits[:32], digits[:128]
	parse := func(digits string) artifact.Key {
		key, err := artifact.ParseKey(digits)
		if err != nil {
			panic(err)
		}
		return key
	}
	forShortest, forLongest := cachetest.Random(parse(shortest), 100), cachetest.Random(parse(longest), 100)
	large := cachetest.Random(cachetest.Key("a"), 6<<20)
	limit := func(bytes int64) func() setup {
		return func() setup { return setup{maxSize: bytes} }
	}
	created := map[string]string{"Content-Length": "0", "Content-Type": "", "Location": ""}

	cases := []apiCase{
		{
			name:   "put",
			rest:   put(keyA, artifactA),
			grpc:   uploadAll(keyA, artifactA),
			status: 201, header: created,
			answer: func(t *testing.T, got answer) {
				if !got.artifact.GetStoredAt().IsValid() || got.artifact.GetStoredAt().GetSeconds() < 1700000000 {
					t.Errorf("stored_at is %v; want the time", got.artifact.GetStoredAt())
				}
				got.artifact.StoredAt = nil
				if want := knownOfA(); !proto.Equal(got.artifact, want) {
					t.Errorf("got %v; want %v", got.artifact, want)
				}
			},
			then: stores(keyA, artifactA),
		},
		{
			name:   "put of an undeclared size",
			rest:   putUndeclared(keyA, artifactA),
			grpc:   upload(header(keyA), chunk(artifactA)),
			status: 201, header: created,
			then: stores(keyA, artifactA),
		},
		{
			name: "put of a declared size",
			grpc: upload(headerWithSize(keyA, 5641), chunk(artifactA)),
			then: stores(keyA, artifactA),
		},
		{
			name:   "put with headers that say something else",
			rest:   &restRequest{method: "PUT", target: "/v1/artifacts/" + keyA, body: artifactA, header: map[string]string{"Content-Type": "text/html", "Accept": "image/png", "Content-Encoding": "br"}},
			status: 201, header: created,
			then: stores(keyA, artifactA),
		},
		{
			name: "put byte by byte",
			grpc: upload(slices.Concat([]*cachev1.PutArtifactRequest{header(keyA)}, chunks(artifactA[:200], 1), chunks(artifactA[200:], 1000))...),
			then: stores(keyA, artifactA),
		},
		{
			name: "put with empty chunks",
			grpc: upload(header(keyA), chunk(nil), chunk(nil), chunk(artifactA[:100]), chunk(nil), chunk(artifactA[100:]), chunk(nil)),
			then: stores(keyA, artifactA),
		},
		{
			name: "put in chunks as large as they may be",
			grpc: upload(header(keyA), chunk(large[:largestChunk]), chunk(large[largestChunk:])),
			then: stores(keyA, large),
		},
		{
			name:   "put of the shortest key",
			rest:   put(shortest, forShortest),
			grpc:   uploadAll(shortest, forShortest),
			status: 201, header: created,
			then: stores(shortest, forShortest),
		},
		{
			name:   "put of the longest key",
			rest:   put(longest, forLongest),
			grpc:   uploadAll(longest, forLongest),
			status: 201, header: created,
			then: stores(longest, forLongest),
		},
		{
			name:   "put of a key in upper case",
			rest:   put(strings.ToUpper(keyA), artifactA),
			grpc:   uploadAll(strings.ToUpper(keyA), artifactA),
			status: 201, header: created,
			then: stores(keyA, artifactA),
		},
		{
			name:   "put of a key that is stored in the other case",
			given:  havingA,
			rest:   put(strings.ToUpper(keyA), artifactA),
			grpc:   uploadAll(strings.ToUpper(keyA), artifactA),
			status: 409, code: codes.AlreadyExists, reason: "ARTIFACT_EXISTS",
			sentence: "Artifact already exists",
			then:     stores(keyA, artifactA),
		},
		{
			name:   "put of a key that is stored",
			given:  havingA,
			rest:   put(keyA, cachetest.Random(cachetest.Key("a"), 3000)),
			grpc:   uploadAll(keyA, cachetest.Random(cachetest.Key("a"), 3000)),
			status: 409, code: codes.AlreadyExists, reason: "ARTIFACT_EXISTS",
			sentence: "Artifact already exists",
			then:     stores(keyA, artifactA),
		},
		{
			name:   "put of what is not even an artifact under a key that is stored",
			given:  havingA,
			rest:   putUndeclared(keyA, []byte("nonsense")),
			grpc:   uploadAll(keyA, []byte("nonsense")),
			status: 409, code: codes.AlreadyExists, reason: "ARTIFACT_EXISTS",
			sentence: "Artifact already exists",
			then:     stores(keyA, artifactA),
		},
		{
			name:   "put exactly at the limit",
			setup:  limit(5641),
			rest:   put(keyA, artifactA),
			grpc:   upload(headerWithSize(keyA, 5641), chunk(artifactA)),
			status: 201, header: created,
			then: stores(keyA, artifactA),
		},
		{
			name:   "put exactly at the limit of an undeclared size",
			setup:  limit(5641),
			rest:   putUndeclared(keyA, artifactA),
			grpc:   upload(header(keyA), chunk(artifactA)),
			status: 201, header: created,
			then: stores(keyA, artifactA),
		},
		{
			name:   "put one byte over the limit",
			setup:  limit(5640),
			rest:   put(keyA, artifactA),
			grpc:   upload(headerWithSize(keyA, 5641), chunk(artifactA)),
			status: 413, code: codes.ResourceExhausted, reason: "ARTIFACT_TOO_LARGE",
			sentence: "Artifact too large: the limit is 5.5 KiB (5640 bytes)",
			then:     storesNothing,
		},
		{
			name:   "put one byte over the limit of an undeclared size",
			setup:  limit(5640),
			rest:   putUndeclared(keyA, artifactA),
			grpc:   upload(header(keyA), chunk(artifactA)),
			status: 413, code: codes.ResourceExhausted, reason: "ARTIFACT_TOO_LARGE",
			sentence: "Artifact too large: the limit is 5.5 KiB (5640 bytes)",
			then:     storesNothing,
		},
		{
			name:   "put far over the limit",
			setup:  limit(1 << 20),
			rest:   put(keyA, large),
			grpc:   uploadAll(keyA, large),
			status: 413, code: codes.ResourceExhausted, reason: "ARTIFACT_TOO_LARGE",
			sentence: "Artifact too large: the limit is 1.0 MiB (1048576 bytes)",
			then:     storesNothing,
		},
		{
			name:   "put far over the limit of an undeclared size",
			setup:  limit(1 << 20),
			rest:   putUndeclared(keyA, large),
			grpc:   uploadAll(keyA, large),
			status: 413, code: codes.ResourceExhausted, reason: "ARTIFACT_TOO_LARGE",
			sentence: "Artifact too large: the limit is 1.0 MiB (1048576 bytes)",
			then:     storesNothing,
		},
		{
			name: "put of fewer bytes than were declared",
			grpc: upload(headerWithSize(keyA, 5642), chunk(artifactA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Upload has another size than was declared: 5641 bytes, not 5642",
			then:     storesNothing,
		},
		{
			name: "put of more bytes than were declared",
			grpc: upload(headerWithSize(keyA, 5640), chunk(artifactA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Upload has another size than was declared: 5641 bytes, not 5640",
			then:     storesNothing,
		},
		{
			name: "put of something where nothing was declared",
			grpc: upload(headerWithSize(keyA, 0), chunk(artifactA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Upload has another size than was declared: 5641 bytes, not 0",
			then:     storesNothing,
		},
		{
			name: "put of a negative size",
			grpc: upload(headerWithSize(keyA, -1), chunk(artifactA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: size is -1; it must not be negative",
			then:     storesNothing,
		},
		{
			name: "put without any message",
			grpc: upload(),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: the stream has no message; the first must be a header",
			then:     storesNothing,
		},
		{
			name: "put that begins with a chunk",
			grpc: upload(chunk(artifactA), header(keyA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: the first message must be a header",
			then:     storesNothing,
		},
		{
			name: "put that begins with an empty message",
			grpc: upload(&cachev1.PutArtifactRequest{}, header(keyA), chunk(artifactA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: the first message must be a header",
			then:     storesNothing,
		},
		{
			name:     "put that begins with a message that is too large",
			grpc:     upload(chunk(large[:largestChunk+1])),
			code:     codes.ResourceExhausted, // gRPC's own answer, without a reason
			sentence: "grpc: received message larger than max (4194305 vs. 4194304)",
			then:     storesNothing,
		},
		{
			name: "put with two headers",
			grpc: upload(header(keyA), header(keyA), chunk(artifactA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: every message behind the header must be a chunk",
			then:     storesNothing,
		},
		{
			name: "put with a header at its end",
			grpc: upload(header(keyA), chunk(artifactA), header(keyA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: every message behind the header must be a chunk",
			then:     storesNothing,
		},
		{
			name: "put with an empty message",
			grpc: upload(header(keyA), &cachev1.PutArtifactRequest{}, chunk(artifactA)),
			code: codes.InvalidArgument, reason: "INVALID_REQUEST",
			sentence: "Invalid request: every message behind the header must be a chunk",
			then:     storesNothing,
		},
		{
			name:     "put with a message that is too large",
			grpc:     upload(header(keyA), chunk(large[:largestChunk+1]), chunk(large[largestChunk+1:])),
			code:     codes.ResourceExhausted, // gRPC's own answer, without a reason
			sentence: "grpc: received message larger than max (4194305 vs. 4194304)",
			then:     storesNothing,
		},
	}
	for _, u := range unsoundArtifacts() {
		unsound := apiCase{
			rest:   put(keyA, u.Artifact),
			grpc:   uploadAll(keyA, u.Artifact),
			status: 422, code: codes.InvalidArgument, reason: "VERIFICATION_FAILED",
			sentence: "Verification failed: " + u.Message,
			then:     storesNothing,
		}
		declared, undeclared := unsound, unsound
		declared.name = "put of an unsound artifact: " + u.Name
		undeclared.name = declared.name + ", of an undeclared size"
		undeclared.rest = putUndeclared(keyA, u.Artifact)
		undeclared.grpc = nil // uploadAll declares none
		cases = append(cases, declared, undeclared)
	}
	return cases
}

// chunks cuts content into chunks of size bytes.
func chunks(content []byte, size int) []*cachev1.PutArtifactRequest {
	var all []*cachev1.PutArtifactRequest
	for part := range slices.Chunk(content, size) {
		all = append(all, chunk(part))
	}
	return all
}

// knownOfA is what is known of artifactA, but for the time when it was stored.
func knownOfA() *cachev1.Artifact {
	return &cachev1.Artifact{
		Scope:            "default",
		CacheKey:         keyA,
		Hash:             hashOf(artifactA),
		Size:             5641,
		UncompressedSize: 2000,
		FileCount:        1,
		PackageName:      "web",
		TaskName:         "build",
		Command:          "npm run build",
		CreatedAt:        &timestamppb.Timestamp{Seconds: 1700000000},
	}
}

// storedOfA is when havingA has artifactA stored, and lastModifiedOfA is the same in a header.
const (
	storedOfA       = 1706933106
	lastModifiedOfA = "Sat, 03 Feb 2024 04:05:06 GMT"
)

// havingA is the state of a server that has artifactA since 2024-02-03 04:05:06 UTC.
func havingA(t *testing.T, s *testServer) { s.putA(t) }

func (s *testServer) putA(t testing.TB) {
	s.put(t, cachetest.Key("a"), artifactA)
	// The store takes the file for another one now and verifies it once more, which changes nothing.
	stored := time.Unix(storedOfA, 0)
	if err := os.Chtimes(s.path(cachetest.Key("a")), stored, stored); err != nil {
		t.Fatal(err)
	}
}

// stores returns a check that an artifact is on disk as it was sent, under its key in lower case, and
// that nothing else is.
func stores(digits string, content []byte) func(*testing.T, *testServer) {
	return func(t *testing.T, s *testServer) {
		t.Helper()
		key, err := artifact.ParseKey(digits)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(s.path(key))
		if err != nil || string(got) != string(content) {
			t.Errorf("%d bytes are stored, %v; want the %d that were sent", len(got), err, len(content))
		}
		waitUntil(t, "no upload is in progress", func() bool { return s.uploadsInProgress() == 0 })
	}
}

// storesNothing checks that no artifact is stored, and no temporary file.
func storesNothing(t *testing.T, s *testServer) {
	t.Helper()
	if _, err := s.cache.Stat(t.Context(), cachetest.Key("a")); err != cache.ErrNotFound {
		t.Errorf("an artifact is stored: Stat returned %v", err)
	}
	waitUntil(t, "no upload is in progress", func() bool { return s.uploadsInProgress() == 0 })
}
