package metrics

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/index"
	"github.com/polykit/polykit-cache/internal/retention"
)

// lookTimeout bounds how long a scrape waits for the index.
const lookTimeout = 5 * time.Second

// Sources are what is looked at when it is asked for.
type Sources struct {
	// Index, Collector, Store and Verifier are those of the server.
	Index     *index.Index
	Collector *retention.Collector
	Store     *disk.Store
	Verifier  *artifact.Verifier
	// Requests and Connections return how many there are now.
	Requests, Connections func() int64
	// ConnectionsLimit is the most connections that may be open at once.
	ConnectionsLimit int
	// Ready returns an error if artifacts can't be stored now.
	Ready func(context.Context) error
	// Refusals returns how many requests were refused for who sent them, by each reason that there is.
	Refusals func() map[auth.Reason]int64
}

// figure is a metric that is looked at.
type figure struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func gauge(name, help string, labels ...string) figure {
	return figure{prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil), prometheus.GaugeValue}
}

func counter(name, help string, labels ...string) figure {
	return figure{prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil), prometheus.CounterValue}
}

var (
	ready            = gauge("ready", "1 if uploads can be stored, as /readyz says it; 0 if not.")
	requestsInFlight = gauge("requests_in_flight", "Requests and calls that are handled now.")
	connections      = gauge("connections", "Connections that are open.")
	connectionsLimit = gauge("connections_limit", "Most that may be, by --max-connections.")
	uploadsInFlight  = gauge("uploads_in_flight", "Uploads and other artifacts that are verified now.")
	uploadsLimit     = gauge("uploads_limit", "Most that are verified at once, by --verify-memory.")
	uploadsQueued    = gauge("uploads_queued", "Uploads that wait for others to end.")
	authFailures     = counter("auth_failures_total", "Requests and calls that were refused for who sent them, by the reason.", "reason")

	hits            = counter("hits_total", "Downloads that found an artifact.")
	misses          = counter("misses_total", "Downloads that found none.")
	uploads         = counter("uploads_total", "Uploads that were stored.")
	compared        = counter("compared_artifacts_total", "Pairs of artifacts of one key in two scopes, by whether they have the same files (agreed) or not (differed): then one is poisoned, or its task does not make the same each time.", "result")
	evictions       = counter("evictions_total", "Artifacts that were removed by the retention policy, by the limit that they were removed for.", "reason")
	evicted         = counter("evicted_bytes_total", "Bytes on the disk that this freed.", "reason")
	artifacts       = gauge("artifacts", "Artifacts that are stored, in all scopes.")
	stored          = gauge("stored_bytes", "Bytes of artifacts that are stored.")
	indexComplete   = gauge("index_complete", "1 if the index has all that is stored; 0 while it is completed in the background.")
	indexAvailable  = gauge("index_available", "1 if the index can answer; 0 if not, and then the figures that are from it are missing.")
	storageUsed     = gauge("storage_used_bytes", "Bytes that everything in the storage directory takes on the disk, with uploads in flight.")
	storageRoom     = gauge("storage_room_bytes", "Bytes that uploads may take until something must be evicted, by --max-storage and --min-free.")
	diskSize        = gauge("disk_size_bytes", "Size of the file system that the storage directory is on.")
	diskFree        = gauge("disk_free_bytes", "Bytes that are free there, less what uploads in flight will still write.")
	quarantined     = gauge("quarantine_files", "Files in quarantine.")
	quarantineBytes = gauge("quarantine_bytes", "Bytes that they take on the disk.")

	scrubbed      = counter("scrubbed_artifacts_total", "Artifacts that a scrub has read, by what it found: sound, damaged.", "result")
	scrubbedBytes = counter("scrubbed_bytes_total", "Bytes of these.")
	scrubStarted  = gauge("scrub_start_timestamp_seconds", "When the scrub of everything that goes on began, which a restart does not change, or when the next one will, in seconds since 1970; missing with --scrub-interval=0.")
	lastScrubbed  = gauge("last_scrub_timestamp_seconds", "When the last scrub of everything ended, in seconds since 1970; missing if none has since the server started.")
)

// Watch adds what is looked at when it is asked for.
func (m *Metrics) Watch(sources Sources) { m.registry.MustRegister(&watch{sources}) }

// watch is a prometheus.Collector.
type watch struct{ Sources }

// Describe implements prometheus.Collector. What there is depends on what can be told.
func (w *watch) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector. What can't be told now is left out: a 0 would be a lie.
func (w *watch) Collect(all chan<- prometheus.Metric) {
	tell := func(f figure, value float64, labels ...string) {
		all <- prometheus.MustNewConstMetric(f.desc, f.kind, value, labels...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookTimeout)
	defer cancel()
	tell(ready, number(w.Ready(ctx) == nil))
	tell(requestsInFlight, float64(w.Requests()))
	tell(connections, float64(w.Connections()))
	tell(connectionsLimit, float64(w.ConnectionsLimit))
	tell(uploadsInFlight, float64(w.Verifier.InFlight()))
	tell(uploadsLimit, float64(w.Verifier.Slots()))
	tell(uploadsQueued, float64(w.Verifier.Queued()))
	for reason, n := range w.Refusals() {
		tell(authFailures, float64(n), string(reason))
	}
	happened := w.Index.SinceStart()
	tell(hits, float64(happened.Hits))
	tell(misses, float64(happened.Misses))
	tell(uploads, float64(happened.Stored))
	tell(compared, float64(happened.Agreed), "agreed")
	tell(compared, float64(happened.Differed), "differed")
	for reason, sum := range w.Collector.Removed() {
		tell(evictions, float64(sum.Artifacts), reason.String())
		tell(evicted, float64(sum.DiskSize), reason.String())
	}
	tell(indexComplete, number(w.Index.Complete()))
	stats, err := w.Index.Stats(ctx, 0)
	tell(indexAvailable, number(err == nil))
	if err == nil {
		tell(artifacts, float64(stats.Total.Artifacts))
		tell(stored, float64(stats.Total.Size))
	}
	if usage, err := w.Store.Usage(); err == nil {
		tell(storageUsed, float64(usage.Used))
		tell(storageRoom, float64(usage.Room))
		tell(diskSize, float64(usage.Size))
		tell(diskFree, float64(usage.Free))
	}
	if files, size, err := w.Store.QuarantineSize(); err == nil {
		tell(quarantined, float64(files))
		tell(quarantineBytes, float64(size))
	}
	scrubs := w.Store.Scrubbed()
	tell(scrubbed, float64(scrubs.Sound), "sound")
	tell(scrubbed, float64(scrubs.Damaged), "damaged")
	tell(scrubbedBytes, float64(scrubs.Bytes))
	if !scrubs.StartedAt.IsZero() {
		tell(scrubStarted, seconds(scrubs.StartedAt))
	}
	if !scrubs.EndedAt.IsZero() {
		tell(lastScrubbed, seconds(scrubs.EndedAt))
	}
}

// seconds returns a time as Prometheus has it.
func seconds(at time.Time) float64 { return float64(at.UnixNano()) / 1e9 }

func number(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
