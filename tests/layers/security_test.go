package layers

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// Each test that the page about security names, as `FOLDER.TestName`, is there, and each
// row of its tables of promises names one.
func TestSecurityPage(t *testing.T) {
	b, err := os.ReadFile("../../docs/security.md")
	must.Succeed(t, err)
	named := regexp.MustCompile("`([a-z0-9/-]+)\\.(Test[A-Za-z0-9]+)`")
	promises := false
	count := 0
	for line := range strings.Lines(string(b)) {
		found := named.FindAllStringSubmatch(line, -1)
		switch {
		case strings.HasPrefix(line, "| promise |"):
			promises = true
		case !strings.HasPrefix(line, "|"):
			promises = false
		case promises && !strings.HasPrefix(line, "|---") && len(found) == 0:
			t.Errorf("no test holds this promise: %s", line)
		}
		for _, f := range found {
			count++
			if !hasTest(t, f[1], f[2]) {
				t.Errorf("%s has no %s", f[1], f[2])
			}
		}
	}
	if count < 50 {
		t.Errorf("the page names only %d tests", count)
	}
}

func hasTest(t *testing.T, folder, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../..", folder, "*_test.go"))
	must.Succeed(t, err)
	for _, path := range files {
		b, err := os.ReadFile(path)
		must.Succeed(t, err)
		if strings.Contains(string(b), "func "+name+"(t *testing.T)") {
			return true
		}
	}
	return false
}
