# Everything works inside .venv; `make demo` and `make test` need nothing but Python 3.10+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The CPU build of torch: an unpinned one may pull several GB of CUDA.
CONSTRAINTS := constraints-cpu.txt

.PHONY: setup demo test test-all lint bench plots train-demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[export,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fstq demo --out demo-out $(if $(MODEL),--model $(MODEL)) $(if $(CALIB),--calib $(CALIB))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python bench/quality.py
	$(BIN)/python bench/pruning.py

# The README's pictures: of bench/results/quality.json, and of a prompt in a calibrated bundle.
plots: $(STAMP)
	$(BIN)/python bench/plots.py $(or $(BUNDLE),demo-out/model.bundle)

train-demo: $(STAMP)
	$(BIN)/python -m fstq_export.demo.train --out $(VENV)/demo-stage-1 --tokens 14000000
	$(BIN)/python -m fstq_export.demo.train --start $(VENV)/demo-stage-1 --out export/fstq_export/demo/model --tokens 9000000 --longest 380 --rate 0.0015 --seed 8

clean:
	rm -rf $(VENV) demo-out dist build
