# make quickstart   install, train on the embedded digits, evaluate, predict
# make lint         ruff, codespell, mypy: what the pre-commit hooks run
# make test         lint and all tests
# make test-timm    every test of timm's own model tests on every variant
# make test-browser the page in a browser; takes the screenshots of docs/explore.md
# make test-export  export every registered model at its size to ONNX; compare in onnxruntime and OpenVINO (export.csv)
# make test-oldest  the tests with the oldest supported versions, in another environment, without the optional extras
# make load         a thousand requests to the page, good and bad
# make torture      interrupt and damage runs at two hundred random moments and compare with unbroken ones
# make fuzz         ten thousand damaged and hostile inputs: the right answer or a clear error
# make docs         build the site in .cache/site; a warning is an error

# without bytecode every process compiles torch and timm again: 14 s to import instead of 5
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart lint test test-browser load test-timm test-export test-oldest torture fuzz docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# a stamp file, so that a second call installs nothing
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

# the checks of .pre-commit-config.yaml, on every file
lint: $(VENV)/.tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --dist worksteal

test-timm: $(VENV)/.tests
	cd tests/models && $(abspath $(BIN))/python timm_suite.py --every -n 2

# needs chromium; `playwright install chromium` downloads one
test-browser: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet --no-compile playwright
	$(BIN)/pytest tests/stress/browser.py -rs

STRESS := PYTHONPATH=..:../models:../train:../explore:../export
RUN_OF_LOAD ?= $(lastword $(sort $(wildcard runs/*)))
load: $(VENV)/.tests
	cd tests/stress && $(STRESS) $(abspath $(BIN))/python load.py $(abspath $(RUN_OF_LOAD))

torture: $(VENV)/.tests
	cd tests/stress && $(STRESS) OMP_NUM_THREADS=1 $(abspath $(BIN))/python torture.py

fuzz: $(VENV)/.tests
	cd tests/stress && $(STRESS) OMP_NUM_THREADS=1 $(abspath $(BIN))/python fuzz.py

docs: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

test-export: $(VENV)/.tests
	$(BIN)/python scripts/export_all.py

# the extras (export, explore) need newer versions than the oldest supported ones, so their tests are skipped; old versions
# warn about each other, so warnings are not errors here; the oldest Hub client rejects the server of test_hub
EXTRAS := backbone explore export fuzz hardening hub imports readme timm_suite
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --no-compile --constraint tests/oldest.txt --editable . \
		build hatchling pytest pytest-timeout pytest-xdist
	$(VENV)-oldest/bin/pytest -n 2 --dist worksteal -p no:warnings $(foreach name,$(EXTRAS),--ignore-glob "tests/*test_$(name).py")

clean:
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache
