# `make demo` sets everything up and runs the main job; `make test` runs the tests.
# Both need Python 3.11 or newer, with pip, and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/.core-installed
	$(BIN)/sagellm replay --report report.html
	@echo "The charts are in report.html"

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) report.html

# Some systems ship Python without the means to put pip into an environment; the system's own pip does it then.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --quiet --python $(BIN)/python install pip; }

$(VENV)/.core-installed: pyproject.toml | $(BIN)/python
	$(PIP) install --editable .
	touch $@

$(VENV)/.dev-installed: pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[dev]'
	touch $@
