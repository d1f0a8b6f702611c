# make install | demo | test | check | smoke.  What is not installed yet is installed first, into .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
# Test workers; each runs torch with one thread.
WORKERS ?= 2

SOURCES := mmgen data_pipelines benchmarks tests

.PHONY: install demo smoke test check format
.DELETE_ON_ERROR:

install: $(STAMP)

# torch first and alone: other packages then take the build that is there. Bytecode comes with the first import.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(PY) -m mmgen train configs/demo.yaml
	$(PY) -m benchmarks.demo

smoke: $(STAMP)
	$(PY) -m mmgen train configs/smoke.yaml

test: $(STAMP)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal --durations 10

check: $(STAMP)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -q -m 'not slow'

format: $(STAMP)
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix-only $(SOURCES)
