package spec

import (
	"cmp"
	"math"
	"math/bits"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// The OCI runtime has libseccomp compile the filter of a container again for each create
// and each exec. With the default profile that takes longer than all the rest of an exec:
// its time grows with the number of rules that look at an argument, times the number of
// all rules of all architectures. So what is given to it is written with fewer of them.

// intArgument are system calls of which the kernel takes the first argument as an int. It
// does not see the upper half of the register, which the rules need not look at either.
var intArgument = []string{"personality", "socket"}

// treeNames is how many names one rule has at most. The OCI runtime asks for a filter
// that searches instead of comparing one by one if there are more than 32 rules.
const treeNames = 16

// compact rewrites a filter into one that decides the same, and is compiled in a third of
// the time. Without the x32 ABI in the kernel its system calls end the thread, where
// they failed before.
func compact(f *specs.LinuxSeccomp, noX32 bool) {
	if noX32 {
		f.Architectures = slices.DeleteFunc(f.Architectures, func(a specs.Arch) bool { return a == specs.ArchX32 })
	}
	var rules []specs.LinuxSyscall
	allowed := map[string][]uint32{}
	for _, r := range f.Syscalls {
		if values := intValues(r); values != nil {
			allowed[r.Names[0]] = append(allowed[r.Names[0]], values...)
			continue
		}
		for names := range slices.Chunk(r.Names, treeNames) {
			r.Names = names
			rules = append(rules, r)
		}
	}
	for _, name := range intArgument {
		for _, m := range cover(allowed[name]) {
			rules = append(rules, specs.LinuxSyscall{
				Names:  []string{name},
				Action: specs.ActAllow,
				Args:   []specs.LinuxSeccompArg{m.condition()},
			})
		}
	}
	f.Syscalls = rules
}

// intValues are the values of an int that a rule allows; nil if it is another kind of rule.
func intValues(r specs.LinuxSyscall) []uint32 {
	const most = 64 // of what one rule may list
	if len(r.Names) != 1 || !slices.Contains(intArgument, r.Names[0]) || r.Action != specs.ActAllow ||
		r.ErrnoRet != nil || len(r.Args) != 1 || r.Args[0].Index != 0 {
		return nil
	}
	a := r.Args[0]
	switch {
	case a.Op == specs.OpEqualTo && a.Value <= math.MaxUint32:
		return []uint32{uint32(a.Value)}
	case a.Op == specs.OpLessThan && a.Value <= most:
		var values []uint32
		for v := range uint32(a.Value) {
			values = append(values, v)
		}
		return values
	}
	return nil
}

// masked stands for the numbers that are value in the bits of mask.
type masked struct{ mask, value uint32 }

func (m masked) has(v uint32) bool { return v&m.mask == m.value }

func (m masked) condition() specs.LinuxSeccompArg {
	return specs.LinuxSeccompArg{Op: specs.OpMaskedEqual, Value: uint64(m.mask), ValueTwo: uint64(m.value)}
}

// cover finds a few that stand for exactly the values together. Two that differ in one
// bit are one without that bit (the method of Quine and McCluskey); of those that cannot
// be joined further, the one that adds most is taken first.
func cover(values []uint32) []masked {
	level := map[masked]bool{}
	for _, v := range values {
		level[masked{math.MaxUint32, v}] = true
	}
	var widest []masked
	for len(level) > 0 {
		next := map[masked]bool{}
		for m := range level {
			alone := true
			for rest := m.mask; rest != 0; rest &= rest - 1 {
				bit := rest & -rest
				if level[masked{m.mask, m.value ^ bit}] {
					next[masked{m.mask &^ bit, m.value &^ bit}] = true
					alone = false
				}
			}
			if alone {
				widest = append(widest, m)
			}
		}
		level = next
	}
	// The order of a map is any, that of a spec is always the same.
	slices.SortFunc(widest, func(a, b masked) int {
		return cmp.Or(bits.OnesCount32(a.mask)-bits.OnesCount32(b.mask), cmp.Compare(a.value, b.value),
			cmp.Compare(a.mask, b.mask))
	})
	var found []masked
	left := slices.Clone(values)
	added := func(m masked) (n int) {
		for _, v := range left {
			if m.has(v) {
				n++
			}
		}
		return n
	}
	for len(left) > 0 {
		best := slices.MaxFunc(widest, func(a, b masked) int { return added(a) - added(b) })
		found = append(found, best)
		left = slices.DeleteFunc(left, best.has)
	}
	return found
}
