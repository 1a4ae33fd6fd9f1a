package server

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
)

// newGateway returns the JSON methods.
func (s *Server) newGateway() http.Handler {
	gateway := runtime.NewServeMux(
		// What is done must be what was admitted: X-HTTP-Method-Override would have the gateway look for another method.
		runtime.WithDisablePathLengthFallback(),
		runtime.WithMarshalerOption(runtime.MIMEWildcard, &runtime.JSONPb{
			MarshalOptions: protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true},
		}),
		runtime.WithErrorHandler(func(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, err error) {
			if st, ok := status.FromError(err); ok && st.Code() == codes.InvalidArgument {
				err = fmt.Errorf("%w: %s", errInvalidRequest, st.Message()) // the gateway's own, of a parameter
			}
			s.refuse(w, r, err)
		}),
	)
	if err := cachev1.RegisterArtifactServiceHandlerServer(context.Background(), gateway, &artifactService{server: s}); err != nil {
		panic(err) // two rules for one path: a programming error
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The gateway takes a path apart after it was unescaped, and does not find a key with a slash.
		if digits := r.PathValue("cache_key"); strings.Contains(digits, "/") {
			_, err := artifact.ParseKey(digits)
			s.refuse(w, r, err)
			return
		}
		if r.Body != http.NoBody {
			r.Body = &boundedBody{r.Body, maxMessageSize}
		}
		r = r.WithContext(context.WithValue(r.Context(), recordKey{}, recordOf(w)))
		if r.Method == http.MethodHead { // net/http leaves the body out
			r = r.Clone(r.Context())
			r.Method = http.MethodGet
		}
		gateway.ServeHTTP(w, r)
	})
}

// boundedBody is the body of a request that the gateway reads, and keeps, as a whole. Who reads on after the
// error gets the rest, to throw it away.
type boundedBody struct {
	io.ReadCloser
	left int // bytes
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	before := b.left
	b.left -= min(n, before+1)
	if before >= 0 && b.left < 0 {
		return 0, fmt.Errorf("the body has more than %d bytes", maxMessageSize)
	}
	return n, err
}
