package layers

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

const (
	root     = "../.."
	registry = "proto/step"
	drills   = "tests/crash"
)

// Each step of the registry names one place: product code reaches it there and
// nowhere else, and a drill kills there. Nothing is reached that has no name in
// the registry.
func TestSteps(t *testing.T) {
	names := stepNames(t)
	if len(names) == 0 {
		t.Fatal("the registry is empty")
	}
	places, drilled := map[string][]string{}, map[string]bool{}
	for path, f := range sources(t) {
		dir := filepath.ToSlash(filepath.Dir(path))
		test := strings.HasSuffix(path, "_test.go")
		if dir == registry || test && dir != drills {
			continue
		}
		for _, name := range stepsIn(t, path, f) {
			if dir == drills {
				drilled[name] = true
			} else {
				places[name] = append(places[name], path)
			}
		}
	}
	for name := range names {
		if len(places[name]) != 1 {
			t.Errorf("step.%s is used in %v: it is the name of one place", name, places[name])
		}
		if !drilled[name] {
			t.Errorf("step.%s is in no drill of %s", name, drills)
		}
	}
}

// stepNames are the constants of the registry. No two may have one value.
func stepNames(t *testing.T) map[string]bool {
	names, values := map[string]bool{}, map[string]string{}
	for path, f := range sources(t) {
		if filepath.ToSlash(filepath.Dir(path)) != registry || strings.HasSuffix(path, "_test.go") {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			v, ok := n.(*ast.ValueSpec)
			if !ok || !isIdent(v.Type, "Step") {
				return true
			}
			value := v.Values[0].(*ast.BasicLit).Value
			if other := values[value]; other != "" {
				t.Errorf("%s and %s are both %s", other, v.Names[0].Name, value)
			}
			names[v.Names[0].Name], values[value] = true, v.Names[0].Name
			return true
		})
	}
	return names
}

// stepsIn gives each use of a constant of the registry in a file. A step that is
// made of anything but such a constant is an error.
func stepsIn(t *testing.T, path string, f *ast.File) (uses []string) {
	if !imports(f, module+registry) {
		return nil
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			fun, ok := n.Fun.(*ast.SelectorExpr)
			if !ok || len(n.Args) != 1 {
				return true
			}
			_, literal := n.Args[0].(*ast.BasicLit)
			if fun.Sel.Name == "Reach" && literal || fun.Sel.Name == "Step" && isIdent(fun.X, "step") {
				t.Errorf("%s: a step that is no constant of %s", path, registry)
			}
		case *ast.SelectorExpr:
			switch {
			case !isIdent(n.X, "step"):
			case n.Sel.Name == "Reach", n.Sel.Name == "Environ", n.Sel.Name == "Step":
			default:
				uses = append(uses, n.Sel.Name)
			}
		}
		return true
	})
	return uses
}

func isIdent(n ast.Expr, name string) bool {
	i, ok := n.(*ast.Ident)
	return ok && i.Name == name
}

// imports says whether a file imports a package, under its own name.
func imports(f *ast.File, path string) bool {
	for _, i := range f.Imports {
		if i.Path.Value == `"`+path+`"` && i.Name == nil {
			return true
		}
	}
	return false
}

// sources are all Go files of the module, by their path in it.
func sources(t *testing.T) map[string]*ast.File {
	t.Helper()
	files := map[string]*ast.File{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			if d != nil && d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root {
				return filepath.SkipDir
			}
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		files[name] = f
		return err
	})
	must.Succeed(t, err)
	return files
}
