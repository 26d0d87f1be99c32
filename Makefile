# Two commands: `make demo` learns single-digit addition, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)

.PHONY: demo test lint setup clean

demo: $(VENV)/.installed
	$(BIN)/fitrl demo

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.installed-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian run 'apt-get install python3-venv', then make again" >&2; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed $(PLUGINS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]' \
		$(foreach plugin,$(PLUGINS),--editable '$(patsubst %/,%,$(dir $(plugin)))[test]')
	touch $@

clean:
	rm -rf $(VENV) .fitrl .mypy_cache .ruff_cache .pytest_cache .hypothesis
