// Package cdi gives containers the devices that vendors describe in files: the
// Container Device Interface. It finds the files, reads them with care, and has the
// CDI's own library check them and edit an OCI spec.
//
// Nothing is watched: the files are read again for each container that asks for a
// device, and parsed again where their bytes have changed.
package cdi

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"
	specs "tags.cncf.io/container-device-interface/specs-go"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// The bounds of what is read. A file for a large machine has some hundred kilobytes, and
// dynamic allocation makes a small one for each container.
const (
	maxFile    = 1 << 20  // bytes of a file
	maxBytes   = 32 << 20 // of all files together
	maxEntries = 16384    // of a directory
)

// Store is all devices that files describe. Its methods may be called at the same time.
type Store struct {
	dirs []string

	mu    sync.Mutex
	files map[string]*file // by path: those of the last look
}

// file is one that was parsed. It is not changed once its look is over.
type file struct {
	path     string
	priority int // of its directory: the highest counts
	sum      [sha256.Size]byte
	spec     *specs.Spec
	err      error // why it cannot be used
}

// New makes a store of the files in some directories, of which a later one goes before
// an earlier one. They need not exist.
func New(dirs []string) *Store { return &Store{dirs: dirs} }

// Device is one that a request names.
type Device struct {
	Field string // of the request
	Name  string // VENDOR/CLASS=NAME
}

// Find looks devices up. An error is of the kind kind.State: a driver may describe the
// device later.
func (s *Store) Find(wanted []Device) (*Edits, error) {
	found := s.read()
	e := &Edits{}
	for _, w := range wanted {
		at := found.devices[w.Name]
		if len(at) != 1 {
			return nil, kind.Errorf(kind.State, "%s: %s", w.Field, found.why(w.Name, s.dirs))
		}
		e.add(at[0])
	}
	return e, nil
}

// look is what one look at the directories found.
type look struct {
	// devices has, by qualified name, those of the directory that counts. More than one
	// contradict each other.
	devices map[string][]device
	broken  map[string]error // by path
}

// device is one in a file.
type device struct {
	*specs.Device
	file *file
}

// why says why a device cannot be used. The file that describes it may be a broken one.
func (l *look) why(name string, dirs []string) string {
	text := fmt.Sprintf("there is no CDI device %.200q in %s", name, strings.Join(dirs, ", "))
	if at := l.devices[name]; len(at) > 1 {
		text = fmt.Sprintf("the CDI device %.200q is in %s as well as in %s: remove one of them", name,
			at[0].file.path, at[1].file.path)
	}
	const most = 4
	for i, path := range slices.Sorted(maps.Keys(l.broken)) {
		if i == most {
			text += fmt.Sprintf("; %d more files cannot be used", len(l.broken)-most)
			break
		}
		text += fmt.Sprintf("; cannot use %s: %.500s", path, l.broken[path])
	}
	return text
}

// read looks at all files.
func (s *Store) read() *look {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &look{devices: map[string][]device{}, broken: map[string]error{}}
	files := map[string]*file{}
	left := int64(maxBytes)
	for priority, dir := range s.dirs {
		names, err := specFiles(dir)
		if err != nil {
			l.broken[dir] = err
			continue
		}
		for _, name := range names {
			path := filepath.Join(dir, name)
			f, err := s.readLocked(path, &left)
			if err == nil {
				files[path] = f
				err = f.err
			}
			if err != nil {
				l.broken[path] = err
				continue
			}
			f.priority = priority
			l.add(f)
		}
	}
	s.files = files
	return l
}

// add takes the devices of a file. Those of a later directory replace the others.
func (l *look) add(f *file) {
	for i := range f.spec.Devices {
		d := device{&f.spec.Devices[i], f}
		name := f.spec.Kind + "=" + d.Name
		if at := l.devices[name]; len(at) > 0 && at[0].file.priority < f.priority {
			l.devices[name] = nil
		}
		l.devices[name] = append(l.devices[name], d)
	}
}

// specFiles gives the names in a directory that files of the CDI have, in order. A
// directory that is missing has none.
func specFiles(dir string) ([]string, error) {
	held, err := beneath.Open("/", dir, beneath.Directory, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer held.Close()
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", held.Fd()))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := f.Readdirnames(maxEntries + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if len(all) > maxEntries {
		return nil, fmt.Errorf("%s has more than %d entries", dir, maxEntries)
	}
	names := slices.DeleteFunc(all, func(name string) bool {
		ext := filepath.Ext(name)
		return ext != ".json" && ext != ".yaml"
	})
	slices.Sort(names)
	return names, nil
}

// readLocked reads a file, and parses it unless its bytes are known. left is how many
// bytes all files together may still have. The store's lock is held.
func (s *Store) readLocked(path string, left *int64) (*file, error) {
	b, err := beneath.ReadFile("/", path, min(maxFile, *left))
	if err != nil {
		return nil, err
	}
	*left -= int64(len(b))
	f := &file{path: path, sum: sha256.Sum256(b)}
	if known := s.files[path]; known != nil && known.sum == f.sum {
		f.spec, f.err = known.spec, known.err
	} else {
		f.spec, f.err = parse(b)
	}
	return f, nil
}

// parse has the library read a file and check what is in it.
func parse(b []byte) (*specs.Spec, error) {
	spec, err := cdi.ParseSpec(b)
	if err != nil {
		return nil, err
	}
	if spec == nil {
		return nil, errors.New("it is empty")
	}
	if hasNil(&spec.ContainerEdits) || slices.ContainsFunc(spec.Devices, func(d specs.Device) bool {
		return hasNil(&d.ContainerEdits)
	}) {
		return nil, errors.New("a list in it has an empty entry")
	}
	vendor, class := parser.ParseQualifier(spec.Kind)
	for _, err := range []error{
		specs.ValidateVersion(spec),
		parser.ValidateVendorName(vendor),
		parser.ValidateClassName(class),
		validate(&spec.ContainerEdits),
	} {
		if err != nil {
			return nil, err
		}
	}
	seen := map[string]bool{}
	for i := range spec.Devices {
		d := &spec.Devices[i]
		if err := parser.ValidateDeviceName(d.Name); err != nil {
			return nil, err
		}
		if seen[d.Name] {
			return nil, fmt.Errorf("it has two devices %.200q", d.Name)
		}
		seen[d.Name] = true
		if err := validate(&d.ContainerEdits); err != nil {
			return nil, fmt.Errorf("device %.200q: %w", d.Name, err)
		}
	}
	return spec, nil
}
