# make bench and make test work from a bare clone: they make .venv, install what constraints.txt pins, and run.
# PYTHON=python3.12 picks the interpreter, CXX=clang++ the compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc tests/fuzz -name '*.cpp' -o -name '*.h')
RESULT ?= build/bench.json
PAGE ?= build/bench.html

.PHONY: bench bench-compare test versions lint types unit format install extension wheel sdist aot gpu sanitize fuzz libfuzzer clean

bench: install $(VENV)/.peers
	@mkdir -p $(dir $(RESULT))
	$(BIN)/fastbert bench --json $(RESULT) --html $(PAGE) $(BENCH_ARGS)

# Is anything slower than in the committed result of this device? Exit status 1 where it is, also when measured again.
bench-compare: install $(VENV)/.peers
	@mkdir -p $(dir $(RESULT))
	$(BIN)/fastbert bench --json $(RESULT) --html $(PAGE) --compare benchmarks/results $(BENCH_ARGS)

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest $(PYTEST_ARGS)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# Every kernel in every shipped configuration, ahead of time, for every architecture: no GPU needed. Eight minutes on two cores.
aot: install
	$(BIN)/python -m fastbert.kernels._aot --all

# Models of transformers with its oldest version that is supported, and with the one that is installed. (What a tokenizer answers
# changed within transformers 5: ours is compared with the installed version's.)
INTEGRATIONS := tests/test_optimize*.py tests/test_integrations_attention.py
versions: install
	$(PIP) install --quiet --upgrade --target build/oldest transformers==5.0.0
	PYTHONPATH=$(CURDIR)/build/oldest $(BIN)/pytest $(INTEGRATIONS) $(PYTEST_ARGS)
	$(BIN)/pytest $(INTEGRATIONS) $(PYTEST_ARGS)

# On a machine with a GPU.
gpu: install
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)
	@mkdir -p build
	$(BIN)/fastbert bench --suite gpu --json build/bench-gpu.json --html build/bench-gpu.html $(BENCH_ARGS)

# The tokenizer on random and malformed texts, under AddressSanitizer and UBSan, and the comparison with tokenizers at length.
# FUZZ_ARGS="100000 7" are how many texts, and the seed.
fuzz: build/fuzz/tokenizer install
	build/fuzz/tokenizer $(FUZZ_ARGS)
	FASTBERT_FUZZ=1000000 $(BIN)/pytest -q tests/test_tokenizer_core.py -k random_texts

build/fuzz/tokenizer: tests/fuzz/tokenizer.cpp $(CSRC)
	$(call fuzz_build,$(CXX),-fsanitize=address$(,)undefined -fno-sanitize-recover=all)

# With clang: what to try next is chosen by coverage, until it is stopped.
libfuzzer: build/fuzz/libfuzzer
	@mkdir -p build/fuzz/corpus
	build/fuzz/libfuzzer -max_len=8192 $(FUZZ_ARGS) build/fuzz/corpus

build/fuzz/libfuzzer: tests/fuzz/tokenizer.cpp $(CSRC)
	$(call fuzz_build,clang++,-fsanitize=fuzzer$(,)address$(,)undefined -fno-sanitize-recover=all -DFASTBERT_LIBFUZZER)

, := ,
FUZZ_SOURCES := $(filter-out %_kernels.cpp,$(wildcard csrc/tokenizer/*.cpp)) csrc/cpu/dispatch.cpp
ISA_FLAGS_avx512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma
ISA_FLAGS_avx512_bf16 := $(ISA_FLAGS_avx512) -mavx512vnni -mavx512bf16
ISA_FLAGS_avx2 := -mavx2 -mfma
FUZZ_ISAS := baseline $(if $(filter x86_64 amd64,$(shell uname -m)),avx2 avx512 avx512_bf16)
# compiler, flags → $@
define fuzz_build
@mkdir -p $(dir $@)
$(foreach isa,$(FUZZ_ISAS),$(1) -std=c++17 -O1 -g $(2) $(ISA_FLAGS_$(isa)) -DFASTBERT_ISA=$(isa) \
	-c csrc/tokenizer/scan_kernels.cpp -o $@.$(isa).o &&) \
$(1) -std=c++17 -O1 -g $(2) -pthread tests/fuzz/tokenizer.cpp $(FUZZ_SOURCES) $(FUZZ_ISAS:%=$@.%.o) -o $@
endef

# The C++ code under AddressSanitizer and UndefinedBehaviorSanitizer, run by the tests of the CPU kernels. libstdc++ is loaded
# first too, or AddressSanitizer does not find the function that throws; a report comes past pytest's capture.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g1
sanitize: install
	CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/python -m tests.sanitized build/sanitized --capture=sys tests/test_cpu_*.py $(PYTEST_ARGS)

wheel: $(VENV)/.installed
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

sdist: $(VENV)/.installed
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

install: extension

# A change in C++ compiles what it touches and nothing else.
extension: build/.extension

build/.extension: $(VENV)/.installed setup.py $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(VENV)/.created
	$(PIP) install --constraint constraints.txt setuptools wheel ninja pybind11
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[bench,dev]'
	@touch $@

# The engines that the benchmark measures against: not needed by the tests.
$(VENV)/.peers: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[peers]'
	@touch $@

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache fastbert/_C.*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
