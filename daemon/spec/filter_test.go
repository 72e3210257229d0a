package spec

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestCover(t *testing.T) {
	random := make([]uint32, 40)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range random {
		random[i] = r.Uint32N(64)
	}
	for _, tt := range []struct {
		name   string
		values []uint32
		most   int // conditions
	}{
		{"none", nil, 0},
		{"one", []uint32{38}, 1},
		{"twice the same", []uint32{7, 7}, 1},
		{"two that differ in one bit", []uint32{4, 6}, 1},
		{"two that differ in two", []uint32{1, 2}, 2},
		{"all of a power of two", []uint32{0, 1, 2, 3, 4, 5, 6, 7}, 1},
		{"three in a row", []uint32{0, 1, 2}, 2},
		{"the highest bit", []uint32{0, 1 << 31, math.MaxUint32}, 2},
		{"any", random, len(random)},
	} {
		found := cover(tt.values)
		if len(found) > tt.most {
			t.Errorf("%s: %d conditions, at most %d are needed: %v", tt.name, len(found), tt.most, found)
		}
		if again := cover(tt.values); !slices.Equal(found, again) {
			t.Errorf("%s: %v the first time, then %v", tt.name, found, again)
		}
		for _, v := range candidates(tt.values) {
			has := slices.ContainsFunc(found, func(m masked) bool { return m.has(v) })
			if has != slices.Contains(tt.values, v) {
				t.Errorf("%s: %v says %t of %d", tt.name, found, has, v)
			}
		}
	}
}

// candidates are small numbers, and all that differ from a value in up to two bits.
func candidates(values []uint32) []uint32 {
	var all []uint32
	for v := range uint32(1 << 10) {
		all = append(all, v)
	}
	for _, v := range values {
		for i := range 32 {
			for j := range 32 {
				all = append(all, v^1<<i^1<<j)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// only is the filter with nothing but the rules of one call.
func only(f *specs.LinuxSeccomp, name string) specs.LinuxSeccomp {
	g := *f
	g.Syscalls = slices.DeleteFunc(slices.Clone(f.Syscalls), func(r specs.LinuxSyscall) bool {
		return !slices.Contains(r.Names, name)
	})
	return g
}

// decision is what the rules of a call say, if its other arguments are 0.
func decision(f specs.LinuxSeccomp, argument uint64) string {
	for _, r := range f.Syscalls {
		fits := true
		for _, a := range r.Args {
			value := argument
			if a.Index != 0 {
				value = 0
			}
			fits = fits && map[specs.LinuxSeccompOperator]bool{
				specs.OpEqualTo:     value == a.Value,
				specs.OpLessThan:    value < a.Value,
				specs.OpMaskedEqual: value&a.Value == a.ValueTwo,
			}[a.Op]
		}
		if fits && r.ErrnoRet != nil {
			return fmt.Sprint(r.Action, *r.ErrnoRet)
		} else if fits {
			return string(r.Action)
		}
	}
	return string(f.DefaultAction)
}

func TestCompactDecidesTheSame(t *testing.T) {
	for _, capability := range []string{"CAP_CHOWN", "CAP_SYS_ADMIN"} {
		s := &specs.Spec{Process: &specs.Process{
			Capabilities: &specs.LinuxCapabilities{Bounding: []string{capability}},
		}}
		was, err := seccomp.GetDefaultProfile(s)
		is, err2 := seccomp.GetDefaultProfile(s)
		if err != nil || err2 != nil {
			t.Fatal(err, err2)
		}
		compact(is, false)
		names := []string{"mount", "kexec_load", "no_such_call"}
		var values []uint32
		arguments := 0
		for _, r := range was.Syscalls {
			names = append(names, r.Names...)
			for _, a := range r.Args {
				values = append(values, uint32(a.Value))
			}
		}
		for _, r := range is.Syscalls {
			arguments += len(r.Args)
		}
		tries := candidates(values)
		slices.Sort(names)
		for _, name := range slices.Compact(names) {
			before, after := only(was, name), only(is, name)
			for _, v := range tries {
				if old, now := decision(before, uint64(v)), decision(after, uint64(v)); old != now {
					t.Fatalf("%s(%d) with %s: %s, %s in the compact filter", name, v, capability, old, now)
				}
				if !slices.Contains([]string{"socket", "personality", "clone"}, name) {
					break // it does not depend on arguments
				}
			}
		}
		if arguments > 20 || len(is.Syscalls) <= 32 {
			t.Errorf("%d conditions on arguments in %d rules: slow to compile, or to be asked", arguments,
				len(is.Syscalls))
		}
		if !slices.Equal(is.Architectures, was.Architectures) || is.DefaultAction != was.DefaultAction {
			t.Errorf("the compact filter is for %v, %s else", is.Architectures, is.DefaultAction)
		}
	}
}

func TestCompactKeepsOtherRules(t *testing.T) {
	condition := func(index uint, op specs.LinuxSeccompOperator, value uint64) []specs.LinuxSeccompArg {
		return []specs.LinuxSeccompArg{{Index: index, Op: op, Value: value}}
	}
	rules := []specs.LinuxSyscall{
		{Names: []string{"socket"}, Action: specs.ActErrno, Args: condition(0, specs.OpEqualTo, 1)},
		{Names: []string{"socket"}, Action: specs.ActAllow, Args: condition(1, specs.OpEqualTo, 1)},
		{Names: []string{"socket"}, Action: specs.ActAllow, Args: condition(0, specs.OpEqualTo, 1<<32)},
		{Names: []string{"socket"}, Action: specs.ActAllow, Args: condition(0, specs.OpLessThan, 1<<20)},
		{Names: []string{"socket"}, Action: specs.ActAllow, Args: condition(0, specs.OpNotEqual, 1)},
		{Names: []string{"clone"}, Action: specs.ActAllow, Args: condition(0, specs.OpEqualTo, 1)},
	}
	f := &specs.LinuxSeccomp{
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
		Syscalls:      slices.Clone(rules),
	}
	compact(f, true)
	if fmt.Sprint(f.Syscalls) != fmt.Sprint(rules) {
		t.Errorf("%v became %v", rules, f.Syscalls)
	}
	if !slices.Equal(f.Architectures, []specs.Arch{specs.ArchX86_64, specs.ArchX86}) {
		t.Errorf("without x32 the filter is for %v", f.Architectures)
	}
}

func TestLacksX32(t *testing.T) {
	const amd64 = "#\n# a kernel\n#\nCONFIG_X86_64=y\n"
	for _, tt := range []struct {
		name, config, commandLine string
		lacks                     bool
	}{
		{name: "nothing known"},
		{name: "another architecture", config: "\nCONFIG_ARM64=y\n"},
		{name: "built without", config: amd64 + "# CONFIG_X86_X32_ABI is not set\n", lacks: true},
		{name: "built with", config: amd64 + "CONFIG_X86_X32_ABI=y\n"},
		{name: "built with, before 5.18", config: amd64 + "CONFIG_X86_X32=y\n"},
		{
			name:   "Debian's",
			config: amd64 + "CONFIG_X86_X32_ABI=y\nCONFIG_X86_X32_DISABLED=y\n", commandLine: "quiet", lacks: true,
		},
		{
			name:   "Debian's, asked for",
			config: amd64 + "CONFIG_X86_X32_ABI=y\nCONFIG_X86_X32_DISABLED=y\n", commandLine: "quiet syscall.x32=y\n",
		},
	} {
		if got := lacksX32([]byte(tt.config), []byte(tt.commandLine)); got != tt.lacks {
			t.Errorf("%s: %t", tt.name, got)
		}
	}
}
