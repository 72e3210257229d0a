package metrics

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// text is what a scrape gives.
func text(t *testing.T, m *Metrics, snapshot func() Snapshot) string {
	t.Helper()
	families, err := m.Gatherer(snapshot).Gather()
	must.Succeed(t, err)
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func full() Snapshot {
	s := Snapshot{
		Pods: map[string]int{"ready": 2, "notready": 1}, Containers: map[string]int{"running": 3},
		Layers: 17, LayerBytes: 18, LayerInodes: 19,
	}
	s.Pulls = map[string]uint64{"success": 4, "not_found": 5}
	s.Running = []records.Pull{
		{Ref: "a.test/x:1", Bytes: 10, TotalBytes: 100},
		{Ref: "a.test/x:1", Bytes: 20, TotalBytes: 100}, // two callers
		{Ref: "a.test/y:1"},
	}
	s.Downloads, s.Bytes, s.ResumedBytes, s.Retries, s.Shared, s.Unpacked = 6, 7, 8, 9, 10, 11
	s.Images, s.Blobs, s.BlobBytes, s.Collected, s.FreedBytes = 12, 13, 14, 15, 16
	return s
}

func TestMetrics(t *testing.T) {
	m := New("1.2.3")
	m.Called("PullImage", "OK", time.Second)
	m.Called("PullImage", "NotFound", 2*time.Second)
	m.Pulled(time.Minute)
	got := text(t, m, full)
	for _, want := range []string{
		`holdfast_cri_calls_total{code="NotFound",method="PullImage"} 1`,
		`holdfast_cri_call_duration_seconds_sum{method="PullImage"} 3`,
		`holdfast_image_pull_duration_seconds_bucket{le="60"} 1`,
		`holdfast_pods{state="notready"} 1`,
		`holdfast_containers{state="running"} 3`,
		`holdfast_image_pulls_total{result="not_found"} 5`,
		`holdfast_image_pulls_running 3`,
		`holdfast_image_pull_done_bytes{image="a.test/x:1"} 20`,
		`holdfast_image_pull_size_bytes{image="a.test/x:1"} 100`,
		`holdfast_image_pull_size_bytes{image="a.test/y:1"} 0`,
		`holdfast_image_downloads_running 6`,
		`holdfast_image_downloaded_bytes_total 7`,
		`holdfast_image_resumed_bytes_total 8`,
		`holdfast_image_download_retries_total 9`,
		`holdfast_image_downloads_shared_total 10`,
		`holdfast_image_layers_unpacked_total 11`,
		`holdfast_images 12`,
		`holdfast_image_blobs 13`,
		`holdfast_image_blob_bytes 14`,
		`holdfast_image_blobs_collected_total 15`,
		`holdfast_image_collected_bytes_total 16`,
		`holdfast_layers 17`,
		`holdfast_layer_bytes 18`,
		`holdfast_layer_inodes 19`,
	} {
		if !strings.Contains(got, "\n"+want+"\n") {
			t.Errorf("there is no %s", want)
		}
	}
	if !regexp.MustCompile(`\nholdfast_build_info{goversion="go[^"]*",version="1.2.3"} 1\n`).MatchString(got) {
		t.Error("it does not say which program it is")
	}
	if t.Failed() {
		t.Log(got)
	}
}

func TestNames(t *testing.T) {
	got := text(t, New("1"), full)
	problems, err := promlint.New(strings.NewReader(got)).Lint()
	must.Succeed(t, err)
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "holdfast_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// The table in the documentation is what there is.
func TestDocumented(t *testing.T) {
	m := New("1")
	m.Called("Version", "OK", 0)
	doc, err := os.ReadFile("../../docs/operations.md")
	must.Succeed(t, err)
	has := names(regexp.MustCompile(`(?m)^# TYPE (holdfast_\S+)`), text(t, m, full))
	said := names(regexp.MustCompile("(?m)^\\| `(holdfast_[a-z_]+)"), string(doc))
	if !slices.Equal(has, said) {
		t.Errorf("there are\n%q, documented are\n%q", has, said)
	}
}

func names(r *regexp.Regexp, text string) (list []string) {
	for _, m := range r.FindAllStringSubmatch(text, -1) {
		list = append(list, m[1])
	}
	slices.Sort(list)
	return list
}

// Where nobody asks for metrics there is nothing to count in.
func TestOff(t *testing.T) {
	var m *Metrics
	m.Called("Version", "OK", time.Second)
	m.Pulled(time.Second)
	if n := testing.AllocsPerRun(10, func() { m.Called("Version", "OK", time.Second) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
