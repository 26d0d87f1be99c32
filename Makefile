# Two commands: `make demo` learns single-digit addition, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torchtitan wants older packages than our tested set has, so it has an environment of its own: test-titan
PLUGINS := $(filter-out plugins/titan/%,$(wildcard plugins/*/pyproject.toml))

.PHONY: demo test test-tinker test-titan test-vllm lint setup clean

demo: $(VENV)/.installed
	$(BIN)/fitrl demo

# two at a time, because tests wait for servers and ranks of theirs much of the time
test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# the real engine on a CPU, in an environment of its own (3.5 GB): its pins differ from ours
test-vllm: plugins/vllm/.venv/.installed
	plugins/vllm/.venv/bin/python -m pytest plugins/vllm/tests

plugins/vllm/.venv/.installed: plugins/vllm/requirements-cpu.txt plugins/vllm/pyproject.toml pyproject.toml
	$(PYTHON) -m venv plugins/vllm/.venv
	plugins/vllm/.venv/bin/python -m pip install --quiet --requirement plugins/vllm/requirements-cpu.txt
	plugins/vllm/.venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # break beside a CPU torch
	plugins/vllm/.venv/bin/python -m pip install --quiet --editable . --editable 'plugins/vllm[test]'
	touch $@

# torchtitan's parallel plans and Monarch's actors, on gloo ranks
test-titan: plugins/titan/.venv/.installed
	plugins/titan/.venv/bin/python -m pytest plugins/titan/tests

plugins/titan/.venv/.installed: plugins/titan/constraints.txt plugins/titan/pyproject.toml pyproject.toml
	$(PYTHON) -m venv plugins/titan/.venv
	plugins/titan/.venv/bin/python -m pip install --quiet --constraint plugins/titan/constraints.txt \
		--editable '.[test]' --editable 'plugins/titan[test]'
	touch $@

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
	rm -rf $(VENV) plugins/*/.venv $(TINKER)/.server $(TINKER)/.sdk .fitrl .mypy_cache .ruff_cache .pytest_cache .hypothesis
