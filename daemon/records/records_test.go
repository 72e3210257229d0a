package records

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/tests/must"
)

// A record of a later version, with fields that this one does not know, must read,
// and what it has of the CRI's message must be whole.
func TestRecordOfALaterVersion(t *testing.T) {
	config, err := Encoded(&runtimeapi.PodSandboxConfig{
		Hostname: "h",
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "n", Attempt: 3},
	})
	must.Succeed(t, err)
	b, err := json.Marshal(Pod{ID: "a", Phase: PodReady, Config: config})
	must.Succeed(t, err)
	var loose map[string]any
	must.Succeed(t, json.Unmarshal(b, &loose))
	loose["later"] = 1
	loose["config"].(map[string]any)["later"] = map[string]any{"x": []int{1}}
	if b, err = json.Marshal(loose); err != nil {
		t.Fatal(err)
	}
	var back Pod
	must.Succeed(t, json.Unmarshal(b, &back))
	if back.Phase != PodReady || back.Config.M.GetHostname() != "h" || back.Config.M.GetMetadata().GetAttempt() != 3 {
		t.Errorf("got %+v", &back)
	}
	var none Container
	if err := json.Unmarshal([]byte(`{"id":"x","user":null}`), &none); err != nil || none.User.M != nil {
		t.Errorf("null message: %v, %v", none.User.M, err)
	}
}

// A record without debts is of a version that did not write them: all may be due.
// One that has paid all says so, also after it was written and read.
func TestOwes(t *testing.T) {
	paid := Pod{Debts: []Debt{}}
	b, err := json.Marshal(paid)
	must.Succeed(t, err)
	var back Pod
	must.Succeed(t, json.Unmarshal(b, &back))
	for _, c := range []struct {
		pod  Pod
		want bool
	}{
		{Pod{}, true},
		{paid, false},
		{back, false},
		{Pod{Debts: []Debt{DebtFiles}}, false},
		{Pod{Debts: []Debt{DebtNetwork}}, true},
	} {
		if got := c.pod.Owes(DebtNetwork); got != c.want {
			t.Errorf("%v owes the network: %v", c.pod.Debts, got)
		}
	}
}

// A debt that cannot be paid holds back none of the others.
func TestPay(t *testing.T) {
	broken := errors.New("broken")
	var tried []Debt
	left, err := Pay(t.Context(), []Debt{DebtNetwork, DebtMounts, DebtFiles}, func(_ context.Context, d Debt) error {
		tried = append(tried, d)
		if d == DebtMounts {
			return broken
		}
		return nil
	})
	if !errors.Is(err, broken) || !reflect.DeepEqual(left, []Debt{DebtMounts}) || len(tried) != 3 {
		t.Errorf("left %v after %v: %v", left, tried, err)
	}
}
