package crash

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-cri/holdfast/proto/step"
	"github.com/holdfast-cri/holdfast/tests/harness"
)

// What docs/crash-windows.md says is left behind is compared with what is there after a
// kill, before the daemon is started again.

const windowsDoc = "../../docs/crash-windows.md"

// things are what can be left of an object, as the document calls it, by how a node tells
// of it: the first one that matches.
var things = []struct {
	pattern *regexp.Regexp // ID stands for the object's id
	object  string
	name    string
}{
	{regexp.MustCompile("^netns /run/netns/holdfast-ID"), "pod", "netns"},
	{regexp.MustCompile("^lease "), "pod", "lease"},
	{regexp.MustCompile("^veth "), "pod", "veth"},
	{regexp.MustCompile("^path ROOT/cni/results/"), "pod", "cni"},
	{regexp.MustCompile("^path ROOT/pods/ID/record.json"), "pod", "record"},
	{regexp.MustCompile("^path STATE/pods/ID/record.json"), "pod", "copy"},
	{regexp.MustCompile("^mount STATE/pods/ID/ns/"), "pod", "ns"},
	{regexp.MustCompile("^mount STATE/pods/ID/shm"), "pod", "shm"},
	{regexp.MustCompile("^mount STATE/pods/ID/etc"), "pod", "etc"},
	{regexp.MustCompile("^mount STATE/pods/ID/pid"), "pod", "pid"},
	{regexp.MustCompile("^path ROOT/containers/ID/record.json"), "container", "record"},
	{regexp.MustCompile("^path STATE/containers/ID$"), "container", "run-dir"},
	{regexp.MustCompile("^mount STATE/containers/ID/rootfs"), "container", "root"},
	{regexp.MustCompile("^process .*holdfast-shim --dir STATE/containers/ID"), "container", "shim"},
	{regexp.MustCompile("^process [0-9]+ in .*/ID$"), "container", "processes"},
	{regexp.MustCompile("^path STATE/containers/ID/exit.json"), "container", "exit"},
}

// whole are the names of all that an object has in the middle of its life.
var whole = map[string]string{
	"pod":       "cni copy etc lease netns ns record shm veth",
	"container": "processes record root run-dir shim",
}

// leftBehind describes what is left as the document does: "pod + container(record run-dir)".
func leftBehind(n *harness.Node) string {
	objects := map[string]map[string]bool{} // by kind and id
	for _, line := range n.Leftovers() {
		line = strings.ReplaceAll(strings.ReplaceAll(line, n.State+"/", "STATE/"), n.Root+"/", "ROOT/")
		if strings.Contains(line, " in ") && strings.Contains(line, "/shims/") {
			continue // the shim, by its cgroup
		}
		id := idPattern.FindString(line)
		if id != "" {
			line = strings.ReplaceAll(line, id, "ID")
		}
		for _, t := range things {
			if !t.pattern.MatchString(line) {
				continue
			}
			key := t.object // there is one pod
			if t.object == "container" {
				key += " " + id
			}
			if objects[key] == nil {
				objects[key] = map[string]bool{}
			}
			objects[key][t.name] = true
			break
		}
	}
	var all []string
	for key, names := range objects {
		kind, _, _ := strings.Cut(key, " ")
		var list []string
		for name := range names {
			list = append(list, name)
		}
		slices.Sort(list)
		said := strings.Join(list, " ")
		if said == whole[kind] {
			all = append(all, kind)
		} else {
			all = append(all, kind+"("+said+")")
		}
	}
	slices.SortFunc(all, func(a, b string) int { return strings.Compare(b, a) }) // the pod first
	if len(all) == 0 {
		return "nothing"
	}
	return strings.Join(all, " + ")
}

// checkWindow compares what is left after a kill with the document.
func (k *kubelet) checkWindow() {
	k.t.Helper()
	if k.killed > 1 || k.nth > 1 || !first(k.disaster) {
		return
	}
	got := leftBehind(k.n)
	if file := os.Getenv("HOLDFAST_WINDOWS"); file != "" {
		f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		check(k.t, err)
		fmt.Fprintf(f, "%s: %s\n", k.at, got)
		f.Close()
	}
	want := windows(k.t)[string(k.at)]
	if matches(strings.Split(want, " + "), strings.Split(got, " + ")) {
		return
	}
	k.t.Errorf("killed at %s there is left: %s; %s says %q", k.at, got, windowsDoc, want)
}

// matches says whether objects are those that are wanted, in any order.
func matches(want, got []string) bool {
	if len(want) == 0 || len(got) == 0 {
		return len(want) == len(got)
	}
	for i, g := range got {
		rest := slices.Delete(slices.Clone(got), i, i+1)
		if object(want[0]).MatchString(inFull(g)) && matches(want[1:], rest) {
			return true
		}
	}
	return false
}

// object makes a pattern of an object of the document, in which what has a question mark
// may be there or not.
func object(wanted string) *regexp.Regexp {
	kind, list, _ := strings.Cut(strings.Trim(inFull(wanted), ")"), "(")
	pattern := "^" + kind + `\(`
	for name := range strings.FieldsSeq(list) {
		if name, maybe := strings.CutSuffix(name, "?"); maybe {
			pattern += "( ?" + name + ")?"
		} else {
			pattern += " ?" + name
		}
	}
	return regexp.MustCompile(pattern + `\)$`)
}

// inFull is an object with all its names.
func inFull(object string) string {
	if names := whole[object]; names != "" {
		return object + "(" + names + ")"
	}
	return object
}

// first says whether a disaster is the first one of its step, of which the document tells.
func first(d disaster) bool {
	i := slices.IndexFunc(disasters, func(o disaster) bool { return o.at == d.at })
	return disasters[i] == d
}

// windows are what the document says is left behind at each step.
func windows(t *testing.T) map[string]string {
	t.Helper()
	m := map[string]string{}
	for _, cells := range rowsOf(t, "step") {
		m[strings.Trim(cells[0], "`")] = cells[1]
	}
	return m
}

// rowsOf are the cells of all tables of the document whose first column has a title.
func rowsOf(t *testing.T, title string) (rows [][]string) {
	t.Helper()
	b, err := os.ReadFile(windowsDoc)
	check(t, err)
	in := false
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			in = false
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		switch {
		case cells[0] == title:
			in = true
		case in && !strings.HasPrefix(cells[0], "--"):
			rows = append(rows, cells)
		}
	}
	return rows
}

// Each step has one row, and each row names a step.
func TestWindowsAreSteps(t *testing.T) {
	b, err := os.ReadFile("../../proto/step/step.go")
	check(t, err)
	steps := map[string]int{}
	for _, m := range regexp.MustCompile(`Step += "([a-z-]+)"`).FindAllStringSubmatch(string(b), -1) {
		steps[m[1]] = 0
	}
	if _, known := steps[string(step.PodRecord)]; !known || len(steps) < 50 {
		t.Fatalf("%d steps were found", len(steps))
	}
	for _, cells := range rowsOf(t, "step") {
		name := strings.Trim(cells[0], "`")
		if _, known := steps[name]; !known {
			t.Errorf("%s is no step", name)
		}
		steps[name]++
		if len(cells) != 3 || slices.Contains(cells, "") {
			t.Errorf("the row of %s is not whole: %q", name, cells)
		}
	}
	for name, rows := range steps {
		if rows != 1 {
			t.Errorf("%s has %d rows in %s", name, rows, windowsDoc)
		}
	}
}

// checkListed: each system call is one of a group that the document names.
func checkListed(t *testing.T, calls []string, ofShim bool) {
	t.Helper()
	title := "calls of the daemon"
	if ofShim {
		title = "calls of a shim"
	}
	var patterns []string
	for _, cells := range rowsOf(t, title) {
		for p := range strings.FieldsSeq(cells[0]) {
			patterns = append(patterns, strings.Trim(p, "`"))
		}
	}
	for _, call := range calls {
		words := strings.Fields(call)
		last := words[len(words)-1]
		if !slices.ContainsFunc(patterns, func(p string) bool { return below(p, last) }) {
			t.Errorf("%q is in no row of %q in %s", call, title, filepath.Base(windowsDoc))
		}
	}
}

// below says whether a path matches a pattern, or lies below one that ends with /**.
func below(pattern, name string) bool {
	if dir, all := strings.CutSuffix(pattern, "/**"); all {
		parts := strings.Split(name, "/")
		n := strings.Count(dir, "/") + 1
		if len(parts) < n {
			return false
		}
		name, pattern = strings.Join(parts[:n], "/"), dir
	}
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}
