package stats

import (
	"context"
	"slices"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

// commonKeys are the labels that every metric has, as cAdvisor's have in a kubelet: id is
// the path of the cgroup, name the id of the container. A pod has no container and image,
// and its own id as its name.
var commonKeys = []string{"container", "id", "image", "name", "namespace", "pod"}

// subject is a container or pod, with all that metrics are made of. What is not known, or
// not of such a subject, has its zero value.
type subject struct {
	labels    []string // values of commonKeys
	figures   cgroup.Figures
	pressure  map[string]*cgroup.Pressure // by resource
	transfers []cgroup.Transfer
	pages     []cgroup.HugePages
	links     []link
	processes []point
	opened    []point // descriptors
	sockets   []point
	openFiles []point // the limit of descriptors
	shares    uint64  // as asked for: the weight of v2 cannot be turned back into shares
	layer     *layer
	disk      disk
	container bool
	created   time.Time
	start     time.Time // zero: it has not been started, or is a pod
}

// point is one value of a metric.
type point struct {
	n      uint64
	labels []string  // values of the keys of its metric
	at     time.Time // when it was measured; zero: now
}

// metric is one of the table.
type metric struct {
	name    string
	help    string
	kind    runtimeapi.MetricType
	keys    []string        // beyond commonKeys
	figures []cgroup.Figure // that points needs
	points  func(s *subject) []point
}

const (
	counter = runtimeapi.MetricType_COUNTER
	gauge   = runtimeapi.MetricType_GAUGE

	// second is one in the unit of figures. The value of a metric is a whole number in
	// the CRI, and so the seconds of a counter are.
	second = uint64(time.Second)
)

// ofUnified are the metrics whose figures only cgroup v2 has. A descriptor promises values.
var ofUnified = map[string]bool{
	"container_memory_events_high_total": true,
	"container_memory_events_max_total":  true,
	"container_memory_pgscan_total":      true,
	"container_memory_pgsteal_total":     true,
}

// Descriptors is ListMetricDescriptors of the CRI.
func (c *Collector) Descriptors() []*runtimeapi.MetricDescriptor {
	return descriptorsOf(cgroup.Probe().Unified)
}

func descriptorsOf(unified bool) (list []*runtimeapi.MetricDescriptor) {
	for _, m := range metrics {
		if ofUnified[m.name] && !unified {
			continue
		}
		list = append(list, &runtimeapi.MetricDescriptor{
			Name:      m.name,
			Help:      m.help,
			LabelKeys: slices.Concat(commonKeys, m.keys),
		})
	}
	return list
}

// neededFigures are those that some metric needs.
var neededFigures = func() (all []cgroup.Figure) {
	for _, m := range metrics {
		all = append(all, m.figures...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}()

// Metrics is ListPodSandboxMetrics of the CRI, of pods that are ready. One that was stopped may
// have the cgroup of the pod that the kubelet has made in its place, whose use would count twice.
func (c *Collector) Metrics(ctx context.Context) (list []*runtimeapi.PodSandboxMetrics, err error) {
	c.layers.asked()
	pods := slices.DeleteFunc(c.Node.Pods(nil), func(p Pod) bool { return !p.Ready })
	links := interfaces(pods)
	budget := maxDescriptors
	for _, p := range pods {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s, _, _ := subjectOf(p.Cgroup)
		// The kubelet's own metrics are without the loopback.
		s.links = slices.DeleteFunc(links[p.ID], func(l link) bool { return l.name == loopback })
		s.labels, s.created = labels("", p.Cgroup, "", p.ID, &p), p.Created
		one := &runtimeapi.PodSandboxMetrics{PodSandboxId: p.ID, Metrics: pointsOf(&s)}
		for i := range p.Containers {
			if s, ok := c.containerSubject(&p, &p.Containers[i], &budget); ok {
				one.ContainerMetrics = append(one.ContainerMetrics, &runtimeapi.ContainerMetrics{
					ContainerId: p.Containers[i].ID,
					Metrics:     pointsOf(&s),
				})
			}
		}
		list = append(list, one)
	}
	return list, nil
}

// labels are values of commonKeys.
func labels(container, path, image, name string, p *Pod) []string {
	m := p.Config.GetMetadata()
	return []string{container, path, image, name, m.GetNamespace(), m.GetName()}
}

// subjectOf reads a cgroup, and gives the processes in it. It says false where there is
// no cgroup.
func subjectOf(path string) (s subject, pids []int, ok bool) {
	set := cgroup.At(path)
	if path == "" || len(set) == 0 {
		return s, nil, false
	}
	s.figures = set.Figures(neededFigures...)
	s.pressure = map[string]*cgroup.Pressure{}
	for _, resource := range []string{"cpu", "memory", "io"} {
		if p := set.Pressure(resource); p != nil {
			s.pressure[resource] = p
		}
	}
	s.transfers, s.pages = set.Transfers(), set.HugePages()
	pids, err := set.Pids()
	if err == nil {
		s.processes = []point{{n: uint64(len(pids))}}
	}
	return s, pids, true
}

// containerSubject is a container that has not ended.
func (c *Collector) containerSubject(p *Pod, one *Container, budget *int) (subject, bool) {
	s, pids, ok := subjectOf(one.Cgroup)
	if !ok {
		return s, false
	}
	s.labels = labels(one.Config.GetMetadata().GetName(), one.Cgroup, one.Image, one.ID, p)
	s.container, s.created, s.start = true, one.Created, one.Start
	s.shares = uint64(max(0, one.Config.GetLinux().GetResources().GetCpuShares()))
	if l, ok := c.layers.get(one.ID); ok {
		s.layer, s.disk = &l, c.layers.diskNow()
	}
	if open, sockets, ok := descriptors(pids, budget); ok {
		s.opened, s.sockets = []point{{n: open}}, []point{{n: sockets}}
	}
	if slices.Contains(pids, one.Init) {
		if n, ok := openFilesLimit(one.Init); ok {
			s.openFiles = []point{{n: n, labels: []string{"max_open_files"}}}
		}
	}
	return s, true
}

// pointsOf makes the metrics of a subject.
func pointsOf(s *subject) (list []*runtimeapi.Metric) {
	for i := range metrics {
		m := &metrics[i]
		for _, p := range m.points(s) {
			one := &runtimeapi.Metric{Name: m.name, MetricType: m.kind, LabelValues: s.labels, Value: number(p.n)}
			if len(p.labels) > 0 {
				one.LabelValues = slices.Concat(s.labels, p.labels)
			}
			if !p.at.IsZero() {
				one.Timestamp = p.at.UnixNano()
			}
			list = append(list, one)
		}
	}
	return list
}
