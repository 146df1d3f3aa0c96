# Everything works inside .venv; `make demo` and `make test` need nothing but Python 3.10+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The CPU build of torch: an unpinned one may pull several GB of CUDA.
CONSTRAINTS := constraints-cpu.txt

# Flower asks for an older protobuf, rich and typer than the rest is tested with.
FED := .venv-federated
FED_STAMP := $(FED)/.installed

.PHONY: setup demo test test-all test-federated lint bench plots train-demo clean

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

# Flower comes from an environment of its own, torch, Transformers and PEFT from the other one.
$(FED_STAMP): $(STAMP)
	$(PYTHON) -m venv $(FED)
	$(FED)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) flwr
	base=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  own=$$($(FED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$base')" > "$$own/zz-base.pth"
	touch $(FED_STAMP)

test-federated: $(FED_STAMP)
	$(FED)/bin/python -m pytest -m "not slow" tests/federated

bench: $(STAMP)
	$(BIN)/python bench/quality.py
	$(BIN)/python bench/pruning.py

# The README's pictures: of bench/results/quality.json, and of a prompt in a calibrated bundle.
plots: $(STAMP)
	$(BIN)/python bench/plots.py $(or $(BUNDLE),demo-out/model.bundle)

# An hour on 2 cores that do nothing else. The first weights are those of the demo model before, which the history holds;
# short contexts first, then longer ones at a lower rate.
TRAIN := $(BIN)/python -m fstq_export.demo.train
train-demo: $(STAMP)
	mkdir -p $(VENV)/demo-start
	git archive 52a9fa7 export/fstq_export/demo/model | tar -x -C $(VENV)/demo-start
	$(TRAIN) --start $(VENV)/demo-start/export/fstq_export/demo/model --out $(VENV)/demo-short --tokens 7200000 --decay 0.16
	$(TRAIN) --start $(VENV)/demo-short --out $(VENV)/demo-model --seed 8 --learning-rate 1.2e-3 --shortest 235 --ramp-from 0 \
	  --ramp-to 5000000 --tokens 11000000 --decay 0.5
	cp $(VENV)/demo-model/*.json $(VENV)/demo-model/model.safetensors export/fstq_export/demo/model

clean:
	rm -rf $(VENV) $(FED) demo-out dist build
