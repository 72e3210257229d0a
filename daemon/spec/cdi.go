package spec

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

// cdiPrefix is that of annotations in which clients name devices that do not know the
// field for it, or do not know whether a runtime does.
const cdiPrefix = "cdi.k8s.io/"

// maxCDIDevices is more than anybody has in a machine.
const maxCDIDevices = 1024

// CDIDevice is a device of the Container Device Interface that a request names.
type CDIDevice struct {
	Field string // of the request
	Name  string // VENDOR/CLASS=NAME
}

// CDIDevices gives the devices that a container asks for, each once: those of the field,
// then those of annotations. An error is of the kind kind.Invalid.
func CDIDevices(c *runtimeapi.ContainerConfig) ([]CDIDevice, error) {
	var all []CDIDevice
	for i, d := range c.GetCDIDevices() {
		all = append(all, CDIDevice{fmt.Sprintf("config.CDI_devices[%d].name", i), d.GetName()})
	}
	for _, key := range slices.Sorted(maps.Keys(c.GetAnnotations())) {
		if strings.HasPrefix(key, cdiPrefix) {
			for name := range strings.SplitSeq(c.GetAnnotations()[key], ",") {
				all = append(all, CDIDevice{fmt.Sprintf("config.annotations[%s]", key), name})
			}
		}
	}
	var list []CDIDevice
	seen := map[string]bool{}
	for _, d := range all {
		if _, _, _, err := parser.ParseQualifiedName(d.Name); err != nil {
			return nil, invalid(d.Field, "%q is not the name of a CDI device, vendor/class=name: %v", d.Name, err)
		}
		if !seen[d.Name] {
			list = append(list, d)
		}
		seen[d.Name] = true
	}
	if len(list) > maxCDIDevices {
		return nil, invalid(list[maxCDIDevices].Field, "there are more than %d devices", maxCDIDevices)
	}
	return list, nil
}
