// Package e2e asks one daemon at a time, through CRI, for what a kubelet asks
// for, and looks at the answers and at the machine. One file for each behaviour.
package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.RemoveBinaries()
	os.Exit(code)
}

const patience = time.Minute

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

func isProcess(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return err == nil
}
