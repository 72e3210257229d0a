package taskapi

import (
	"math"
	"strings"
	"testing"
)

// at gives the sum of the numbers at a path of fields.
func (m message) at(path ...number) (sum uint64) {
	if len(path) == 1 {
		return m.uint(path[0])
	}
	for len(m) > 0 {
		n, _, _, rest := m.split()
		if n == path[0] {
			sum += m[:len(m)-len(rest)].bytes(n).at(path[1:]...)
		}
		m = rest
	}
	return sum
}

func TestMetrics(t *testing.T) {
	files := map[string]string{
		"pids.current":          "3\n",
		"pids.max":              "max\n",
		"cpuacct.usage_sys":     "11\n",
		"cpu.stat":              "nr_throttled 5\nusage_usec 6\nburst_usec 7\n",
		"memory.stat":           "rss 21\nfile 22\nthp_collapse_alloc 23\ntotal_unevictable 24\n",
		"memory.limit_in_bytes": "31\n",
		"memory.memsw.failcnt":  "32\n",
		"memory.peak":           "33\n",
		"memory.oom_control":    "oom_kill_disable 0\nunder_oom 0\noom_kill 41\n",
		"memory.events":         "low 0\noom_kill 42\n",
		"io.stat":               "8:16 rbytes=51 wbytes=52 rios=53 wios=54 dbytes=1\n259:1 rbytes=1\n7:0\n",

		"blkio.throttle.io_service_bytes_recursive": "8:16 Read 61\n8:16 Total 62\nTotal 63\n",
		"blkio.throttle.io_serviced_recursive":      "8:16 Write 64\n",
	}
	for _, c := range []struct {
		v1   bool
		want uint64
		path []number
	}{
		{true, 3, []number{2, 1}},
		{true, math.MaxUint64, []number{2, 2}},
		{true, 11, []number{3, 1, 2}},
		{true, 5, []number{3, 2, 2}},
		{true, 21, []number{4, 2}},
		{true, 24, []number{4, 32}},
		{true, 31, []number{4, 33, 1}},
		{true, 32, []number{4, 34, 4}},
		{true, 41, []number{9, 3}},
		{true, 61 + 62, []number{5, 1, 5}},
		{true, 64, []number{5, 2, 5}},
		{true, 16, []number{5, 2, 4}},
		{false, 3, []number{1, 1}},
		{false, math.MaxUint64, []number{1, 2}},
		{false, 6, []number{2, 1}},
		{false, 7, []number{2, 9}},
		{false, 22, []number{4, 2}},
		{false, 23, []number{4, 31}},
		{false, 33, []number{4, 36}},
		{false, 42, []number{8, 5}},
		{false, 8 + 259 + 7, []number{6, 1, 1}},
		{false, 52, []number{6, 1, 4}},
		{false, 54, []number{6, 1, 6}},
	} {
		metrics, err := metricsOf(func(controller, file string) ([][]string, error) {
			if before, _, _ := strings.Cut(file, "."); c.v1 && controller != before || !c.v1 && controller != "" {
				t.Errorf("%s is read in %q", file, controller)
			}
			var words [][]string
			for line := range strings.Lines(files[file]) {
				words = append(words, strings.Fields(line))
			}
			return words, nil
		}, c.v1)
		if got := metrics.at(c.path...); err != nil || got != c.want {
			t.Errorf("v1 %t, field %v: %d, %v, want %d", c.v1, c.path, got, err, c.want)
		}
	}
}
