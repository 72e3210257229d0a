// Package kubelet runs a real kubelet, standalone, with static pods, against a real
// holdfastd. It is a module of its own, so that what it needs of Kubernetes is no
// dependency of Holdfast.
package kubelet

import (
	"testing"

	"github.com/holdfast-cri/holdfast/tests/kubelet/machine"
)

func TestMain(m *testing.M) { machine.Main(m, "kubelet") }
