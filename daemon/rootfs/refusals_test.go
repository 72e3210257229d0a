package rootfs

import (
	"os"
	"testing"

	"github.com/holdfast-cri/holdfast/tests/refusals"
)

func TestMain(m *testing.M) { os.Exit(refusals.Tests{}.Main(m.Run)) }
