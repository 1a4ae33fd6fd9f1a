package retention

import (
	"context"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// TracerName is the name of the tracer of removals.
const TracerName = "github.com/polykit/polykit-cache/internal/retention"

// Trace has removals that no traced request asked for traced too, each as a trace of its own. It must be called before
// anything is removed.
func (c *Collector) Trace(tracer trace.Tracer) { c.tracer = tracer }

// trace tells the trace of a context of a removal that began at some time. It is told when that is over, since most remove
// nothing, and nobody wants to see that.
func (c *Collector) trace(ctx context.Context, began time.Time, removals []Removal, failed error) {
	if len(removals) == 0 && (failed == nil || ctx.Err() != nil) {
		return
	}
	tracer := c.tracer
	if parent := trace.SpanFromContext(ctx); parent.IsRecording() {
		tracer = parent.TracerProvider().Tracer(TracerName)
	}
	if tracer == nil {
		return
	}
	var artifacts, size int64
	var reasons []string
	for _, r := range removals {
		artifacts += r.Artifacts
		size += r.DiskSize
		if reason := r.Reason.String(); !slices.Contains(reasons, reason) {
			reasons = append(reasons, reason)
		}
	}
	_, span := tracer.Start(ctx, "evict", trace.WithTimestamp(began), trace.WithAttributes(
		attribute.Int64("polykit.artifacts", artifacts),
		attribute.Int64("polykit.disk_size", size),
		attribute.StringSlice("polykit.reasons", reasons)))
	if failed != nil {
		span.SetStatus(codes.Error, failed.Error())
	}
	span.End()
}
