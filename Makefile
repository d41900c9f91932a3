# make test, make bench: on a fresh machine each sets up .venv by itself. make gpu: with a Python that has torch.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest

.PHONY: test test-cpu test-interpreter test-compile test-transfo-xl test-all lint bench bench-smoke gpu resources clean

# Kernels defined in interpreter mode cannot be compiled: three processes. Triton exists for Linux only.
test: test-cpu $(if $(filter Linux,$(shell uname)),test-interpreter test-compile)

test-cpu: $(VENV)/ready
	$(PYTEST) tests --ignore=tests/interpreter --ignore=tests/compile --ignore=tests/emulator -m "not long and not gpu"

test-interpreter: $(VENV)/ready
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -m "not long"

test-compile: $(VENV)/ready
	$(PYTEST) tests/compile tests/emulator -m "not long"

# Hugging Face's Transformer-XL last ran in transformers 4.37.2, which wants an environment of its own.
test-transfo-xl: $(VENV)-transfo-xl/ready
	$(VENV)-transfo-xl/bin/python -m pytest tests/test_checkpoints_huggingface.py tests/patching/test_transfo_xl.py

# test_many_random_problems is for hands: where a result is a single number, the reference's error is no yardstick.
test-all: test test-transfo-xl
	$(PYTEST) tests --ignore=tests/interpreter -m "long and not gpu"
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -m long -k "not random"
	$(RUN) -m tests.mutations

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/ready
	$(PYTEST) benchmarks --benchmark-only

bench-smoke: $(VENV)/ready
	$(PYTEST) benchmarks --benchmark-only --smoke

# Nothing is installed. Each part stays under 9 minutes; finished parts are skipped when it is run again.
gpu:
	$(PYTHON) -m benchmarks.gpu

# Registers, spills, shared memory and instructions of every kernel for every GPU generation, and what kernels do when
# they run; needs no GPU.
resources: $(VENV)/ready
	$(RUN) -m tests.compile > benchmarks/resources.md
	$(RUN) -m tests.emulator >> benchmarks/resources.md

clean:
	rm -rf $(VENV) $(VENV)-transfo-xl .pytest_cache .ruff_cache .benchmarks build dist *.egg-info

# Last come the packages whose models `patch` knows. Where they cannot be installed their tests are skipped; in CI that
# may happen to what is built from source only.
$(VENV)/ready: pyproject.toml constraints.txt tests/patching/requirements.txt tests/patching/requirements-source.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/patching/requirements.txt \
		|| test -z "$$CI"
	-$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement tests/patching/requirements-source.txt
	touch $@

$(VENV)-transfo-xl/ready: tests/patching/requirements-transfo-xl.txt
	$(PYTHON) -m venv $(VENV)-transfo-xl
	$(VENV)-transfo-xl/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@
