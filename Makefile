# `make demo` sets everything up and runs the main job; `make test` runs the tests; `make serve` serves a toy.
# They need Python 3.11 or newer, with pip, and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(shell find sagellm sim -name '*.py' 2>/dev/null)
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo serve test picture lint clean

# Chat at a load at which the clusters differ: 80 requests/s on four cards.
DEMO = azure-conv --rate 80 --limit 6000 --slo ttft=500ms,tpot=15ms \
	--cluster h200x4-colocated --cluster h200x4-pd --cluster h200x4-pd-3p1d

demo: $(VENV)/.core-installed
	$(BIN)/sagellm replay $(DEMO) --report report.html
	@echo "The charts are in report.html"

# A toy on the CPU, behind OpenAI's API.
serve: $(VENV)/.serve-installed
	$(BIN)/sagellm serve

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n auto

# The README's picture of the demo; needs Chromium.
picture: $(VENV)/.core-installed
	VENV=$(VENV) docs/images/make.sh $(DEMO)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) report.html .compiled-sources.sha256 *__mypyc*.so
	find sagellm sim -name '*.so' -delete

# Some systems ship Python without the means to put pip into an environment; the system's own pip does it then.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --quiet --python $(BIN)/python install pip; }

# Hot modules are compiled when the package is installed (hatch_build.py), so it is installed again when they change.
$(VENV)/.core-installed: pyproject.toml hatch_build.py $(SOURCES) | $(BIN)/python
	$(PIP) install --editable .
	touch $@

$(VENV)/.serve-installed: pyproject.toml hatch_build.py $(SOURCES) | $(BIN)/python
	$(PIP) install --editable '.[serve]'
	touch $@

$(VENV)/.dev-installed: pyproject.toml hatch_build.py $(SOURCES) | $(BIN)/python
	$(PIP) install --editable '.[dev]'
	touch $@
