#!/bin/sh
# Generates proto/*.pb.go. The plugins are pinned in go.mod; protoc only parses,
# so that any version of it does.
#
#   proto.sh [--check]     --check compares and writes nothing
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.cache/bin:$PWD/.cache/go/bin:$PATH:/usr/local/go/bin
hack/deps.sh proto

mkdir -p .cache/bin
GOBIN=$PWD/.cache/bin go install \
	google.golang.org/protobuf/cmd/protoc-gen-go \
	github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc

out=$(mktemp -d .cache/proto.XXXXXX)
trap 'rm -rf "$out"' EXIT
protoc -I proto \
	--go_out="$out" --go_opt=paths=source_relative \
	--go-ttrpc_out="$out" --go-ttrpc_opt=paths=source_relative proto/*.proto
gofmt -w "$out"

if [ "${1:-}" != --check ]; then
	cp "$out"/*.go proto/
	exit 0
fi
# The version of protoc stands in a comment and differs between machines.
code() { sed '/^\/\/ [[:space:]]*protoc  *v/d' "$1"; }
for new in "$out"/*.go; do
	old=proto/$(basename "$new")
	[ "$(code "$old" | sha256sum)" = "$(code "$new" | sha256sum)" ] || {
		echo "$old is not what proto/*.proto says: run make proto" >&2
		exit 1
	}
done
