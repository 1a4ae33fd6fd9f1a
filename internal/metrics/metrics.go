// Package metrics is all that a server counts and measures, for Prometheus: every name, what it means and what its
// labels can be stands here.
//
// What happens to requests is told as it happens: Method, Unsound. What is there already is looked at when it is
// asked for: Watch, in sources.go. Labels take few values: no key, scope, package or client is one, and what a
// client makes up is "other".
package metrics

import (
	"net/http"
	"sync"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/polykit/polykit-cache/internal/artifact"
)

const namespace = "polykit_cache"

const (
	// nativeFactor is how much wider each bucket of a native histogram is than the one before, and nativeBuckets
	// how many there are at most.
	nativeFactor  = 1.1
	nativeBuckets = 100
	nativeReset   = time.Hour
)

// buckets are the upper bounds in seconds of those histograms that are not native, from a download of what is in
// memory to the largest artifact over a slow line.
var buckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}

// Metrics are those of one server. They are safe for concurrent use.
type Metrics struct {
	registry  *prometheus.Registry
	requests  *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	firstByte *prometheus.HistogramVec
	received  *prometheus.CounterVec
	sent      *prometheus.CounterVec
	unsound   *prometheus.CounterVec
	methods   sync.Map // *Method by methodKey
	calls     *grpcprom.ServerMetrics
}

// New returns metrics that count from now on.
func New() *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	byMethod := []string{"protocol", "method"}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, labels)
		m.registry.MustRegister(c)
		return c
	}
	histogram := func(name, help string) *prometheus.HistogramVec {
		h := prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Name: name, Help: help, Buckets: buckets,
			NativeHistogramBucketFactor: nativeFactor, NativeHistogramMaxBucketNumber: nativeBuckets, NativeHistogramMinResetDuration: nativeReset,
		}, byMethod)
		m.registry.MustRegister(h)
		return h
	}
	m.requests = counter("requests_total", "Requests and calls that have ended, by protocol (rest, grpc), method (that of the gRPC service that does the same, or what is no method there) and status (of HTTP, or the code of gRPC).", append(byMethod, "status")...)
	m.duration = histogram("request_duration_seconds", "Time from a request's header to the end of its answer.")
	m.firstByte = histogram("request_first_byte_seconds", "Time from a request's header to the first byte of its answer.")
	m.received = counter("received_bytes_total", "Bytes of bodies over REST and of messages over gRPC that were received.", byMethod...)
	m.sent = counter("sent_bytes_total", "Bytes of bodies over REST and of messages over gRPC that were sent.", byMethod...)
	m.unsound = counter("verification_failures_total", "Uploads that were refused since they are not sound, by the rule that they break.", "reason")
	for _, rule := range []artifact.Rule{artifact.RuleStream, artifact.RuleDocument, artifact.RuleKey, artifact.RuleEntry, artifact.RulePath, artifact.RuleLimit} {
		m.unsound.WithLabelValues(string(rule)) // so that the first one is an increase
	}
	m.calls = grpcprom.NewServerMetrics()
	m.registry.MustRegister(m.calls, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Calls is what counts the calls and messages of a gRPC server under the names that all have for them
// (grpc_server_handled_total and its like).
func (m *Metrics) Calls() *grpcprom.ServerMetrics { return m.calls }

// Build says what was built into the binary: its version, and that of Go.
func (m *Metrics) Build(version, goVersion string) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: namespace, Name: "build_info", Help: "Always 1, with what the server was built from.",
		ConstLabels: prometheus.Labels{"version": version, "go_version": goVersion},
	}, func() float64 { return 1 }))
}

// Handler returns what answers a scrape, in the text format of Prometheus, that of OpenMetrics, or the one with native
// histograms, as is asked for.
func (m *Metrics) Handler() http.Handler {
	return promhttp.InstrumentMetricHandler(m.registry, promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		Registry: m.registry, EnableOpenMetrics: true, MaxRequestsInFlight: 4, Timeout: 30 * time.Second,
		ErrorHandling: promhttp.ContinueOnError, // what can be told is
	}))
}

type methodKey struct{ protocol, name string }

// Method counts the requests of one method.
type Method struct {
	// Name is what the method is called.
	Name string

	requests            *prometheus.CounterVec
	duration, firstByte prometheus.Observer
	received, sent      prometheus.Counter
}

// Method returns what counts the requests of a method over a protocol. There must be few of them.
func (m *Metrics) Method(protocol, name string) *Method {
	if method, ok := m.methods.Load(methodKey{protocol, name}); ok {
		return method.(*Method)
	}
	method, _ := m.methods.LoadOrStore(methodKey{protocol, name}, &Method{
		Name:      name,
		requests:  m.requests.MustCurryWith(prometheus.Labels{"protocol": protocol, "method": name}),
		duration:  m.duration.WithLabelValues(protocol, name),
		firstByte: m.firstByte.WithLabelValues(protocol, name),
		received:  m.received.WithLabelValues(protocol, name),
		sent:      m.sent.WithLabelValues(protocol, name),
	})
	return method.(*Method)
}

// Request is what is counted of a request.
type Request struct {
	// Status is that of HTTP, or the code of gRPC.
	Status string
	// Received and Sent are bytes.
	Received, Sent int64
	// FirstByte and Duration are how long it took until the first byte of the answer, and until its last.
	FirstByte, Duration time.Duration
}

// Ended counts a request that has ended.
func (m *Method) Ended(r Request) {
	m.requests.WithLabelValues(r.Status).Inc()
	m.duration.Observe(r.Duration.Seconds())
	m.firstByte.Observe(r.FirstByte.Seconds())
	m.received.Add(float64(r.Received))
	m.sent.Add(float64(r.Sent))
}

// Unsound counts an upload that was refused.
func (m *Metrics) Unsound(rule artifact.Rule) { m.unsound.WithLabelValues(string(rule)).Inc() }
