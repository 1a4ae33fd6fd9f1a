package server_test

import (
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
)

// TestLateMessages sends on after a call was refused, as a client does that has not read it yet: the server
// ends the stream once, and says no more of it.
func TestLateMessages(t *testing.T) {
	bothWays(t, func(t *testing.T, dial func(*testing.T, *testServer, ...http2.Setting) *frames) {
		s := startServer(t, setup{})
		f := dial(t, s)
		id := f.call()
		f.send(id, grpcFrame(t, &cachev1.PutArtifactRequest{Payload: &cachev1.PutArtifactRequest_Header{Header: &cachev1.PutArtifactHeader{CacheKey: "not-a-key"}}}), 1<<14, false)
		f.wantStatus(id, codes.InvalidArgument, "INVALID_CACHE_KEY", "Invalid cache key: it has 9 characters; a key has 32 to 128 hexadecimal digits")
		f.wantReset(id, http2.ErrCodeNo)
		for range 3 {
			f.write(func() error { return f.framer.WriteData(id, false, make([]byte, 1000)) })
		}
		f.ping()
		f.ping() // for its answer may overtake another frame
		f.mu.Lock()
		defer f.mu.Unlock()
		if n := f.answers[id].resets; n != 1 {
			t.Errorf("the stream is reset %d times", n)
		}
	})
}
