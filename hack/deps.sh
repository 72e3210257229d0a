#!/bin/sh
# Installs the Debian packages that a group of targets needs, if they are
# missing. What is there is not touched, and then no network is needed. Where
# the Go that is there or was installed is too old, go.sh gets a newer one.
#
#   deps.sh build|proto|test
set -eu
cd "$(dirname "$0")/.."
# Go and iptables may be there, and not on the path of every user.
PATH=$PWD/.cache/go/bin:$PATH:/usr/local/go/bin:/usr/sbin:/sbin

# PACKAGE|CHECK: the package is missing where the check fails.
build='
make|command -v make
ca-certificates|test -e /etc/ssl/certs/ca-certificates.crt || test -e /etc/pki/tls/certs/ca-bundle.crt
iproute2|command -v ip
golang-go|command -v go
gcc|command -v gcc
libc6-dev|test -e /usr/include/stdio.h
pkg-config|command -v pkg-config
libseccomp-dev|pkg-config --exists libseccomp
iptables|command -v iptables
e2fsprogs|command -v mkfs.ext4
busybox-static|busybox --help && ! ldd "$(command -v busybox)"
'
proto='
protobuf-compiler|command -v protoc
libprotobuf-dev|test -e /usr/include/google/protobuf/any.proto
'
# Tests that need one of these are skipped where it is missing.
test='
skopeo|command -v skopeo
apparmor|! grep -q Y /sys/module/apparmor/parameters/enabled || command -v apparmor_parser
'
case ${1:-} in
build) wanted=$build ;;
proto) wanted=$proto ;;
test) wanted=$test ;;
*)
	echo "usage: deps.sh build|proto|test" >&2
	exit 2
	;;
esac

missing=$(echo "$wanted" | while IFS='|' read -r package check; do
	[ -z "$package" ] || (eval "$check") >/dev/null 2>&1 || echo "$package"
done)
[ -n "$missing" ] || exec hack/go.sh

missing=$(echo $missing)
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "cannot go on without these packages: $missing. Install them, or run this as root on Debian or Ubuntu" >&2
	exit 1
fi
echo "installing $missing"
export DEBIAN_FRONTEND=noninteractive
# The lists may be older than the archive, or not there at all.
apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1 || {
	apt-get update -qq
	apt-get install -qq -y --no-install-recommends $missing >/dev/null
}
exec hack/go.sh
