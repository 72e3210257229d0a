//go:build race

package shim_test

// raceEnabled makes the shim under test one with the race detector, too.
const raceEnabled = true
