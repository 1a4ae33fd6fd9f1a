package server_test

import (
	"context"
	"testing"

	"google.golang.org/grpc/codes"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// TestBombs uploads artifacts that would cost far more than they are. Each is refused, and the server
// takes no more memory for it than it would for any other.
func TestBombs(t *testing.T) {
	a := cachetest.Key("a")
	bombs := cachetest.Bombs(a)
	for _, m := range mouths {
		if m.name != "REST over HTTP1" && m.name != "gRPC" {
			continue // for the server it is the same, and this takes time
		}
		t.Run(m.name, func(t *testing.T) {
			s := startServer(t, setup{limits: cachetest.BombLimits()})
			// Its connections outlive the bombs.
			t.Run("bombs", func(t *testing.T) {
				var send func(t *testing.T, bomb []byte, sentence string)
				if m.rest != nil {
					transport := m.rest(t, s)
					send = func(t *testing.T, bomb []byte, sentence string) {
						response, body := put(keyA, bomb).do(t, s, transport)
						if response.StatusCode != 422 {
							t.Errorf("status is %d; want 422", response.StatusCode)
						}
						checkErrorBody(t, "PUT", response, body, sentence)
					}
				} else {
					client := cachev1.NewArtifactServiceClient(m.grpc(t, s))
					send = func(t *testing.T, bomb []byte, sentence string) {
						ctx, cancel := context.WithTimeout(t.Context(), patience)
						defer cancel()
						_, err := uploadAll(keyA, bomb)(ctx, client)
						checkStatus(t, err, codes.InvalidArgument, "VERIFICATION_FAILED", sentence)
					}
				}
				for i, bomb := range bombs {
					if (m.rest == nil) != (i%2 > 0) {
						continue // each goes one of the two ways
					}
					t.Run(bomb.Name, func(t *testing.T) {
						// Most lives of 32 MiB of names, or of a manifest.json, and of what grew to hold them: some 45 MiB. On a busy
						// machine what dies while the collector looks is counted too. Without limits it would be gigabytes.
						const most = 512 << 20
						if peak := peakHeap(living, func() { send(t, bomb.Artifact, "Verification failed: "+bomb.Message) }); peak > most {
							t.Errorf("the heap grew by %d MiB; want at most %d", peak>>20, most>>20)
						}
					})
				}
			})
			storesNothing(t, s)
			s.put(t, a, artifactA)
		})
	}
}
