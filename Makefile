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

# A quarter of a gigabyte that only building TensorRT engines needs.
TRT := .venv-tensorrt
TRT_STAMP := $(TRT)/.installed

# Reads signatures and docstrings without torch or a backend.
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.installed

# Tests use one thread each; a worker takes about 1.5 GiB.
WORKERS := -n auto --maxprocesses 4

.PHONY: setup demo loop test test-all test-federated test-tensorrt lint docs bench plots train-demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[export,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fstq demo --out demo-out $(if $(MODEL),--model $(MODEL)) $(if $(CALIB),--calib $(CALIB))

# Clients train an adapter with Flower, then engines answer with it: docs/loop.md. LOOP= takes its options.
loop: $(STAMP) $(FED_STAMP)
	$(BIN)/python -m fstq_export.demo.loop --out loop-out --python $(FED)/bin/python $(LOOP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: lint
	$(BIN)/python -m pytest $(WORKERS)

# Flower comes from an environment of its own, torch, Transformers and PEFT from the other one.
$(FED_STAMP): $(STAMP)
	$(PYTHON) -m venv $(FED)
	$(FED)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) flwr flwr-datasets
	base=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  own=$$($(FED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$base')" > "$$own/zz-base.pth"
	touch $(FED_STAMP)

test-federated: $(FED_STAMP)
	$(FED)/bin/python -m pytest $(WORKERS) -m "not slow" tests/federated

$(TRT_STAMP): $(STAMP)
	$(PYTHON) -m venv $(TRT)
	$(TRT)/bin/python -m pip install --quiet 'tensorrt-rtx>=1.7,<2'
	base=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  own=$$($(TRT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$base')" > "$$own/zz-base.pth"
	touch $(TRT_STAMP)

# Builds with tensorrt-rtx, without a GPU; TRT_TESTS= adds the slow ones.
TRT_TESTS ?= -m "not slow"
test-tensorrt: $(TRT_STAMP)
	$(TRT)/bin/python -m pytest $(WORKERS) $(TRT_TESTS) tests/engines/tensorrt tests/runtime/test_trt.py tests/runtime/test_trt_adapters.py

$(DOCS_STAMP): pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --editable '.[docs]'
	touch $(DOCS_STAMP)

# Warnings, broken internal links and anchors among them, are errors. Nothing is fetched.
docs: $(DOCS_STAMP)
	$(DOCS)/bin/python -m sphinx -q -E -W --keep-going -n -b html docs build/docs

bench: $(STAMP)
	$(BIN)/python bench/quality.py
	$(BIN)/python bench/pruning.py
	$(BIN)/python bench/precision.py

# The README's pictures: of bench/results/quality.json, and of a prompt in a calibrated bundle.
plots: $(STAMP)
	$(BIN)/python bench/plots.py $(or $(BUNDLE),demo-out/model.bundle)

# Half an hour on one core. The first weights are those of an earlier demo model, which the history holds with its log.
TRAIN := $(BIN)/python -m fstq_export.demo.train
train-demo: $(STAMP)
	mkdir -p $(VENV)/demo-start
	git archive 068894c export/fstq_export/demo/model | tar -x -C $(VENV)/demo-start
	$(TRAIN) --start $(VENV)/demo-start/export/fstq_export/demo/model --out $(VENV)/demo-model --seed 11 --learning-rate 1.5e-3 \
	  --shortest 1050 --ramp-from 0 --ramp-to 1 --tokens 4600000 --decay 0.7 --batches 1 --threads 1
	cp $(VENV)/demo-model/*.json $(VENV)/demo-model/model.safetensors export/fstq_export/demo/model

clean:
	rm -rf $(VENV) $(FED) $(TRT) $(DOCS) demo-out loop-out dist build
