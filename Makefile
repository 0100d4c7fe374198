# The two commands of the README are `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
PROMPT ?= The
NEW    ?= 600

BIN    := $(VENV)/bin
MODEL  := configs/demo/model.pt
BUNDLE := build/demo
DEV    := cpu,train,export,hub,plot,bpe,gguf,parquet,tensorboard,dev
EXTRAS ?= $(DEV)

.PHONY: help demo test check format clean

help:
	@echo "make demo     install into $(VENV), export the shipped model, generate text with it"
	@echo "make test     run the tests"
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

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

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
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cpu,train,export,plot]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "blt needs Python 3.11 to 3.13 and $(PYTHON) is another; run: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; run: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
