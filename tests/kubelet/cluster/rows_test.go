package cluster

import (
	"fmt"
	"slices"
	"strings"

	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
)

// row is a thing that users do, in a namespace of its own.
type row struct {
	name      string
	manifests string // IMAGE is the image of the tests, DIR the scratch directory of the node
	check     func(*cluster)
	warnings  []string // reasons of events that the row brings about on purpose
}

// All rows are valid with a runtime that is killed again and again, too. They run at the
// same time. Their pods stay, but for those that have ended.
var rows = []row{
	{name: "deployment", manifests: deploymentManifest, check: checkDeployment},
	{name: "daemonset", manifests: daemonSetManifest, check: checkDaemonSet},
	{name: "jobs", manifests: jobsManifest, check: checkJobs,
		warnings: []string{"PodFailurePolicy", "FailedIndexes", "BackoffLimitExceeded", "BackOff"}},
	{name: "statefulset", manifests: statefulSetManifest, check: checkStatefulSet},
	{name: "sessions", manifests: sessionsManifest, check: checkSessions},
	{name: "logs", manifests: logsManifest, check: checkLogs},
	{name: "debug", manifests: debugManifest, check: checkDebug},
	{name: "resize", manifests: resizeManifest, check: checkResize, warnings: []string{"ResizeError"}},
	{name: "figures", manifests: figuresManifest, check: checkFigures},
}

const deploymentManifest = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: main
        image: IMAGE
        command: [testbox, echo, "8080"]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
        livenessProbe: {exec: {command: ["true"]}, periodSeconds: 5, timeoutSeconds: 30}
        resources: {requests: {cpu: 5m, memory: 8Mi}}
`

// many is how many pods a Deployment has for a while.
const many = 30

func checkDeployment(c *cluster) {
	c.rollout("deployment/web")
	c.kubectl("scale", "deployment/web", fmt.Sprintf("--replicas=%d", many))
	c.rollout("deployment/web")
	if n := len(c.pods("app=web")); n != many {
		c.t.Errorf("there are %d pods, want %d", n, many)
	}
	c.kubectl("scale", "deployment/web", "--replicas=4")
	c.until("the other pods are gone", func() bool { return len(c.pods("app=web")) == 4 })
	c.kubectl("set", "image", "deployment/web", "main="+newImage)
	c.rollout("deployment/web")
	c.until("no pod has the old image", func() bool {
		pods := c.pods("app=web")
		return len(pods) == 4 && !slices.ContainsFunc(pods, func(p core.Pod) bool {
			return !podReady(&p) || p.Status.ContainerStatuses[0].Image != newImage
		})
	})
	c.kubectl("rollout", "undo", "deployment/web")
	c.rollout("deployment/web")
}

const daemonSetManifest = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      hostNetwork: true
      hostPID: true
      tolerations: [{operator: Exists}]
      volumes: [{name: host, hostPath: {path: /}}]
      containers:
      - name: main
        image: IMAGE
        command: [testbox, print, -every, 1s]
        volumeMounts: [{name: host, mountPath: /host, readOnly: true, mountPropagation: HostToContainer}]
`

func checkDaemonSet(c *cluster) {
	c.rollout("daemonset/agent")
	c.kubectl("set", "env", "daemonset/agent", "VERSION=2")
	c.rollout("daemonset/agent")
	var pods []core.Pod
	c.until("the old pod is gone", func() bool { pods = c.pods("app=agent"); return len(pods) == 1 })
	got := c.exec(pods[0].Name, "sh", "-c", "echo $VERSION; ls -d /host/etc; ps | grep -c holdfastd")
	if !strings.HasPrefix(got, "2\n/host/etc\n") || strings.HasSuffix(got, "\n0\n") {
		c.t.Errorf("it sees %q", got)
	}
}

// Each index of codes ends with its own number, and counting once with each of three
// codes: it finds in a file of the node how often it has been tried. refused has a code
// that fails the whole job, again is started again in its pod.
const jobsManifest = `
apiVersion: batch/v1
kind: Job
metadata: {name: codes}
spec:
  completions: 8
  parallelism: 4
  completionMode: Indexed
  backoffLimitPerIndex: 0
  maxFailedIndexes: 8
  template:
    metadata: {annotations: {ends: index}}
    spec:
      restartPolicy: Never
      containers:
      - name: main
        image: IMAGE
        command: [sh, -c, sleep $((4 + JOB_COMPLETION_INDEX)); echo last words; exit $JOB_COMPLETION_INDEX]
---
apiVersion: batch/v1
kind: Job
metadata: {name: counting}
spec:
  backoffLimit: 5
  template:
    metadata: {annotations: {ends: "7 8 0"}}
    spec:
      restartPolicy: Never
      volumes: [{name: marks, hostPath: {path: DIR/marks}}]
      containers:
      - name: main
        image: IMAGE
        command: [sh, -c, 'echo >>/marks/counting; case $(wc -l </marks/counting) in 1) exit 7;; 2) exit 8;; esac']
        volumeMounts: [{name: marks, mountPath: /marks}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: refused}
spec:
  backoffLimit: 5
  podFailurePolicy:
    rules:
    - {action: FailJob, onExitCodes: {operator: In, values: [42]}}
  template:
    metadata: {annotations: {ends: "42"}}
    spec:
      restartPolicy: Never
      containers: [{name: main, image: IMAGE, command: [sh, -c, sleep 3; exit 42]}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: again}
spec:
  template:
    metadata: {annotations: {ends: "9 0", restarts: "1"}}
    spec:
      restartPolicy: OnFailure
      volumes: [{name: work, emptyDir: {}}]
      containers:
      - name: main
        image: IMAGE
        command: [sh, -c, '[ -e /work/again ] && exit 0; touch /work/again; exit 9']
        volumeMounts: [{name: work, mountPath: /work}]
`

func checkJobs(c *cluster) {
	// What has failed and what has succeeded, and why the job has come to its end.
	for _, want := range []struct {
		job               string
		failed, succeeded int32
		end               batch.JobConditionType
		reason            string
	}{
		{"codes", 7, 1, batch.JobFailed, "FailedIndexes"},
		{"counting", 2, 1, batch.JobComplete, "CompletionsReached"},
		{"refused", 1, 0, batch.JobFailed, "PodFailurePolicy"},
		{"again", 0, 1, batch.JobComplete, "CompletionsReached"},
	} {
		var job batch.Job
		var end batch.JobCondition
		c.until(want.job+" has come to its end", func() bool {
			job = batch.Job{}
			if err := c.get("/apis/batch/v1/namespaces/"+c.space+"/jobs/"+want.job, &job); err != nil {
				c.t.Fatal(err)
			}
			i := slices.IndexFunc(job.Status.Conditions, func(d batch.JobCondition) bool {
				return d.Type == batch.JobComplete || d.Type == batch.JobFailed
			})
			if i >= 0 {
				end = job.Status.Conditions[i]
			}
			return i >= 0
		})
		s := job.Status
		if s.Failed != want.failed || s.Succeeded != want.succeeded || end.Type != want.end ||
			end.Reason != want.reason {
			c.t.Errorf("%s: %d failed, %d succeeded, %s %s %s, want %+v", want.job, s.Failed, s.Succeeded, end.Type,
				end.Reason, end.Message, want)
		}
	}
	c.checkCodes("codes", 0, 1, 2, 3, 4, 5, 6, 7)
	c.checkCodes("counting", 0, 7, 8)
	c.checkCodes("refused", 42)
	c.checkCodes("again", 0)
}

// checkCodes fails unless the containers of a job's pods have ended with these codes.
func (c *cluster) checkCodes(job string, want ...int32) {
	c.t.Helper()
	var got []int32
	for _, p := range c.pods("job-name=" + job) {
		if end := p.Status.ContainerStatuses[0].State.Terminated; end != nil {
			got = append(got, end.ExitCode)
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		c.t.Errorf("the containers of %s have ended with %v, want %v", job, got, want)
	}
}

// The volumes are directories of the node that were made beforehand, as there is nothing
// that makes some on demand.
const statefulSetManifest = `
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: local}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: a}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: local
  local: {path: DIR/volumes/a}
  nodeAffinity:
    required:
      nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node]}]}]
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: b}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: local
  local: {path: DIR/volumes/b}
  nodeAffinity:
    required:
      nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node]}]}]
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  replicas: 2
  serviceName: db
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      volumes: [{name: scratch, emptyDir: {}}]
      containers:
      - name: main
        image: IMAGE
        command: [sh, -c, hostname >>/data/starts && exec testbox echo 8080]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
        volumeMounts: [{name: data, mountPath: /data}, {name: scratch, mountPath: /scratch}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec: {accessModes: [ReadWriteOnce], storageClassName: local, resources: {requests: {storage: 1Gi}}}
`

func checkStatefulSet(c *cluster) {
	c.rollout("statefulset/db")
	before := c.pod("db-0")
	c.exec("db-0", "sh", "-c", "echo kept >/data/word; echo lost >/scratch/word")
	c.kubectl("delete", "pod", "db-0")
	c.rollout("statefulset/db")
	after := c.ready("db-0")
	if after.UID == before.UID {
		c.t.Error("it is the same pod as before")
	}
	// A start that the runtime's death has made fail may have run the command, too.
	got := c.exec("db-0", "sh", "-c", "cat /data/word; ls /scratch; sort -u /data/starts; cat /data/starts | wc -l")
	if got != "kept\ndb-0\n2\n" && !c.killing || !strings.HasPrefix(got, "kept\ndb-0\n") {
		c.t.Errorf("its volumes hold %q", got)
	}
	c.kubectl("scale", "statefulset/db", "--replicas=1")
	c.until("one pod is left", func() bool { return len(c.pods("app=db")) == 1 })
	c.kubectl("scale", "statefulset/db", "--replicas=2")
	c.rollout("statefulset/db")
	var set apps.StatefulSet
	err := c.get("/apis/apps/v1/namespaces/"+c.space+"/statefulsets/db", &set)
	if err != nil || set.Status.ReadyReplicas != 2 {
		c.t.Errorf("%d replicas are ready: %v", set.Status.ReadyReplicas, err)
	}
}

const resizeManifest = `
apiVersion: v1
kind: Pod
metadata: {name: grows}
spec:
  volumes: [{name: memory, emptyDir: {medium: Memory}}]
  containers:
  - name: main
    image: IMAGE
    command: [testbox, echo, "8080"]
    resources: {requests: {cpu: 50m, memory: 16Mi}, limits: {cpu: 100m, memory: 64Mi}}
    volumeMounts: [{name: memory, mountPath: /memory}]
`

// checkResize makes a container larger, and then smaller than what it uses.
func checkResize(c *cluster) {
	id := c.ready("grows").Status.ContainerStatuses[0].ContainerID
	resize := func(cpu, memory string) {
		c.t.Helper()
		c.kubectl("patch", "pod", "grows", "--subresource=resize", "-p", fmt.Sprintf(
			`{"spec": {"containers": [{"name": "main", "resources": {"limits": {"cpu": %q, "memory": %q}}}]}}`, cpu, memory))
	}
	resize("200m", "96Mi")
	c.until("the container is larger", func() bool { return c.hasLimits("200m", "96Mi") })
	const script = `cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null
cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null; true`
	if got := strings.Fields(c.exec("grows", "sh", "-c", script)); got[0] != fmt.Sprint(96<<20) || got[1] != "20000" {
		c.t.Errorf("its cgroup has the limits %v", got)
	}
	c.exec("grows", "dd", "if=/dev/zero", "of=/memory/x", "bs=1M", "count=40")
	resize("200m", "24Mi")
	c.until("the kubelet says that it cannot be that small", func() bool {
		return slices.ContainsFunc(c.pod("grows").Status.Conditions, func(d core.PodCondition) bool {
			return d.Type == core.PodResizeInProgress && d.Reason == core.PodReasonError
		})
	})
	if !c.hasLimits("200m", "96Mi") {
		c.t.Errorf("its resources are %v", c.pod("grows").Status.ContainerStatuses[0].Resources)
	}
	c.exec("grows", "rm", "/memory/x")
	c.until("the container is smaller", func() bool { return c.hasLimits("200m", "24Mi") })
	if now := c.pod("grows").Status.ContainerStatuses[0]; now.ContainerID != id || now.RestartCount != 0 {
		c.t.Errorf("the container was %s and is %+v", id, now)
	}
}

func (c *cluster) hasLimits(cpu, memory string) bool {
	s := c.pod("grows").Status.ContainerStatuses
	if len(s) != 1 || s[0].Resources == nil {
		return false
	}
	limits := s[0].Resources.Limits
	return limits.Cpu().String() == cpu && limits.Memory().String() == memory
}
