package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"

	"github.com/holdfast-cri/holdfast/daemon/audit"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func setupExplain(a *app, fs *flag.FlagSet) runFunc {
	root := fs.String("root", "",
		"what survives a reboot is in `DIR` (default: as the daemon was started, or its config says)")
	return func(_ context.Context, _ rundir.Dir, args []string) error {
		stories, err := audit.Stories(a.auditOptions(*root), args[0])
		if err != nil && len(stories) == 0 {
			return err
		}
		if len(stories) == 0 {
			return fmt.Errorf("nothing is known of a pod or container %q; what is long gone is forgotten", args[0])
		}
		var b strings.Builder
		for _, s := range stories {
			writeStory(&b, s)
		}
		return errors.Join(a.print(stories, b.String()), err)
	}
}

// verbs are how a person says what has happened.
var verbs = map[records.What]string{
	records.Asked:    "asked for, by",
	records.Failed:   "could not be created:",
	records.Created:  "created",
	records.Started:  "started",
	records.Stopping: "asked to stop, by",
	records.Exited:   "ended:",
	records.Stopped:  "stopped",
	records.Removed:  "removed",
}

func writeStory(b *strings.Builder, s audit.Story) {
	what := "pod"
	if s.Pod != "" {
		what = "container"
	}
	fmt.Fprintf(b, "%s %s (%s)\n", what, printable(s.Name), printable(records.ShortID(s.ID)))
	gone := false
	for _, line := range s.Lines {
		verb := verbs[line.What]
		if s.Pod == "" && line.What == records.Exited {
			verb = "its init ended:"
		}
		if line.What == records.Created && line.Text != "" {
			verb = "created from"
		}
		text := strings.TrimSpace(cmp.Or(verb, string(line.What)) + " " + line.Text)
		fmt.Fprintf(b, "  %s  %s\n", timeText(line.At), printable(text))
		gone = gone || line.What == records.Removed || line.What == records.Failed
	}
	switch {
	case s.Now != "":
		fmt.Fprintf(b, "  now: %s\n", printable(s.Now))
	case !gone:
		b.WriteString("  now: it is gone; when it was removed is not known\n")
	}
}
