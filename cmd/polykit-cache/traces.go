package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"go.opentelemetry.io/contrib/propagators/autoprop"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	oteltrace "go.opentelemetry.io/otel/trace"
	"golang.org/x/time/rate"

	"github.com/polykit/polykit-cache/internal/server"
)

// This file is how a server sends traces: as the variables of OpenTelemetry say, OTEL_*, and no flag. Its libraries read
// most of them. What they leave to others is read here and not by its autoexport, which makes the binary 2 MB larger, with
// what sends metrics and logs.
//
// Spans are sent in the background, and dropped when nobody takes them.

const (
	// flushTimeout bounds the time in which the last spans are sent when the server ends, beside --shutdown-timeout.
	flushTimeout = 5 * time.Second
	// sendFaultInterval is how often it is logged that spans can't be sent.
	sendFaultInterval = time.Minute
)

// tracing sends traces.
type tracing struct {
	provider   *sdktrace.TracerProvider
	propagator propagation.TextMapPropagator
}

// newTracing begins to send traces if a variable says where to. Else it returns nil.
func newTracing(ctx context.Context, stdout io.Writer, log *slog.Logger) (*tracing, error) {
	exporter, protocol := os.Getenv("OTEL_TRACES_EXPORTER"), "http/protobuf"
	if exporter == "" && (os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "") {
		exporter = "otlp"
	}
	if exporter == "" || exporter == "none" || strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") {
		return nil, nil
	}
	// Here the libraries tell faults that they go on in spite of. Who sets a variable wants it to be used.
	faults := &traceFaults{log: log, limit: rate.NewLimiter(rate.Every(sendFaultInterval), 1)}
	otel.SetLogger(logr.New(faults))
	otel.SetErrorHandler(otel.ErrorHandlerFunc(faults.add))

	var sender sdktrace.SpanExporter
	var err error
	switch exporter {
	case "console":
		sender, err = stdouttrace.New(stdouttrace.WithWriter(stdout))
		protocol = ""
	case "otlp":
		for _, variable := range []string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"} {
			if set := os.Getenv(variable); set != "" && !strings.Contains(set, "://") { // which the libraries take for none
				return nil, usageError("%s must be a URL, such as http://127.0.0.1:4318", variable)
			}
		}
		variable := "OTEL_EXPORTER_OTLP_PROTOCOL"
		if os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") != "" {
			variable = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
		}
		if set := os.Getenv(variable); set != "" {
			protocol = set
		}
		switch protocol {
		case "http/protobuf":
			sender, err = otlptracehttp.New(ctx)
		case "grpc":
			sender, err = otlptracegrpc.New(ctx)
		default:
			return nil, usageError("%s is %q; it must be http/protobuf or grpc", variable, protocol)
		}
	default:
		return nil, usageError("OTEL_TRACES_EXPORTER is %q; it must be otlp, console or none", exporter)
	}
	if err != nil {
		return nil, usageError("could not use the OTEL_* variables that say where traces are sent: %w", err)
	}
	release, _, _ := strings.Cut(version(), " ")
	about, err := resource.New(ctx,
		resource.WithAttributes(attribute.String("service.name", "polykit-cache"), attribute.String("service.version", release)),
		resource.WithTelemetrySDK(),
		resource.WithHost(),
		resource.WithFromEnv()) // the last one wins
	if err != nil {
		return nil, usageError("could not use OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	t := &tracing{
		// The log has panics, and most are how net/http is told that the client is gone.
		provider:   sdktrace.NewTracerProvider(sdktrace.WithBatcher(sender), sdktrace.WithResource(about), sdktrace.WithoutPanicRecording()),
		propagator: autoprop.NewTextMapPropagator(),
	}
	if err := faults.started(); err != nil {
		t.close(flushTimeout) // which it takes none of
		return nil, usageError("could not use the OTEL_* variables: %w", err)
	}
	log.Info("requests are traced", "exporter", exporter, "protocol", protocol)
	return t, nil
}

// server returns how a server traces.
func (t *tracing) server() *server.Traces {
	return &server.Traces{Provider: t.provider, Propagator: t.propagator}
}

// close sends what was not sent yet, within a time.
func (t *tracing) close(timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), min(timeout, flushTimeout))
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		otel.Handle(err)
	}
}

// traceFaults is told of what goes wrong with traces by all of OpenTelemetry. It is the logr.LogSink of it too.
type traceFaults struct {
	log   *slog.Logger
	limit *rate.Limiter

	mu       sync.Mutex
	running  bool
	starting []error // that came before
	unlogged int     // that came since one was logged
}

// started returns what went wrong so far. From here on it is logged, but not all of it: while a collector can't be reached
// there is something to say every few seconds.
func (t *traceFaults) started() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.running = true
	return errors.Join(t.starting...)
}

func (t *traceFaults) add(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case !t.running:
		t.starting = append(t.starting, err)
	case t.limit.Allow():
		t.log.Warn("could not send traces; all else goes on", "error", err, "unlogged", t.unlogged)
		t.unlogged = 0
	default:
		t.unlogged++
	}
}

// Error implements logr.LogSink. What else it is told of may be a variable with a password.
func (t *traceFaults) Error(_ error, what string, _ ...any) {
	t.add(fmt.Errorf("OpenTelemetry failed to %s", what))
}

func (t *traceFaults) Init(logr.RuntimeInfo)          {}
func (t *traceFaults) Enabled(int) bool               { return false }
func (t *traceFaults) Info(int, string, ...any)       {}
func (t *traceFaults) WithValues(...any) logr.LogSink { return t }
func (t *traceFaults) WithName(string) logr.LogSink   { return t }

// traceIDs is a slog.Handler that says of what is logged for a traced request or call which span it is about.
type traceIDs struct{ slog.Handler }

// Handle implements slog.Handler.
func (t traceIDs) Handle(ctx context.Context, record slog.Record) error {
	if span := oteltrace.SpanFromContext(ctx); span.IsRecording() {
		about := span.SpanContext()
		record = record.Clone()
		record.AddAttrs(slog.String("trace_id", about.TraceID().String()), slog.String("span_id", about.SpanID().String()))
	}
	return t.Handler.Handle(ctx, record)
}

// WithAttrs implements slog.Handler.
func (t traceIDs) WithAttrs(attrs []slog.Attr) slog.Handler {
	return traceIDs{t.Handler.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler.
func (t traceIDs) WithGroup(name string) slog.Handler { return traceIDs{t.Handler.WithGroup(name)} }
