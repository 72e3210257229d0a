package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const sessionsManifest = `
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec:
  containers:
  - name: main
    image: IMAGE
    command: [testbox, echo, "8080"]
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
---
apiVersion: v1
kind: Pod
metadata: {name: attached, annotations: {ends: "5"}}
spec:
  restartPolicy: Never
  containers:
  - {name: main, image: IMAGE, command: [sh, -c, read x; echo got $x; exit 5], stdin: true, stdinOnce: true}
`

// sessionLines is how many lines a session of exec brings: one each 100 ms, so that the
// runtime is killed in between.
const sessionLines = 250

func checkSessions(c *cluster) {
	c.ready("server")
	r := c.run("in\n", "exec", "-i", "server", "--", "sh", "-c", "cat; echo err >&2; exit 42")
	if r.out != "in\n" || !strings.HasPrefix(r.errs, "err\n") || r.code != 42 {
		c.t.Errorf("exec: %+v, want exit code 42", r)
	}
	out := c.exec("server", "testbox", "print", "-every", "100ms", "-count", strconv.Itoa(sessionLines))
	if n := numbered(out); n != sessionLines || strings.Count(out, "\n") != n {
		c.t.Errorf("exec brought %d of %d lines in order", n, sessionLines)
	}
	c.ready("attached")
	if r = c.run("word\n", "attach", "-i", "-q", "attached"); r.out != "got word\n" {
		c.t.Errorf("attach: %+v", r)
	}
	c.until("the attached container has ended", func() bool {
		s := c.pod("attached").Status.ContainerStatuses
		return len(s) == 1 && s[0].State.Terminated != nil
	})
	if end := c.pod("attached").Status.ContainerStatuses[0].State.Terminated; end.ExitCode != 5 {
		c.t.Errorf("it has ended so: %+v", end)
	}
	c.checkCopy()
	for _, target := range []string{"pod/server:8080", "service/server:80"} {
		c.checkForward(target)
	}
}

// numbered counts the lines of testbox print, up to the first that is not the next one.
func numbered(out string) (n int) {
	for line := range strings.Lines(out) {
		if line != fmt.Sprintf("line %08d\n", n+1) {
			break
		}
		n++
	}
	return n
}

// checkCopy copies a file into a container and back again.
func (c *cluster) checkCopy() {
	c.t.Helper()
	content := make([]byte, 3<<20)
	rand.Read(content)
	there, back := c.n.Path("home/there"), c.n.Path("home/back")
	if err := os.WriteFile(there, content, 0o644); err != nil {
		c.t.Fatal(err)
	}
	c.kubectl("cp", there, "server:/tmp/copied")
	c.kubectl("cp", "server:/tmp/copied", back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, content) {
		c.t.Errorf("%d bytes came back, want the %d that were sent: %v", len(got), len(content), err)
	}
}

// checkForward forwards a port. A connection lasts while the runtime is killed.
func (c *cluster) checkForward(target string) {
	c.t.Helper()
	object, port, _ := strings.Cut(target, ":")
	var failure error
	c.until("a port of "+target+" is forwarded", func() bool {
		failure = c.forward(object, port)
		return failure == nil || !c.killing
	})
	if failure != nil {
		c.t.Errorf("port-forward %s: %v", target, failure)
	}
}

func (c *cluster) forward(object, port string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := c.command(ctx, "port-forward", object, ":"+port)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	line, err := bufio.NewReader(out).ReadString('\n') // Forwarding from 127.0.0.1:PORT -> 8080
	if err != nil {
		return err
	}
	address := strings.TrimPrefix(line, "Forwarding from ")
	address, _, _ = strings.Cut(address, " ")
	conn, err := net.DialTimeout("tcp", address, time.Minute)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	for i := range 30 { // with 15 seconds in between
		sent := fmt.Appendf(nil, "word %02d\n", i)
		got := make([]byte, len(sent))
		if _, err := conn.Write(sent); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, sent) {
			return fmt.Errorf("%q came back for %q: %w", got, sent, err)
		}
		time.Sleep(500 * time.Millisecond)
	}
	return nil
}

const logsManifest = `
apiVersion: v1
kind: Pod
metadata: {name: talks, annotations: {ends: "0"}}
spec:
  restartPolicy: Never
  containers:
  - {name: main, image: IMAGE, command: [testbox, print, -every, 50ms, -count, "600"]}
`

// checkLogs follows a log to its end. The kubelet asks the runtime at the end of the file
// each time whether the container runs, and ends the answer when the runtime is gone: so
// one that follows begins anew, and none may have a line that is not the next one.
func checkLogs(c *cluster) {
	const lines = 600
	c.until("the container has begun", func() bool {
		s := c.pod("talks").Status.ContainerStatuses
		return len(s) == 1 && (s[0].State.Running != nil || s[0].State.Terminated != nil)
	})
	c.until("a log is followed to its end", func() bool {
		r := c.once("", "logs", "-f", "talks")
		own := strings.Count(r.out, "line ")
		if n := numbered(r.out); n != own || !c.killing && n != lines {
			c.t.Fatalf("logs -f brings %d lines, of which %d are in order: %s", own, n, r.errs)
		}
		return own == lines
	})
	if n := numbered(c.kubectl("logs", "talks")); n != lines {
		c.t.Errorf("the log has %d lines in order, want %d", n, lines)
	}
	if got := c.kubectl("logs", "talks", "--tail=1"); got != fmt.Sprintf("line %08d\n", lines) {
		c.t.Errorf("its last line is %q", got)
	}
	files, err := filepath.Glob(filepath.Join(c.n.LogDir, c.space+"_talks_*/main/0.log"))
	if err != nil || len(files) != 1 {
		c.t.Errorf("its files are %v: %v", files, err)
	}
}

const debugManifest = `
apiVersion: v1
kind: Pod
metadata: {name: bare}
spec:
  containers: [{name: main, image: IMAGE, command: [testbox, echo, "8080"]}]
`

// checkDebug looks at a container from another one that is put beside it, and at the node.
func checkDebug(c *cluster) {
	c.ready("bare")
	c.kubectl("debug", "bare", "--image="+newImage, "--target=main", "--container=look", "--profile=general", "--",
		"sh", "-c", "tr '\\0' ' ' </proc/1/cmdline; echo; ls /proc/1/root/bin/testbox; exec testbox echo 9090")
	c.until("the ephemeral container runs", func() bool {
		s := c.pod("bare").Status.EphemeralContainerStatuses
		return len(s) == 1 && s[0].State.Running != nil
	})
	const want = "testbox echo 8080 \n/proc/1/root/bin/testbox\n"
	c.until("it has seen the container", func() bool { return c.kubectl("logs", "bare", "-c", "look") == want })
	c.kubectl("debug", "node/node", "--image="+newImage, "--profile=sysadmin", "--", "sh", "-c",
		"chroot /host hostname; exec testbox echo 9090")
	pods := c.pods("app.kubernetes.io/managed-by=kubectl-debug")
	if len(pods) != 1 {
		c.t.Fatalf("there are %d pods to debug the node, want 1", len(pods))
	}
	c.ready(pods[0].Name)
	c.until("it has seen the node", func() bool { return c.kubectl("logs", pods[0].Name) == "node\n" })
}
