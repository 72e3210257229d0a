package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/daemon/audit"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Exit codes of doctor beside those of all commands.
const (
	codeOwnerless = 3 // something has no owner
	codeUnknown   = 4 // something could not be looked at, or it cannot be told whose it is
)

// maxDoubtful is how many things are listed whose owner is not known.
const maxDoubtful = 10

const (
	defaultRoot   = "/var/lib/holdfast"
	defaultCNIDir = "/etc/cni/net.d"
)

// doctor is one run of the command.
type doctor struct {
	*app
	root     string
	verbose  bool
	fix, yes bool
	options  audit.Options
	in       *bufio.Reader
	fixed    int
}

func setupDoctor(a *app, fs *flag.FlagSet) runFunc {
	d := &doctor{app: a}
	fs.StringVar(&d.root, "root", "",
		"what survives a reboot is in `DIR` (default: as the daemon was started, or its config says)")
	fs.BoolVar(&d.verbose, "v", false, "list everything, with its owner")
	fs.BoolVar(&d.fix, "fix", false, "take away what has no owner, after a question for each")
	fs.BoolVar(&d.yes, "yes", false, "with --fix: do not ask")
	return func(ctx context.Context, _ rundir.Dir, _ []string) error {
		if d.yes && !d.fix {
			return usagef("doctor: --yes means nothing without --fix")
		}
		if os.Geteuid() != 0 {
			return errors.New("cannot look at the machine: this needs root")
		}
		d.options = a.auditOptions(d.root)
		return d.run(ctx)
	}
}

// auditOptions are where to look: as flags say, as the daemon was started, as the config
// says.
func (a *app) auditOptions(root string) audit.Options {
	return audit.Options{
		Root:       cmp.Or(root, a.daemon.Root, a.settings.Root, defaultRoot),
		State:      a.state,
		Address:    a.address,
		CNIConfDir: cmp.Or(a.daemon.CNIConfDir, a.settings.CNI.ConfDir, defaultCNIDir),
		NRISocket:  a.daemon.NRISocket,
	}
}

func (d *doctor) run(ctx context.Context) error {
	report, err := audit.Look(ctx, d.options)
	if err != nil {
		fmt.Fprintf(d.stderr, "holdfastctl: %s; are --state and --root right?\n", printable(err.Error()))
		return exitCode(codeUnknown)
	}
	if err := d.show(report); err != nil {
		return err
	}
	if d.fix && len(report.Ownerless()) > 0 {
		if err := d.mend(ctx, report); err != nil {
			return err
		}
		if report, err = audit.Look(ctx, d.options); err != nil {
			return err
		}
		fmt.Fprintf(d.stderr, "%d things were taken away, %d are left without an owner\n", d.fixed,
			len(report.Ownerless()))
	}
	switch {
	case len(report.Ownerless()) > 0:
		return exitCode(codeOwnerless)
	case len(report.Doubtful())+len(report.Unknown) > 0:
		return exitCode(codeUnknown)
	}
	return nil
}

// show prints a report.
func (d *doctor) show(r audit.Report) error {
	var b strings.Builder
	counts := map[audit.Kind]int{}
	var kinds []string
	for _, t := range r.Things {
		if counts[t.Kind]++; counts[t.Kind] == 1 {
			kinds = append(kinds, string(t.Kind))
		}
		if d.verbose {
			owner := cmp.Or(printable(t.Owner), "no owner")
			if t.Doubt {
				owner = "not known"
			}
			fmt.Fprintf(&b, "%s %s\n    %s: %s\n", t.Kind, printable(t.Name), owner, printable(t.Why))
		}
	}
	for i, k := range kinds {
		kinds[i] = fmt.Sprintf("%s %d", k, counts[audit.Kind(k)])
	}
	running := "no daemon runs"
	if r.DaemonRuns {
		running = "the daemon runs"
	}
	fmt.Fprintf(&b, "%d things (%s); %s\n", len(r.Things), strings.Join(kinds, ", "), running)
	for _, t := range r.Ownerless() {
		fmt.Fprintf(&b, "NO OWNER: %s %s\n    %s\n", t.Kind, printable(t.Name), printable(t.Why))
		if t.Remedy != "" {
			fmt.Fprintf(&b, "    to do: %s\n", t.Remedy)
		}
	}
	for i, t := range r.Doubtful() {
		if i == maxDoubtful && !d.verbose {
			fmt.Fprintf(&b, "NOT KNOWN: whose are %d things more, which -v lists\n", len(r.Doubtful())-i)
			break
		}
		fmt.Fprintf(&b, "NOT KNOWN: whose is %s %s: %s\n", t.Kind, printable(t.Name), printable(t.Why))
	}
	for _, u := range r.Unknown {
		fmt.Fprintf(&b, "NOT KNOWN: %s\n", printable(strings.ReplaceAll(u, "\n", "; ")))
	}
	if len(r.Ownerless())+len(r.Doubtful())+len(r.Unknown) == 0 {
		b.WriteString("all of it has an owner\n")
	}
	return d.print(r, b.String())
}

// mend takes away what has no owner, one thing after the other.
func (d *doctor) mend(ctx context.Context, r audit.Report) error {
	if !d.yes {
		if _, err := unix.IoctlGetTermios(int(d.stdin.Fd()), unix.TCGETS); err != nil {
			return usagef("doctor: --fix asks on a terminal, and the standard input is none; --yes does without")
		}
		d.in = bufio.NewReader(d.stdin)
	}
	var all []audit.Thing
	for _, t := range r.Ownerless() {
		if !r.CanFix(t) {
			remedy := cmp.Or(t.Remedy, "nothing to be done here")
			fmt.Fprintf(d.stderr, "left: %s %s (%s)\n", t.Kind, printable(t.Name), remedy)
			continue
		}
		if d.yes {
			all = append(all, t)
			continue
		}
		answer, err := d.ask(t)
		if err == nil && answer == "y" {
			err = audit.Fix(ctx, d.options, []audit.Thing{t}, d.tell)
		}
		if err != nil || answer == "q" {
			return err
		}
	}
	return audit.Fix(ctx, d.options, all, d.tell)
}

// tell says what came of taking a thing away.
func (d *doctor) tell(t audit.Thing, err error) {
	what := fmt.Sprint(t.Kind, " ", printable(t.Name))
	switch {
	case errors.Is(err, audit.ErrOwned):
		fmt.Fprintf(d.stderr, "gone, or not without an owner any more: %s\n", what)
	case err != nil:
		fmt.Fprintf(d.stderr, "left: %s: %s\n", what, printable(err.Error()))
	default:
		d.fixed++
		fmt.Fprintf(d.stderr, "taken away: %s\n", what)
	}
}

// ask asks whether a thing is to be taken away: y, n or q.
func (d *doctor) ask(t audit.Thing) (string, error) {
	for {
		fmt.Fprintf(d.stderr, "%s %s\n    %s\n%s? [y/n/q] ", t.Kind, printable(t.Name), printable(t.Why), t.Remedy)
		line, err := d.in.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("cannot read the answer: %w", err)
		}
		if answer := strings.ToLower(strings.TrimSpace(line)); slices.Contains([]string{"y", "n", "q"}, answer) {
			return answer, nil
		}
	}
}
