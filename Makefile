# make quickstart   install, train on the embedded digits, evaluate, predict
# make test         install what tests need, lint, check types, run all tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart test clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# a stamp, so that a second call installs nothing
$(VENV)/.package: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	touch $@

$(VENV)/.tests: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	touch $@ $(VENV)/.package

quickstart: $(VENV)/.package
	$(BIN)/t2t-vit train --recipe digits --output $(RUN)
	$(BIN)/t2t-vit eval --checkpoint $(RUN)
	$(BIN)/t2t-vit predict digits --checkpoint $(RUN) --top_k 3 --picture $(RUN)/predictions.png

test: $(VENV)/.tests
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

clean:
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache
