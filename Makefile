# Two commands: `make demo` learns single-digit addition, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)

.PHONY: demo test test-tinker lint setup clean

demo: $(VENV)/.installed
	$(BIN)/fitrl demo

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A real server that speaks the Tinker service's protocol; its pins are its own, so is its environment.
TINKER := plugins/tinker

test-tinker: $(VENV)/.installed-test $(TINKER)/.server/.installed $(TINKER)/.sdk/.installed
	FITRL_TINKER_SERVER_PYTHON=$(CURDIR)/$(TINKER)/.server/bin/python PYTHONPATH=$(CURDIR)/$(TINKER)/.sdk \
		$(BIN)/python -m pytest $(TINKER)/tests/test_real_server.py

$(TINKER)/.server/.installed:
	$(PYTHON) -m venv $(TINKER)/.server
	$(TINKER)/.server/bin/python -m pip install --quiet 'skyrl[tinker,jax]==0.3.0' 'tinker==0.24.1' 'torch==2.13.0' uv
	touch $@

$(TINKER)/.sdk/.installed:
	$(PYTHON) -m pip install --quiet --no-deps --target $(TINKER)/.sdk 'tinker==0.24.1'
	touch $@

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
	rm -rf $(VENV) .fitrl .mypy_cache .ruff_cache .pytest_cache .hypothesis $(TINKER)/.server $(TINKER)/.sdk
