package netns

// What a pod leaves on the machine is called so, by who makes it and by who looks for it.
const (
	Dir       = "/run/netns" // of the pins
	PinPrefix = "holdfast-"  // of a pin, before the id of its pod

	BuiltinNetwork = "holdfast"  // the network of a node without a CNI of its own
	BuiltinBridge  = "holdfast0" // its bridge
	LeasesName     = "networks"  // the directory of its leases, below the one of CNI results
)
