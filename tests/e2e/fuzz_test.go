package e2e

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/harness"
)

// Requests of all calls, filled at random from the descriptors of the API, are answered
// by the same daemon; none of them is an error of its own, and nothing is left of them.
// Those that make something begin with one that is in order. HOLDFAST_DRILL=1 asks more.
func TestRandomRequests(t *testing.T) {
	t.Parallel()
	n := harness.New(t, harness.Options{Config: "[containers]\nabsent_mount_source = \"reject\"\n"})
	n.Mark()
	pid := n.PID()
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	defer conn.Close()

	rounds, seed := 300, uint64(time.Now().UnixNano())
	if os.Getenv("HOLDFAST_DRILL") != "" {
		rounds = 20_000
	}
	t.Logf("the seed is %d", seed)
	r := &requests{Rand: rand.New(rand.NewPCG(seed, 0)), n: n, texts: []string{
		"", "a", "runc", "nobody", harness.Image, "../../etc", strings.Repeat("x", 5000), "\xff\x00",
		"/dev/null", n.Dir, n.LogDir, "true", "sleep", "1", "cpu.max", "net.ipv4.ip_forward",
		"noexec", "suid", "0-1", "2MB", "localhost/x", "ALL", "NET_ADMIN", "v/c=d", "cdi.k8s.io/x", "10.0.0.0/8",
	}}
	methods := unaryMethods()
	answers := map[codes.Code]int{}
	for i := range rounds {
		m := methods[r.IntN(len(methods))]
		req := r.request(m)
		resp, err := newMessage(m.Output())
		check(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		err = conn.Invoke(ctx, fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name()), req, resp)
		cancel()
		code := status.Code(err)
		answers[code]++
		// The test's own library does not send what is not UTF-8, and what an OCI runtime
		// says has no kind.
		excused := code == codes.Internal && strings.Contains(err.Error(), "UTF-8") ||
			code == codes.Unknown && strings.Contains(err.Error(), "OCI runtime cannot")
		if slices.Contains([]codes.Code{codes.Internal, codes.Unknown, codes.Unavailable}, code) && !excused {
			t.Errorf("request %d, %s: %v\n%.2000s", i, m.Name(), err, req)
		}
		r.learn(resp)
		if i%1000 == 999 { // a node has so many addresses
			n.RemoveAllPods()
			r.pods, r.containers = nil, nil
		}
		if n.Ended() {
			t.Fatalf("request %d, %s ended the daemon:\n%.2000s", i, m.Name(), req)
		}
	}
	t.Logf("answers: %v", answers)
	n.RemoveAllPods()
	harness.Eventually(t, time.Minute, "nothing is left behind", func() bool {
		left := slices.DeleteFunc(n.Leftovers(), func(what string) bool {
			return strings.Contains(what, "/stream/tokens/") // they expire
		})
		return len(left) == 0
	})
	log, err := os.ReadFile(n.DaemonLog())
	check(t, err)
	if n.PID() != pid || strings.Contains(string(log), "panic") {
		t.Error("the daemon panicked, or is another one")
	}
	if answers[codes.OK] < rounds/20 {
		t.Errorf("of %d requests only %d were in order: this tests too little", rounds, answers[codes.OK])
	}
}

// unaryMethods are all calls with one answer. RemoveImage would take the image away.
func unaryMethods() (list []protoreflect.MethodDescriptor) {
	services := (&cri.VersionRequest{}).ProtoReflect().Descriptor().ParentFile().Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			if !m.IsStreamingServer() && m.Name() != "RemoveImage" {
				list = append(list, m)
			}
		}
	}
	return list
}

func newMessage(d protoreflect.MessageDescriptor) (proto.Message, error) {
	typ, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		return nil, err
	}
	return typ.New().Interface(), nil
}

// requests makes requests, from texts that mean something somewhere and from the ids that
// were answered.
type requests struct {
	*rand.Rand
	n                *harness.Node
	texts            []string
	pods, containers []string
	made             int
}

func (r *requests) learn(resp proto.Message) {
	switch a := resp.(type) {
	case *cri.RunPodSandboxResponse:
		if a.PodSandboxId != "" {
			r.pods = append(r.pods, a.PodSandboxId)
		}
	case *cri.CreateContainerResponse:
		if a.ContainerId != "" {
			r.containers = append(r.containers, a.ContainerId)
		}
	}
}

// request is one of its call: in order, or with some of its fields at random.
func (r *requests) request(m protoreflect.MethodDescriptor) proto.Message {
	req, err := newMessage(m.Input())
	if err != nil {
		r.n.T.Fatalf("%v", err)
	}
	r.made++
	switch q := req.(type) {
	case *cri.RunPodSandboxRequest:
		q.Config = r.n.PodConfig(fmt.Sprintf("pod%d", r.made))
	case *cri.CreateContainerRequest:
		q.Config = harness.ContainerConfig(fmt.Sprintf("c%d", r.made), []string{"sleep", "1000"})
		q.PodSandboxId = r.one(r.pods)
	case *cri.CheckpointContainerRequest:
		q.Location = r.n.Path(fmt.Sprintf("c%d.tar", r.made))
	case *cri.PullImageRequest:
		q.Image = &cri.ImageSpec{Image: harness.Image}
	}
	for range r.IntN(3) {
		r.mutate(req.ProtoReflect(), 0)
	}
	fields := req.ProtoReflect().Descriptor().Fields()
	for name, known := range map[protoreflect.Name][]string{"pod_sandbox_id": r.pods, "container_id": r.containers} {
		if f := fields.ByName(name); f != nil && r.IntN(8) > 0 {
			req.ProtoReflect().Set(f, protoreflect.ValueOfString(r.one(known)))
		}
	}
	return req
}

func (r *requests) one(of []string) string {
	if len(of) == 0 {
		return ""
	}
	return of[len(of)-1-r.IntN(min(len(of), 4))] // earlier ones may be gone
}

// mutate gives one field of a message, or of one below it, another value.
func (r *requests) mutate(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	if fields.Len() == 0 {
		return
	}
	f := fields.Get(r.IntN(fields.Len()))
	switch {
	case strings.HasPrefix(string(f.Name()), "windows") && r.IntN(8) > 0:
	case f.IsMap():
		if f.MapValue().Kind() == protoreflect.StringKind {
			m.Mutable(f).Map().Set(protoreflect.ValueOfString(r.text()).MapKey(), protoreflect.ValueOfString(r.text()))
		}
	case f.IsList():
		list := m.Mutable(f).List()
		if f.Message() == nil {
			list.Append(r.value(f))
			return
		}
		r.mutate(list.AppendMutable().Message(), depth+1)
		for range r.IntN(4) {
			r.mutate(list.Get(list.Len()-1).Message(), depth+1)
		}
	case f.Message() != nil:
		for range 1 + r.IntN(3) {
			r.mutate(m.Mutable(f).Message(), depth+1)
		}
	default:
		m.Set(f, r.value(f))
	}
}

func (r *requests) text() string { return r.texts[r.IntN(len(r.texts))] }

func (r *requests) value(f protoreflect.FieldDescriptor) protoreflect.Value {
	numbers := []int64{0, 1, -1, 2, 1000, 4096, 65536, 1 << 20, math.MaxInt32, math.MinInt32, math.MaxInt64,
		math.MinInt64}
	n := numbers[r.IntN(len(numbers))]
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(r.text())
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(r.text()))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(r.IntN(2) == 0)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(r.IntN(f.Enum().Values().Len() + 1)))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(n)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(n))
	default:
		return protoreflect.ValueOfFloat64(float64(n))
	}
}
