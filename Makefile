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

# torch first and alone: other packages then take the build that is there. Bytecode comes with the first import. xformers
# is for the test of its masks, and apart: where diffusers finds it, every command would import it and warn without CUDA.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt --no-deps --upgrade \
	  --target $(VENV)/xformers xformers
	touch $@

# A run that was cut goes on; one that is finished is only asked to draw again.
demo: $(STAMP)
	$(PY) -m benchmarks.demo --out runs/demo/demo.json

# Train, stop, resume, sample both ways.
smoke: $(STAMP)
	rm -rf runs/smoke
	$(PY) -m mmgen train configs/smoke.yaml --train.steps 20
	$(PY) -m mmgen train configs/smoke.yaml --resume
	$(PY) -m mmgen sample runs/smoke --prompt "a red apple, noto style" --num 4 --out runs/smoke/apples
	$(PY) -m mmgen sample runs/smoke --caption runs/smoke/apples/00000.png

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
