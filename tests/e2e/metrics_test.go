package e2e

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// scraped is what /metrics says.
type scraped map[string]*dto.MetricFamily

func scrape(t *testing.T, address string) scraped {
	t.Helper()
	resp, err := http.Get("http://" + address + "/metrics")
	check(t, err)
	defer resp.Body.Close()
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v", resp.Status, err)
	}
	return families
}

// value is that of a counter, a gauge or the count of a histogram; -1 if there
// is none. Labels are pairs of a name and a value.
func (s scraped) value(name string, labels ...string) float64 {
	for _, m := range s[name].GetMetric() {
		has := map[string]string{}
		for _, l := range m.Label {
			has[l.GetName()] = l.GetValue()
		}
		fits := true
		for i := 0; i < len(labels); i += 2 {
			fits = fits && has[labels[i]] == labels[i+1]
		}
		switch {
		case !fits:
		case m.Counter != nil:
			return m.Counter.GetValue()
		case m.Gauge != nil:
			return m.Gauge.GetValue()
		default:
			return float64(m.Histogram.GetSampleCount())
		}
	}
	return -1
}

// randomLayers do not compress, and no other test has them.
func randomLayers(t *testing.T, count, bytes int) (layers []harness.Layer) {
	t.Helper()
	for i := range count {
		b := make([]byte, bytes)
		rand.Read(b)
		l, err := harness.MakeLayer(map[string]string{fmt.Sprint("file", i): string(b)})
		check(t, err)
		layers = append(layers, l)
	}
	return layers
}

// A pull shows in the metrics and in `holdfastctl pulls` while it runs, not
// longer, and what it did adds up.
func TestMetricsOfPulls(t *testing.T) {
	t.Parallel()
	address := fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t))
	n := harness.New(t, harness.Options{Config: fmt.Sprintf("[metrics]\naddress = %q\n", address)})
	s := newSlow(t, n, "slow.test")
	const ref, size = "slow.test/team/app:1", 512 << 10
	if _, err := n.Registry.Push(ref, ocispec.ImageConfig{}, randomLayers(t, 2, size)...); err != nil {
		t.Fatal(err)
	}
	before := scrape(t, address)
	grown := func(name string, labels ...string) float64 {
		return scrape(t, address).value(name, labels...) - before.value(name, labels...)
	}
	done := func() float64 { return scrape(t, address).value("holdfast_image_pull_done_bytes", "image", ref) }
	pull := func(ctx context.Context, ended chan<- error) {
		_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref},
			SandboxConfig: n.PodConfig("waits")})
		ended <- err
	}
	ended := make(chan error, 2)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go pull(ctx, ended)
	harness.Eventually(t, patience, "its size is known", func() bool {
		return scrape(t, address).value("holdfast_image_pull_size_bytes", "image", ref) > 2*size
	})
	total := scrape(t, address).value("holdfast_image_pull_size_bytes", "image", ref)
	if got := done(); got != 0 {
		t.Errorf("%v bytes are here before any came", got)
	}
	s.send(3)
	harness.Eventually(t, patience, "three pieces are here", func() bool { return done() == 3*piece })
	if got := scrape(t, address).value("holdfast_image_pulls_running"); got != 1 {
		t.Errorf("%v pulls run", got)
	}
	out, err := exec.Command(filepath.Join(n.Bin, "holdfastctl"), "--state", n.State, "pulls").CombinedOutput()
	if want := n.PodConfig("waits").Metadata; err != nil || !strings.Contains(string(out), ref) ||
		!strings.Contains(string(out), want.Namespace+"/"+want.Name) {
		t.Errorf("holdfastctl pulls: %v\n%s", err, out)
	}

	// It is called off half way.
	cancel()
	if err := <-ended; err == nil {
		t.Error("a pull that was called off went well")
	}
	harness.Eventually(t, patience, "it is gone", func() bool { return done() == -1 })
	harness.Eventually(t, patience, "one pull was called off", func() bool {
		return grown("holdfast_image_pulls_total",
			"result", "canceled") == 1
	})
	harness.Eventually(t, patience, "its downloads have ended", func() bool {
		return scrape(t,
			address).value("holdfast_image_downloads_running") == 0
	})
	kept := grown("holdfast_image_downloaded_bytes_total")

	// Two want it; what has come is not fetched again, and nothing twice.
	go pull(t.Context(), ended)
	harness.Eventually(t, patience, "it goes on", func() bool { return done() == kept })
	go pull(t.Context(), ended)
	harness.Eventually(t, patience, "the other one joins",
		func() bool { return grown("holdfast_image_downloads_shared_total") == 2 })
	s.hurry()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	for _, want := range []struct {
		grown  float64
		name   string
		labels []string
	}{
		{2, "holdfast_image_pulls_total", []string{"result", "success"}},
		{2, "holdfast_image_pull_duration_seconds", nil},
		{total, "holdfast_image_downloaded_bytes_total", nil},
		{kept, "holdfast_image_resumed_bytes_total", nil},
		{1, "holdfast_images", nil},
		{2, "holdfast_layers", nil},
		{4, "holdfast_image_blobs", nil}, // manifest, config, layers
	} {
		if got := grown(want.name, want.labels...); got != want.grown {
			t.Errorf("%s %v grew by %v, want %v", want.name, want.labels, got, want.grown)
		}
	}
	if now := scrape(t, address); done() != -1 || now.value("holdfast_image_pulls_running") != 0 {
		t.Errorf("pulls that ended are still there: %v", now["holdfast_image_pull_done_bytes"])
	}

	removeImage(t, n, ref)
	harness.Eventually(t, patience, "its blobs are gone, and counted", func() bool {
		return grown("holdfast_image_blob_bytes") == 0 && grown("holdfast_image_blobs_collected_total") >= 4
	})
	blobs, bytes := grown("holdfast_image_blobs_collected_total"), grown("holdfast_image_collected_bytes_total")
	if blobs != 4 || bytes <= total {
		t.Errorf("%v blobs with %v bytes were collected", blobs, bytes)
	}
	ctx, cancel = harness.Deadline()
	defer cancel()
	n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "slow.test/team/none:1"}})
	if got := grown("holdfast_image_pulls_total", "result", "not_found"); got != 1 {
		t.Errorf("%v pulls found nothing", got)
	}
	got := scrape(t, address).value("holdfast_cri_calls_total", "method", "PullImage", "code", "NotFound")
	if got != 1 {
		t.Errorf("%v calls found nothing", got)
	}
}

// Pods and containers are counted, also those of an earlier daemon, and nothing
// but the daemon holds the port.
func TestMetricsOfPods(t *testing.T) {
	t.Parallel()
	address := fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t))
	n := harness.New(t, harness.Options{Config: fmt.Sprintf("[metrics]\naddress = %q\n", address)})
	p := n.RunPod("counted")
	p.Run("runs", []string{"sleep", "1000"})
	p.Create("waits", []string{"true"})
	compare := func() {
		t.Helper()
		harness.Eventually(t, patience, "all are counted", func() bool {
			s := scrape(t, address)
			return s.value("holdfast_pods", "state", "ready") == 1 && s.value("holdfast_pods", "state",
				"notready") == 0 &&
				s.value("holdfast_containers", "state", "running") == 1 && s.value("holdfast_containers", "state",
				"created") == 1
		})
	}
	compare()
	got := scrape(t, address).value("holdfast_cri_calls_total", "method", "CreateContainer", "code", "OK")
	if got != 2 {
		t.Errorf("%v containers were created", got)
	}
	n.Kill()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatalf("somebody kept the port: %v", err)
	}
	// Somebody else's port is an error that names the key.
	out, err := exec.Command(filepath.Join(n.Bin, "holdfastd"), "--config", n.Path("config.toml"), "--root", n.Root,
		"--state", n.State,
		"--address", n.Socket).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "metrics.address") || !strings.Contains(string(out), "in use") {
		t.Errorf("it started on a port in use: %v\n%s", err, out)
	}
	check(t, l.Close())
	n.Start()
	compare()
	if got := scrape(t, address).value("holdfast_cri_calls_total", "method", "CreateContainer"); got != -1 {
		t.Errorf("%v containers were created by a daemon that has just started", got)
	}
	n.Stop()
	if l, err = net.Listen("tcp", address); err != nil {
		t.Errorf("somebody kept the port: %v", err)
	} else {
		l.Close()
	}
	n.Start()
}
