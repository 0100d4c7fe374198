# The commands of the README are `make demo`, `make tour` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
PROMPT ?= The
NEW    ?= 600

BIN    := $(VENV)/bin
MODEL  := configs/demo/model.pt
BUNDLE := build/demo
TOUR   := build/tour
DEV    := cpu,serve,grammar,train,export,hub,plot,bpe,gguf,parquet,tensorboard,dev
EXTRAS ?= $(DEV)

.PHONY: help demo tour test fuzz check format clean

help:
	@echo "make demo     install into $(VENV), export the shipped model, generate text with it"
	@echo "make tour     train a small model on Python's own library, export, evaluate and run it: a few minutes"
	@echo "make test     run the tests"
	@echo "make fuzz     run the short form of the fuzzers: a minute"
	@echo "make check    formatting, lint, types, then the tests"
	@echo "make format   format the code"
	@echo "make clean    remove build/ and the caches ($(VENV) stays)"

demo: $(BUNDLE)/manifest.json
	@$(BIN)/blt inspect $(BUNDLE)
	@echo; printf '%s' "$(PROMPT)"
	@$(BIN)/blt generate $(BUNDLE) "$(PROMPT)" -n $(NEW) --seed 1 --stats
	@echo

$(BUNDLE)/manifest.json: $(MODEL) | $(VENV)/.demo
	@mkdir -p build
	$(BIN)/blt export $(MODEL) -o $(BUNDLE) --force --quiet > build/export.log || { cat build/export.log; exit 1; }

# From text to a model that writes, without a network. A second run continues where the first one stopped.
tour: | $(VENV)/.demo
	@echo "1 of 6  Text: the library of this Python becomes a data folder, $(TOUR)/data."
	@test -f $(TOUR)/data/manifest.json || $(BIN)/blt data corpus tiny -o $(TOUR)/data -q
	@echo; echo "2 of 6  A small entropy model learns to predict the next byte; where it is unsure, a patch will begin."
	@$(BIN)/blt train entropy -c configs/tour-entropy.yaml --data $(TOUR)/data -o $(TOUR)/entropy
	@echo; echo "3 of 6  The BLT learns on these patches. Its text before the first step is noise; see the last sample."
	@$(BIN)/blt train blt -c configs/tour.yaml --data $(TOUR)/data --entropy-model $(TOUR)/entropy -o $(TOUR)/blt
	@echo; echo "4 of 6  Export: the checkpoint becomes a bundle of ONNX graphs, compared with PyTorch."
	@$(BIN)/blt export $(TOUR)/blt -o $(TOUR)/bundle --force
	@echo; echo "5 of 6  Evaluation: bits per byte of text that the model has not seen (8 without any model)."
	@$(BIN)/blt eval $(TOUR)/bundle $(TOUR)/data --split valid --by group
	@echo; echo "6 of 6  The bundle writes, without PyTorch."
	@$(BIN)/blt generate $(TOUR)/bundle "def " -n 400 --seed 1 --stats
	@echo; echo "Done. Continue with: $(BIN)/blt train blt -c configs/tour.yaml --data $(TOUR)/data \\"; \
	  echo "  --entropy-model $(TOUR)/entropy -o $(TOUR)/blt --steps 2000"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/fuzz

fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 tests/fuzz

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache

# Stamps: a second run installs nothing. torch goes first, so that its version is pinned for what follows.
$(VENV)/.demo: pyproject.toml runtime/pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ./runtime -e ".[cpu,train,export,plot]"
	@touch $@

$(VENV)/.dev: pyproject.toml runtime/pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ./runtime -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "blt needs Python 3.11 to 3.13 and $(PYTHON) is another; run: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; run: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
