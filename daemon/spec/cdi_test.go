package spec

import (
	"fmt"
	"reflect"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// A kubelet names devices in both forms: each is added once, in an order that does not
// change.
func TestCDIDevices(t *testing.T) {
	c := &config{
		CDIDevices: []*cri.CDIDevice{{Name: "v/c=2"}, {Name: "v/c=1"}},
		Annotations: map[string]string{
			"cdi.k8s.io/b": "v/c=4,v/c=1",
			"cdi.k8s.io/a": "v/c=3",
			"cdi/k8s.io":   "not one of these",
		},
	}
	want := []CDIDevice{
		{"config.CDI_devices[0].name", "v/c=2"},
		{"config.CDI_devices[1].name", "v/c=1"},
		{"config.annotations[cdi.k8s.io/a]", "v/c=3"},
		{"config.annotations[cdi.k8s.io/b]", "v/c=4"},
	}
	if got, err := CDIDevices(c); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for i := range maxCDIDevices {
		c.CDIDevices = append(c.CDIDevices, &cri.CDIDevice{Name: fmt.Sprintf("v/many=%d", i)})
	}
	_, err := CDIDevices(c)
	wantField(t, err, kind.Invalid, "config.CDI_devices[1024].name")
}
