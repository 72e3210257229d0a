// Package refusals holds the tests of a package against its code: whatever it refuses with
// InvalidArgument or Unimplemented is refused by one of its tests.
package refusals

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Env names the file in which a program notes its refusals that these tests start: one that
// is built with the tag "refusals".
const Env = "HOLDFAST_REFUSALS"

var (
	mu   sync.Mutex
	made = map[string]bool{} // the lines that refused something, as FILE:LINE; guarded by mu
)

// places are the lines that are making a refusal: one may be made by a function for others.
func places() (list []string) {
	pcs := make([]uintptr, 8)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(4, pcs)])
	for {
		f, more := frames.Next()
		list = append(list, fmt.Sprintf("%s:%d", f.File, f.Line))
		if !more {
			return list
		}
	}
}

func note(error) {
	mu.Lock()
	defer mu.Unlock()
	for _, at := range places() {
		made[at] = true
	}
}

// Append makes this process note its refusals in the file that Env names.
func Append() {
	f, err := os.OpenFile(os.Getenv(Env), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return // whoever started it does not ask
	}
	kind.Made = func(error) { fmt.Fprintln(f, strings.Join(places(), "\n")) }
}

// Tests is what one run of tests has to be refused.
type Tests struct {
	Dirs   []string // whose refusals they are; none: that of the tests
	Makers []string // functions that make refusals for others
	Least  int      // refusals in each folder; with fewer, the code that makes them was not found
}

// Main runs the tests. If all of them ran and passed, it fails where the code makes a refusal
// that none of them has met: a call with kind.Invalid or kind.Unsupported among its
// arguments, or of a maker.
func (w Tests) Main(run func() int) int {
	dir, err := os.MkdirTemp("", "refusals")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs := filepath.Join(dir, "made")
	os.Setenv(Env, programs)
	kind.Made = note
	code := run()
	for _, some := range []string{"test.run", "test.skip", "test.list", "test.fuzz"} {
		if flag.Lookup(some).Value.String() != "" {
			return code
		}
	}
	if code != 0 || testing.Short() || os.Geteuid() != 0 {
		return code
	}
	if err := w.check(programs); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		return 1
	}
	return 0
}

func (w Tests) check(programs string) error {
	mu.Lock() // a goroutine that a test has left alone may still be refused something
	defer mu.Unlock()
	if b, err := os.ReadFile(programs); err == nil {
		for at := range strings.Lines(string(b)) {
			made[strings.TrimSpace(at)] = true
		}
	}
	met := map[string]bool{}
	for at := range made {
		met[inModule(at)] = true
	}
	var missing []string
	for _, dir := range append(w.Dirs, ".")[:max(1, len(w.Dirs))] {
		calls, err := w.refusals(dir)
		if err != nil {
			return err
		}
		for _, c := range calls {
			if !slices.ContainsFunc(c, func(at string) bool { return met[inModule(at)] }) {
				missing = append(missing, c[0])
			}
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("no test is refused at\n  %s", strings.Join(missing, "\n  "))
	}
	return nil
}

const module = "github.com/holdfast-cri/holdfast/"

// root is the directory of the module, in which the tests run.
var root = sync.OnceValue(func() string {
	dir, err := os.Getwd()
	for ; err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir + "/"
		}
	}
	return ""
})

// inModule is a line of a file by its name in the module: what is built with -trimpath knows
// no other one.
func inModule(at string) string {
	return strings.TrimPrefix(strings.TrimPrefix(at, module), root())
}

// refusals are the calls in a folder that make refusals, each as the lines that it takes.
func (w Tests) refusals(dir string) (calls [][]string, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if c, ok := n.(*ast.CallExpr); ok && w.refuses(c) {
				var lines []string
				for line := fset.Position(c.Pos()).Line; line <= fset.Position(c.End()).Line; line++ {
					lines = append(lines, fmt.Sprintf("%s:%d", name, line))
				}
				calls = append(calls, lines)
			}
			return true
		})
	}
	if len(calls) < max(1, w.Least) {
		return nil, fmt.Errorf("only %d refusals were found in %s", len(calls), dir)
	}
	return calls, nil
}

func (w Tests) refuses(c *ast.CallExpr) bool {
	switch fn := c.Fun.(type) {
	case *ast.Ident:
		if slices.Contains(w.Makers, fn.Name) {
			return true
		}
	case *ast.SelectorExpr:
		if fn.Sel.Name == "Is" { // errors.Is asks
			return false
		}
	}
	return slices.ContainsFunc(c.Args, func(a ast.Expr) bool {
		s, ok := a.(*ast.SelectorExpr)
		if !ok {
			return false
		}
		p, ok := s.X.(*ast.Ident)
		return ok && p.Name == "kind" && (s.Sel.Name == "Invalid" || s.Sel.Name == "Unsupported")
	})
}
