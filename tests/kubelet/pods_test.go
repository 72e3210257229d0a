package kubelet

import (
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	core "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// row is a pod and what has to become of it.
type row struct {
	name     string
	spec     string // the pod's; IMAGE is the image of the tests, MARKS a directory of the node
	check    func(*kubelet)
	restarts int32 // of all its containers
	gone     bool  // the check has removed it
}

// All rows are valid with a runtime that is killed again and again, too. Work files are
// in an emptyDir, which a container that is started again finds as it was.
var rows = []row{
	{name: "init", spec: initSpec, check: checkInit},
	{name: "probes", spec: probesSpec, check: checkProbes},
	{name: "liveness", spec: livenessSpec, check: checkLiveness, restarts: 1},
	{name: "crash", spec: crashSpec, check: checkCrash, restarts: 1},
	{name: "hostport", spec: hostPortSpec, check: checkHostPort},
	{name: "volumes", spec: volumesSpec, check: checkVolumes},
	{name: "rotation", spec: rotationSpec, check: checkRotation},
	{name: "prestop", spec: preStopSpec, check: checkPreStop, gone: true},
	{name: "oom", spec: oomSpec, check: checkOOM},
	{name: "typo", spec: typoSpec, check: checkTypo},
	{name: "sidecar", spec: sidecarSpec, check: checkSidecar},
	{name: "users", spec: usersSpec, check: checkUsers},
	{name: "security", spec: securitySpec, check: checkSecurity},
	{name: "sharedpid", spec: sharedPIDSpec, check: checkSharedPID},
	{name: "hostns", spec: hostNamespacesSpec, check: checkHostNamespaces},
	{name: "imagevolume", spec: imageVolumeSpec, check: checkImageVolume},
	{name: "sessions", spec: sessionsSpec, check: checkSessions},
	{name: figuresPod, spec: figuresSpec, check: func(k *kubelet) { k.ready(figuresPod) }},
}

const initSpec = `
  volumes: [{name: work, emptyDir: {}}]
  initContainers:
  - name: first
    image: IMAGE
    command: [sh, -c, echo hello >/work/word]
    volumeMounts: [{name: work, mountPath: /work}]
  - name: second
    image: IMAGE
    command: [sh, -c, echo world >>/work/word]
    volumeMounts: [{name: work, mountPath: /work}]
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, cat /work/word; exec sleep 1000]
    volumeMounts: [{name: work, mountPath: /work}]
`

func checkInit(k *kubelet) {
	p := k.ready("init")
	for _, name := range []string{"first", "second"} {
		wantEnd(k.t, container(p, name).State.Terminated, 0, "Completed")
	}
	k.logged("init", "main", "hello\nworld\n")
}

const probesSpec = `
  volumes: [{name: work, emptyDir: {}}]
  containers:
  - name: exec
    image: IMAGE
    command: [sh, -c, sleep 1; touch /work/started /work/ready; exec sleep 1000]
    volumeMounts: [{name: work, mountPath: /work}]
    startupProbe:
      exec: {command: [test, -e, /work/started]}
      periodSeconds: 1
      timeoutSeconds: 30
      failureThreshold: 100
    readinessProbe: {exec: {command: [test, -e, /work/ready]}, periodSeconds: 1, timeoutSeconds: 10}
    livenessProbe: {exec: {command: ["true"]}, periodSeconds: 1, timeoutSeconds: 30}
  - name: http
    image: IMAGE
    command: [httpd, -f, -p, "8001", -h, /etc]
    readinessProbe: {httpGet: {path: /passwd, port: 8001}, periodSeconds: 1, timeoutSeconds: 10}
    livenessProbe: {httpGet: {path: /passwd, port: 8001}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 10}
  - name: tcp
    image: IMAGE
    command: [testbox, echo, "8002"]
    readinessProbe: {tcpSocket: {port: 8002}, periodSeconds: 1, timeoutSeconds: 10}
    livenessProbe: {tcpSocket: {port: 8002}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 10}
`

func checkProbes(k *kubelet) {
	k.ready("probes")
	k.exec("probes", "exec", "rm", "/work/ready")
	k.until("probes", "the container whose probe fails is not ready", func(p *core.Pod) bool {
		return !container(p, "exec").Ready && container(p, "http").Ready && container(p, "tcp").Ready
	})
	k.exec("probes", "exec", "touch", "/work/ready")
	k.ready("probes")
}

const livenessSpec = `
  terminationGracePeriodSeconds: 10
  volumes: [{name: work, emptyDir: {}}]
  containers:
  - name: main
    image: IMAGE
    command:
    - sh
    - -c
    - |
      [ -e /work/again ] && touch /work/alive && exec sleep 1000
      trap 'exit 9' TERM
      touch /work/again
      while :; do sleep 0.1; done
    volumeMounts: [{name: work, mountPath: /work}]
    livenessProbe:
      exec: {command: [sh, -c, "[ -e /work/alive ] || [ ! -e /work/again ]"]}
      periodSeconds: 1
      timeoutSeconds: 30
      failureThreshold: 1
`

func checkLiveness(k *kubelet) {
	p := k.startedAgain("liveness")
	wantEnd(k.t, container(p, "main").LastTerminationState.Terminated, 9, "Error")
	k.ready("liveness")
}

const crashSpec = `
  volumes: [{name: work, emptyDir: {}}]
  containers:
  - name: main
    image: IMAGE
    command:
    - sh
    - -c
    - |
      [ -e /work/again ] && exec sleep 1000
      touch /work/again
      echo last words
      echo why >/dev/termination-log
      exit 3
    volumeMounts: [{name: work, mountPath: /work}]
`

func checkCrash(k *kubelet) {
	p := k.startedAgain("crash")
	end := container(p, "main").LastTerminationState.Terminated
	wantEnd(k.t, end, 3, "Error")
	if end != nil && end.Message != "why\n" {
		k.t.Errorf("its termination message is %q", end.Message)
	}
	previous := "/containerLogs/" + namespace + "/" + podName("crash") + "/main?previous=true"
	harness.Eventually(k.t, patience, "the log of the one before is served", func() bool {
		b, err := k.get(previous)
		return err == nil && string(b) == "last words\n"
	})
}

const hostPortSpec = `
  containers:
  - {name: main, image: IMAGE, command: [testbox, echo, "8080"], ports: [{containerPort: 8080, hostPort: 8089}]}
`

func checkHostPort(k *kubelet) {
	k.ready("hostport")
	harness.Eventually(k.t, patience, "the port of the host answers", func() bool {
		return echo("127.0.0.1:8089") == nil && echo(nodeIP+":8089") == nil
	})
}

// What is made of the pod's own data has the volume code of a ConfigMap: a directory
// of links that is replaced as a whole.
const volumesSpec = `
  hostAliases: [{ip: 192.0.2.77, hostnames: [alias.test]}]
  volumes:
  - name: info
    downwardAPI:
      items:
      - {path: labels, fieldRef: {fieldPath: metadata.labels}}
      - {path: a/name, fieldRef: {fieldPath: metadata.name}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  containers:
  - name: main
    image: IMAGE
    command: [sleep, "1000"]
    env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    volumeMounts:
    - {name: info, mountPath: /info}
    - {name: info, mountPath: /one/labels, subPath: labels}
    - {name: info, mountPath: /all, readOnly: true}
    - {name: memory, mountPath: /memory}
`

func checkVolumes(k *kubelet) {
	p := k.ready("volumes")
	const script = `cat /info/labels; echo; cat /one/labels; echo; cat /all/a/name; echo; echo $POD_IP
touch /all/x 2>/dev/null && echo written
grep -c alias.test /etc/hosts; grep ' /memory ' /proc/mounts | cut -d' ' -f3`
	got := k.exec("volumes", "main", "sh", "-c", script)
	label := `app="volumes"`
	want := strings.Join([]string{label, label, podName("volumes"), p.Status.PodIP, "1", "tmpfs", ""}, "\n")
	if got != want || p.Status.PodIP == "" {
		k.t.Errorf("the container sees %q, want %q", got, want)
	}
}

const floodLines = 8000

var rotationSpec = fmt.Sprintf(`
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, testbox flood -rate 200000 -line 200 -count %d && exec sleep 1000]
`, floodLines)

// The kubelet rotates the log several times. Not a line is missing or there twice.
func checkRotation(k *kubelet) {
	p := k.ready("rotation")
	dir := filepath.Join(k.n.LogDir, fmt.Sprintf("%s_%s_%s", namespace, p.Name, p.UID), "main")
	var files []string
	var count int
	var err error
	for n := 0; n < floodLines; {
		harness.Eventually(k.t, patience, "the log grows", func() bool {
			files, count, err = countLines(dir)
			return count > n || err == nil && count == floodLines
		})
		n = count
	}
	if err != nil || len(files) < 3 {
		k.t.Errorf("%d files with %d lines: %v", len(files), count, err)
	}
}

// countLines checks all files of a log together.
func countLines(dir string) (files []string, count int, err error) {
	if files, err = filepath.Glob(dir + "/0.log*"); err != nil || len(files) == 0 {
		return nil, 0, err
	}
	slices.Sort(files) // 0.log is the first now, and has the last lines
	var lines []harness.Line
	for _, path := range append(files[1:], files[0]) {
		if strings.HasSuffix(path, ".tmp") {
			continue // is being compressed
		}
		some, err := readLog(path)
		if err != nil {
			return nil, 0, err
		}
		lines = append(lines, some...)
	}
	count, err = harness.Numbered("flood", lines)
	return files, count, err
}

// readLog reads a file of a log, which the kubelet may have compressed.
func readLog(path string) ([]harness.Line, error) {
	if !strings.HasSuffix(path, ".gz") {
		return harness.ReadLog(path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	plain, err := os.CreateTemp("", "hf-log-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(plain.Name())
	defer plain.Close()
	if _, err := io.Copy(plain, z); err != nil {
		return nil, err
	}
	return harness.ReadLog(plain.Name())
}

const preStopSpec = `
  terminationGracePeriodSeconds: 100
  volumes: [{name: marks, hostPath: {path: MARKS}}]
  containers:
  - name: main
    image: IMAGE
    command:
    - sh
    - -c
    - |
      trap 'echo term >>/marks/prestop; exit 0' TERM
      while :; do sleep 0.1; done
    lifecycle:
      postStart: {exec: {command: [sh, -c, echo started >>/marks/prestop]}}
      preStop: {exec: {command: [sh, -c, echo pre >>/marks/prestop; sleep 1; echo stop >>/marks/prestop]}}
    volumeMounts: [{name: marks, mountPath: /marks}]
`

func checkPreStop(k *kubelet) {
	k.ready("prestop")
	k.remove("prestop")
	harness.Eventually(k.t, patience, "the pod is stopped", func() bool {
		return !slices.ContainsFunc(k.sandboxes(), func(s *cri.PodSandbox) bool {
			return s.Metadata.Name == podName("prestop") && s.State == cri.PodSandboxState_SANDBOX_READY
		})
	})
	const want = "started\npre\nstop\nterm\n"
	got := k.mark("prestop")
	if k.killing { // what runs a hook in a container ends with the runtime, and the hook is run again
		got = regexp.MustCompile(`^(started\n)?(pre\n)+`).ReplaceAllString(got, "started\npre\n")
	}
	if got != want {
		k.t.Errorf("the hooks and the signal came as %q, want %q", got, want)
	}
}

const oomSpec = `
  restartPolicy: Never
  containers:
  - {name: main, image: IMAGE, command: [tail, /dev/zero], resources: {limits: {memory: 32Mi, cpu: 500m}}}
`

func checkOOM(k *kubelet) { wantEnd(k.t, k.exited("oom", "main"), 137, "OOMKilled") }

const typoSpec = `
  restartPolicy: Never
  containers:
  - {name: main, image: IMAGE, command: [/no/such/command]}
`

func checkTypo(k *kubelet) {
	wantEnd(k.t, k.exited("typo", "main"), 128, "StartError")
	k.until("typo", "the pod has failed", func(p *core.Pod) bool { return p.Status.Phase == core.PodFailed })
}

const sidecarSpec = `
  restartPolicy: Never
  terminationGracePeriodSeconds: 100
  volumes: [{name: marks, hostPath: {path: MARKS}}]
  initContainers:
  - name: side
    image: IMAGE
    restartPolicy: Always
    command:
    - sh
    - -c
    - |
      trap 'echo side ends >>/marks/sidecar; exit 0' TERM
      echo side >>/marks/sidecar
      while :; do sleep 0.1; done
    startupProbe:
      exec: {command: [test, -e, /marks/sidecar]}
      periodSeconds: 1
      timeoutSeconds: 30
      failureThreshold: 100
    volumeMounts: [{name: marks, mountPath: /marks}]
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, echo main >>/marks/sidecar; exit 5]
    volumeMounts: [{name: marks, mountPath: /marks}]
`

func checkSidecar(k *kubelet) {
	p := k.until("sidecar", "the pod has failed", func(p *core.Pod) bool { return p.Status.Phase == core.PodFailed })
	wantEnd(k.t, container(p, "main").State.Terminated, 5, "Error")
	wantEnd(k.t, container(p, "side").State.Terminated, 0, "Completed")
	if got := k.mark("sidecar"); got != "side\nmain\nside ends\n" {
		k.t.Errorf("they ran as %q", got)
	}
}

const usersSpec = `
  hostUsers: false
  volumes: [{name: work, emptyDir: {}}]
  containers:
  - {name: main, image: IMAGE, command: [sleep, "1000"], volumeMounts: [{name: work, mountPath: /work}]}
`

func checkUsers(k *kubelet) {
	k.ready("users")
	got := strings.Fields(k.exec("users", "main", "sh", "-c",
		"touch /work/x && stat -c %u /work/x && cat /proc/self/uid_map"))
	if len(got) != 4 || got[0] != "0" || got[1] != "0" || got[2] == "0" || got[3] != "65536" {
		k.t.Errorf("the owner of a file in a volume, and the ids of the pod: %q", got)
	}
}

const securitySpec = `
  securityContext:
    runAsUser: 1000
    runAsGroup: 1001
    fsGroup: 3000
    supplementalGroups: [4000]
    supplementalGroupsPolicy: Strict
    seccompProfile: {type: RuntimeDefault}
    sysctls: [{name: net.ipv4.ip_local_port_range, value: 20000 30000}]
  volumes: [{name: work, emptyDir: {}}]
  containers:
  - name: main
    image: IMAGE
    command: [sleep, "1000"]
    securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: work, mountPath: /work}]
`

func checkSecurity(k *kubelet) {
	p := k.ready("security")
	const script = `id -u; id -g; id -G; touch /x 2>/dev/null && echo written; touch /work/x; stat -c %g /work/x
awk '/^(CapEff|NoNewPrivs|Seccomp):/ {print $2}' /proc/self/status; cat /proc/sys/net/ipv4/ip_local_port_range`
	got := strings.Join(strings.Fields(k.exec("security", "main", "sh", "-c", script)), " ")
	if want := "1000 1001 1001 3000 4000 3000 0000000000000000 1 2 20000 30000"; got != want {
		k.t.Errorf("the container sees %q, want %q", got, want)
	}
	user := container(p, "main").User
	if user == nil || user.Linux == nil || user.Linux.UID != 1000 || user.Linux.GID != 1001 ||
		!slices.Equal(user.Linux.SupplementalGroups, []int64{1001, 3000, 4000}) {
		k.t.Errorf("its status has the user %v", user)
	}
}

const sharedPIDSpec = `
  shareProcessNamespace: true
  containers:
  - {name: one, image: IMAGE, command: [sleep, "1001"]}
  - {name: two, image: IMAGE, command: [sleep, "1002"]}
`

func checkSharedPID(k *kubelet) {
	k.ready("sharedpid")
	harness.Eventually(k.t, patience, "each container sees the other's process", func() bool {
		return strings.Contains(k.exec("sharedpid", "one", "ps"), "sleep 1002") &&
			strings.Contains(k.exec("sharedpid", "two", "ps"), "sleep 1001")
	})
}

const hostNamespacesSpec = `
  hostNetwork: true
  hostPID: true
  hostIPC: true
  containers:
  - {name: main, image: IMAGE, command: [sleep, "1003"], securityContext: {privileged: true}}
`

func checkHostNamespaces(k *kubelet) {
	k.ready("hostns")
	got := k.exec("hostns", "main", "sh", "-c", "hostname; ip -o addr show dev lo; ps")
	if !strings.HasPrefix(got, nodeName+"\n") || !strings.Contains(got, nodeIP) || !strings.Contains(got, "holdfastd") {
		k.t.Errorf("it does not see the host: %s", got)
	}
}

const imageVolumeSpec = `
  volumes: [{name: files, image: {reference: IMAGE, pullPolicy: IfNotPresent}}]
  containers:
  - name: main
    image: IMAGE
    command: [sleep, "1000"]
    volumeMounts:
    - {name: files, mountPath: /files}
    - {name: files, mountPath: /part, subPath: etc}
`

func checkImageVolume(k *kubelet) {
	k.ready("imagevolume")
	const script = "cmp /files/etc/passwd /etc/passwd && cmp /part/group /etc/group && ! touch /files/x 2>/dev/null"
	k.exec("imagevolume", "main", "sh", "-c", script)
}

const sessionsSpec = `
  restartPolicy: Never
  containers:
  - name: server
    image: IMAGE
    command: [testbox, echo, "8080"]
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
  - {name: attach-spdy, image: IMAGE, command: [sh, -c, read x; echo got $x], stdin: true, stdinOnce: true}
  - {name: attach-websocket, image: IMAGE, command: [sh, -c, read x; echo got $x], stdin: true, stdinOnce: true}
`
