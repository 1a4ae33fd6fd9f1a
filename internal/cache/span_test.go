package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// traced does something as part of a traced request, and returns the spans: that of the request comes last.
func traced(t *testing.T, do func(ctx context.Context)) []sdktrace.ReadOnlySpan {
	t.Helper()
	recorder := tracetest.NewSpanRecorder()
	ctx, span := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder)).Tracer("test").Start(t.Context(), "request")
	do(ctx)
	span.End()
	spans := recorder.Ended()
	for _, s := range spans[:len(spans)-1] {
		if s.Parent().SpanID() != span.SpanContext().SpanID() {
			t.Errorf("%s is not part of the request", s.Name())
		}
	}
	if n := len(recorder.Started()); n != len(spans) {
		t.Errorf("of %d spans %d ended", n, len(spans))
	}
	return spans
}

// attributesOf returns the attributes of a span, as NAME=VALUE in ascending order.
func attributesOf(span sdktrace.ReadOnlySpan) (all []string) {
	set := attribute.NewSet(span.Attributes()...) // of two with one name the last one counts
	for _, a := range set.ToSlice() {
		all = append(all, string(a.Key)+"="+a.Value.String())
	}
	slices.Sort(all)
	return all
}

// TestUploadSpans checks which spans an upload has that goes through, or fails in one of its steps.
func TestUploadSpans(t *testing.T) {
	sound := cachetest.Sound(key, map[string]string{"a": "A", "b": "B"})
	name := []string{"polykit.cache_key=" + key.String(), "polykit.scope=default"}
	all := []string{"polykit.cache_key=" + key.String(), "polykit.file_count=2", "polykit.package_name=web", "polykit.scope=default",
		fmt.Sprintf("polykit.size=%d", len(sound)), "polykit.task_name=build"}
	type want struct {
		name       string
		failed     string // why
		attributes []string
	}
	for _, c := range []struct {
		name    string
		content []byte
		faults  cachetest.Faults
		exists  bool
		want    []want
	}{
		{name: "stored", content: sound, want: []want{{"queue", "", name}, {"verify", "", all}, {"commit", "", all}, {"request", "", all}}},
		{name: "exists", content: sound, exists: true, want: []want{{"request", "", name}}},
		{name: "unsound", content: []byte("junk"), want: []want{
			{"queue", "", name},
			{"verify", "the zstd stream does not begin with a zstd frame", slices.Insert(slices.Clone(name), 1, "polykit.rule=stream")},
			{"request", "", name}}},
		{name: "write fails", content: sound, faults: cachetest.Faults{Write: errDisk}, want: []want{
			{"queue", "", name}, {"verify", errDisk.Error(), name}, {"request", "", name}}},
		{name: "commit fails", content: sound, faults: cachetest.Faults{Commit: errDisk}, want: []want{
			{"queue", "", name}, {"verify", "", all}, {"commit", errDisk.Error(), all}, {"request", "", all}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newMemory()
			if c.exists {
				if _, err := r.Put(t.Context(), key, cache.UnknownSize, bytes.NewReader(c.content)); err != nil {
					t.Fatal(err)
				}
			}
			r.memory.Fail(c.faults)
			spans := traced(t, func(ctx context.Context) { r.Put(ctx, key, cache.UnknownSize, bytes.NewReader(c.content)) })
			var got []want
			for _, s := range spans {
				if failed := s.Status().Code == codes.Error; failed != (s.Status().Description != "") {
					t.Errorf("%s has status %v", s.Name(), s.Status())
				}
				got = append(got, want{s.Name(), s.Status().Description, attributesOf(s)})
			}
			if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", c.want) {
				t.Errorf("got\n%q\nwant\n%q", got, c.want)
			}
		})
	}
}

// TestQueueSpan has an upload wait for others until it is told that there are too many.
func TestQueueSpan(t *testing.T) {
	limits := artifact.DefaultLimits
	limits.Memory, limits.Queue = limits.LeastMemory(), 0
	verifier := artifact.NewVerifier(limits)
	for range verifier.Slots() {
		_, release, err := verifier.Admit(t.Context(), bytes.NewReader(nil))
		if err != nil {
			t.Fatal(err)
		}
		defer release()
	}
	c := cache.New(new(cachetest.Memory), verifier, cache.Config{MaxSize: maxSize})
	spans := traced(t, func(ctx context.Context) {
		if _, err := c.Put(ctx, key, 1, bytes.NewReader([]byte{0})); !errors.Is(err, artifact.ErrBusy) {
			t.Errorf("got %v", err)
		}
	})
	if len(spans) != 2 || spans[0].Name() != "queue" || spans[0].Status().Code != codes.Error {
		t.Errorf("got %v", spans)
	}
}

// TestDownloadSpans checks what the span of a request is told that only reads.
func TestDownloadSpans(t *testing.T) {
	r := newMemory()
	if _, err := r.Put(t.Context(), key, cache.UnknownSize, bytes.NewReader(cachetest.Sound(key, nil))); err != nil {
		t.Fatal(err)
	}
	name := func(key artifact.Key) []string {
		return []string{"polykit.cache_key=" + key.String(), "polykit.scope=default"}
	}
	for what, c := range map[string]struct {
		do   func(ctx context.Context)
		want []string
	}{
		"hit": {func(ctx context.Context) {
			if file, _, err := r.Get(ctx, key); err == nil {
				file.Close()
			}
		}, append(name(key), "polykit.task_name=build")},
		"miss":         {func(ctx context.Context) { r.Get(ctx, other) }, name(other)},
		"stat":         {func(ctx context.Context) { r.Stat(ctx, key) }, append(name(key), "polykit.task_name=build")},
		"stat, a miss": {func(ctx context.Context) { r.Stat(ctx, other) }, name(other)},
		"many keys":    {func(ctx context.Context) { r.Missing(ctx, []artifact.Key{key, other}) }, nil},
	} {
		spans := traced(t, c.do)
		got := attributesOf(spans[0])
		if len(spans) != 1 || len(c.want) == 0 && len(got) > 0 {
			t.Errorf("%s: got %v with %v", what, spans, got)
		}
		for _, want := range c.want {
			if !slices.Contains(got, want) {
				t.Errorf("%s: got %v; want %s", what, got, want)
			}
		}
	}
}

// TestUntracedCostsNothing checks that what is not traced, or in a trace that is not recorded, allocates nothing for it.
func TestUntracedCostsNothing(t *testing.T) {
	r := newMemory()
	info := artifact.Info{Key: key, Hash: artifact.Digest{1}, Size: 1}
	remote := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, Remote: true})
	unsampled, _ := sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.NeverSample())).Tracer("test").Start(t.Context(), "request")
	for name, ctx := range map[string]context.Context{
		"untraced":     t.Context(),
		"the client's": trace.ContextWithRemoteSpanContext(t.Context(), remote),
		"not sampled":  unsampled,
	} {
		if n := testing.AllocsPerRun(1000, func() { r.Trace(ctx, info) }); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	sampled, span := sdktrace.NewTracerProvider().Tracer("test").Start(t.Context(), "request")
	defer span.End()
	if n := testing.AllocsPerRun(10, func() { r.Trace(sampled, info) }); n == 0 {
		t.Error("a traced upload allocates nothing, so this test sees nothing")
	}
}
