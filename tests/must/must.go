// Package must ends tests that do not get what they need.
package must

import (
	"os"
	"testing"
	"time"
)

// Succeed ends the test if there is an error.
func Succeed(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// limit is far above what anything takes that is waited for.
const limit = 3 * time.Minute

// Come waits until something is so, which another goroutine or process brings about.
func Come(t testing.TB, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never came: %s", what)
		}
	}
}

// BeRoot skips the test if it is run by another user.
func BeRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}
