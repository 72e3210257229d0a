package cgroup

import (
	"slices"
	"strings"
)

// Transfer is what has gone to or from a block device.
type Transfer struct {
	Device    string // MAJOR:MINOR
	Operation string // Read, Write or Discard
	Bytes     uint64
	Count     uint64
}

// Transfers reads what was transferred, by device and operation.
func (c Set) Transfers() []Transfer {
	if c["blkio"] != "" {
		return c.transfersV1()
	}
	var all []Transfer
	lines, _ := c.Words("", "io.stat")
	for _, words := range lines {
		counts := map[string]uint64{}
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			counts[key], _ = Number(value)
		}
		for _, o := range []struct{ name, initial string }{{"Read", "r"}, {"Write", "w"}, {"Discard", "d"}} {
			if _, ok := counts[o.initial+"bytes"]; ok {
				all = append(all, Transfer{words[0], o.name, counts[o.initial+"bytes"], counts[o.initial+"ios"]})
			}
		}
	}
	return all
}

func (c Set) transfersV1() (all []Transfer) {
	read := func(file string, add func(t *Transfer, n uint64)) {
		lines, _ := c.Words("blkio", file)
		for _, w := range lines {
			if len(w) != 3 || w[1] != "Read" && w[1] != "Write" && w[1] != "Discard" {
				continue
			}
			i := slices.IndexFunc(all, func(t Transfer) bool { return t.Device == w[0] && t.Operation == w[1] })
			if i < 0 {
				i = len(all)
				all = append(all, Transfer{Device: w[0], Operation: w[1]})
			}
			n, _ := Number(w[2])
			add(&all[i], n)
		}
	}
	read("blkio.throttle.io_service_bytes_recursive", func(t *Transfer, n uint64) { t.Bytes = n })
	read("blkio.throttle.io_serviced_recursive", func(t *Transfer, n uint64) { t.Count = n })
	return all
}

// HugePages is what a cgroup has of huge pages of one size.
type HugePages struct {
	Size  string // such as 2MB
	Usage uint64 // bytes
	Peak  uint64 // bytes; 0 on v2, which has no such file
}

// HugePages reads the use of huge pages of each size. It is none without the controller.
func (c Set) HugePages() (all []HugePages) {
	controller, now := "hugetlb", ".usage_in_bytes"
	if c[controller] == "" {
		controller, now = "", ".current"
	}
	for _, size := range hugePageSizes() {
		usage, _ := c.Words(controller, "hugetlb."+size+now)
		if len(usage) == 0 {
			continue
		}
		h := HugePages{Size: size}
		h.Usage, _ = Number(usage[0][0])
		if peak, _ := c.Words(controller, "hugetlb."+size+".max_usage_in_bytes"); len(peak) > 0 {
			h.Peak, _ = Number(peak[0][0])
		}
		all = append(all, h)
	}
	return all
}
