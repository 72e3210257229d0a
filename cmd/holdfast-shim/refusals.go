//go:build refusals

package main

import "github.com/holdfast-cri/holdfast/tests/refusals"

// A shim that is built for the tests of the folder shim notes what it refuses.
func init() { refusals.Append() }
