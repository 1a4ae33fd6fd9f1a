# Tools are pinned, each group in a module file of its own so that what they need stays out of
# go.mod. They are built from the module cache when they are first used; nothing is installed.
# To move one to another version: go get -modfile=.tools/X.mod -tool PACKAGE@VERSION
# They are compiled as the binary itself is, so that what both need is compiled once.
AS_BUILT    := CGO_ENABLED=0 GOFLAGS="$(shell go env GOFLAGS) -trimpath"
BUF         := $(AS_BUILT) go tool -modfile=.tools/buf.mod buf
STATICCHECK := $(AS_BUILT) go tool -n -modfile=.tools/lint.mod staticcheck
NFPM        := $(AS_BUILT) go tool -modfile=.tools/nfpm.mod nfpm
PLATFORMS   := $(AS_BUILT) go run -modfile=.tools/platforms.mod ./.tools/platforms
COMPOSE     := $(AS_BUILT) go run -modfile=.tools/compose.mod ./.tools/compose

.PHONY: help
help: ## Say what there is to make (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: ## Run the server from source; give it flags with ARGS="--flag value"
	go run ./cmd/polykit-cache $(ARGS)

.PHONY: build
build: ## Build the static binary, bin/polykit-cache
	CGO_ENABLED=0 go build -trimpath -o bin/polykit-cache ./cmd/polykit-cache

# The packages that take longest begin first, or one of them would run alone in the end.
TESTED := ./internal/server ./cmd/polykit-cache ./...

# The race detector needs cgo, which go turns off by itself on a machine without a C compiler.
# Tests that were not raced are better than none there, but not in CI, where nobody would notice.
.PHONY: test
test: ## Run all tests, with the race detector where there is a C compiler
	@if [ "$$(go env CGO_ENABLED)" = 1 ]; then \
		set -x; go test -timeout=20m -race $(TESTED); \
	elif [ "$$CI" = true ]; then \
		echo "make test: the race detector needs a C compiler, and in CI it is not optional: install gcc" >&2; exit 1; \
	else \
		echo "make test: no C compiler, so WITHOUT the race detector; install gcc to have it" >&2; \
		set -x; go test -timeout=20m $(TESTED); \
	fi

.PHONY: torture
torture: ## Kill a busy server 500 times (or KILLS=n) and check what is left each time; takes some 10 minutes
	POLYKIT_CACHE_TEST_KILLS=$(or $(KILLS),500) go test -run='^TestCrash$$' -count=1 -timeout=0 -v ./cmd/polykit-cache

.PHONY: soak
soak: ## Abort 100,000 uploads and downloads, and look for what the server does not give back
	POLYKIT_CACHE_SOAK=100000 go test -count=1 -timeout=2h -v -run='^TestSoak$$' ./cmd/polykit-cache

.PHONY: fill
fill: ## Fill a cache with 100,000 artifacts (or ARTIFACTS=n) past its limit, kill it, and compare index and directory
	POLYKIT_CACHE_TEST_FILL=$(or $(ARTIFACTS),100000) go test -run='^TestFill$$' -count=1 -timeout=0 -v ./cmd/polykit-cache

.PHONY: slow
slow: ## Measure what 5,000 slow clients (or CLIENTS=n) cost others; takes some 2 minutes
	POLYKIT_CACHE_TEST_SLOW_CLIENTS=$(or $(CLIENTS),5000) go test -run='^TestSlowClients$$' -count=1 -timeout=0 -v ./cmd/polykit-cache

# Each target in turn, since go test can fuzz only one at a time.
.PHONY: fuzz
fuzz: ## Fuzz each target for 20 minutes (or FUZZTIME=1h)
	@for package in artifact auth server; do \
		for target in $$(go test -list='^Fuzz' ./internal/$$package | grep '^Fuzz'); do \
			(set -x; go test -run='^$$' -fuzz="^$$target\$$" -fuzztime=$(or $(FUZZTIME),20m) ./internal/$$package) || exit; \
		done; \
	done

.PHONY: check
check: lint tidy fresh breaking test ## Check all that CI checks: lint, go.mod, gen/, the wire contract, tests

# What is compiled for vet and staticcheck is what the tests need too, with the race detector where they have it;
# staticcheck itself is built without, and "go tool -n" says where it is.
AS_TESTED := $(if $(filter 1,$(shell go env CGO_ENABLED)),GOFLAGS="$(shell go env GOFLAGS) -race")

.PHONY: lint
lint: ## Check formatting, go vet, staticcheck, types on other systems, buf lint and compose.yaml
	@offenders=$$(gofmt -l .) && if [ -n "$$offenders" ]; then \
		echo "not formatted, run gofmt -w on:" >&2; echo "$$offenders" >&2; exit 1; \
	fi
	$(AS_TESTED) go vet ./...
	$(AS_TESTED) $$($(STATICCHECK)) ./...
	$(PLATFORMS) windows/amd64 darwin/arm64
	$(BUF) lint
	$(COMPOSE) deploy/compose.yaml

.PHONY: generate
generate: ## Generate gen/ from proto/
	$(BUF) generate

.PHONY: faults
faults: ## Make every call on files fail in every way, on the real program, which takes a minute or two
	POLYKIT_CACHE_TEST_FAULTS=all go test -race -count=1 -v -run='Faults$$' ./cmd/polykit-cache

.PHONY: bench
bench: ## Measure the server beside nginx and others, or ROWS="name ..." of it; takes some 15 minutes
	go run ./internal/bench $(ROWS)

.PHONY: gobench
gobench: ## Run the Go benchmarks, with allocations
	go test -run='^$$' -bench=. -benchmem ./...

# The version is a tag without its v, and behind it how many commits later it is.
.PHONY: packages
packages: export VERSION = $(shell (git describe --tags --match 'v[0-9]*' 2>/dev/null || \
	echo "v0.0.0-$$(git rev-list --count HEAD)-g$$(git rev-parse --short HEAD)") | sed 's/^v//; s/-\([0-9]*-g\)/+\1/; s/-g/.g/')
packages: export ARCH = $(or $(GOARCH),$(shell go env GOARCH))
packages: export DIST = dist
packages: export STAGE = bin/package-$(ARCH)
packages: ## Build a Debian package and an rpm into dist/, for this architecture (or GOARCH=arm64)
	mkdir -p "$$STAGE" "$$DIST"
	CGO_ENABLED=0 GOOS=linux GOARCH=$$ARCH go build -trimpath -o "$$STAGE/polykit-cache" ./cmd/polykit-cache
	for shell in bash zsh fish; do \
		env -u GOARCH CGO_ENABLED=0 go run -trimpath ./cmd/polykit-cache completion $$shell >"$$STAGE/$$shell" || exit; \
	done
	for packager in deb rpm; do \
		env -u GOARCH $(NFPM) package --config deploy/nfpm.yaml --packager $$packager --target "$$DIST" || exit; \
	done

.PHONY: image
image: ## Build the container image polykit-cache, with docker
	docker build -f deploy/Dockerfile -t polykit-cache --build-arg VERSION="$$(git describe --tags --always --dirty)" \
		--build-arg REVISION="$$(git rev-parse HEAD)" .

.PHONY: release
release: ## Build the archives of the tagged commit into dist/, or of any other with ARGS=-snapshot
	rm -rf dist
	go run ./internal/release $(ARGS)

.PHONY: clean
clean: ## Remove what was built, but no stored artifact
	rm -rf bin dist

# Parts of check.

.PHONY: tidy
tidy:
	go mod tidy -diff

# Compared in a directory of its own, so that a check changes nothing and needs no git.
.PHONY: fresh
fresh:
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(BUF) generate --output "$$fresh" && \
	if diff -r gen "$$fresh/gen"; then echo "gen/ is fresh"; else \
		echo "gen/ is not what proto/ generates: run make generate and commit gen/" >&2; exit 1; \
	fi

# An archive and not buf's own git input, which can't see remote branches: a CI checkout of another
# branch has no main but origin/main.
.PHONY: breaking
breaking:
	@ref=$$(git for-each-ref --sort=-refname --count=1 --format='%(refname)' refs/heads/main refs/remotes/origin/main); \
	if [ -z "$$ref" ]; then \
		echo "buf breaking: skipped, there is no main to compare with"; \
	elif [ -z "$$(git ls-tree "$$ref" proto/)" ]; then \
		echo "buf breaking: skipped, $$ref has no proto yet"; \
	else \
		main=$$(mktemp -d) && trap 'rm -rf "$$main"' EXIT && \
		git archive --output "$$main/main.tar" "$$ref" buf.yaml proto && \
		$(BUF) breaking --against "$$main/main.tar" && \
		echo "buf breaking: nothing is broken since $$ref"; \
	fi
