# Holdfast. `make help` lists the targets.

# Modules are taken as go.mod says; a change that is missing there is an error.
GOFLAGS ?= -mod=readonly
export GOFLAGS

# hack/go.sh puts a Go there where the one on the path is too old.
export PATH := $(CURDIR)/.cache/go/bin:$(PATH):/usr/local/go/bin
unexport GOROOT

# A semantic version, as CRI asks for: of the last tag, or of none.
VERSION := $(patsubst v%,%,$(or $(shell git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null),v0.0.0-$(or $(shell git describe --always --dirty 2>/dev/null),unknown)))
PREFIX  ?= /usr/local
UNITDIR ?= /usr/lib/systemd/system
LIBEXEC  = $(PREFIX)/libexec/holdfast

PROGRAMS = holdfastd holdfast-shim holdfast-stream holdfastctl holdfast-pause
PLUGINS  = main/bridge main/loopback ipam/host-local meta/portmap

# Both have to be linked anew only when the pinned modules change.
FOREIGN = bin/runc $(foreach p,$(PLUGINS),bin/cni/$(notdir $p))

.DEFAULT_GOAL := help
.PHONY: help deps build programs proto check-proto test drill fuzz vm-test test-kubelet test-cluster lint bench \
	demo update-footprint install clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

deps: ## install what is missing of Debian's packages and of Go; needs no network if nothing is
	@hack/deps.sh build

build: .cache/modules programs $(FOREIGN) ## fill bin/ and bin/cni/

# All modules are fetched at once, those of the tests included: after a first build only the
# targets with a kubelet, and Debian packages that are missing, need a network.
.cache/modules: go.sum tests/sessions/go.sum | deps
	@mkdir -p .cache
	go list -deps -test ./... >/dev/null
	cd tests/sessions && go list -deps -test ./... >/dev/null
	@touch $@

programs: deps
	@mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w -X main.version=$(VERSION)' -o bin/ $(PROGRAMS:%=./cmd/%)

# runc needs cgo: for its first steps inside the namespaces and for libseccomp.
# It is linked statically, so that the file runs on nodes without that library.
bin/runc: go.sum | deps
	@mkdir -p bin
	CGO_ENABLED=1 go build -trimpath -tags 'seccomp netgo osusergo' \
		-ldflags='-s -w -linkmode external -extldflags -static' -o $@ github.com/opencontainers/runc
	@touch $@

define plugin
bin/cni/$(notdir $(1)): go.sum | deps
	@mkdir -p bin/cni
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o $$@ github.com/containernetworking/plugins/plugins/$(1)
	@touch $$@
endef
$(foreach p,$(PLUGINS),$(eval $(call plugin,$p)))

proto: deps ## generate proto/*.pb.go from proto/*.proto
	@hack/proto.sh

check-proto: deps ## fail if the generated code is not what `make proto` makes
	@hack/proto.sh --check

test: build ## format, vet, generated code, unit tests with -race, layers, footprint, e2e, sessions, quick drills
	@hack/deps.sh test || echo 'going on without; the tests that need it are skipped'
	@hack/test.sh

# What test runs of them too, in their quick form.
DRILLS = crash orders faults

drill: build ## kill, fail and fill up all that can be, for hours; DRILL=quick: only what `make test` runs of it
ifeq ($(DRILL),quick)
	hack/test.sh $(DRILLS)
else
	HOLDFAST_DRILL=1 hack/test.sh e2e sessions $(DRILLS) fuzz
endif

fuzz: deps ## run each fuzzer for FUZZTIME (1m)
	@hack/test.sh fuzz

vm-test: build ## test under systemd and cgroup v2, in a machine that VM=PROGRAM boots
	@[ -n '$(VM)' ] || { echo 'make vm-test needs VM=PROGRAM; tests/vm/vm_test.go says what it has to do'; exit 2; }
	HOLDFAST_VM='$(VM)' go test -count=1 -timeout=60m -v ./tests/vm

test-kubelet: build ## test with a real kubelet, which is built at first (some minutes, into .cache)
	@hack/test.sh kubelet

test-cluster: build ## test with a whole cluster of one node, built at first (many minutes, into .cache)
	@hack/test.sh cluster

lint: deps ## check the format and go vet
	@hack/test.sh gofmt vet

bench: build ## pull 60 layers of 2 GiB, or BENCH='-execs 100' or '-sessions 64', beside CONTAINERD=PROGRAM
	go run ./hack/bench -bin bin $(if $(CONTAINERD),-containerd '$(CONTAINERD)') $(BENCH)

demo: build ## see a pod survive its runtime, in under two minutes
	HOLDFAST_BIN=$(CURDIR)/bin go run ./hack/demo

update-footprint: deps ## accept the shim's present dependencies as its checked-in list
	go test -count=1 -run=TestDependencies ./tests/footprint -update

install: build ## install below $(DESTDIR)$(PREFIX), with a systemd unit
	install -d '$(DESTDIR)$(LIBEXEC)/cni' '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(UNITDIR)'
	install $(PROGRAMS:%=bin/%) bin/runc '$(DESTDIR)$(LIBEXEC)'
	install bin/cni/* '$(DESTDIR)$(LIBEXEC)/cni'
	ln -sfn '$(LIBEXEC)/holdfastd' '$(LIBEXEC)/holdfastctl' '$(DESTDIR)$(PREFIX)/bin'
	sed 's|@LIBEXEC@|$(LIBEXEC)|' hack/holdfast.service >'$(DESTDIR)$(UNITDIR)/holdfast.service'

clean: ## remove what was built
	rm -rf bin .cache
