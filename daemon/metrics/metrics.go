// Package metrics has the names and kinds of what Holdfast counts, in the form
// that Prometheus reads. Nothing is kept twice: what the daemon's parts count
// themselves is read when somebody asks (Snapshot), and only times of calls and
// of pulls are collected here.
//
// Labels have few values: methods, codes, states, results, and the references of
// the images that are being pulled at the moment.
package metrics

import (
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/holdfast-cri/holdfast/daemon/records"
)

// Snapshot is what the daemon has, and has done since it started. It is made
// from memory for each scrape. The help texts in the table below say what each
// number counts.
type Snapshot struct {
	records.ImageStats
	Pods, Containers map[string]int // by state, all states

	Layers      int
	LayerBytes  uint64
	LayerInodes uint64
}

// Metrics collects the times of calls and pulls. A nil one collects nothing. Its
// methods may be called from any goroutine.
type Metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.CounterVec
	took     *prometheus.HistogramVec
	pull     prometheus.Histogram
}

// New gives the metrics of a program of that version. They exist before the
// daemon does, so that its start is measured, too.
func New(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_cri_calls_total",
			Help: "Calls of the CRI that were answered.",
		}, []string{"method", "code"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "holdfast_cri_call_duration_seconds",
			Help:    "Time that calls of the CRI took, failed ones included.",
			Buckets: []float64{.001, .005, .025, .1, .25, .5, 1, 2.5, 5, 10, 30, 120},
		}, []string{"method"}),
		pull: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "holdfast_image_pull_duration_seconds",
			Help:    "Time that pulls took which succeeded, those of images that were here already included.",
			Buckets: []float64{.1, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800},
		}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "holdfast_build_info",
		Help:        "1; the labels say which program this is.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	build.Set(1)
	m.registry.MustRegister(m.calls, m.took, m.pull, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Called counts a call of the CRI; method and code are without their packages.
func (m *Metrics) Called(method, code string, took time.Duration) {
	if m != nil {
		m.calls.WithLabelValues(method, code).Inc()
		m.took.WithLabelValues(method).Observe(took.Seconds())
	}
}

// Pulled counts a pull that succeeded.
func (m *Metrics) Pulled(took time.Duration) {
	if m != nil {
		m.pull.Observe(took.Seconds())
	}
}

// Gatherer gives all metrics, with a snapshot for each time that they are asked
// for. It is called once.
func (m *Metrics) Gatherer(snapshot func() Snapshot) prometheus.Gatherer {
	m.registry.MustRegister(reader(snapshot))
	return m.registry
}

// metric is one that is read from a snapshot.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func(*Snapshot, func(value float64, labels ...string))
}

// number is a metric without labels.
func number[N int | uint64](kind prometheus.ValueType, name, help string, get func(*Snapshot) N) metric {
	return metric{
		desc: prometheus.NewDesc(name, help, nil, nil),
		kind: kind,
		read: func(s *Snapshot, emit func(float64, ...string)) { emit(float64(get(s))) },
	}
}

// numbers is a metric with one label, whose values are the keys.
func numbers[N int | uint64](
	kind prometheus.ValueType, name, help, label string, get func(*Snapshot) map[string]N,
) metric {
	return metric{
		desc: prometheus.NewDesc(name, help, []string{label}, nil),
		kind: kind,
		read: func(s *Snapshot, emit func(float64, ...string)) {
			for value, n := range get(s) {
				emit(float64(n), value)
			}
		},
	}
}

// perPull has a value for each image that is being pulled. Several pulls of one
// image share their downloads, so that the one that is furthest counts for all.
func perPull(name, help string, get func(records.Pull) int64) metric {
	return metric{
		desc: prometheus.NewDesc(name, help, []string{"image"}, nil),
		kind: prometheus.GaugeValue,
		read: func(s *Snapshot, emit func(float64, ...string)) {
			furthest := map[string]int64{}
			for _, p := range s.Running {
				furthest[p.Ref] = max(furthest[p.Ref], get(p))
			}
			for ref, n := range furthest {
				emit(float64(n), ref)
			}
		},
	}
}

const (
	gauge   = prometheus.GaugeValue
	counter = prometheus.CounterValue
)

// table has all that is read from snapshots. docs/operations.md shows it.
var table = []metric{
	numbers(gauge, "holdfast_pods", "Pods, by state.", "state", func(s *Snapshot) map[string]int { return s.Pods }),
	numbers(gauge, "holdfast_containers",
		"Containers, by state.", "state",
		func(s *Snapshot) map[string]int { return s.Containers }),

	numbers(counter, "holdfast_image_pulls_total",
		"Pulls that ended, by result.", "result",
		func(s *Snapshot) map[string]uint64 { return s.Pulls }),
	number(gauge, "holdfast_image_pulls_running", "Pulls that run.", func(s *Snapshot) int { return len(s.Running) }),
	perPull("holdfast_image_pull_done_bytes",
		"Compressed bytes that are here of an image that is being pulled.",
		func(p records.Pull) int64 { return p.Bytes }),
	perPull("holdfast_image_pull_size_bytes",
		"Compressed size of an image that is being pulled; 0 while it is not known.",
		func(p records.Pull) int64 { return p.TotalBytes }),
	number(gauge, "holdfast_image_downloads_running",
		"Layers that are being downloaded, or wait for their turn.",
		func(s *Snapshot) int { return s.Downloads }),
	number(counter, "holdfast_image_downloaded_bytes_total",
		"Bytes of layers that came from registries.",
		func(s *Snapshot) uint64 { return s.Bytes }),
	number(counter, "holdfast_image_resumed_bytes_total",
		"Bytes of layers that an interrupted download had brought, so that they were not fetched again.",
		func(s *Snapshot) uint64 { return s.ResumedBytes }),
	number(counter, "holdfast_image_download_retries_total",
		"Requests for layers that failed and were repeated, or given up.",
		func(s *Snapshot) uint64 { return s.Retries }),
	number(counter, "holdfast_image_downloads_shared_total",
		"Layers that a pull took from the download of another pull.",
		func(s *Snapshot) uint64 { return s.Shared }),
	number(counter, "holdfast_image_layers_unpacked_total",
		"Layers that were unpacked.",
		func(s *Snapshot) uint64 { return s.Unpacked }),

	number(gauge, "holdfast_images", "Images in the store.", func(s *Snapshot) int { return s.Images }),
	number(gauge, "holdfast_image_blobs", "Blobs in the store.", func(s *Snapshot) uint64 { return s.Blobs }),
	number(gauge, "holdfast_image_blob_bytes",
		"Size of the blobs in the store.",
		func(s *Snapshot) uint64 { return s.BlobBytes }),
	number(counter, "holdfast_image_blobs_collected_total",
		"Blobs that were removed because nothing needed them.",
		func(s *Snapshot) uint64 { return s.Collected }),
	number(counter, "holdfast_image_collected_bytes_total",
		"Size of the blobs that were removed because nothing needed them.",
		func(s *Snapshot) uint64 { return s.FreedBytes }),
	number(gauge, "holdfast_layers", "Unpacked layers.", func(s *Snapshot) int { return s.Layers }),
	number(gauge, "holdfast_layer_bytes",
		"Size of the unpacked layers.",
		func(s *Snapshot) uint64 { return s.LayerBytes }),
	number(gauge, "holdfast_layer_inodes",
		"Inodes of the unpacked layers.",
		func(s *Snapshot) uint64 { return s.LayerInodes }),
}

// reader reads a snapshot for each scrape.
type reader func() Snapshot

// Describe implements prometheus.Collector.
func (reader) Describe(c chan<- *prometheus.Desc) {
	for _, m := range table {
		c <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (r reader) Collect(c chan<- prometheus.Metric) {
	s := r()
	for _, m := range table {
		m.read(&s, func(value float64, labels ...string) {
			c <- prometheus.MustNewConstMetric(m.desc, m.kind, value, labels...)
		})
	}
}
