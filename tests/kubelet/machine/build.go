package machine

import (
	"context"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// build gives the path of a program of the module programs. It takes minutes to be
// built, so it stays in .cache, by its version, its source and the versions of all that
// it needs.
func build(name string) (string, error) {
	root, err := harness.Root()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "tests/kubelet/programs")
	sum := crc32.NewIEEE()
	for _, file := range []string{"go.mod", "go.sum", name + "/main.go"} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return "", err
		}
		sum.Write(b)
	}
	version, err := goCommand(dir, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, ".cache", fmt.Sprintf("%s-%s-%08x", name, version, sum.Sum32()))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	fmt.Printf("building %s %s, which takes some minutes\n", name, version)
	start := time.Now()
	// Linked under another name first: a build that was broken off leaves no program.
	_, err = goCommand(dir, "build", "-trimpath", "-o", path+".new",
		"-ldflags=-s -w -X k8s.io/component-base/version.gitVersion="+version, "./"+name)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	fmt.Printf("built after %v\n", time.Since(start).Round(time.Second))
	return path, err
}

func goCommand(dir string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("cannot run go %s in %s: %w\n%s", strings.Join(args, " "), dir, err, errs.String())
	}
	return strings.TrimSpace(string(out)), nil
}
