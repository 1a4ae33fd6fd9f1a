package cache

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// This file is what traces tell of artifacts. Who traces a request puts its span into the context, and with it what makes
// those below it. Without a span that is recorded all this costs no more than a look into the context.

// describe tells the span of a context, if it is recorded, which artifact is asked for and, if info is not empty, what is
// known of it.
func (c *Cache) describe(ctx context.Context, key artifact.Key, info artifact.Info) {
	span := trace.SpanFromContext(ctx)
	if !span.IsRecording() {
		return
	}
	if info.Key == (artifact.Key{}) {
		info.Scope, info.Key = c.scopes[0], key
	}
	span.SetAttributes(attributes(info)...)
}

// attributes returns what is known of an artifact. The names are those of the wire contract.
func attributes(info artifact.Info) []attribute.KeyValue {
	known := []attribute.KeyValue{
		attribute.String("polykit.scope", info.Scope.String()),
		attribute.String("polykit.cache_key", info.Key.String()),
	}
	if info.Hash == (artifact.Digest{}) {
		return known
	}
	return append(known,
		attribute.Int64("polykit.size", info.Size),
		attribute.Int("polykit.file_count", info.FileCount),
		attribute.String("polykit.package_name", info.PackageName),
		attribute.String("polykit.task_name", info.TaskName))
}

// step is a part of an upload that has a span of its own, if the upload has one that is recorded.
type step struct{ span trace.Span } // or nil

// begin begins a step of an upload.
func begin(ctx context.Context, name string, about artifact.Info) step {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return step{}
	}
	tracer := parent.TracerProvider().Tracer("github.com/polykit/polykit-cache/internal/cache")
	_, span := tracer.Start(ctx, name, trace.WithAttributes(attributes(about)...))
	return step{span}
}

// end ends a step with what is known of the artifact by then. Of one that failed the span says why, and if the artifact
// was found unsound which rule it breaks.
func (s step) end(about artifact.Info, err error) {
	if s.span == nil {
		return
	}
	s.span.SetAttributes(attributes(about)...)
	if unsound, ok := errors.AsType[*artifact.UnsoundError](err); ok {
		s.span.SetAttributes(attribute.String("polykit.rule", string(unsound.Rule)))
	}
	if err != nil {
		s.span.SetStatus(codes.Error, err.Error())
	}
	s.span.End()
}
