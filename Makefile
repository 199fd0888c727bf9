# make quickstart   install, train on the embedded digits, evaluate, predict
# make test         install what tests need, lint, check types, run all tests
# make test-timm    timm's own tests of models, every test on every variant
# make test-browser the page in a browser; takes the screenshots of docs/explore.md
# make load         a thousand requests to the page, good and bad
# make torture      kill a run at a hundred random moments and compare with an unbroken one
# make fuzz         ten thousand damaged and hostile inputs: each a clear error, a skip, or a result
# make docs         the site, in .cache/site, without a warning
# make test-export every registered model at its size to ONNX, run by onnxruntime and OpenVINO; results/export.csv
# make test-oldest  the tests of all but the extras with the oldest versions declared, in an environment of their own

# without bytecode every process compiles torch's and timm's sources again: 14 s to import instead of 5
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart lint test test-browser load test-timm test-export test-oldest torture fuzz docs clean

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

# where there is no chromium, `playwright install chromium` fetches one
test-browser: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet --no-compile playwright
	$(BIN)/pytest tests/stress/browser.py -rs

STRESS := PYTHONPATH=..:../models:../train:../explore
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

# the extras (export, explore) ask for newer versions of what they share with the package, so their tests stay out;
# old versions warn about each other: here warnings are no errors; the oldest Hub client does not take test_hub's server
EXTRAS := backbone explore export fuzz hardening hub imports readme timm_suite
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --no-compile --constraint tests/oldest.txt --editable . \
		build hatchling pytest pytest-timeout pytest-xdist
	$(VENV)-oldest/bin/pytest -n 2 --dist worksteal -p no:warnings $(foreach name,$(EXTRAS),--ignore-glob "tests/*test_$(name).py")

clean:
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache
