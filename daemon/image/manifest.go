package image

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/holdfast-cri/holdfast/daemon/image/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types that are known beside those of OCI.
const (
	typeDockerConfig  = "application/vnd.docker.container.image.v1+json"
	typeDockerLayer   = "application/vnd.docker.image.rootfs.diff.tar"
	typeDockerForeign = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	typeDockerSchema1 = "application/vnd.docker.distribution.manifest.v1+"
	typeOCIForeign    = "application/vnd.oci.image.layer.nondistributable.v1.tar"
	typeOctets        = "application/octet-stream" // configs of old pushers
)

// maxConfig is the limit of a config in bytes.
const maxConfig = 8 << 20

// maxUser is the limit of the user in a config in bytes: each list of images has it.
const maxUser = 1 << 10

// document is a manifest or an index, as JSON tells.
type document struct {
	index    *ocispec.Index    // one of the two is set
	manifest *ocispec.Manifest // checked by checkManifest
}

// parseDocument decides by the content: what a registry says about it is not
// covered by the digest.
func parseDocument(b []byte, said string) (d document, err error) {
	if err := checkValues(b); err != nil {
		return d, err
	}
	var probe struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Layers        json.RawMessage `json:"layers"`
		Config        json.RawMessage `json:"config"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(b, &probe); err != nil {
		return d, fmt.Errorf("%w: the manifest is not JSON: %w", ErrCorrupt, err)
	}
	index, manifest := probe.Manifests != nil, probe.Layers != nil || probe.Config != nil
	switch {
	case probe.SchemaVersion == 1 || probe.FSLayers != nil || strings.HasPrefix(said, typeDockerSchema1):
		return d, fmt.Errorf("%w: a manifest of schema version 1; the image has to be pushed again by a newer tool",
			ErrUnsupported)
	case index == manifest:
		return d, fmt.Errorf("%w: neither a manifest nor an index (%s)", ErrUnsupported, said)
	case index:
		if t := probe.MediaType; t != "" && t != ocispec.MediaTypeImageIndex && t != registry.TypeDockerList {
			return d, fmt.Errorf("%w: an index of type %q", ErrUnsupported, t)
		}
		err = json.Unmarshal(b, &d.index)
	default:
		if t := probe.MediaType; t != "" && t != ocispec.MediaTypeImageManifest && t != registry.TypeDockerManifest {
			return d, fmt.Errorf("%w: a manifest of type %q", ErrUnsupported, t)
		}
		if err = json.Unmarshal(b, &d.manifest); err == nil {
			return d, checkManifest(d.manifest)
		}
	}
	if err != nil {
		return d, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return d, nil
}

// maxValues of a manifest, an index or a config: a value of three bytes may take
// more than a hundred in memory, and those of a config as long as the image is here.
const maxValues = 100_000

// checkValues counts what is in the lists and objects of a JSON document.
func checkValues(b []byte) error {
	n, quoted := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case c == '"':
			quoted = !quoted
		case quoted && c == '\\':
			i++
		case !quoted && (c == ',' || c == '[' || c == '{'):
			n++
		}
	}
	if n > maxValues {
		return fmt.Errorf("%w: a manifest or config of %d values, the limit is %d", ErrUnsupported, n, maxValues)
	}
	return nil
}

// mediaType is the type of a document for a descriptor in index.json.
func mediaType(b []byte, said string) string {
	var probe struct {
		MediaType string `json:"mediaType"`
	}
	if json.Unmarshal(b, &probe) == nil && probe.MediaType != "" {
		return probe.MediaType
	}
	if slices.Contains(registry.ManifestTypes, said) {
		return said
	}
	return ocispec.MediaTypeImageManifest
}

// maxLayers of an image: overlayfs mounts no more, and each costs memory while
// it is pulled. A layer that an image has several times is one.
const maxLayers = 500

func checkManifest(m *ocispec.Manifest) error {
	switch m.Config.MediaType {
	case ocispec.MediaTypeImageConfig, typeDockerConfig, typeOctets:
	default:
		return fmt.Errorf("%w: its config is of type %q, it is not a container image",
			ErrUnsupported, m.Config.MediaType)
	}
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if err := checkDescriptor(d); err != nil {
			return err
		}
	}
	layers := map[digest.Digest]bool{}
	for _, l := range m.Layers {
		if err := checkLayerType(l.MediaType); err != nil {
			return err
		}
		layers[l.Digest] = true
	}
	if len(layers) > maxLayers {
		return fmt.Errorf("%w: %d layers, the limit is %d", ErrUnsupported, len(layers), maxLayers)
	}
	return nil
}

func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: digest %q: %w", ErrCorrupt, d.Digest, err)
	}
	if d.Size < 0 {
		return fmt.Errorf("%w: %s of %d bytes", ErrCorrupt, d.Digest, d.Size)
	}
	return nil
}

// checkLayerType refuses what cannot be unpacked. Which of the known
// compressions it is, the content tells.
func checkLayerType(t string) error {
	if strings.HasPrefix(t, typeDockerForeign) || strings.HasPrefix(t, typeOCIForeign) {
		return fmt.Errorf("%w: a foreign layer (%s), which is not to be had from the registry", ErrUnsupported, t)
	}
	for _, base := range []string{ocispec.MediaTypeImageLayer, typeDockerLayer} {
		rest, ok := strings.CutPrefix(t, base)
		if ok && (rest == "" || rest == ".gzip" || rest == ".zstd" || rest == "+gzip" || rest == "+zstd") {
			return nil
		}
	}
	return fmt.Errorf("%w: a layer of unknown type %q", ErrUnsupported, t)
}

// choose gives the best manifest of an index for a platform. One without a
// platform is taken if no other fits.
func choose(x *ocispec.Index, p ocispec.Platform) (ocispec.Descriptor, error) {
	match := platforms.Only(p)
	var best, plain *ocispec.Descriptor
	var offers []string
	for i := range x.Manifests {
		d := &x.Manifests[i]
		if err := checkDescriptor(*d); err != nil {
			return *d, err
		}
		switch {
		case d.Platform == nil:
			if plain == nil && d.ArtifactType == "" {
				plain = d
			}
			continue
		case d.Platform.OS != "unknown": // attestations
			offers = append(offers, platforms.FormatAll(*d.Platform))
		}
		if match.Match(*d.Platform) && (best == nil || match.Less(*d.Platform, *best.Platform)) {
			best = d
		}
	}
	if best = cmp.Or(best, plain); best == nil {
		return ocispec.Descriptor{}, fmt.Errorf("%w: no image for %s, there are: %s",
			ErrUnsupported, platforms.Format(p), strings.Join(offers, ", "))
	}
	return *best, nil
}

// microarchitectures are the variants of amd64 by the names of their features
// in /proc/cpuinfo, each over the one before (x86-64 psABI).
var microarchitectures = [][]string{
	{"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
	{"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
	{"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}

// machine is the platform of this machine, for amd64 with the best variant that
// all of its features allow.
func machine(cpuinfo string) ocispec.Platform {
	p := platforms.DefaultSpec()
	if p.Architecture != "amd64" || p.Variant != "" {
		return p
	}
	_, rest, _ := strings.Cut(cpuinfo, "\nflags")
	line, _, _ := strings.Cut(rest, "\n")
	has := strings.Fields(line)
	for i, features := range microarchitectures {
		if slices.ContainsFunc(features, func(f string) bool { return !slices.Contains(has, f) }) {
			break
		}
		p.Variant = fmt.Sprintf("v%d", i+2)
	}
	return p
}

// parseConfig reads an image's config and compares it with the manifest.
func parseConfig(b []byte, m *ocispec.Manifest) (c ocispec.Image, err error) {
	if err := checkValues(b); err != nil {
		return c, err
	}
	var all Spec
	if err := json.Unmarshal(b, &all); err != nil {
		return c, fmt.Errorf("%w: the config is not JSON: %w", ErrCorrupt, err)
	}
	c = all.Image
	if c.OS != "" && c.OS != "linux" {
		return c, fmt.Errorf("%w: an image for %s", ErrUnsupported, c.OS)
	}
	if n := len(c.Config.User); n > maxUser {
		return c, fmt.Errorf("%w: the name of its user has %d bytes, %d may be", ErrUnsupported, n, maxUser)
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return c, fmt.Errorf("%w: %d layers and %d diff ids", ErrCorrupt, len(m.Layers), len(c.RootFS.DiffIDs))
	}
	content := map[digest.Digest]digest.Digest{}
	for i, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return c, fmt.Errorf("%w: diff id %q: %w", ErrCorrupt, d, err)
		}
		blob := m.Layers[i].Digest
		if other, twice := content[blob]; twice && other != d {
			return c, fmt.Errorf("%w: layer %s is %s and %s", ErrCorrupt, blob, other, d)
		}
		content[blob] = d
	}
	return c, nil
}

// blobsOf are the blobs that an image consists of, without repetition.
func blobsOf(target, manifest digest.Digest, m *ocispec.Manifest) []digest.Digest {
	l := []digest.Digest{target, manifest, m.Config.Digest}
	for _, d := range m.Layers {
		l = append(l, d.Digest)
	}
	slices.Sort(l)
	return slices.Compact(l)
}
