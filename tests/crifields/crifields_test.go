// Package crifields holds docs/cri.md against the descriptors of the CRI: whatever a new
// version of the API adds fails here, until somebody has decided about it.
package crifields

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/must"
)

const page = "../../docs/cri.md"

// row is a line of a table: what is done about a call, or about some fields of messages.
type row struct{ state, text string }

var states = map[string]bool{"done": true, "not possible": true, "not done": true}

// readPage gives the state of each call, of each field (MESSAGE.FIELD), and of each
// message of Windows. Tables of fields have four columns, the others three.
func readPage(t *testing.T) map[string]row {
	t.Helper()
	b, err := os.ReadFile(page)
	must.Succeed(t, err)
	table := map[string]row{}
	for l := range strings.Lines(string(b)) {
		cells := strings.Split(strings.TrimSpace(l), "|")
		if len(cells) < 5 || strings.HasPrefix(cells[1], "--") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		n := len(cells)
		names, r := cells[1], row{cells[n-3], cells[n-2]}
		if r.state == "state" {
			continue
		}
		if !states[r.state] || r.state != "done" && r.text == "" || n > 6 {
			t.Errorf("this line has no state, or no reason for it: %s", l)
		}
		for _, key := range strings.Split(names, ", ") {
			for _, field := range strings.Split(cells[2], ", ") {
				full := key
				if n == 6 {
					full += "." + field
				}
				if _, twice := table[full]; twice {
					t.Errorf("there are two rows for %s", full)
				}
				table[full] = r
			}
		}
	}
	return table
}

// wanted gives all calls, and all fields of all messages that a call can carry. Of the
// messages of Windows there is one row each: no field of theirs means anything here.
func wanted() (calls map[string]bool, keys map[string]bool) {
	calls, keys = map[string]bool{}, map[string]bool{}
	file := (&cri.VersionRequest{}).ProtoReflect().Descriptor().ParentFile()
	for i := range file.Services().Len() {
		methods := file.Services().Get(i).Methods()
		for j := range methods.Len() {
			calls[string(methods.Get(j).Name())] = true
			keys[string(methods.Get(j).Name())] = true
		}
	}
	for i := range file.Messages().Len() {
		addMessage(keys, file.Messages().Get(i))
	}
	return calls, keys
}

func addMessage(keys map[string]bool, m protoreflect.MessageDescriptor) {
	if m.IsMapEntry() {
		return
	}
	if strings.HasPrefix(string(m.Name()), "Windows") {
		keys[string(m.Name())] = true
		return
	}
	for i := range m.Fields().Len() {
		keys[string(m.Name())+"."+string(m.Fields().Get(i).Name())] = true
	}
	for i := range m.Messages().Len() {
		addMessage(keys, m.Messages().Get(i))
	}
}

func TestEveryCallAndField(t *testing.T) {
	table := readPage(t)
	calls, keys := wanted()
	if len(calls) < 43 || len(keys) < 400 {
		t.Fatalf("the API has %d calls, and %d names: its descriptors were not read", len(calls), len(keys))
	}
	for k := range keys {
		if _, ok := table[k]; !ok {
			t.Errorf("docs/cri.md says nothing of %s: decide about it", k)
		}
	}
	for k := range table {
		if !keys[k] {
			t.Errorf("docs/cri.md has a row for %s, and the API has no such thing", k)
		}
	}
}

// A call is done if the server has a method of its own for it. Otherwise it is answered
// by what says Unimplemented.
func TestCallsThatAreDone(t *testing.T) {
	table := readPage(t)
	calls, _ := wanted()
	has := serverMethods(t)
	for c := range calls {
		if done := table[c].state == "done"; done != has[c] {
			t.Errorf("docs/cri.md calls %s %q; the server has a method for it: %v", c, table[c].state, has[c])
		}
	}
}

// serverMethods reads the names of the methods of cri.Server from its source: those that
// it only embeds look the same from outside.
func serverMethods(t *testing.T) map[string]bool {
	t.Helper()
	files, err := filepath.Glob("../../cri/*.go")
	if err != nil || len(files) == 0 {
		t.Fatal("cannot find the server: ", err)
	}
	methods := map[string]bool{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		must.Succeed(t, err)
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv == nil {
				continue
			}
			if star, ok := fn.Recv.List[0].Type.(*ast.StarExpr); ok {
				if of, ok := star.X.(*ast.Ident); ok && of.Name == "Server" {
					methods[fn.Name.Name] = true
				}
			}
		}
	}
	return methods
}

// Enum values that are new mean something that the code has not heard of. They are in
// no table, as each is handled or refused where its field is; so their number is here.
func TestEnumsAreKnown(t *testing.T) {
	known := map[string]int{
		"Protocol":                 3,
		"MountPropagation":         3,
		"NamespaceMode":            4,
		"SupplementalGroupsPolicy": 2,
		"ProfileType":              3,
		"PodSandboxState":          2,
		"Signal":                   66,
		"ContainerState":           4,
		"ContainerEventType":       4,
		"MetricType":               2,
		"CgroupDriver":             2,
	}
	file := (&cri.VersionRequest{}).ProtoReflect().Descriptor().ParentFile()
	check := func(e protoreflect.EnumDescriptor) {
		if n := e.Values().Len(); known[string(e.Name())] != n {
			t.Errorf("%s has %d values, and %d are known: look where it is used", e.Name(), n, known[string(e.Name())])
		}
	}
	for i := range file.Enums().Len() {
		check(file.Enums().Get(i))
	}
	for i := range file.Messages().Len() {
		for j := range file.Messages().Get(i).Enums().Len() {
			check(file.Messages().Get(i).Enums().Get(j))
		}
	}
}
