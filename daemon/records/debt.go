package records

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Debt is one thing that a pod holds, or may hold, and that has to be given back.
// It is on record before the thing is taken.
type Debt string

// What a pod may owe, in the order in which it is paid.
const (
	DebtInit       Debt = "init"       // the container that is its init
	DebtNetwork    Debt = "network"    // addresses and rules: DEL
	DebtNamespaces Debt = "namespaces" // the pins
	DebtMounts     Debt = "mounts"     // /dev/shm, the files below /etc, the pin of the pid namespace
	DebtCgroup     Debt = "cgroup"     // of the pod
	DebtFiles      Debt = "files"      // its directory in STATE
)

// AllDebts is what a pod may owe of which nothing else is known.
var AllDebts = []Debt{DebtInit, DebtNetwork, DebtNamespaces, DebtMounts, DebtCgroup, DebtFiles}

// StopDebts are those that are paid when a pod is stopped, the others when it is
// removed.
var StopDebts = []Debt{DebtNetwork, DebtNamespaces, DebtMounts}

// Owes says whether the pod may hold something. A record of a version that did
// not write its debts may owe all of them.
func (p *Pod) Owes(d Debt) bool { return p.Debts == nil || slices.Contains(p.Debts, d) }

// Pay calls pay for each of the debts that are due, in order, and gives those
// that are still owed. One that cannot be paid holds back none of the others.
func Pay(ctx context.Context, debts []Debt, pay func(context.Context, Debt) error) ([]Debt, error) {
	left := []Debt{}
	var errs []error
	for _, d := range debts {
		if err := pay(ctx, d); err != nil {
			left = append(left, d)
			errs = append(errs, fmt.Errorf("%s: %w", d, err))
		}
	}
	return left, errors.Join(errs...)
}
