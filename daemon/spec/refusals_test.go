package spec

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

// refusals are the places, as FILE:LINE, from which tests of this package were refused
// something.
var refusals sync.Map

func noteRefusal() {
	pcs := make([]uintptr, 4)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs)])
	for {
		f, more := frames.Next()
		refusals.Store(fmt.Sprintf("%s:%d", filepath.Base(f.File), f.Line), true)
		if !more {
			return
		}
	}
}

// TestMain holds the tests against the code: each refusal in it is made by some test.
func TestMain(m *testing.M) {
	flag.Parse()
	refused = noteRefusal
	code := m.Run()
	all := flag.Lookup("test.run").Value.String() == "" && flag.Lookup("test.skip").Value.String() == "" &&
		flag.Lookup("test.list").Value.String() == "" && !testing.Short()
	if all && code == 0 {
		missing, err := notRefused()
		if err != nil || len(missing) > 0 {
			fmt.Fprintf(os.Stderr, "FAIL: no test is refused at\n  %s\n%v\n", strings.Join(missing, "\n  "), err)
			code = 1
		}
	}
	os.Exit(code)
}

// notRefused are the calls that make refusals and that no test has come to.
func notRefused() (missing []string, err error) {
	fset := token.NewFileSet()
	files, err := filepath.Glob("*.go")
	calls := map[string]bool{}
	for _, name := range files {
		if err != nil || strings.HasSuffix(name, "_test.go") {
			continue
		}
		var f *ast.File
		if f, err = parser.ParseFile(fset, name, nil, parser.SkipObjectResolution); err != nil {
			return nil, err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if c, ok := n.(*ast.CallExpr); ok {
				fn, _ := c.Fun.(*ast.Ident)
				if fn != nil && (fn.Name == "invalid" || fn.Name == "unsupported") {
					at := fset.Position(c.Pos())
					calls[fmt.Sprintf("%s:%d", at.Filename, at.Line)] = true
				}
			}
			return true
		})
	}
	if len(calls) < 80 {
		return nil, fmt.Errorf("only %d refusals were found in the code", len(calls))
	}
	for _, at := range slices.Sorted(maps.Keys(calls)) {
		if _, ok := refusals.Load(at); !ok {
			missing = append(missing, at)
		}
	}
	return missing, err
}
