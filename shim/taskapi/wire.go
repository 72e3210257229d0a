package taskapi

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// number is that of a field in a message.
type number = protowire.Number

// message is a protobuf message as it is on the wire. Fields are read from it and added
// to it by their numbers: a few of them do not need types of their own, which would cost
// each shim memory from its start.
type message []byte

// split takes the first field off; n 0: there is none.
func (m message) split() (n number, t protowire.Type, value, rest message) {
	n, t, tag := protowire.ConsumeTag(m)
	if tag < 0 {
		return 0, 0, nil, nil
	}
	size := protowire.ConsumeFieldValue(n, t, m[tag:])
	if size < 0 {
		return 0, 0, nil, nil
	}
	return n, t, m[tag : tag+size], m[tag+size:]
}

// last gives the value of a field, of which the last one counts; empty: there is none.
// Fields that are not asked for, or have another type, do not matter.
func (m message) last(n number, t protowire.Type) (last message) {
	for len(m) > 0 {
		num, typ, value, rest := m.split()
		if num == n && typ == t {
			last = value
		}
		m = rest
	}
	return last
}

func (m message) uint(n number) uint64 {
	v, _ := protowire.ConsumeVarint(m.last(n, protowire.VarintType))
	return v
}

func (m message) bytes(n number) message {
	v, _ := protowire.ConsumeBytes(m.last(n, protowire.BytesType))
	return v
}

func (m message) text(n number) string { return string(m.bytes(n)) }

func (m message) bool(n number) bool { return m.uint(n) != 0 }

// What is zero is not on the wire, but for a message, which may be empty.

func (m message) putUint(n number, v uint64) message {
	if v == 0 {
		return m
	}
	return protowire.AppendVarint(protowire.AppendTag(m, n, protowire.VarintType), v)
}

func (m message) putBool(n number, v bool) message {
	if !v {
		return m
	}
	return m.putUint(n, 1)
}

func (m message) putText(n number, v string) message {
	if v == "" {
		return m
	}
	return m.putMessage(n, message(v))
}

func (m message) putMessage(n number, v message) message {
	return protowire.AppendBytes(protowire.AppendTag(m, n, protowire.BytesType), v)
}

// putTime adds a google.protobuf.Timestamp; nil: there is none.
func (m message) putTime(n number, t *timestamppb.Timestamp) message {
	if t == nil {
		return m
	}
	return m.putMessage(n, message(nil).putUint(1, uint64(t.Seconds)).putUint(2, uint64(t.Nanos)))
}

// anyOf is a google.protobuf.Any.
func anyOf(typeURL string, value message) message {
	return message(nil).putText(1, typeURL).putMessage(2, value)
}
