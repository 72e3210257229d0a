// Package records is what the daemon knows of pods and containers: what was
// wanted, in the words of whoever wanted it (Pod, Container), what was seen of it
// (Seen), what is still to be given back (Debt), and, when the daemon starts or a
// shim has gone, what follows from that (Decide).
//
// A record says how far the daemon has come. What the container does is not in
// it: that is for the shim to say, and for its files. Unknown fields are ignored,
// so that an older daemon reads the records of a younger one.
//
// Nothing in here does anything to the machine. Other parts of the daemon import
// this package; it imports none of them.
package records

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// The type URLs under which a shim keeps the daemon's records.
const (
	ContainerURL = "holdfast.dev/daemon/container.v1"
	PodURL       = "holdfast.dev/daemon/pod.v1"
	ResourcesURL = "holdfast.dev/daemon/resources.v1" // linux.resources of a container's config
)

// PodPhase is how far a pod has come.
type PodPhase string

// The phases of a pod, in order.
const (
	PodCreating PodPhase = "creating" // never acknowledged: a restart undoes it
	PodReady    PodPhase = "ready"
	PodStopping PodPhase = "stopping" // its resources are being given back
	PodStopped  PodPhase = "stopped"  // they are, or are debts
	PodRemoved  PodPhase = "removed"  // nobody sees it any more; its debts are still owed
)

// NetworkPhase is the write-ahead log of the network attachment.
type NetworkPhase string

// The phases of a network attachment, in order.
const (
	NetworkAdding NetworkPhase = "adding" // ADD may have run: DEL is due
	NetworkAdded  NetworkPhase = "added"
	NetworkGone   NetworkPhase = "gone" // DEL has run
)

// Network is the attachment of a pod to its network.
type Network struct {
	Phase      NetworkPhase `json:"phase"`
	Attachment Attachment   `json:"attachment"`
	Result     Result       `json:"result"`
}

// Pod is ROOT/pods/ID/record.json.
type Pod struct {
	ID          string                                `json:"id"`
	Config      Message[*runtimeapi.PodSandboxConfig] `json:"config"`
	Handler     string                                `json:"handler"`
	Fingerprint string                                `json:"fingerprint"`
	CreatedAt   time.Time                             `json:"createdAt"`
	BootID      string                                `json:"bootId"`
	Phase       PodPhase                              `json:"phase"`
	Namespaces  Namespaces                            `json:"namespaces"`
	Network     *Network                              `json:"network,omitempty"` // nil: the host's
	// FilesDir has hosts, hostname and resolv.conf. Empty is a record of a version
	// that had them in the pod's directory in STATE.
	FilesDir string `json:"filesDir,omitempty"`
	// Init says that the pod has, or may have, an init process of its own, a
	// container with the pod's id. PIDNamespace is where its namespace is pinned.
	Init         bool   `json:"init,omitempty"`
	PIDNamespace string `json:"pidNamespace,omitempty"`
	// Debts are what the pod holds, or may hold. nil is a record of a version
	// that did not write them: all may be due.
	Debts []Debt `json:"debts"`
}

// IPs are the addresses of the pod, the primary one first.
func (p *Pod) IPs() []string {
	if p.Network == nil {
		return nil
	}
	return p.Network.Result.IPs
}

// ContainerPhase is how far a container has come, as far as that is for the
// daemon to say.
type ContainerPhase string

// The phases of a container, in order.
const (
	ContainerCreating ContainerPhase = "creating" // never acknowledged: a restart undoes it
	ContainerCreated  ContainerPhase = "created"  // from here on the shim knows more
	ContainerRemoving ContainerPhase = "removing"
)

// Container is ROOT/containers/ID/record.json.
type Container struct {
	ID          string                                  `json:"id"`
	PodID       string                                  `json:"podId"`
	Init        bool                                    `json:"init,omitempty"` // of the pod, not the kubelet's
	Config      Message[*runtimeapi.ContainerConfig]    `json:"config"`
	Handler     string                                  `json:"handler"`
	Fingerprint string                                  `json:"fingerprint"`
	CreatedAt   time.Time                               `json:"createdAt"`
	BootID      string                                  `json:"bootId"`
	Phase       ContainerPhase                          `json:"phase"`
	ImageID     string                                  `json:"imageId"`
	ImageRef    string                                  `json:"imageRef"` // a digest reference where there is one
	Layers      []digest.Digest                         `json:"layers"`   // diff ids, base first
	ImageMounts []ImageMount                            `json:"imageMounts,omitempty"`
	LogPath     string                                  `json:"logPath"` // absolute
	Signal      int                                     `json:"signal"`  // that stops it
	StopSignal  runtimeapi.Signal                       `json:"stopSignal"`
	User        Message[*runtimeapi.LinuxContainerUser] `json:"user"`
	CgroupsPath string                                  `json:"cgroupsPath"`
	// Updating says that the shim was asked for other resources than those of Config, and
	// has not answered.
	Updating bool `json:"updating,omitempty"`
	// Checkpoint says that a checkpoint may be under way: the container may be frozen, and
	// files of it may be left. nil: none is.
	Checkpoint *Checkpoint `json:"checkpoint,omitempty"`
	// Leftover are files of checkpoints that are over, which may still have their second
	// names; those that are not kept may have both.
	Leftover []File `json:"leftover,omitempty"`
	// Restored is the checkpoint that the container was made from; empty: it was not.
	Restored string `json:"restored,omitempty"`
}

// Checkpoint is what has to be undone of a checkpoint that was cut short.
type Checkpoint struct {
	Files []File `json:"files"` // beside what is in the container's own directory
}

// File is a file of a checkpoint. While it is made it has a second name, in the same
// directory, that nobody else gives to a file.
type File struct {
	Path string `json:"path"`
	Own  string `json:"own"` // the second name
	Kept bool   `json:"kept,omitempty"`
}

// SetResources replaces the resources of the config.
func (c *Container) SetResources(r *runtimeapi.LinuxContainerResources) error {
	cfg := proto.Clone(c.Config.M).(*runtimeapi.ContainerConfig)
	if cfg.Linux == nil {
		cfg.Linux = &runtimeapi.LinuxContainerConfig{}
	}
	cfg.Linux.Resources = r
	config, err := Encoded(cfg)
	if err == nil {
		c.Config = config
	}
	return err
}

// TakeUpdate replaces them by what the shim keeps of an update, if there was one.
func (c *Container) TakeUpdate(dir rundir.Dir) error {
	u, err := dir.ReadUpdate()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var m Message[*runtimeapi.LinuxContainerResources]
	if err == nil {
		err = m.UnmarshalJSON(u.Record.Value)
	}
	if err != nil {
		return err
	}
	return c.SetResources(m.M)
}

// AllLayers are those of the image, and of images mounted as volumes.
func (c *Container) AllLayers() []digest.Digest {
	all := slices.Clone(c.Layers)
	for _, m := range c.ImageMounts {
		all = append(all, m.Layers...)
	}
	return all
}

// Uses says whether one of them is layer.
func (c *Container) Uses(layer digest.Digest) bool {
	return slices.Contains(c.Layers, layer) ||
		slices.ContainsFunc(c.ImageMounts, func(m ImageMount) bool { return slices.Contains(m.Layers, layer) })
}

// ImageMount is an image that a container reads as a volume.
type ImageMount struct {
	Index   int             `json:"index"` // in Config.mounts
	ImageID string          `json:"imageId"`
	Layers  []digest.Digest `json:"layers"`
}

// Message is a CRI message inside a record, as protobuf's JSON. It is encoded
// once: a record is written several times, and its messages never change.
type Message[M interface {
	comparable
	proto.Message
}] struct {
	M    M
	json []byte
}

// Encoded makes a Message.
func Encoded[M interface {
	comparable
	proto.Message
}](m M) (Message[M], error) {
	b, err := protojson.Marshal(m)
	if err != nil {
		return Message[M]{}, fmt.Errorf("cannot encode %T: %w", m, err)
	}
	return Message[M]{M: m, json: b}, nil
}

// MarshalJSON gives the message as protobuf's JSON.
func (m Message[M]) MarshalJSON() ([]byte, error) {
	var none M
	switch {
	case m.M == none:
		return []byte("null"), nil
	case m.json != nil:
		return m.json, nil
	}
	return protojson.Marshal(m.M)
}

// UnmarshalJSON reads what MarshalJSON gave, of any version.
func (m *Message[M]) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	var none M
	fresh := none.ProtoReflect().Type().New().Interface().(M)
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, fresh); err != nil {
		return err
	}
	m.M, m.json = fresh, nil
	return nil
}

// Fingerprint tells whether two requests ask for the same: messages, and parts
// that encoding/json encodes.
func Fingerprint(parts ...any) (string, error) {
	h := sha256.New()
	for _, p := range parts {
		var b []byte
		var err error
		if m, ok := p.(proto.Message); ok {
			b, err = proto.MarshalOptions{Deterministic: true}.Marshal(m)
		} else {
			b, err = json.Marshal(p)
		}
		if err != nil {
			return "", fmt.Errorf("cannot encode %T: %w", p, err)
		}
		fmt.Fprintf(h, "%d:", len(b))
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// ThisBoot says whether what a record speaks of can still exist.
func ThisBoot(bootID string) bool { return bootID == rundir.BootID() }

// ShortID is the part of an id that is enough for a person.
func ShortID(id string) string { return id[:min(13, len(id))] }
