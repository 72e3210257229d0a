// Package cluster runs a whole Kubernetes cluster of one node on a real holdfastd: etcd,
// the API server, the controllers, the scheduler and the kubelet. All is asked of the
// API server, or of kubectl.
package cluster

import (
	"testing"

	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

func TestMain(m *testing.M) { machine.Main(m, "kubernetes") }
