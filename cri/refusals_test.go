package cri

import (
	"os"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/refusals"
)

func TestMain(m *testing.M) {
	os.Exit(refusals.Tests{Makers: []string{"invalid", "require", "checkRef"}}.Main(m.Run))
}
