package records

import "encoding/json"

// Namespaces holds the paths of a pod's namespaces; "" is the host's.
type Namespaces struct {
	Net  string `json:"net,omitempty"`
	IPC  string `json:"ipc,omitempty"`
	UTS  string `json:"uts,omitempty"`
	User string `json:"user,omitempty"`
}

// List gives all four paths, those of the host as "".
func (n Namespaces) List() []string { return []string{n.Net, n.IPC, n.UTS, n.User} }

// Want says which namespaces a pod has of its own, and what is set in them.
type Want struct {
	Net, IPC, UTS bool
	// User, if not nil, is a user namespace that the others are made in. With it
	// the kernel sees whoever is root inside as somebody without rights.
	User *Userns

	Hostname string            // set if UTS; empty keeps the host's
	Sysctls  map[string]string // namespaced ones only
}

// IDMap maps the ids from 0 on to ids of the host. Root maps to HostID.
type IDMap struct{ HostID, Length uint32 }

// Userns is the mappings of a user namespace.
type Userns struct{ UIDs, GIDs IDMap }

// Attachment is one pod's place in the pod network: all that plugins are told.
// DEL has to be given what ADD was given, so it is on record before ADD.
type Attachment struct {
	ID        string `json:"id"`
	Netns     string `json:"netns"` // path; DEL takes one that is gone
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	UID       string `json:"uid"`

	PortMappings []PortMapping     `json:"portMappings,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	CgroupParent string            `json:"cgroupParent,omitempty"` // of the pod
	DNS          *DNS              `json:"dns,omitempty"`

	// Config is the CNI config list that was in force when the attachment was
	// recorded. Without it ADD takes the one in force, DEL the one in libcni's
	// cache.
	Config json.RawMessage `json:"config,omitempty"`
}

// DNS is what the pod's resolver is to be, in the words of CNI's conventions.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// PortMapping is a port of the node that leads to the pod. HostPort 0 is none.
type PortMapping struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol,omitempty"` // tcp (also if empty), udp, sctp; any case
	HostIP        string `json:"hostIP,omitempty"`
}

// Result is what the plugins made.
type Result struct {
	IPs        []string        `json:"ips"` // of eth0, the primary one first
	Interfaces []Interface     `json:"interfaces,omitempty"`
	Raw        json.RawMessage `json:"raw"` // the CNI result
}

// Interface is one that the plugins report. Sandbox is empty for the node's.
type Interface struct {
	Name    string `json:"name"`
	MAC     string `json:"mac,omitempty"`
	Sandbox string `json:"sandbox,omitempty"`
}
