# Two commands do everything on a fresh machine: `make bench` (set-up, then the main job) and `make test`.
PYTHON ?= python3
VENV ?= .venv
OUT ?= gpu-results
PART ?= all

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
# Without a GPU: the pinned CPU build of torch. With one: whatever torch the machine's index serves.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints.txt)

.PHONY: bench test test-main test-interpret test-aot sanitize lint format benchmark gpu clean

bench: $(VENV)/.ready
	$(BIN)/dyncore bench --quick

# Triton's interpreter and its ahead-of-time compiler cannot share a process, hence three runs of pytest.
test: test-aot test-interpret test-main

test-main: $(VENV)/.ready
	$(BIN)/python -m pytest tests -m "not gpu" --ignore=tests/kernels -q

test-interpret: $(VENV)/.ready
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -q

test-aot: $(VENV)/.ready
	$(BIN)/python -m pytest tests/kernels -q

# The C++ kernels, without Python, under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer.
sanitize: $(VENV)/.ready
	set -e; for kind in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/sanitize/$$kind -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCMAKE_BUILD_TYPE=Release -DDYNCORE_SANITIZE=$$kind --log-level=WARNING; \
	  $(BIN)/cmake --build build/sanitize/$$kind; \
	  build/sanitize/$$kind/kernels_test; \
	done

benchmark: $(VENV)/.ready
	$(BIN)/python -m pytest benchmarks --benchmark-only -q
	$(BIN)/python -m benchmarks.bars

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

# On a machine with a GPU, in the Python that is there (PYTHON), with nothing downloaded.
gpu:
	$(PYTHON) -m pip install --no-build-isolation --no-deps --config-settings editable_mode=compat -e .
	$(PYTHON) -m benchmarks.gpu --out $(OUT) --part $(PART)

$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(CONSTRAINTS) --config-settings editable_mode=compat -e ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(BIN)/python -m pip install -q $(CONSTRAINTS) "clang-format==23.1.5" "pyright==1.1.414" "ruff==0.17.5"
	touch $@

clean:
	rm -rf build dist *.egg-info dyncore/_C*.so $(VENV)
