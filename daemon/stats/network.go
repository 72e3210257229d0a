package stats

import (
	"bytes"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/network/netns"
)

const (
	defaultLink = "eth0" // the interface of a pod in Kubernetes
	loopback    = "lo"

	// maxTable bounds what is read of the interfaces of one pod, in bytes: some hundred of
	// them. A pod that may change its network can have any number, and the answer is one
	// message for all pods.
	maxTable = 64 << 10
)

// link is one interface of a pod, with what went through it.
type link struct {
	name string
	// Bytes, packets, errors and dropped packets, received and sent.
	rx, tx traffic
}

type traffic struct{ bytes, packets, errors, dropped uint64 }

// interfaces reads those of pods that have a network of their own, by the id of the pod.
// Nothing has to run in a pod. A namespace that cannot be entered
// is that of a pod which is being stopped.
//
// One thread enters one namespace after the other. It reads a file, as netlink takes a
// lock in the kernel that whoever removes an interface holds for long.
func interfaces(pods []Pod) map[string][]link {
	all := map[string][]link{}
	// The error is that of the function, which has none.
	netns.OnThread(func() error {
		for _, p := range pods {
			if p.Netns == "" || netns.Enter(p.Netns) != nil {
				continue
			}
			if table, err := os.Open("/proc/thread-self/net/dev"); err == nil {
				all[p.ID] = readLinks(table)
				table.Close()
			}
		}
		return nil
	})
	return all
}

// readLinks reads what it may of a table. A line that is cut off is none.
func readLinks(r io.Reader) []link {
	table, err := io.ReadAll(io.LimitReader(r, maxTable))
	if err != nil {
		return nil
	}
	return parseLinks(string(table[:bytes.LastIndexByte(table, '\n')+1]))
}

// parseLinks reads /proc/net/dev (proc_pid_net(5)): two lines of titles, then a line for
// each interface, "NAME: " and eight numbers for each direction.
func parseLinks(table string) (links []link) {
	for line := range strings.Lines(table) {
		// The name may have a colon of its own.
		i := strings.LastIndexByte(line, ':')
		if i < 0 {
			continue
		}
		// The pod may choose any bytes, and a message with others than UTF-8 is not sent.
		name := strings.ToValidUTF8(strings.TrimSpace(line[:i]), "\uFFFD")
		f := strings.Fields(line[i+1:])
		if len(f) < 16 {
			continue
		}
		var n [16]uint64
		for i := range n {
			n[i], _ = strconv.ParseUint(f[i], 10, 64)
		}
		links = append(links, link{
			name: name,
			rx:   traffic{n[0], n[1], n[2], n[3]},
			tx:   traffic{n[8], n[9], n[10], n[11]},
		})
	}
	return links
}

// networkUsage is links in a message of the CRI; nil without any but the loopback, as the
// kubelet takes it for granted that there is a default one. All others are beside it, the
// loopback too: the kubelet leaves out a list without any, and who reads its summary expects one.
func networkUsage(links []link) *runtimeapi.NetworkUsage {
	first := -1
	for i, l := range links {
		if l.name == defaultLink || first < 0 && l.name != loopback {
			first = i
		}
	}
	if first < 0 {
		return nil
	}
	u := &runtimeapi.NetworkUsage{Timestamp: time.Now().UnixNano()}
	for i, l := range links {
		one := &runtimeapi.NetworkInterfaceUsage{
			Name:     l.name,
			RxBytes:  number(l.rx.bytes),
			RxErrors: number(l.rx.errors),
			TxBytes:  number(l.tx.bytes),
			TxErrors: number(l.tx.errors),
		}
		if i == first {
			u.DefaultInterface = one
		} else {
			u.Interfaces = append(u.Interfaces, one)
		}
	}
	return u
}
