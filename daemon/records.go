package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/network"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// A record says what was wanted, in the words of whoever wanted it, and how far
// this daemon has come with it. What the container does is not in it: that is
// for the shim to say, and for its files. Unknown fields are ignored, so that an
// older daemon reads a younger one's records.

// podPhase is how far a pod has come.
type podPhase string

const (
	podCreating podPhase = "creating" // never acknowledged; a restart undoes it
	podReady    podPhase = "ready"
	podStopping podPhase = "stopping" // its resources are being given back
	podStopped  podPhase = "stopped"  // they are
)

// netPhase is the write-ahead log of the network attachment.
type netPhase string

const (
	netAdding netPhase = "adding" // ADD may have run: DEL is due
	netAdded  netPhase = "added"
	netGone   netPhase = "gone" // DEL has run
)

type podNetwork struct {
	Phase      netPhase           `json:"phase"`
	Attachment network.Attachment `json:"attachment"`
	Result     network.Result     `json:"result"`
}

// podRecord is ROOT/pods/ID/record.json.
type podRecord struct {
	ID          string                                `json:"id"`
	Config      message[*runtimeapi.PodSandboxConfig] `json:"config"`
	Handler     string                                `json:"handler"`
	Fingerprint string                                `json:"fingerprint"`
	CreatedAt   time.Time                             `json:"createdAt"`
	BootID      string                                `json:"bootId"`
	Phase       podPhase                              `json:"phase"`
	Namespaces  network.Namespaces                    `json:"namespaces"`
	Network     *podNetwork                           `json:"network,omitempty"` // nil: the host's
	// Init says that the pod has an init process of its own, a container
	// with the pod's id. PIDNamespace is where its pid namespace is pinned.
	Init         bool   `json:"init,omitempty"`
	PIDNamespace string `json:"pidNamespace,omitempty"`
}

// ips are the addresses of the pod, the primary one first.
func (r *podRecord) ips() []string {
	if r.Network == nil {
		return nil
	}
	return r.Network.Result.IPs
}

// containerPhase is how far a container has come, as far as it is the daemon's.
type containerPhase string

const (
	containerCreating containerPhase = "creating" // never acknowledged; a restart undoes it
	containerCreated  containerPhase = "created"  // from here on the shim knows
	containerRemoving containerPhase = "removing"
)

// containerRecord is ROOT/containers/ID/record.json.
type containerRecord struct {
	ID          string                                  `json:"id"`
	PodID       string                                  `json:"podId"`
	Init        bool                                    `json:"init,omitempty"` // the pod's init, not the kubelet's
	Config      message[*runtimeapi.ContainerConfig]    `json:"config"`
	Handler     string                                  `json:"handler"`
	Fingerprint string                                  `json:"fingerprint"`
	CreatedAt   time.Time                               `json:"createdAt"`
	BootID      string                                  `json:"bootId"`
	Phase       containerPhase                          `json:"phase"`
	ImageID     string                                  `json:"imageId"`
	ImageRef    string                                  `json:"imageRef"` // a digest reference where there is one
	Layers      []digest.Digest                         `json:"layers"`   // diff ids, base first
	ImageMounts []imageMount                            `json:"imageMounts,omitempty"`
	LogPath     string                                  `json:"logPath"` // absolute
	Signal      int                                     `json:"signal"`  // that stops it
	StopSignal  runtimeapi.Signal                       `json:"stopSignal"`
	User        message[*runtimeapi.LinuxContainerUser] `json:"user"`
	CgroupsPath string                                  `json:"cgroupsPath"`
}

// allLayers are those of the image, and of images mounted as volumes.
func (r *containerRecord) allLayers() []digest.Digest {
	all := slices.Clone(r.Layers)
	for _, m := range r.ImageMounts {
		all = append(all, m.Layers...)
	}
	return all
}

// imageMount is an image that a container reads as a volume.
type imageMount struct {
	Index   int             `json:"index"` // in Config.mounts
	ImageID string          `json:"imageId"`
	Layers  []digest.Digest `json:"layers"`
}

// message is a CRI message inside a record, as protobuf's JSON.
type message[M interface {
	comparable
	proto.Message
}] struct{ M M }

func (m message[M]) MarshalJSON() ([]byte, error) {
	var none M
	if m.M == none {
		return []byte("null"), nil
	}
	return protojson.Marshal(m.M)
}

func (m *message[M]) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	var none M
	fresh := none.ProtoReflect().Type().New().Interface().(M)
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, fresh); err != nil {
		return err
	}
	m.M = fresh
	return nil
}

// fingerprint tells whether two requests ask for the same.
func fingerprint(parts ...any) (string, error) {
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

// thisBoot says whether what a record speaks of can still exist.
func thisBoot(bootID string) bool { return bootID == rundir.BootID() }
