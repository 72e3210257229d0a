#!/bin/bash
# Runs the checks and tests, all of them or the named ones, and ends with a
# summary. One that fails does not keep the others from running.
#
#   test.sh [gofmt] [vet] [proto] [unit] [layers] [footprint] [e2e] [sessions] [crash] [orders] [faults] [fuzz]
#           [kubelet] [cluster]
#
# HOLDFAST_DRILL=1 runs e2e, sessions and the drills in full length. fuzz, kubelet and cluster
# run only if named; fuzz takes FUZZTIME, 1m, for each target. The whole output of each
# step stays in .cache/test/STEP.log.
set -u
cd "$(dirname "$0")/.." || exit
PATH=$PWD/.cache/go/bin:$PATH:/usr/local/go/bin
logs=.cache/test
# A package is compiled twice at most: with -race and cgo, for most tests and the daemon
# that they run, and without both, for the programs as they are shipped and the other tests.
export GOFLAGS="${GOFLAGS:-} -trimpath"
mkdir -p "$logs"

# The limits end what hangs, and show where. They allow for a machine that is
# several times slower than others; a drill takes hours there.
limit=15m
[ -z "${HOLDFAST_DRILL:-}" ] || limit=360m
# The step vet has vetted what is tested.
gotest() { go test -v -count=1 -vet=off -timeout="${TIMEOUT:-$limit}" "$@"; }

# fuzz runs all fuzz targets, one after the other. Go would spend up to a minute
# on making each input smaller that it has not seen the like of, and try nothing
# else meanwhile; so it is told not to.
fuzz() {
	local package target failed=0
	for package in $(grep -rlE --include='*_test.go' '^func Fuzz' daemon cri shim proto | xargs -n1 dirname | sort -u); do
		for target in $(grep -rhoE --include='*_test.go' '^func Fuzz\w+' "$package" | cut -c6- | sort); do
			echo "== $package $target"
			go test -run='^$' -fuzz="^$target\$" -fuzztime="${FUZZTIME:-1m}" -fuzzminimizetime=1x "./$package" \
				>"$logs/fuzz-$target.log" 2>&1 || timesup "$logs/fuzz-$target.log" || failed=1
			cat "$logs/fuzz-$target.log"
		done
	done
	return $failed
}

# timesup says whether all that failed was that the time was up: go test reports that for a
# worker that was busy then (Go 1.26). Whatever input fails is written to a file, and told.
timesup() { grep -q '^ *context deadline exceeded$' "$1" && ! grep -q 'Failing input' "$1"; }

# count adds up the results of tests in the output of go test.
count() {
	awk '
		/^ *--- PASS/ { p++ } /^ *--- FAIL/ { f++ } /^ *--- SKIP/ { s++ }
		END { printf "%d passed, %d failed, %d skipped\n", p, f, s }' "$@"
}

# failures shows the tests that failed, or did not end, and what they say, without the logs of
# daemons in between, so that the end of a long output tells what is wrong.
failures() {
	awk '
		/^=== / { test = $3 }
		/^ *[a-z0-9_]+\.go:[0-9]+: / && !/DRILL\|/ { said[test] = said[test] $0 "\n" }
		/^ *--- FAIL/ { printf "%s\n%s", $0, said[$3] }
		/^panic: |^\trunning tests:|^\t\tTest|DATA RACE|^FAIL\s/' "$1" | cut -c1-300 | head -n 60
}

# drills makes a table of the rows that drills have logged (tests/harness/drill.go).
drills() {
	grep -hoE 'DRILL(\|[^|]*){6}$' "$@" 2>/dev/null | awk -F '|' '
		function row(name, a, b, c, d, e) { printf "%-44s %7s %9s %6s %9s %6s\n", name, a, b, c, d, e }
		NR == 1 { print ""; row("drill", "kills", "statuses", "lines", "sessions", "leaks") }
		{ row($2, $3, $4, $5, $6, $7); for (i = 3; i <= 7; i++) sum[i] += $i }
		END { if (NR) row("sum", sum[3], sum[4], sum[5], sum[6], sum[7]) }'
}

# durations shows how long each test and each part of it took, and what it says of that.
durations() {
	sed -nE 's/^ *--- ([A-Z]+): (.*)$/  \1 \2/p; s/^.*_test\.go:[0-9]+: (.* after [0-9hms.]+)$/  \1/p' "$1"
}

step() {
	case $1 in
	gofmt)
		local bad
		bad=$(gofmt -l $(find . -name '*.go' -not -path './.*'))
		[ -z "$bad" ] || { echo "gofmt -w is due for: $bad"; return 1; }
		;;
	vet) hack/go.sh --check && go vet -race ./... && go vet -race -tags=failpoint ./proto/step ;;
	proto) hack/proto.sh --check ;;
	unit)
		local packages
		packages=$(go list ./...) || return
		local failed=0
		# Four at a time, however few processors: most of them wait for others.
		gotest -race -p 4 $(grep -v /tests/ <<<"$packages") || failed=1
		gotest -race -tags=failpoint ./proto/step || failed=1
		return $failed
		;;
	layers) CGO_ENABLED=0 gotest ./tests/layers ./tests/crifields ;; # what the tree and the table of the CRI promise
	footprint) CGO_ENABLED=0 gotest ./tests/footprint ;; # measures the shim as it is shipped
	e2e) gotest -race ./tests/e2e ;;
	sessions) # a module of its own
		(cd tests/sessions && export CGO_ENABLED=0 && go vet . && gotest .)
		;;
	crash | orders | faults) gotest -race "./tests/$1" ;;
	kubelet) # with programs that are built as they are shipped, in namespaces of their own
		(cd tests/kubelet && go vet . ./machine && HOLDFAST_BIN=$PWD/../../bin gotest .)
		;;
	cluster) # the same, with all programs of a cluster
		(cd tests/kubelet && go vet ./cluster ./machine && HOLDFAST_BIN=$PWD/../../bin gotest -parallel=16 ./cluster)
		;;
	fuzz)
		fuzz || return
		HOLDFAST_DRILL=1 gotest -run='^Test(RandomLayers|Bombs)' ./daemon/rootfs
		;;
	*) echo "there is no step $1"; return 2 ;;
	esac
}

steps=("$@")
[ $# -gt 0 ] || steps=(gofmt vet proto unit layers footprint e2e sessions crash orders faults)
status=0
summary=
for s in "${steps[@]}"; do
	echo "== $s"
	log=$logs/$s.log
	start=$SECONDS
	if step "$s" >"$log" 2>&1; then result=ok; else
		result=FAIL
		status=1
		grep -vE '^(=== (RUN|PAUSE|CONT|NAME) .*| *--- (PASS|SKIP).*|PASS|ok  .*|\? .*)$' "$log"
	fi
	counts=
	if grep -qE '^ *--- ' "$log"; then
		counts=$(count "$log")
	fi
	summary+=$(printf '%-10s %-5s %4ds  %s' "$s" "$result" $((SECONDS - start)) "$counts")$'\n'
	[ $s != cluster ] || summary+=$(durations "$log")$'\n'
	[ $result = ok ] || summary+=$(failures "$log")$'\n'
done
outputs=("${steps[@]/#/$logs/}")
drills "${outputs[@]/%/.log}"
printf '\n%s' "$summary"
count "${outputs[@]/%/.log}"
if [ $status = 0 ]; then echo "all passed"; else echo "FAILED: the output is in $logs"; fi
exit $status
