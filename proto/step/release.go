//go:build !failpoint

package step

// Reach says that a step has been reached. This build does nothing about it.
func Reach(Step) error { return nil }

// Environ is what a child needs in its environment to have the same failpoints.
func Environ() []string { return nil }
