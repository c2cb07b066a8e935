# Everything a newcomer needs; each target makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help quickstart test test-full test-gpu test-oldest test-newest mutation lint docs clean

help:
	@echo "make quickstart   SFT, then GRPO, on the embedded model and data (2 to 5 minutes on two cores)"
	@echo "make test         the tests (no GPU, no network but the package registry)"
	@echo "make test-full    the long tests too; writes tests/reports/full.txt (PART=compare: that part anew)"
	@echo "make test-gpu     the tests that need an NVIDIA GPU"
	@echo "make test-oldest  the tests with the least versions that are allowed (.venv-oldest, 4 GB of packages)"
	@echo "make test-newest  the tests with the newest versions that there are (.venv-newest, 6 GB)"
	@echo "make mutation     breaks losses, ops and masks on purpose; writes tests/reports/mutation.json (SAMPLE=200)"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the documentation site, in site/"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aligntune needs Python 3.11 or later (PYTHON=python3.12 make ...)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/aligntune train quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

test-full: $(STAMP)
	$(BIN)/python -m tests.full_report $(if $(PART),--part $(PART)) -- $(PYTEST_ARGS)

test-gpu:
	$(PYTHON) -m pytest -q -m gpu $(PYTEST_ARGS)

test-oldest test-newest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q --upgrade --upgrade-strategy eager \
		$(if $(filter oldest,$*),-c constraints-oldest.txt) -e '.[dev]'
	.venv-$*/bin/python -m tests.full_report --part $* --workers 2 -- $(PYTEST_ARGS)

SAMPLE ?= 200
mutation: $(STAMP)
	$(BIN)/python -m tests.mutation --sample $(SAMPLE) --report

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .mypy_cache
