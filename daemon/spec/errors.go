package spec

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/proto/kind"
)

// An error of this package names the field at fault as in the CRI, with its path:
// config.linux.resources.cpu_shares. It is of the kind kind.Invalid if the caller's config
// causes it, and of kind.Unsupported if a well-formed request is one that this runtime or
// this machine cannot fulfil.

func invalid(field, format string, args ...any) error {
	return fieldError(kind.Invalid, field, format, args...)
}

func unsupported(field, format string, args ...any) error {
	return fieldError(kind.Unsupported, field, format, args...)
}

// limitFiles are the files of cgroups by the fields that end up in them.
var limitFiles = map[string][]string{
	"cpu_period":                 {"cpu.cfs_period_us"},
	"cpu_quota":                  {"cpu.cfs_quota_us", "cpu.max"},
	"cpu_shares":                 {"cpu.shares", "cpu.weight"},
	"cpuset_cpus":                {"cpuset.cpus"},
	"cpuset_mems":                {"cpuset.mems"},
	"memory_limit_in_bytes":      {"memory.limit_in_bytes", "memory.max"},
	"memory_swap_limit_in_bytes": {"memory.memsw.limit_in_bytes", "memory.swap.max"},
}

// Blame finds the field of resources r, which the request has under the name field, whose
// value the kernel has not taken: the cgroup above may leave less than the machine has. All
// that there is to go by is the text of an OCI runtime. Any other error stays as it is.
func Blame(field string, r *runtimeapi.LinuxContainerResources, err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	refused := func(problem unix.Errno) bool { return strings.HasSuffix(text, problem.Error()) }
	if !slices.ContainsFunc([]unix.Errno{unix.EINVAL, unix.ERANGE, unix.EACCES}, refused) {
		return err
	}
	files := maps.Clone(limitFiles)
	files["unified"] = slices.Collect(maps.Keys(r.GetUnified()))
	for _, name := range slices.Sorted(maps.Keys(files)) {
		for _, file := range files[name] {
			if strings.Contains(text, "/"+file+":") {
				return kind.As(kind.Invalid, fmt.Errorf("%s.%s: %w", field, name, err))
			}
		}
	}
	return err
}

// Errors repeat what they were given, which may be a megabyte, and are logged.
const (
	longestField   = 256
	longestProblem = 1024
)

func fieldError(k error, field, format string, args ...any) error {
	problem := fmt.Sprintf(format, args...)
	return kind.Errorf(k, "%s: %s", shorten(field, longestField), shorten(problem, longestProblem))
}

// shorten leaves out the middle of a text that is longer than max bytes.
func shorten(s string, max int) string {
	if len(s) <= max {
		return s
	}
	return fmt.Sprintf("%s ... (%d bytes) ... %s", s[:max/2], len(s), s[len(s)-max/2:])
}
