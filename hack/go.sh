#!/bin/sh
# Provides a Go that is as new as go.mod asks for. Where the one on the PATH is
# older, the right one comes as the module golang.org/toolchain from the module
# proxy that is configured (GOPROXY), and goes to .cache/go, where the Makefile
# and the scripts beside this one look first. Its checksum is the one in
# toolchain.sum, so that no checksum database is needed. Nothing outside the
# checkout is changed.
#
#   go.sh            needs no network if there is such a Go
#   go.sh --check    fails if toolchain.sum lacks the version that go.mod names
#   go.sh --pin      writes toolchain.sum anew, with what the checksum database says
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.cache/go/bin:$PATH:/usr/local/go/bin
module=golang.org/toolchain
pins=hack/toolchain.sum
want=$(sed -n 's/^go \([0-9.]*\)$/\1/p' go.mod)
advice="Install Go $want or later, or set GOPROXY to a module proxy that has it (go env -w GOPROXY=...)"

fail() {
	echo "$*" >&2
	exit 1
}

# new_enough VERSION takes what `go version` prints.
new_enough() {
	version=$(echo "$1" | sed 's/.*go\([0-9][0-9.]*\).*/\1/')
	[ -n "$version" ] && printf '%s\n' "$want" "$version" | sort -VC
}

# download ARCH fetches the toolchain to $tmp/mod and prints what is known of it.
# The settings are those under which all versions of Go since 1.16 do the same.
download() {
	printf 'module toolchain.invalid\n' >"$tmp/go.mod"
	(cd "$tmp" && env -u GOROOT GO111MODULE=on GOWORK=off GOTOOLCHAIN=local GOFLAGS=-modcacherw \
		GOPATH="$tmp/path" GOMODCACHE="$tmp/mod" go mod download -json "$module@v0.0.1-go$want.linux-$1")
}

# field NAME prints a field of what download printed.
field() { sed -n 's/^.*"'"$1"'": "\(.*\)",\{0,1\}$/\1/p' "$tmp/info"; }

make_tmp() {
	mkdir -p .cache
	tmp=$(mktemp -d "$PWD/.cache/go.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	trap 'exit 1' HUP INT TERM
}

case ${1:-} in
--check)
	for arch in amd64 arm64; do
		grep -q "^$module v0.0.1-go$want.linux-$arch h1:" $pins ||
			fail "$pins lacks the checksum of Go $want for linux/$arch: run hack/go.sh --pin"
	done
	exit 0
	;;
--pin)
	make_tmp
	for arch in amd64 arm64; do
		download $arch >"$tmp/info" || fail "cannot download Go $want for linux/$arch: $(field Error)"
		echo "$module v0.0.1-go$want.linux-$arch $(field Sum)"
	done >"$tmp/sum"
	cp "$tmp/sum" $pins
	exit 0
	;;
esac

command -v go >/dev/null || fail "cannot build without Go. Install Go $want or later"
old=$(GOTOOLCHAIN=local go version)
new_enough "$old" && exit 0
arch=$(GOTOOLCHAIN=local go env GOHOSTARCH)
# Since 1.21, Go itself may switch to a toolchain, which it has downloaded then.
[ -d "$(GOTOOLCHAIN=local go env GOMODCACHE)/$module@v0.0.1-go$want.linux-$arch" ] &&
	new_enough "$(GOPROXY=off go version 2>/dev/null)" && exit 0

sum=$(sed -n "s|^$module v0.0.1-go$want.linux-$arch \(h1:.*\)|\1|p" $pins)
[ -n "$sum" ] ||
	fail "$old is too old, and $pins has no checksum of Go $want for linux/$arch. Install Go $want or later"
echo "downloading Go $want to .cache/go, as this one is older: $old"
make_tmp
export GONOSUMDB=$module
download "$arch" >"$tmp/info" 2>"$tmp/error" ||
	fail "cannot download Go $want: $(field Error; cat "$tmp/error"). $advice"
[ "$(field Sum)" = "$sum" ] ||
	fail "the module proxy gave a Go $want with the checksum $(field Sum) instead of $sum, so it is not used. $advice"

# A module has no executable files and no second go.mod.
dir=$(field Dir)
chmod +x "$dir"/bin/* "$dir"/pkg/tool/*/*
cp "$dir/src/_go.mod" "$dir/src/go.mod"
rm -rf .cache/go
mv "$dir" .cache/go
