package cri

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Every item comes once, in parts that any client takes in.
func TestSendParts(t *testing.T) {
	item := func(size int) *runtimeapi.Container {
		return &runtimeapi.Container{Id: strings.Repeat("x", size)}
	}
	for name, list := range map[string][]*runtimeapi.Container{
		"none":                   {},
		"small":                  {item(1), item(2), item(3)},
		"many":                   slices.Repeat([]*runtimeapi.Container{item(300 << 10)}, 100),
		"one larger than a part": {item(1), item(3 << 20), item(1)},
	} {
		t.Run(name, func(t *testing.T) {
			var got []*runtimeapi.Container
			parts := 0
			err := sendParts(list, func(part []*runtimeapi.Container) error {
				parts++
				size := proto.Size(&runtimeapi.StreamContainersResponse{Containers: part})
				if size > maxPart+1024 && len(part) != 1 {
					t.Errorf("a part of %d items has %d bytes", len(part), size)
				}
				got = append(got, part...)
				return nil
			})
			if err != nil || !slices.Equal(got, list) || parts > len(list) {
				t.Errorf("%d of %d items in %d parts, %v", len(got), len(list), parts, err)
			}
		})
	}
	gone := errors.New("the client is gone")
	err := sendParts([]*runtimeapi.Container{item(1)}, func([]*runtimeapi.Container) error { return gone })
	if err != gone {
		t.Errorf("got %v", err)
	}
}
