// Package e2e asks daemons, through CRI, for what a kubelet asks for, and looks at the
// answers and at the machine. One file for each behaviour. Most tests run beside others.
// Not so those in which layers are lost or damaged: a daemon keeps what is damaged while
// it is mounted anywhere, and the nodes have the same image.
package e2e

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-cri/holdfast/tests/harness"
	"github.com/holdfast-cri/holdfast/tests/must"
)

func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("test.parallel", "4") // more than there are processors: most of them wait
	code := m.Run()
	harness.RemoveBinaries()
	os.Exit(code)
}

const patience = 3 * time.Minute

// wantError fails unless err has the code and its text names the field, written
// in whatever case.
func wantError(t *testing.T, err error, code codes.Code, field string) {
	t.Helper()
	plain := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "_", "") }
	switch {
	case err == nil:
		t.Errorf("no error, want %s naming %s", code, field)
	case status.Code(err) != code:
		t.Errorf("the code is %s, want %s: %v", status.Code(err), code, err)
	case !strings.Contains(plain(err.Error()), plain(field)):
		t.Errorf("the error does not name %s: %v", field, err)
	}
}

// number is one that no other test has, nor another run beside this one, for a
// process that is to be found among all of the machine.
func number() string { return fmt.Sprint(100_000_000 + rand.IntN(900_000_000)) }

var check = must.Succeed
