package network

import (
	"fmt"
	"math/big"
	"strings"
)

var quantityUnits = map[string]string{
	"m": "1/1000", "": "1", "k": "1000", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15", "E": "1e18",
	"Ki": "1024", "Mi": "1048576", "Gi": "1073741824", "Ti": "1099511627776",
	"Pi": "1125899906842624", "Ei": "1152921504606846976",
}

// The limits that Kubernetes puts on a bandwidth annotation, in bits per second.
const minBandwidth, maxBandwidth = 1_000, 1_000_000_000_000_000

// parseQuantity reads a bandwidth in Kubernetes' notation of quantities, such
// as 10M or 1.5Gi, in bits per second.
func parseQuantity(s string) (uint64, error) {
	number := strings.TrimRight(s, "mkKMGTPEi")
	unit, ok := quantityUnits[s[len(number):]]
	value, ok2 := new(big.Rat).SetString(number)
	if !ok || !ok2 || strings.ContainsAny(number, "/_xXoObBpP") {
		return 0, fmt.Errorf("%q is not a quantity, write for example 10M", s)
	}
	factor, _ := new(big.Rat).SetString(unit)
	value.Mul(value, factor)
	q := new(big.Int).Quo(value.Num(), value.Denom())
	if !q.IsUint64() || q.Uint64() < minBandwidth || q.Uint64() > maxBandwidth {
		return 0, fmt.Errorf("bandwidth %q is not between 1k and 1P", s)
	}
	return q.Uint64(), nil
}
