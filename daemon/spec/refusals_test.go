package spec

import (
	"os"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/refusals"
)

func TestMain(m *testing.M) {
	os.Exit(refusals.Tests{Makers: []string{"invalid", "unsupported"}, Least: 80}.Main(m.Run))
}
