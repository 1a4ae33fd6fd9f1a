package retention_test

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/retention"
)

// TestSpans has a collector remove nothing, something, and something but not all, as part of a traced request and not.
func TestSpans(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder)).Tracer("test")
	r := newRig(t, retention.Policy{})
	for _, name := range []string{"stuck", "b", "c"} {
		r.mustPut(t, name, "build", 100)
	}
	c := retention.New(r.index, stuckStore{r.store, cachetest.Key("stuck")}, retention.Policy{}, slog.New(slog.DiscardHandler))
	collect := func(policy retention.Policy) string {
		request, span := tracer.Start(t.Context(), "request")
		c.Collect(request, policy, 1000)
		c.Collect(t.Context(), policy, 1000)
		span.End()
		var lines []string
		for _, s := range recorder.Ended() {
			line := s.Name()
			if s.Parent().SpanID() == span.SpanContext().SpanID() {
				line += " for the request"
			} else if s.Parent().IsValid() {
				t.Errorf("%s has another parent", s.Name())
			}
			for _, a := range s.Attributes() {
				if a.Key != "polykit.disk_size" || a.Value.AsInt64() < 4096 {
					line += fmt.Sprintf(" %s=%s", a.Key, a.Value.String())
				}
			}
			if s.Status().Description != "" {
				line += fmt.Sprintf(" %s: %q", s.Status().Code, s.Status().Description)
			}
			lines = append(lines, line)
		}
		recorder.Reset()
		return strings.Join(lines, ", ")
	}
	if got, want := collect(retention.Policy{}), "request"; got != want {
		t.Errorf("of nothing: %s; want %s", got, want)
	}
	// What removes something is traced by the request that it is part of, if nobody said how else.
	if got, want := collect(retention.Policy{KeepLast: 1}), `evict for the request polykit.artifacts=1 polykit.reasons=["keep-last"] Error: "stuck, for this test", request`; got != want {
		t.Errorf("without a tracer: %s; want %s", got, want)
	}
	c.Trace(tracer)
	if got, want := collect(retention.Policy{MinFree: 1 << 60}), `evict for the request polykit.artifacts=1 polykit.reasons=["min-free"] Error: "stuck, for this test", `+
		`evict polykit.artifacts=0 polykit.disk_size=0 polykit.reasons=[] Error: "stuck, for this test", request`; got != want {
		t.Errorf("with a tracer: %s; want %s", got, want)
	}
}
